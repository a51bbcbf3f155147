# SPDX-License-Identifier: Apache-2.0
"""What is known of one TCP connection to a DNS server. Times are CLOCK_MONOTONIC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracer import decode
from tracer.passage import Flow, Journey, Passage, Place
from tracer.record import HopKind, Status
from tracer.tcp_records import Ended, Who

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tracer.reassemble import Message, Stream

# The hook at which a response has come back to where the query was first seen.
_BACK = {
    HopKind.SEND: HopKind.RECEIVE,
    HopKind.RECEIVE: HopKind.SEND,
    HopKind.INGRESS: HopKind.EGRESS,
    HopKind.EGRESS: HopKind.INGRESS,
}
_QUERY, _RESPONSE = 0, 1
Where = tuple[int, int, int]  # kind, ifindex, netns


@dataclass(slots=True, eq=False)
class Query:
    """One that was asked, and its answer."""

    message: Message  # its data cut
    t_ns: int
    journey: Journey
    question: tuple[str, str | None] | None
    response: bytes | None = None
    response_journey: Journey | None = None
    answered_ns: int = 0
    awaited: Where | None = None  # where the response is expected last


@dataclass(slots=True)
class Side:
    """One direction of a connection."""

    stream: Stream
    passage: Passage = field(default_factory=Passage)
    waits_since_ns: int = 0  # for bytes that are missing; 0: for none
    fin_ns: int = 0
    fin_position: int = 0


@dataclass(slots=True)
class Losses:
    """What is in no transaction."""

    undecodable: int = 0  # messages
    unmatched_responses: int = 0
    hops: int = 0
    bytes: int = 0  # of messages that could not be put together
    cut_short: int = 0  # queries, and attempts to connect, that had to make room for others


@dataclass(slots=True, eq=False)
class Connection:
    """All of it. What it is not known to be is 0."""

    number: int
    who: Who
    sides: tuple[Side, Side]
    asked: Flow
    open: dict[int, list[Query]] = field(default_factory=dict)  # by DNS id, oldest first
    waiting: int = 0
    answered: dict[Journey, Query] = field(default_factory=dict)  # not yet at the last hop
    places: dict[tuple[int, int, int, int, bytes], Place] = field(default_factory=dict)
    signals: tuple[dict[Place, int], dict[Place, int]] = field(
        default_factory=lambda: ({}, {})
    )  # when SYN, SYN-ACK and RST passed first
    last_ns: int = 0
    began_ns: int = 0  # its SYN; 0: not seen
    accepted: bool = False
    asked_once: bool = False
    told: bool = False  # that it was never opened
    refused_ns: int = 0
    ended_ns: int = 0
    held: int = 0
    drop_location: int = 0
    server_cgroup_id: int = 0

    def never_opened(self) -> bool:
        """Whether somebody wanted to ask and could not, as far as is known."""
        return bool(self.began_ns) and not (self.accepted or self.asked_once or self.told)

    def query_of(self, response: bytes) -> Query | None:
        """The oldest that it answers."""
        asked = question_of(response)
        for query in self.open.get(int.from_bytes(response[:2]), ()):
            if asked is None or asked == query.question:
                return query
        return None

    def has_ended(self) -> bool:
        """Whether no answer can come any more. A client may close its half before they have."""
        asked, answered = self.sides
        if answered.fin_ns:
            wanted = answered.stream.wanted
            return wanted is None or wanted >= answered.fin_position
        return bool(asked.fin_ns) and not self.waiting

    def describe(self, query: Query, status: Status) -> Ended:
        """What becomes of a query."""
        problem = ""
        if status == Status.TIMEOUT and self.ended_ns:
            problem = "the TCP connection ended before the answer"
        response = query.response_journey
        return Ended(
            status,
            self.who,
            self.asked,
            query.t_ns,
            query.message.data,
            query.message.end - query.message.start - 2,
            query.journey.passed,
            query.response,
            response.passed if response is not None else None,
            0,
            self.drop_location,
            self.server_cgroup_id,
            problem,
        )

    def unopened(self) -> Ended:
        """That nothing could be asked."""
        refused_ns = self.refused_ns
        asked, answered = self.signals
        if refused_ns:
            # Who refuses a packet then gives it up.
            asked = {
                place: t_ns
                for place, t_ns in asked.items()
                if place.kind != HopKind.DROP or t_ns < refused_ns
            }
            received = (t_ns for place, t_ns in answered.items() if place.kind == HopKind.RECEIVE)
            refused_ns = min(received, default=refused_ns)
        return Ended(
            Status.REFUSED if refused_ns else Status.TIMEOUT,
            self.who,
            self.asked,
            self.began_ns,
            b"",
            0,
            asked,
            None,
            answered,
            refused_ns,
            self.drop_location,
            0,
            "the TCP connection was refused, so nothing was asked"
            if refused_ns
            else "the TCP connection was never opened, so nothing was asked",
        )

    def flows(self) -> set[Flow]:
        """All that it was seen with."""
        return {self.asked, *(place.flow for place in self.places.values())}


def awaited_at(passed: Mapping[Place, int]) -> Where | None:
    """Where the response has gone back all the way that the query was seen to come."""
    if not passed:
        return None
    first = min(passed, key=passed.__getitem__)
    back = _BACK.get(HopKind(first.kind))
    return None if back is None else (back, first.ifindex, first.netns)


def question_of(message: bytes) -> tuple[str, str | None] | None:
    found = decode.question(message)
    return None if found.name is None else (found.name.lower(), found.type)
