# SPDX-License-Identifier: Apache-2.0
"""Sizes of the kernel's tables, as user space chooses them before they are made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_LRU_PER_CPU = 256  # see LRU_ENTRIES in bpf/maps.h


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers of entries, and of bytes for the rings (powers of two).

    `slots`: transactions in flight, a power of two. `series` and `buckets`: of histograms; with
    none, nothing is counted in the kernel, and every transaction leaves it.
    """

    slots: int = 8192
    connections: int = 8192
    verdicts: int = 262_144
    small_ring: int = 8 * _MIB
    large_ring: int = 2 * _MIB
    segment_ring: int = 4 * _MIB
    series: int = 0
    buckets: int = 0

    def macros(self) -> dict[str, int]:
        """As bpf/maps.h wants them: rings in pages, however large this machine's are."""
        page = os.sysconf("SC_PAGESIZE")
        sizes = {
            "SLOTS": self.slots,
            "CONNECTIONS": self.connections,
            "VERDICTS": self.verdicts,
            "SMALL_PAGES": max(1, self.small_ring // page),
            "LARGE_PAGES": max(1, self.large_ring // page),
            "SEGMENT_PAGES": max(1, self.segment_ring // page),
            "LRU_ENTRIES": max(1024, _LRU_PER_CPU * possible_cpus()),
        }
        if self.series:
            sizes |= {"SERIES": self.series, "BUCKETS": self.buckets}
        return sizes


# Counted in the kernel, so that little leaves it: what fits into 16 MiB, tables included.
CONTINUOUS = Limits(
    slots=2048,
    connections=2048,
    verdicts=65_536,
    small_ring=_MIB,
    large_ring=_MIB // 2,
    segment_ring=2 * _MIB,
    series=4096,
    buckets=65_536,
)


def possible_cpus() -> int:
    """How many values a per-CPU map has (/sys/devices/system/cpu/possible, e.g. "0-3")."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1
