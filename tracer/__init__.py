# SPDX-License-Identifier: Apache-2.0
"""Follows every DNS query of a Kubernetes node hop by hop, with eBPF."""

__version__ = "0.1.0"
