# SPDX-License-Identifier: Apache-2.0
"""Measurements: `throughput` on the lab cluster as root, `user_side` anywhere."""
