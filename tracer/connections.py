# SPDX-License-Identifier: Apache-2.0
"""DNS over TCP: from the kernel's segments to transactions, as it reports them for UDP itself.

A query is sent, passes a hop, or is received when the last of its bytes is. Queries and responses
on one connection are matched by id and question, in whatever order they come (RFC 7766). A
connection that is refused, or never opened, is a transaction too, though without a question: the
client wanted to ask and could not.

All tables are bounded. What cannot be put together is counted, never guessed. Every query comes
out once, or is counted as cut short.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from tracer.connection import Connection, Losses, Query, Side, awaited_at, question_of
from tracer.passage import SPAN_COST, Flow, Place
from tracer.reassemble import HEADER_BYTES, Message, Stream
from tracer.record import MAX_HOPS, QUERY_BYTES, HopKind, Status
from tracer.tcp_records import Ended, Who, records

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

CONNECTIONS_MAX = 4096
HELD_MAX = 16 << 20  # bytes that messages take which are not complete, of all connections
OPEN_MAX = 4096  # queries of one connection that wait for an answer
ALL_OPEN_MAX = 16_384  # of all
PLACES_MAX = 256  # hooks that one connection is seen at, with each set of addresses
GAP_NS = 1_000_000_000  # how long bytes may be missing where records of them were lost
LOSSY_NS = 10_000_000_000  # how long lost records may be why bytes are missing
ENDED_NS = 1_000_000_000  # how long a connection that has ended is remembered
LAST_HOPS_NS = 100_000_000  # how long the hops behind the last one expected may take
IDLE_NS = 300_000_000_000
SEEN_NS = 250_000_000  # how exactly it is known when a connection was last seen
_QUERY, _RESPONSE = 0, 1
_FIN, _SYN, _RST = 1, 2, 4
_FLAGS = _FIN | _SYN | _RST
_COLUMNS = (
    "connection", "t_ns", "client_netns", "kind", "ifindex", "netns", "drop_reason",
    "direction", "tcp_flags", "seq", "len", "captured", "unreachable",
)  # fmt: skip
_PLACE = slice(3, 7)
_SPANS_A_TIME = 16


class Connections:
    """All TCP connections to DNS servers. Times are CLOCK_MONOTONIC, in nanoseconds.

    `over` are those that the kernel may forget: (number, their flows).
    """

    def __init__(self, timeout_ns: int) -> None:
        self._timeout_ns = timeout_ns
        self._all: OrderedDict[int, Connection] = OrderedDict()
        self._held = 0
        self._waiting = 0
        self._ended: list[Ended] = []
        self._lossy_ns = -LOSSY_NS  # when records were lost last
        self.over: list[tuple[int, set[Flow]]] = []
        self.lost = Losses()

    def feed(self, batch: NDArray[np.void]) -> NDArray[np.void]:
        """Takes in segments (SEGMENT_RECORD), oldest first; returns transactions (RECORD)."""
        segments = batch["segment"]
        columns = [segments[name].tolist() for name in _COLUMNS]
        flows = segments["flow"].view("V40").tolist()
        payloads = batch["payload"].tolist()
        for row, values in enumerate(zip(*columns, strict=True)):
            connection = self._connection(values, segments, row)
            place = connection.places.get((*values[_PLACE], flows[row]))
            if place is None:
                place = self._add_place(connection, (*values[_PLACE], flows[row]), segments[row])
            if place is not None:
                self._segment(connection, place, values, payloads[row], segments, row)
        return self._records()

    def records_lost(self, now_ns: int) -> None:
        """Some segments have no record. Else, what is missing is still on its way."""
        self._lossy_ns = now_ns

    def expire(self, now_ns: int) -> NDArray[np.void]:
        """Ends what has waited too long; to be called now and then."""
        for connection in list(self._all.values()):
            self._look_after(connection, now_ns)
        return self._records()

    def flush(self) -> NDArray[np.void]:
        """All queries that still wait."""
        for connection in self._all.values():
            self._conclude(connection)
            self._end_waiting(connection)
            if connection.never_opened():
                self._end_unopened(connection)
        return self._records()

    def peek(self) -> NDArray[np.void]:
        """The queries that wait for an answer, as they are now; they go on waiting."""
        waiting = [
            connection.describe(query, Status.OPEN)
            for connection in self._all.values()
            if connection.waiting
            for queries in connection.open.values()
            for query in queries
        ]
        return records(waiting)[0]

    def __contains__(self, number: object) -> bool:
        return number in self._all

    def waiting(self) -> int:
        """How many queries wait for an answer, or for a connection."""
        return self._waiting + sum(c.never_opened() for c in self._all.values())

    def _records(self) -> NDArray[np.void]:
        made, lost = records(self._ended)
        self._ended.clear()
        self.lost.hops += lost
        return made

    def _connection(
        self, values: tuple[int, ...], segments: NDArray[np.void], row: int
    ) -> Connection:
        number, t_ns, netns = values[:3]
        connection = self._all.get(number)
        if connection is None:
            connection = self._add(number, segments[row])
        elif not connection.who.netns and netns:
            connection.who = _who(segments[row])
        if t_ns - connection.last_ns > SEEN_NS:
            self._all.move_to_end(number)
            connection.last_ns = t_ns
        return connection

    def _add(self, number: int, segment: np.void) -> Connection:
        sides = (Side(Stream(is_response=False)), Side(Stream(is_response=True)))
        connection = Connection(number, _who(segment), sides, segment["asked"].item())
        self._all[number] = connection
        if len(self._all) > CONNECTIONS_MAX:
            oldest = next(iter(self._all.values()))
            self._conclude(oldest)
            self.lost.cut_short += oldest.waiting + oldest.never_opened()
            self._forget(oldest)
        return connection

    def _add_place(
        self, connection: Connection, key: tuple[int, int, int, int, bytes], segment: np.void
    ) -> Place | None:
        if len(connection.places) >= PLACES_MAX:
            self.lost.hops += 1
            return None
        place = connection.places[key] = Place(*key[:4], segment["flow"].item())
        return place

    def _segment(
        self,
        connection: Connection,
        place: Place,
        values: tuple[int, ...],
        payload: bytes,
        segments: NDArray[np.void],
        row: int,
    ) -> None:
        _, t_ns, _, _, _, _, _, direction, flags, seq, length, captured, unreachable = values
        if unreachable:
            self._signal(connection, direction, place, t_ns)
            connection.refused_ns = connection.refused_ns or t_ns
            return
        side = connection.sides[direction]
        position = side.stream.position(seq)
        if flags & _FLAGS:
            self._take_flags(
                connection, direction, flags, (position, position + length), place, t_ns
            )
        if place.kind == HopKind.DROP:
            connection.drop_location = int(segments[row]["drop_location"])
        if not length:
            return
        if place.kind == HopKind.RECEIVE and not (direction or connection.server_cgroup_id):
            connection.server_cgroup_id = int(segments[row]["socket_cgroup_id"])
        if captured:
            self._take(connection, direction, position, payload[:captured], length, t_ns)
        passage = side.passage
        spans = passage.spans
        over = passage.segment(place, position, position + length, t_ns)
        for journey in over:
            query = connection.answered.get(journey)
            if query is not None and query.awaited == place[:3]:
                self._end(connection, query, Status.ANSWERED)
        # Often enough for the sum to be about right.
        if (over and connection.held) or (
            passage.spans > spans and passage.spans % _SPANS_A_TIME == 0
        ):
            self._settle(connection)

    def _signal(self, connection: Connection, direction: int, place: Place, t_ns: int) -> None:
        signals = connection.signals[direction]
        if len(signals) < MAX_HOPS:
            signals.setdefault(place, t_ns)

    def _take_flags(
        self,
        connection: Connection,
        direction: int,
        flags: int,
        span: tuple[int, int],
        place: Place,
        t_ns: int,
    ) -> None:
        """A connection begins, or ends."""
        dropped = place.kind == HopKind.DROP
        if flags & (_SYN | _RST) and not (dropped and flags & _RST):  # whoever gets a RST drops it
            self._signal(connection, direction, place, t_ns)
        side = connection.sides[direction]
        if flags & _SYN:
            side.stream.begin(span[0])
            if direction == _QUERY:
                connection.began_ns = connection.began_ns or t_ns
            elif not dropped:
                connection.accepted = True
        if dropped:
            return
        if flags & _FIN and span[1] >= side.fin_position:
            side.fin_ns = side.fin_ns or t_ns
            side.fin_position = span[1]
        if flags & _RST:
            if direction == _RESPONSE and not connection.accepted:
                connection.refused_ns = connection.refused_ns or t_ns
            connection.ended_ns = connection.ended_ns or t_ns

    def _take(
        self,
        connection: Connection,
        direction: int,
        position: int,
        data: bytes,
        length: int,
        t_ns: int,
    ) -> None:
        """Bytes of a stream."""
        side = connection.sides[direction]
        stream = side.stream
        wanted = stream.wanted
        messages = stream.feed(position, data, length)
        if stream.is_waiting():
            if stream.wanted != wanted or not side.waits_since_ns:
                side.waits_since_ns = t_ns
        else:
            side.waits_since_ns = 0
            if stream.wanted is None:
                side.passage.forget()
        if messages:
            self._messages(connection, direction, messages, t_ns)
        self._settle(connection)
        while self._held > HELD_MAX:
            greediest = max(self._all.values(), key=lambda c: c.held)
            for one in greediest.sides:
                one.stream.forget()
                one.passage.forget()
            self._settle(greediest)

    def _settle(self, connection: Connection) -> None:
        """Counts what a connection holds, and has lost."""
        held = 0
        for side in connection.sides:
            held += side.stream.held + side.passage.spans * SPAN_COST
            self.lost.bytes += side.stream.lost
            side.stream.lost = 0
            self.lost.hops += side.passage.lost
            side.passage.lost = 0
        self._held += held - connection.held
        connection.held = held

    def _messages(
        self, connection: Connection, direction: int, messages: Iterable[Message], t_ns: int
    ) -> None:
        passage = connection.sides[direction].passage
        for message in messages:
            data = message.data
            if len(data) < HEADER_BYTES or data[2] >> 7 != direction:
                self.lost.undecodable += 1
                passage.pass_over(message.end)
            elif direction == _RESPONSE:
                self._answer(connection, message, t_ns)
            elif connection.waiting >= OPEN_MAX or self._waiting >= ALL_OPEN_MAX:
                connection.asked_once = True
                self.lost.cut_short += 1
                passage.pass_over(message.end)
            else:
                connection.asked_once = True
                journey = passage.complete(message.start, message.end)
                kept = message._replace(data=data[:QUERY_BYTES])
                query = Query(kept, t_ns, journey, question_of(data))
                connection.open.setdefault(int.from_bytes(data[:2]), []).append(query)
                connection.waiting += 1
                self._waiting += 1

    def _answer(self, connection: Connection, message: Message, t_ns: int) -> None:
        passage = connection.sides[_RESPONSE].passage
        query = connection.query_of(message.data)
        while query is None and connection.sides[_QUERY].stream.is_waiting():
            # Who answers has what is missing here, so it was not the network that lost it.
            self._give_up_missing(connection, _QUERY, t_ns)
            query = connection.query_of(message.data)
        if query is None:
            self.lost.unmatched_responses += 1
            passage.pass_over(message.end)
            return
        self._stop_waiting(connection, query)
        journey = passage.complete(message.start, message.end)
        query.response, query.response_journey, query.answered_ns = message.data, journey, t_ns
        query.awaited = awaited_at(query.journey.passed)
        connection.answered[journey] = query
        if query.awaited is None or any(p[:3] == query.awaited for p in journey.passed):
            self._end(connection, query, Status.ANSWERED)

    def _give_up_missing(self, connection: Connection, direction: int, now_ns: int) -> None:
        """Goes on behind the bytes that are missing."""
        side = connection.sides[direction]
        messages = side.stream.skip()
        side.waits_since_ns = now_ns if side.stream.is_waiting() else 0
        if side.stream.wanted is None:
            side.passage.forget()
        self._messages(connection, direction, messages, now_ns)
        self._settle(connection)

    def _stop_waiting(self, connection: Connection, query: Query) -> None:
        number = int.from_bytes(query.message.data[:2])
        queries = connection.open[number]
        queries.remove(query)
        if not queries:
            del connection.open[number]
        connection.waiting -= 1
        self._waiting -= 1

    def _end(self, connection: Connection, query: Query, status: Status) -> None:
        """A query is over, and waits no more."""
        self._ended.append(connection.describe(query, status))
        connection.sides[_QUERY].passage.remove(query.journey)
        if query.response_journey is not None:
            connection.sides[_RESPONSE].passage.remove(query.response_journey)
            del connection.answered[query.response_journey]

    def _end_unopened(self, connection: Connection) -> None:
        """Tells, once, that nothing could be asked."""
        connection.told = True
        self._ended.append(connection.unopened())

    def _end_waiting(self, connection: Connection, before_ns: int | None = None) -> None:
        """Ends the queries without an answer: all of them, or those from before a time."""
        for queries in list(connection.open.values()):
            for query in list(queries):
                if before_ns is None or query.t_ns < before_ns:
                    self._stop_waiting(connection, query)
                    self._end(connection, query, Status.TIMEOUT)

    def _conclude(self, connection: Connection, before_ns: int | None = None) -> None:
        """Ends the queries that were answered, or were before a time."""
        for query in list(connection.answered.values()):
            if before_ns is None or query.answered_ns < before_ns:
                self._end(connection, query, Status.ANSWERED)

    def _look_after(self, connection: Connection, now_ns: int) -> None:
        gap_ns = GAP_NS if now_ns - self._lossy_ns < LOSSY_NS else self._timeout_ns
        for direction, side in enumerate(connection.sides):
            if side.waits_since_ns and now_ns - side.waits_since_ns > gap_ns:
                self._give_up_missing(connection, direction, now_ns)
        if connection.answered:
            self._conclude(connection, now_ns - LAST_HOPS_NS)
        if not connection.ended_ns and connection.has_ended():
            connection.ended_ns = now_ns
        if connection.waiting:
            ended = connection.ended_ns and now_ns - connection.ended_ns > LAST_HOPS_NS
            self._end_waiting(connection, None if ended else now_ns - self._timeout_ns)
        if connection.never_opened():
            refused = connection.refused_ns and now_ns - connection.refused_ns > LAST_HOPS_NS
            if refused or connection.began_ns < now_ns - self._timeout_ns:
                self._end_unopened(connection)
                if refused:
                    connection.ended_ns = connection.ended_ns or now_ns
        if not connection.waiting and not connection.answered and (
            (connection.ended_ns and now_ns - connection.ended_ns > ENDED_NS)
            or now_ns - connection.last_ns > IDLE_NS
        ):  # fmt: skip
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        for side in connection.sides:
            side.stream.forget()
            side.passage.forget()
        self._settle(connection)
        self._waiting -= connection.waiting
        del self._all[connection.number]
        self.over.append((connection.number, connection.flows()))


def _who(segment: np.void) -> Who:
    """Who connected."""
    names = ("cgroup_id", "client_netns", "pid", "comm", "family")
    return Who(*(segment[name].item() for name in names))
