# SPDX-License-Identifier: Apache-2.0
"""What this process uses."""

from __future__ import annotations

import resource


def cpu_s() -> float:
    """CPU time of this process and of its children that have ended, in seconds."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def rss_bytes() -> int:
    """Resident memory (/proc/self/statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
