# SPDX-License-Identifier: Apache-2.0
"""The live trace: from records to what is shown, until somebody or something ends it.

    ring ─▶ assemble ─▶ name ─▶ nest ─▶ filter ─▶ group into lookups ─▶ show

One thread does all of it, a batch at a time. A signal only asks it to stop, so that the summary
is always the last line and always whole.
"""

from __future__ import annotations

import gc
import select
import signal
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tracer import streams
from tracer.assemble import Assembler, apart
from tracer.cluster.resolvers import Resolvers
from tracer.connection import Losses
from tracer.connection_room import ConnectionRoom
from tracer.connections import Connections
from tracer.correlate.upstream import Upstream
from tracer.kernel.symbols import kernel_symbol
from tracer.late_names import LateNames
from tracer.record import Counter
from tracer.slots import slots_of
from tracer.streams import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from types import FrameType

    import numpy as np
    from numpy.typing import NDArray

    from tracer.cluster.identities import Identities
    from tracer.correlate.lookups import Lookups
    from tracer.keep_up import KeepUp
    from tracer.kernel.session import Session
    from tracer.transaction import Lookup, Transaction

# How long records may lie in the ring: short when there are many, so that it does not run full.
_IDLE_WAIT_S = 0.05
_BUSY_WAIT_S = 0.01
_BUSY_FILL = 0.1
_SWEEP_NS = 250_000_000
_UNNAMED_MAX = 1024  # batches
_WRITTEN_AT_ONCE = 32  # what a slow reader takes in a moment
_GC_THRESHOLD = 50_000
_STALLED_S = 4.0  # how long what is written at once may take when we are asked to stop
_GRACE_NS = 2_000_000_000  # for an answer that comes when its client has just given up
_LAST_ANSWERS_S = 0.05  # for what was asked just before the end
_LAST_RECORDS_S = 1.0


class Output(Protocol):
    """Where transactions and lookups go, batch by batch."""

    def write(self, items: Sequence[Transaction | Lookup]) -> None: ...


@dataclass(slots=True)
class Totals:
    """What the summary tells."""

    transactions: int = 0
    lookups: int = 0
    filtered: int = 0
    unanswered_at_end: int = 0
    lookups_cut_short: int = 0
    upstream_forgotten: int = 0
    names_problem: str | None = None  # why names may be missing or out of date
    connections: Losses = field(default_factory=Losses)
    duration_ns: int = 0


class OutputStalledError(OutputError):
    """Whoever reads our output does not, and we are asked to stop."""


