# SPDX-License-Identifier: Apache-2.0
"""The ring's reading end, against a ring that the test itself writes into."""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.kernel.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGESIZE")
HEADER_LEN = 8
BUSY, DISCARDED = 1 << 31, 1 << 30
# Of sizes that fill no ring exactly, so that records lie across its end.
RECORD = np.dtype([("number", "u8"), ("again", "u8", 4)])
UNALIGNED = np.dtype([("number", "u4"), ("again", "u1", 9)])


@dataclass(slots=True)
class Writer:
    """The kernel's end (kernel/bpf/ringbuf.c): reserves room, then submits or discards it."""

    record: np.dtype[np.void]
    size: int = PAGE
    produced: int = 0
    memory: mmap.mmap = field(init=False)
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + self.size)
        self.memory = mmap.mmap(self.fd, 2 * PAGE + self.size)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)

    def start_at(self, position: int) -> None:
        """As after that many bytes have gone through."""
        self.produced = position
        for page in range(2):
            struct.pack_into("=Q", self.memory, page * PAGE, position)

    def reserve(self) -> int | None:
        """The position of a new record that is being written, or None if there is no room."""
        length = (HEADER_LEN + self.record.itemsize + 7) // 8 * 8
        (consumed,) = struct.unpack_from("=Q", self.memory, 0)
        if self.produced + length - consumed > self.size - 1:
            return None
        position = self.produced
        self._put(position, struct.pack("=II", BUSY | self.record.itemsize, 0))
        self.produced += length
        struct.pack_into("=Q", self.memory, PAGE, self.produced)
        return position

    def begin(self) -> int:
        """The same where there is room."""
        position = self.reserve()
        assert position is not None
        return position

    def finish(self, position: int, number: int, *, discard: bool = False) -> None:
        row = np.zeros(1, self.record)
        row["number"] = number
        row["again"] = number % 256
        self._put(position + HEADER_LEN, row.tobytes())
        flag = DISCARDED if discard else 0
        self._put(position, struct.pack("=II", flag | self.record.itemsize, 0))

    def _put(self, position: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            self.memory[2 * PAGE + (position + i) % self.size] = byte


@pytest.fixture(params=[RECORD, UNALIGNED], ids=["aligned", "unaligned"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    writer = Writer(request.param)
    yield writer
    writer.close()


def numbers(batch: np.ndarray[tuple[int, ...], np.dtype[np.void]]) -> list[int]:
    """Of each record; all of it must be there."""
    for row in batch:
        assert (row["again"] == row["number"] % 256).all()
    return [int(number) for number in batch["number"]]


def test_records_come_in_order_wherever_the_ring_ends(writer: Writer) -> None:
    ring = Ring(writer.fd, writer.size, writer.record)
    written = iter(range(10**6))
    for count in [*range(1, 40), 200, 200]:  # more than it holds, in the end
        expected = []
        for _ in range(count):
            position = writer.reserve()
            if position is None:
                break
            expected.append(next(written))
            writer.finish(position, expected[-1])
        assert ring.pending() == len(expected)
        assert numbers(ring.read(1000)) == expected
        assert ring.fill() == 0
        assert len(ring.read(1000)) == 0


def test_no_more_is_read_than_asked_for(writer: Writer) -> None:
    ring = Ring(writer.fd, writer.size, writer.record)
    for number in range(10):
        writer.finish(writer.begin(), number)
    assert numbers(ring.read(3)) == [0, 1, 2]
    assert ring.pending() == 7
    assert numbers(ring.read(100)) == [3, 4, 5, 6, 7, 8, 9]


def test_record_that_is_being_written_holds_up_those_behind_it(writer: Writer) -> None:
    ring = Ring(writer.fd, writer.size, writer.record)
    first, second, third = (writer.begin() for _ in range(3))
    writer.finish(first, 1)
    writer.finish(third, 3)
    assert numbers(ring.read(100)) == [1]
    assert numbers(ring.read(100)) == []
    assert ring.pending() == 2
    writer.finish(second, 2)
    assert numbers(ring.read(100)) == [2, 3]


def test_record_that_is_finished_during_the_copy_is_left_for_the_next_one(writer: Writer) -> None:
    """Copying is in no particular order: what it found unfinished could be there in part."""
    ring = Ring(writer.fd, writer.size, writer.record)
    first, second = writer.begin(), writer.begin()
    writer.finish(first, 1)
    data = ring._data

    class Finishing:
        def __getitem__(self, part: slice) -> object:
            writer.finish(second, 2)
            return data[part]

    ring._data = Finishing()  # type: ignore[assignment]
    assert numbers(ring.read(100)) == [1]
    assert numbers(ring.read(100)) == [2]


def test_discarded_records_are_passed_over_and_their_room_is_free_again(writer: Writer) -> None:
    ring = Ring(writer.fd, writer.size, writer.record)
    for number in range(6):
        writer.finish(writer.begin(), number, discard=number % 2 == 0)
    assert numbers(ring.read(100)) == [1, 3, 5]
    assert ring.fill() == 0
    writer.finish(writer.begin(), 6, discard=True)
    assert numbers(ring.read(100)) == []
    assert ring.pending() == 0


def test_positions_beyond_32_bits_are_read(writer: Writer) -> None:
    stride = (HEADER_LEN + writer.record.itemsize + 7) // 8 * 8
    writer.start_at((1 << 40) // stride * stride)
    ring = Ring(writer.fd, writer.size, writer.record)
    for number in range(5):
        writer.finish(writer.begin(), number)
    assert numbers(ring.read(100)) == [0, 1, 2, 3, 4]


STEPS = st.one_of(
    st.tuples(st.just("reserve"), st.integers(1, 60)),
    st.tuples(st.sampled_from(("submit", "discard")), st.integers(0, 100)),
    st.tuples(st.just("read"), st.integers(1, 100)),
)


@pytest.mark.fuzz
@given(st.sampled_from((RECORD, UNALIGNED)), st.lists(STEPS, min_size=10, max_size=80))
def test_whatever_the_kernel_does_each_submitted_record_is_read_once(
    record: np.dtype[np.void], steps: list[tuple[str, int]]
) -> None:
    writer = Writer(record)
    ring = Ring(writer.fd, writer.size, record)
    waiting: deque[tuple[int, str]] = deque()  # (position, "busy", "submit" or "discard")
    for what, number in steps:
        if what == "reserve":
            for _ in range(number):
                position = writer.reserve()
                if position is not None:
                    waiting.append((position, "busy"))
        elif what == "read":
            expected = []
            for _ in range(number):
                if not waiting or waiting[0][1] == "busy":
                    break
                position, state = waiting.popleft()
                if state == "submit":
                    expected.append(position)
            assert numbers(ring.read(number)) == expected
            assert ring.pending() == len(waiting)
        elif waiting:
            at = number % len(waiting)
            position, state = waiting[at]
            if state == "busy":
                writer.finish(position, position, discard=what == "discard")
                waiting[at] = (position, what)
    writer.close()
