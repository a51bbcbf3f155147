# SPDX-License-Identifier: Apache-2.0
"""What the C library keeps of memory that is free: as little as may be, for what runs for months."""

from __future__ import annotations

import ctypes

# malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE = 256 << 10


def keep_little() -> None:
    """Scrapes come in threads of their own, and each would get an arena that keeps its size. What is
    large goes back at once, rather than leave a hole that small things then settle in."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Gives the kernel what is free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