class Stop:
    """Becomes true on SIGINT, SIGTERM or SIGHUP, or when the time is up; cuts waiting short.

    A signal only asks, so that what is being written is written whole. If nobody reads it
    (`writing` for longer than a moment after that), OutputStalledError ends it.
    """

    def __init__(self, duration_ns: int | None, *, hangup_stops: bool = True) -> None:
        self._hangup_stops = hangup_stops
        self._hung_up = False
        self._wakes, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wakes.setblocking(False)
        self._requested = False
        self._held = False
        self._writing_s: float | None = None  # since when, while it is
        self._duration_ns = duration_ns
        self._end_s: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._request)
        signal.signal(signal.SIGALRM, self._give_up_writing)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and not self._hangup_stops:
            self._hung_up = True
            return
        first, self._requested = not self._requested, True
        if not first:
            return
        if not self._held:
            raise KeyboardInterrupt  # nothing has been begun that must be ended
        streams.hurry()
        signal.setitimer(signal.ITIMER_REAL, _STALLED_S, _STALLED_S / 4)

    def _give_up_writing(self, _number: int, _frame: FrameType | None) -> None:
        since_s = self._writing_s
        late = since_s is not None and time.monotonic() - since_s >= _STALLED_S
        if late and not streams.takes(sys.stdout):  # else it is the machine that is slow
            raise OutputStalledError(
                "nobody reads the output: the rest of it, and the summary, were not written"
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Output is written in the block. May raise OutputStalledError once a stop is asked for."""
        self._writing_s = time.monotonic()
        try:
            yield
        finally:
            self._writing_s = None

    def start(self) -> None:
        """The time that is allowed begins now."""
        self.hold()
        if self._duration_ns:
            self._end_s = time.monotonic() + self._duration_ns / 1e9

    def hold(self) -> None:
        """From now on, signals do not interrupt what is being done, but ask."""
        self._held = True

    def done(self) -> None:
        """All is written. No alarm may come while the interpreter ends: it would be killed by it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def hung_up(self) -> bool:
        """Whether SIGHUP came since the last call, where that does not stop."""
        hung_up, self._hung_up = self._hung_up, False
        return hung_up

    def now(self) -> bool:
        """Whether to stop."""
        return self._requested or (self._end_s is not None and time.monotonic() >= self._end_s)

    def wait(self, seconds: float) -> None:
        """Sleeps, at most until it is time to stop."""
        if self._end_s is not None:
            seconds = min(seconds, max(0.0, self._end_s - time.monotonic()))
        woken, _, _ = select.select([self._wakes], [], [], seconds)
        if woken and not self._requested:  # else it stays awake
            self._wakes.recv(64)


@dataclass(slots=True)
class Trace:
    """A trace under way. `keep` is the user's filter; `count` how many transactions to show.

    `lookups` is None where transactions are not to be grouped.
    """

    session: Session
    identities: Identities
    keep: Callable[[Transaction], bool]
    lookups: Lookups | None
    output: Output
    timeout_ns: int
    count: int | None
    totals: Totals
    stop: Stop
    keep_up: KeepUp  # called often, to learn what has become of pods
    refuse: Callable[[int], None]  # told the cgroups of those that are not kept
    _servers: Container[int] = ()
    _late: LateNames = field(init=False)
    _waiting: set[tuple[int, int]] = field(default_factory=set)  # (id, port) of the last queries
    _assembler: Assembler = field(init=False)
    _connections: Connections = field(init=False)
    _room: ConnectionRoom = field(init=False)
    _upstream: Upstream = field(init=False)
    _resolvers: Resolvers = field(init=False)

    def __post_init__(self) -> None:
        self._assembler = Assembler(self.identities, self.session.built.drop_reasons, kernel_symbol)
        self._late = LateNames(self.identities, _UNNAMED_MAX)
        self._connections = Connections(self.timeout_ns)
        self._room = ConnectionRoom(self.session, self._connections)
        self._upstream = Upstream(
            self.timeout_ns + _GRACE_NS, self.identities.shared_netns(), apart
        )
        self._resolvers = Resolvers(self.identities.cgroups_of)

    def run(self) -> None:
        """Traces until it is time to stop, then reports what is still waiting."""
        stop = self.stop
        # What is there now stays; short-lived records need no search for cycles.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        stop.start()
        started_ns = time.monotonic_ns()
        next_sweep_ns = 0
        while not stop.now() and not self._enough():
            now_ns = time.monotonic_ns()
            self._read()
            if now_ns >= next_sweep_ns:
                next_sweep_ns = now_ns + _SWEEP_NS
                self._sweep(now_ns)
            self.keep_up()
            busy = self.session.fill() > _BUSY_FILL
            stop.wait(_BUSY_WAIT_S if busy else _IDLE_WAIT_S)
        self._finish()
        self.totals.duration_ns = time.monotonic_ns() - started_ns

    def _read(self, *, to_the_end: bool = False) -> None:
        """Takes in what has left the kernel, and shows what is complete with it.

        Unless it must be `to_the_end`, a stop is not kept waiting by a full ring.
        """
        in_flight: list[Transaction] = []
        if self._upstream.wants_in_flight():
            for records in (self.session.table.peek(), self._connections.peek()):
                in_flight += self._assembler.assemble(records)
        for ring, batch in self.session.read_all():
            self._servers = self.session.serving()  # all of whom there may be queries in it
            records = self._connections.feed(batch) if ring == "segments" else batch
            # Of the small ring, all that was recorded before has been read.
            self._feed(records, in_order=ring == "small")
            if self.stop.now() and not to_the_end:
                break
        self._name_late(time.monotonic_ns())
        self._take(self._upstream.resolve(time.time_ns(), in_flight))

    def _sweep(self, now_ns: int) -> None:
        """Ends what has waited too long."""
        connections = self._connections
        self._feed(self.session.table.expire(now_ns - self.timeout_ns))
        self._feed(connections.expire(now_ns))
        self._room(now_ns)
        if self.lookups is not None:
            self._show(self.lookups.expire(time.time_ns()))

    def _finish(self) -> None:
        """Takes every program away, and reports all that is left."""
        self.session.pause()
        if self.session.table.in_flight() or self._connections.waiting():
            time.sleep(_LAST_ANSWERS_S)
        self.session.detach()
        self._read(to_the_end=True)
        deadline_s = time.monotonic() + _LAST_RECORDS_S
        while self.session.fill() and time.monotonic() < deadline_s:
            time.sleep(0.01)  # a program that was held up is still writing
            self._read(to_the_end=True)
        self._read(to_the_end=True)  # nests what came last, knowing what still waits
        while len(waiting := self.session.table.expire(time.monotonic_ns())):
            self._feed_waiting(waiting)
        self.session.table.give_up()
        self._feed_waiting(self._connections.flush())
        self.keep_up(at_once=True)
        self._name_late(0, at_once=True)
        self._take(self._upstream.flush(time.time_ns()))
        if self.lookups is not None:
            self._show(self.lookups.flush())
            self.totals.lookups_cut_short = self.lookups.evicted
        self.totals.connections = self._connections.lost
        self.totals.upstream_forgotten = self._upstream.evicted

    def _feed_waiting(self, records: NDArray[np.void]) -> None:
        """The same of what still waits at the end, which the summary tells if it is shown."""
        slots = slots_of(records)
        ports = slots["flows"]["client_port"][:, 0]
        self._waiting.update(zip(slots["dns_id"].tolist(), ports.tolist(), strict=True))
        self._feed(records)

    def _feed(self, records: NDArray[np.void], *, in_order: bool = False) -> None:
        """Hands on what is complete and has its names."""
        self._hand_on(self._late.hold(records), in_order=in_order)

    def _name_late(self, now_ns: int, *, at_once: bool = False) -> None:
        for records in self._late.due(now_ns, at_once=at_once):
            self._hand_on(records)

    def _hand_on(self, records: NDArray[np.void], *, in_order: bool = False) -> None:
        transactions = self._assembler.assemble(records)
        now_ns = time.time_ns()
        self._take(self._upstream.feed(transactions, self._servers, now_ns, in_order=in_order))

    def _enough(self) -> bool:
        return self.count is not None and self.totals.transactions >= self.count

    def _take(self, transactions: Iterable[Transaction]) -> None:
        items: list[Transaction | Lookup] = []
        now_ns = time.time_ns()
        for t in transactions:
            if not self.keep(t):
                self.totals.filtered += 1
                if t.client.cgroup_id and t.client.pod is None:
                    self.refuse(t.client.cgroup_id)
                continue
            if self._enough():
                break
            self.totals.transactions += 1
            if self._waiting and t.latency_ns is None and t.status != "answered":
                waited = (t.dns_id or 0, t.client.port) in self._waiting
                self.totals.unanswered_at_end += waited
            items.append(t)
            if self.lookups is not None:
                found = self.lookups.feed(t, self._resolvers.of(t.client), now_ns)
                self.totals.lookups += len(found)
                items += found
        if items:
            self._write(items)

    def _show(self, found: list[Lookup]) -> None:
        self.totals.lookups += len(found)
        if found:
            self._write(found)

    def _write(self, items: Sequence[Transaction | Lookup]) -> None:
        for start in range(0, len(items), _WRITTEN_AT_ONCE):  # lest memory grow with bursts
            with self.stop.writing():
                self.output.write(items[start : start + _WRITTEN_AT_ONCE])


def losses(session: Session, totals: Totals) -> tuple[dict[str, int], dict[str, int]]:
    """The summary's `lost` and `unmatched`: what was seen, but is in no transaction."""
    counters = session.counters()
    tcp = totals.connections
    lost = {
        "ring_full": counters[Counter.RING_FULL],
        "table_full": counters[Counter.TABLE_FULL] + session.table.leaked,
        "undecodable": counters[Counter.UNDECODABLE] + tcp.undecodable,
        "filtered": counters[Counter.FILTERED] + totals.filtered,
        "preempted": counters[Counter.PREEMPTED],
        "hops": counters[Counter.HOPS_LOST] + tcp.hops,
        "segments": counters[Counter.SEGMENTS_LOST],
        "tcp_bytes": tcp.bytes,
        "connections": counters[Counter.CONNECTIONS_FULL] + tcp.cut_short,
        "upstream": totals.upstream_forgotten,
        "lookups": totals.lookups_cut_short,
        "devices": session.devices.failures,
    }
    unmatched = {
        "responses": counters[Counter.UNMATCHED_RESPONSES] + tcp.unmatched_responses,
        "queries": totals.unanswered_at_end,
    }
    return lost, unmatched
