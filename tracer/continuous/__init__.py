# SPDX-License-Identifier: Apache-2.0
"""Tracing for months: counted in the kernel, told by metrics and recordings."""
