# SPDX-License-Identifier: Apache-2.0
"""One direction of a TCP connection: from segments to DNS messages (RFC 1035 section 4.2.2).

Each message comes after its length in two bytes, however the stream is cut into segments.
Positions count bytes of the stream without end; sequence numbers (32 bits) are theirs, wrapped.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, NamedTuple

from tracer import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH_BYTES = 2
HEADER_BYTES = 12
# A receive window's worth may arrive ahead of a segment that was lost.
AHEAD_MAX = 512 << 10
# What is kept of a piece beside its bytes, so that pieces of one byte cost what they take.
PIECE_COST = 128
# No window is that large, so what is farther away belongs to no connection that we know, unless
# that much was lost: then there is more where it comes from.
FAR = 1 << 26
STRAYS_MAX = 16
_SEQ_SPAN = 1 << 32
_QR = 0x80
_OPCODES = frozenset((0, 1, 2, 4, 5, 6))  # RFC 1035, 1996, 2136, 8490


class Message(NamedTuple):
    """A DNS message, and where its last byte, and its length's first, are in the stream."""

    start: int
    end: int
    data: bytes


class Stream:
    """Puts messages together. `lost` counts the bytes between messages that could not be."""

    __slots__ = (
        "_ahead",
        "_buffer",
        "_is_response",
        "_length",
        "_next",
        "_order",
        "_reference",
        "_strays",
        "held",
        "lost",
    )

    def __init__(self, *, is_response: bool) -> None:
        self._is_response = is_response
        self._reference: int | None = None  # a position near which others are, while no boundary is
        self._next: int | None = None  # position of the next byte wanted; None: no boundary known
        self._buffer = bytearray()  # from a message's length on, up to there
        self._ahead: dict[int, bytes] = {}  # what came before it was its turn
        self._order: list[int] = []  # its positions
        self._length: tuple[int, bytes] | None = None  # two bytes alone, where no boundary is known
        self._strays = 0  # one after the other that were too far away
        self.held = 0  # what waits in both, and what that costs
        self.lost = 0

    def position(self, seq: int) -> int:
        """The position of a sequence number, as near as can be to the byte that is wanted next."""
        near = self._reference if self._next is None else self._next
        if near is None:
            # So that what came before it is not negative.
            near = self._reference = _SEQ_SPAN + seq
        return near + (seq - near + _SEQ_SPAN // 2) % _SEQ_SPAN - _SEQ_SPAN // 2

    @property
    def wanted(self) -> int | None:
        """Position of the next byte wanted; None: no boundary of messages is known."""
        return self._next

    def begin(self, position: int) -> None:
        """Here the stream begins: its SYN was seen."""
        if self._next is None:
            self._next = position

    def feed(self, position: int, data: bytes, length: int) -> list[Message]:
        """Takes in a piece; returns the messages that are complete now.

        `data` may be shorter than the `length` that it stands for.
        """
        if len(data) > length:
            data = data[:length]
        if self._next is None and not self._join(position, data, length):
            return []
        wanted = self._next
        if wanted is None:
            raise AssertionError
        if not -FAR < position - wanted < FAR:
            self._stray(length)
            return []
        self._strays = 0
        if position + len(data) <= wanted:
            return []
        if position > wanted:
            return self._keep(position, data)
        self._take(data[wanted - position :] if position < wanted else data)
        if self._order:
            self._take_kept()
        return list(self._messages())

    def skip(self) -> list[Message]:
        """Gives up the bytes that never came, and goes on behind them where a message begins."""
        if self._next is None:
            return []
        while self._order:
            first = self._order.pop(0)
            data = self._pop(first)
            self.lost += max(0, first - self._next) + len(self._buffer)
            self._drop_buffer()
            self._next = first
            if self._looks_like_message(data):
                return self.feed(first, data, len(data))
            self.lost += len(data)
            self._next = first + len(data)
            if self._order and self._order[0] < self._next:
                self._next = self._order[0]  # they overlap
        self._lose_boundary()
        return []

    def forget(self) -> None:
        """Gives up what is held; goes on with the next segment that a message begins in."""
        if self._next is None:
            return
        last = max((p + len(d) for p, d in self._ahead.items()), default=self._next)
        self.lost += last - self._next + len(self._buffer)
        self._next = max(self._next, last)
        self._lose_boundary()

    def is_waiting(self) -> bool:
        """Whether something came ahead of what has not."""
        return bool(self._order)

    def _lose_boundary(self) -> None:
        self._buffer.clear()
        self._ahead.clear()
        self._order.clear()
        self.held = 0
        self._reference, self._next = self._next, None
        self._length = None

    def _join(self, position: int, data: bytes, length: int) -> bool:
        """Whether a message begins in this segment; then its boundary is known."""
        self._reference = position + length
        if self._looks_like_message(data):
            self._next = position
            return True
        before, self._length = self._length, None
        if before is not None and before[0] + LENGTH_BYTES == position:
            if self._looks_like_message(before[1] + data):
                self._next = before[0]
                self.lost -= LENGTH_BYTES
                self._take(before[1])
                return True
        elif len(data) == length == LENGTH_BYTES:
            self._length = position, data  # some clients send it alone
        self.lost += length
        return False

    def _stray(self, length: int) -> None:
        self.lost += length
        self._strays += 1
        if self._strays > STRAYS_MAX:
            self._strays = 0
            self.forget()

    def _keep(self, position: int, data: bytes) -> list[Message]:
        known = self._ahead.get(position)
        if known is None:
            insort(self._order, position)
            self.held += PIECE_COST + len(data)
        elif len(data) > len(known):
            self.held += len(data) - len(known)
        else:
            return []
        self._ahead[position] = data
        return self.skip() if self.held > AHEAD_MAX else []

    def _pop(self, position: int) -> bytes:
        data = self._ahead.pop(position)
        self.held -= PIECE_COST + len(data)
        return data

    def _take(self, data: bytes) -> None:
        if data and self._next is not None:
            self._buffer += data
            self.held += len(data)
            self._next += len(data)

    def _take_kept(self) -> None:
        """What came ahead, as far as it is its turn now."""
        used = 0
        for first in self._order:
            if self._next is None or first > self._next:
                break
            self._take(self._pop(first)[self._next - first :])
            used += 1
        del self._order[:used]

    def _drop_buffer(self) -> None:
        self.held -= len(self._buffer)
        self._buffer.clear()

    def _messages(self) -> Iterator[Message]:
        buffer = self._buffer
        start = (self._next or 0) - len(buffer)
        at = 0
        while len(buffer) - at >= LENGTH_BYTES:
            end = at + LENGTH_BYTES + (buffer[at] << 8 | buffer[at + 1])
            if end > len(buffer):
                break
            yield Message(start + at, start + end, bytes(buffer[at + LENGTH_BYTES : end]))
            at = end
        if at:
            del buffer[:at]
            self.held -= at

    def _looks_like_message(self, data: bytes) -> bool:
        """Whether a message begins here, as far as one can tell where the stream did not."""
        header = data[LENGTH_BYTES : LENGTH_BYTES + HEADER_BYTES]
        if len(header) < HEADER_BYTES:
            return False
        length = int.from_bytes(data[:LENGTH_BYTES])
        return (
            length >= HEADER_BYTES
            and bool(header[2] & _QR) == self._is_response
            and (header[2] >> 3 & 15) in _OPCODES
            and header[4:6] == b"\0\1"
            and decode.question(data[LENGTH_BYTES : LENGTH_BYTES + length]).name is not None
        )
