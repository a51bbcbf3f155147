# SPDX-License-Identifier: Apache-2.0
"""Reads a BPF ring buffer of equal records in batches, without a call per record.

Layout (kernel/bpf/ringbuf.c): one page with the consumer's position, one with the producer's,
then the data. A record has an 8-byte header: its length, whose top bits say that it is still
being written or was discarded, and an offset that does not matter here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BUSY = 1 << 31
_DISCARDED = 1 << 30
_HEADER_LEN = 8


class Ring:
    """The reading end of one ring buffer. `size` is its data's, in bytes, a power of two."""

    def __init__(self, fd: int, size: int, record: np.dtype[np.void]) -> None:
        page = os.sysconf("SC_PAGESIZE")
        self._size = size
        self._stride = (_HEADER_LEN + record.itemsize + 7) // 8 * 8
        self._framed = np.dtype(
            {
                "names": ["length", "record"],
                "formats": ["u4", record],
                "offsets": [0, _HEADER_LEN],
                "itemsize": self._stride,
            }
        )
        self._consumer_map = mmap.mmap(fd, page, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        # The data is mapped a second time behind its end by the kernel; mapping it once and
        # joining what wraps keeps the process smaller by the ring's size.
        self._producer_map = mmap.mmap(fd, page + size, prot=mmap.PROT_READ, offset=page)
        self._consumer = ctypes.c_uint64.from_buffer(self._consumer_map)
        self._producer = np.frombuffer(self._producer_map, np.uint64, 1)
        self._data = np.frombuffer(self._producer_map, np.uint8, size, offset=page)
        self._words = self._data.view(np.uint32)

    def fill(self) -> float:
        """The share of the ring that is waiting to be read, 0 to 1."""
        return float(int(self._producer[0]) - self._consumer.value) / self._size

    def pending(self) -> int:
        """How many records wait, complete or still being written."""
        return (int(self._producer[0]) - self._consumer.value) // self._stride

    def read(self, at_most: int) -> NDArray[np.void]:
        """Complete records, copied out, oldest first; what they took is free again."""
        start = self._consumer.value
        at = start % self._size
        count = min(self.pending(), at_most)
        # Lengths come first: what is complete by now stays so, while what was written during a
        # copy might be there in part. A length never wraps, since everything is a multiple of 8.
        starts = (at + np.arange(count) * self._stride) % self._size
        lengths = self._words[starts // 4]
        busy = np.flatnonzero(lengths & _BUSY)
        if len(busy):
            count = int(busy[0])
            lengths = lengths[:count]
        if count == 0:
            return np.empty(0, self._framed["record"])
        wanted = count * self._stride
        first = self._data[at : at + wanted]
        if len(first) < wanted:
            joined = np.concatenate([first, self._data[: wanted - len(first)]])
        else:
            joined = first.copy()
        self._consumer.value = start + wanted
        records = joined.view(self._framed)["record"]
        whole = (lengths & _DISCARDED) == 0
        return records if whole.all() else records[whole]
