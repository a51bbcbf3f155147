# SPDX-License-Identifier: Apache-2.0
"""The live trace: from records to what is shown, until somebody or something ends it.

    ring ─▶ assemble ─▶ name ─▶ filter ─▶ group into lookups ─▶ show

One thread does all of it, a batch at a time. A signal only asks it to stop, so that the summary
is always the last line and always whole.
"""

from __future__ import annotations

import gc
import select
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tracer.assemble import Assembler
from tracer.cluster.resolvers import Resolvers
from tracer.kernel.symbols import kernel_symbol
from tracer.record import Counter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from tracer.cluster.identities import Identities
    from tracer.correlate.lookups import Lookups
    from tracer.kernel.session import Session
    from tracer.transaction import Lookup, Transaction

# How long records may lie in the ring: short when there are many, so that it does not run full.
_IDLE_WAIT_S = 0.05
_BUSY_WAIT_S = 0.01
_BUSY_FILL = 0.1
_SWEEP_NS = 250_000_000
_LOOK_NS = 1_000_000_000
_GC_THRESHOLD = 50_000
_STALLED_S = 2.0  # how long output may take once we are asked to stop
_LAST_ANSWERS_S = 0.05  # for what was asked just before the end


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
    duration_ns: int = 0


class OutputStalledError(Exception):
    """Whoever reads our output does not, and we are asked to stop."""


class Stop:
    """Becomes true on SIGINT, SIGTERM or SIGHUP, or when the time is up; cuts waiting short.

    A signal only asks, so that what is being written is written whole. If nobody reads it
    (`writing` for longer than a moment after that), OutputStalledError ends it.
    """

    def __init__(self, duration_ns: int | None) -> None:
        self._wakes, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._requested = False
        self._writing = False
        self._duration_ns = duration_ns
        self._end_s: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._request)
        signal.signal(signal.SIGALRM, self._give_up_writing)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
        signal.setitimer(signal.ITIMER_REAL, _STALLED_S, _STALLED_S)

    def _give_up_writing(self, _number: int, _frame: FrameType | None) -> None:
        if self._writing:
            raise OutputStalledError

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Output is written in the block. May raise OutputStalledError once a stop is asked for."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def start(self) -> None:
        """The time that is allowed begins now."""
        if self._duration_ns:
            self._end_s = time.monotonic() + self._duration_ns / 1e9

    def done(self) -> None:
        """All is written. No alarm may come while the interpreter ends: it would be killed by it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def now(self) -> bool:
        """Whether to stop."""
        return self._requested or (self._end_s is not None and time.monotonic() >= self._end_s)

    def wait(self, seconds: float) -> None:
        """Sleeps, at most until it is time to stop."""
        if self._end_s is not None:
            seconds = min(seconds, max(0.0, self._end_s - time.monotonic()))
        select.select([self._wakes], [], [], seconds)


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
    keep_up: Callable[[], None]  # called now and then, to learn what has become of pods

    def run(self) -> None:
        """Traces until it is time to stop, then reports what is still waiting."""
        stop = self.stop
        # What is there now stays; short-lived records need no search for cycles.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        stop.start()
        started_ns = time.monotonic_ns()
        assembler = Assembler(self.identities, self.session.built.drop_reasons, kernel_symbol)
        resolvers = Resolvers(self.identities.cgroups_of)
        next_sweep_ns = next_look_ns = 0
        while not stop.now() and not self._enough():
            now_ns = time.monotonic_ns()
            for batch in self.session.read():
                self._take(assembler.assemble(batch), resolvers)
                if stop.now():
                    break
            if now_ns >= next_sweep_ns:
                next_sweep_ns = now_ns + _SWEEP_NS
                expired = self.session.table.expire(now_ns - self.timeout_ns)
                self._take(assembler.assemble(expired), resolvers)
                if self.lookups is not None:
                    self._show(self.lookups.expire(time.time_ns()))
            if now_ns >= next_look_ns:
                next_look_ns = now_ns + _LOOK_NS
                self.keep_up()
            busy = self.session.fill() > _BUSY_FILL
            stop.wait(_BUSY_WAIT_S if busy else _IDLE_WAIT_S)
        self.session.pause()
        if self.session.table.in_flight():
            time.sleep(_LAST_ANSWERS_S)
        self.session.detach()
        for batch in self.session.read():
            self._take(assembler.assemble(batch), resolvers)
        while len(waiting := self.session.table.expire(time.monotonic_ns())):
            self.totals.unanswered_at_end += len(waiting)
            self._take(assembler.assemble(waiting), resolvers)
        if self.lookups is not None:
            self._show(self.lookups.flush())
            self.totals.lookups_cut_short = self.lookups.evicted
        self.totals.duration_ns = time.monotonic_ns() - started_ns

    def _enough(self) -> bool:
        return self.count is not None and self.totals.transactions >= self.count

    def _take(self, transactions: Iterable[Transaction], resolvers: Resolvers) -> None:
        items: list[Transaction | Lookup] = []
        now_ns = time.time_ns()
        for t in transactions:
            if not self.keep(t):
                self.totals.filtered += 1
                continue
            if self._enough():
                break
            self.totals.transactions += 1
            items.append(t)
            if self.lookups is not None:
                found = self.lookups.feed(t, resolvers.of(t.client), now_ns)
                self.totals.lookups += len(found)
                items += found
        if items:
            self._write(items)

    def _show(self, found: list[Lookup]) -> None:
        self.totals.lookups += len(found)
        if found:
            self._write(found)

    def _write(self, items: Sequence[Transaction | Lookup]) -> None:
        with self.stop.writing():
            self.output.write(items)


def losses(session: Session, totals: Totals) -> tuple[dict[str, int], dict[str, int]]:
    """The summary's `lost` and `unmatched`: what was seen, but is in no transaction."""
    counters = session.counters()
    lost = {
        "ring_full": counters[Counter.RING_FULL],
        "table_full": counters[Counter.TABLE_FULL] + session.table.leaked,
        "undecodable": counters[Counter.UNDECODABLE],
        "filtered": counters[Counter.FILTERED] + totals.filtered,
        "preempted": counters[Counter.PREEMPTED],
        "hops": counters[Counter.HOPS_LOST],
        "lookups": totals.lookups_cut_short,
        "devices": session.devices.failures,
    }
    unmatched = {
        "responses": counters[Counter.UNMATCHED_RESPONSES],
        "queries": totals.unanswered_at_end,
    }
    return lost, unmatched
