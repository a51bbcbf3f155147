# SPDX-License-Identifier: Apache-2.0
"""Measurements that need neither root nor a cluster."""
