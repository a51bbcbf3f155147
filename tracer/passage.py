# SPDX-License-Identifier: Apache-2.0
"""When the messages in one direction of a TCP connection passed each hook.

A message has passed where the last of its bytes to come has, for the first time: what is lost
further on and sent once more passes here twice, and took the longer for it. Segments come by
before one knows what messages are in them, so their times are kept until then.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from tracer.record import MAX_HOPS, HopKind

Flow = tuple[bytes, bytes, int, int, int]  # struct flow
PLACES_MAX = 64
SPANS_MAX = 512  # of one hook
SPAN_COST = 100  # bytes


class Place(NamedTuple):
    """A hook, and what a packet looked like there."""

    kind: int
    ifindex: int
    netns: int
    drop_reason: int
    flow: Flow


@dataclass(slots=True, eq=False)
class Journey:
    """A message on its way, and when it passed each hook. Positions are as in a stream."""

    start: int
    end: int
    passed: dict[Place, int] = field(default_factory=dict)


class Passage:
    """One direction. `lost` counts the hops that there was no room for."""

    __slots__ = ("_ends", "_journeys", "_known", "_spans", "lost", "spans")

    def __init__(self) -> None:
        self._journeys: list[Journey] = []  # of messages that are complete, in order
        self._ends: list[int] = []
        self._known = 0  # where the last complete message ends
        self._spans: dict[Place, _Spans] = {}  # of messages that are not complete, or not here yet
        self.spans = 0  # how many these are
        self.lost = 0

    def segment(self, place: Place, start: int, end: int, t_ns: int) -> list[Journey]:
        """A segment passes. Returns the messages that have passed there with it."""
        over: list[Journey] = []
        partly: list[Journey] = []
        dropped = place.kind == HopKind.DROP
        if start < self._known:
            at = bisect_right(self._ends, start)
            while at < len(self._ends):
                journey = self._journeys[at]
                if journey.start >= end:
                    break
                at += 1
                if place in journey.passed:
                    continue
                if dropped or (start <= journey.start and journey.end <= end):
                    self._pass(journey, place, t_ns)
                    over.append(journey)
                else:
                    partly.append(journey)
        if end > self._known or partly:
            spans = self._add(place, start, end, t_ns)
            for journey in partly:
                if spans and (found_ns := spans.covered_ns(journey.start, journey.end)) is not None:
                    self._pass(journey, place, found_ns)
                    over.append(journey)
            over.sort(key=lambda journey: journey.start)
            if partly and spans and end <= self._known:
                self._drop_needless(place)
        return over

    def complete(self, start: int, end: int) -> Journey:
        """These bytes are a message, whose hops are wanted."""
        journey = Journey(start, end)
        whole = ([start], [end])
        for place, spans in list(self._spans.items()):
            if (spans.starts, spans.ends) == whole:
                self._pass(journey, place, spans.times[0])
                del self._spans[place]
                self.spans -= 1
                continue
            found_ns = (
                spans.touched_ns(start, end)
                if place.kind == HopKind.DROP
                else spans.covered_ns(start, end)
            )
            if found_ns is not None:
                self._pass(journey, place, found_ns)
        at = bisect_right(self._ends, end)
        self._ends.insert(at, end)
        self._journeys.insert(at, journey)
        self.pass_over(end)
        return journey

    def pass_over(self, end: int) -> None:
        """What comes before is known now."""
        self._known = max(self._known, end)
        for place in list(self._spans):
            self._drop_needless(place)

    def remove(self, journey: Journey) -> None:
        """Its hops are not wanted any more."""
        at = bisect_left(self._ends, journey.end)
        while at < len(self._ends) and self._ends[at] == journey.end:
            if self._journeys[at] is journey:
                del self._journeys[at], self._ends[at]
                return
            at += 1

    def forget(self) -> None:
        """Of what is not complete, nothing is wanted."""
        self._spans.clear()
        self.spans = 0

    def _pass(self, journey: Journey, place: Place, t_ns: int) -> None:
        if len(journey.passed) < MAX_HOPS:
            journey.passed[place] = t_ns
        else:
            self.lost += 1

    def _add(self, place: Place, start: int, end: int, t_ns: int) -> _Spans | None:
        spans = self._spans.get(place)
        if spans is None:
            if len(self._spans) >= PLACES_MAX:
                self.lost += 1
                return None
            spans = self._spans[place] = _Spans(start, end, t_ns)
            self.spans += 1
            return spans
        self.spans -= len(spans.starts)
        spans.add(start, end, t_ns)
        if len(spans.starts) > SPANS_MAX:
            spans.forget(SPANS_MAX // 2)
            self.lost += 1
        self.spans += len(spans.starts)
        return spans

    def _drop_needless(self, place: Place) -> None:
        """Times that no message will ask for: of those complete, all before have theirs."""
        spans = self._spans[place]
        if spans.starts[0] >= self._known:
            return
        needed = self._known
        at = (
            len(self._ends)
            if place.kind == HopKind.DROP
            else bisect_right(self._ends, spans.starts[0])
        )
        while at < len(self._ends) and self._journeys[at].start < needed:
            if place not in self._journeys[at].passed:
                needed = self._journeys[at].start
            at += 1
        dropped = bisect_right(spans.ends, needed)
        if dropped:
            self.spans -= dropped
            if dropped == len(spans.ends):
                del self._spans[place]
            else:
                spans.forget(dropped)


class _Spans:
    """The segments that passed one hook, by position, each byte once."""

    __slots__ = ("ends", "starts", "times")

    def __init__(self, start: int, end: int, t_ns: int) -> None:
        self.starts = [start]
        self.ends = [end]
        self.times = [t_ns]

    def add(self, start: int, end: int, t_ns: int) -> None:
        if start >= self.ends[-1]:
            self._insert(len(self.starts), start, end, t_ns)
            return
        at = bisect_right(self.ends, start)
        while at < len(self.starts) and self.starts[at] < end:
            if start < self.starts[at]:
                self._insert(at, start, self.starts[at], t_ns)
                at += 1
            start = self.ends[at]
            at += 1
        if start < end:
            self._insert(at, start, end, t_ns)

    def _insert(self, at: int, start: int, end: int, t_ns: int) -> None:
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        self.times.insert(at, t_ns)

    def covered_ns(self, start: int, end: int) -> int | None:
        """When the last of these bytes passed; None: not all have."""
        at = bisect_right(self.ends, start)
        latest = 0
        while start < end:
            if at == len(self.starts) or self.starts[at] > start:
                return None
            latest = max(latest, self.times[at])
            start = self.ends[at]
            at += 1
        return latest

    def touched_ns(self, start: int, end: int) -> int | None:
        """When the first of these bytes passed; None: none has."""
        at = bisect_right(self.ends, start)
        stop = bisect_left(self.starts, end)
        return min(self.times[at:stop], default=None)

    def forget(self, number: int) -> None:
        """Drops the first of them."""
        del self.starts[:number], self.ends[:number], self.times[:number]
