# SPDX-License-Identifier: Apache-2.0
"""Pods, services and nodes: who is behind an address, a cgroup or a network namespace."""
