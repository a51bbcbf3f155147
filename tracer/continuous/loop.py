# SPDX-License-Identifier: Apache-2.0
"""Continuous mode: the kernel counts, and every few seconds its counts become figures.

    kernel's histograms ─▶ book ──┬─▶ figures (scraped)
    TCP, time-outs ─▶ tally ─▶ book ─┴─▶ recorder
    slow, failed, sampled ─▶ assemble ─▶ recorder

One thread does all of it; scrapes read what it leaves in `figures`.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tracer.assemble import Assembler
from tracer.connection_room import ConnectionRoom
from tracer.connections import Connections
from tracer.continuous import memory
from tracer.continuous.book import Book, Entry, statuses
from tracer.continuous.coverage import Coverage
from tracer.continuous.log import log
from tracer.continuous.metrics import Health
from tracer.continuous.rows import histogram_rows, transaction_row, why_kept
from tracer.continuous.usage import cpu_s, rss_bytes
from tracer.kernel.aggregates import Aggregates
from tracer.kernel.limits import CONTINUOUS
from tracer.kernel.symbols import kernel_symbol
from tracer.late_names import LateNames
from tracer.record import Status
from tracer.run import Totals
from tracer.slots import no_socket, slots_of
from tracer.slots import statuses as statuses_of
from tracer.stages import stage_times
from tracer.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from tracer.cluster.identities import Identities
    from tracer.cluster.sources import Source
    from tracer.continuous.budget import Budget
    from tracer.continuous.labels import Labels
    from tracer.continuous.metrics import Figures
    from tracer.continuous.recorder import Recorder
    from tracer.continuous.top_names import TopNames
    from tracer.keep_up import KeepUp
    from tracer.kernel.session import Session
    from tracer.run import Stop
    from tracer.transaction import Transaction

_WAIT_S = 0.25
_BUSY_WAIT_S = 0.05
_BUSY_FILL = 0.1
_UNNAMED_MAX = 256  # batches
_LAST_ANSWERS_S = 0.05
_FORGET_S = 60.0
_IDLE_NS = 600_000_000_000  # how long a series is kept that nothing is added to
_CROWDED_IDLE_NS = 60_000_000_000  # the same, when tables are nearly full
_CROWDED = 0.8
_GC_THRESHOLD = 50_000


@dataclass(slots=True)
class Continuous:
    """One run. `is_wanted` and `keep` are the filters, of labels and of transactions."""

    session: Session
    identities: Identities
    keep_up: KeepUp
    stop: Stop
    figures: Figures
    recorder: Recorder | None
    budget: Budget
    timeout_ns: int
    interval_s: float
    is_wanted: Callable[[Labels], bool]
    keep: Callable[[Transaction], bool]
    source: Source  # of names
    top_names: TopNames
    totals: Totals = field(default_factory=Totals)
    counted: Counter[str] = field(default_factory=Counter)  # transactions, by status
    _assembler: Assembler = field(init=False)
    _connections: Connections = field(init=False)
    _room: ConnectionRoom = field(init=False)
    _coverage: Coverage = field(init=False)
    _aggregates: Aggregates = field(init=False)
    _tally: Tally = field(init=False)
    _books: tuple[Book, Book] = field(init=False)
    _late: LateNames = field(init=False)
    _interval_ns: int = 0  # when it began, since 1970
    # Transactions that left the kernel, or that it did not end: ordinary ones, and others.
    _ordinary_left: int = 0
    _notable_left: int = 0
    _cpu_before_s: float = 0.0
    _forget_s: float = 0.0
    _is_ready: bool = False
    _dice: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        names = self.identities
        self._cpu_before_s = cpu_s()
        self._assembler = Assembler(names, self.session.built.drop_reasons, kernel_symbol)
        self._tally = Tally(self.session.built.drop_reasons)
        self._late = LateNames(names, _UNNAMED_MAX)
        self._connections = Connections(self.timeout_ns)
        self._room = ConnectionRoom(self.session, self._connections)
        self._coverage = Coverage(
            self.session, self._connections, self._tally, self.recorder, self.budget
        )
        self._aggregates = Aggregates(self.session.built.map_fds)
        self._books = (
            Book(names, names.is_settled, lambda: names.version),
            Book(names, names.is_settled, lambda: names.version),
        )

    def run(self) -> None:
        """Until it is time to stop; then all that was counted is in the figures and recorded."""
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        stop = self.stop
        stop.start()
        started_ns = time.monotonic_ns()
        self._interval_ns = time.time_ns()
        self._is_ready = True
        self.session.keep(self.budget.look(time.monotonic(), 0, 0))
        self._reading()
        due_s = time.monotonic() + self.interval_s
        while not stop.now():
            self._read()
            self._sweep(time.monotonic_ns())
            self.keep_up()
            now_s = time.monotonic()
            if now_s >= due_s:
                due_s = now_s + self.interval_s
                self._reading()
                self._keep_to_budget(now_s)
            if self.recorder is not None:
                if stop.hung_up():
                    log("info", "SIGHUP: the recording is completed")
                    self.recorder.try_again()
                    self._reading()
                    self.recorder.rotate()
                self.recorder.look()
            busy = self.session.fill() > _BUSY_FILL
            stop.wait(_BUSY_WAIT_S if busy else _WAIT_S)
        self._finish()
        self.totals.duration_ns = time.monotonic_ns() - started_ns

    def _keep_to_budget(self, now_s: float) -> None:
        before = self.budget.keeping
        kept = self.budget.look(now_s, self._ordinary_left, self._notable_left)
        if kept == before:
            return
        self.session.keep(kept)
        log(
            "info", "what leaves the kernel was adapted to the CPU budget",
            sample=f"1/{kept.share}" if kept.share else "0",
            slow_or_failed=f"1/{kept.notable_share}" if kept.notable_share else "0",
            cpu_percent=round(self.budget.used * 100, 2),
        )  # fmt: skip

    def _read(self) -> None:
        """Takes in what has left the kernel: what it has counted, and segments of TCP."""
        for ring, batch in self.session.read_all():
            if ring == "segments":
                self._own_of_tcp(self._connections.feed(batch))
            else:
                # What its client gave up, the kernel leaves to us.
                given_up = batch["transaction"]["status"] == Status.TIMEOUT
                self._own(batch[given_up])
                self._record(batch[~given_up])
        self._name_late(time.monotonic_ns())

    def _sweep(self, now_ns: int) -> None:
        """Ends what has waited too long."""
        self._own(self.session.table.expire(now_ns - self.timeout_ns))
        self._own_of_tcp(self._connections.expire(now_ns))
        self._room(now_ns)

    def _own(self, records: NDArray[np.void]) -> None:
        """Counts what the kernel did not end, and keeps of it what the kernel would have kept."""
        if not len(records):
            return
        slots = slots_of(records)
        self._tally.add(slots)
        kept = self.budget.keeping
        weights = np.zeros(len(records), np.uint32)
        for row, is_notable in enumerate(self._notable(slots).tolist()):
            share = kept.notable_share if is_notable else kept.share
            if share and self._dice.randrange(share) == 0:
                weights[row] = share
            elif is_notable:
                self._coverage.own_skipped += 1
            else:
                self._coverage.own_not_kept += 1
        left = records[weights > 0]
        slots_of(left)["weight"] = weights[weights > 0]
        self._record(left)

    def _own_of_tcp(self, records: NDArray[np.void]) -> None:
        if len(records):
            self._own(self._of_servers(records))

    def _of_servers(self, records: NDArray[np.void]) -> NDArray[np.void]:
        """Marks what those ask who are asked themselves, as the kernel does."""
        slots = slots_of(records)
        serving = np.array(sorted(self.session.serving()), np.uint64)
        slots["by_server"] = np.isin(slots["cgroup_id"], serving)
        return records

    def _own_but_waiting(self, records: NDArray[np.void]) -> None:
        """The same at the end, when what still waits for its answer has not failed."""
        told = statuses_of(slots_of(records), no_socket(self.session.built.drop_reasons))
        waiting = np.array([status == "timeout" for status in told], bool)
        self.totals.unanswered_at_end += int(waiting.sum())
        self._own(records[~waiting])

    def _notable(self, slots: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which are slow, or failed; as is_kept in bpf/latency.h."""
        slower_ns = self.budget.keeping.slower_ns
        took_ns = slots["end_ns"].astype(np.int64) - slots["start_ns"].astype(np.int64)
        rcodes = slots["response_flags"].astype(np.int64) & 15
        notable: NDArray[np.bool_] = (slots["status"] != Status.ANSWERED) | ~np.isin(rcodes, (0, 3))
        if slower_ns:
            notable |= (slots["end_ns"] != 0) & (took_ns >= slower_ns)
        return notable

    def _record(self, records: NDArray[np.void]) -> None:
        """Hands on to the recorder, in a moment if a name is not known yet."""
        notable = int(self._notable(slots_of(records)).sum())
        self._notable_left += notable
        self._ordinary_left += len(records) - notable
        self._write(self._late.hold(records))

    def _name_late(self, now_ns: int, *, at_once: bool = False) -> None:
        for records in self._late.due(now_ns, at_once=at_once):
            self._write(records)

    def _write(self, records: NDArray[np.void]) -> None:
        """To recordings, and to the names that are asked for most."""
        if not len(records):
            return
        slots = slots_of(records)
        slower_ns = self.budget.keeping.slower_ns
        rows = []
        for t, weight, times, netns, by_server in zip(
            self._assembler.assemble(records),
            slots["weight"].tolist(),
            stage_times(slots).tolist(),
            slots["netns"].tolist(),
            slots["by_server"].tolist(),
            strict=True,
        ):
            if not self.keep(t):
                continue
            # A client elsewhere is counted there.
            is_here = bool(netns) or not self.session.hooks
            if self.top_names.most and t.name and is_here and not by_server:
                self.top_names.add(t.name, weight)
            if self.recorder is not None:
                kept = why_kept(t, slower_ns)
                row = transaction_row(
                    t, kept, weight, times, client_seen=bool(netns), by_server=bool(by_server)
                )
                rows.append(row)
        if self.recorder is not None:
            self.recorder.write("transactions", rows)

    def _reading(self, *, last: bool = False) -> None:
        """What was counted since the last reading, to figures and recordings."""
        now_ns, now_s = time.time_ns(), time.monotonic()
        self.identities.look()
        try:
            counted = self._aggregates.read()
        except OSError as error:  # the next reading has it
            log("error", f"the kernel's counts cannot be read: {error}")
            return
        own = self._tally.read()
        found: dict[Labels, Entry] = {}
        for book, source in zip(self._books, (counted, own), strict=True):
            for labels, entry in book.take(source, last=last):
                if self.is_wanted(labels):
                    found.setdefault(labels, Entry()).add(entry)
        self.figures.add(found.items(), self.top_names.turn())
        by_status = statuses(found.items())
        self.counted.update(by_status)
        self.totals.transactions = self.counted.total()
        if self.recorder is not None:
            self._record_interval(self.recorder, found.items(), by_status.total(), now_ns)
        self._interval_ns = now_ns
        entries = len(counted.series), len(counted.counts)
        if now_s >= self._forget_s:
            self._forget_s = now_s + _FORGET_S
            memory.give_back()
            limits = CONTINUOUS
            crowded = (
                entries[0] > _CROWDED * limits.series or entries[1] > _CROWDED * limits.buckets
            )
            idle_ns = _CROWDED_IDLE_NS if crowded else _IDLE_NS
            before_ns = time.monotonic_ns() - idle_ns
            of_kernel, of_own = self._books
            try:
                gone = self._aggregates.forget(counted, before_ns, of_kernel.waiting())
            except OSError as error:  # the next minute tries again
                log("error", f"the kernel's counts cannot be tidied up: {error}")
            else:
                of_kernel.forget(gone)
            of_own.forget(self._tally.forget(before_ns, of_own.waiting()))
        self.figures.tell(self._health(*entries), is_ready=self._is_ready)

    def _record_interval(
        self,
        recorder: Recorder,
        entries: Iterable[tuple[Labels, Entry]],
        transactions: int,
        now_ns: int,
    ) -> None:
        rows = []
        for labels, entry in entries:
            rows += histogram_rows(labels, entry, self._interval_ns, now_ns)
        recorder.write("histograms", rows, transactions)
        self._coverage.record(
            recorder,
            self.totals,
            (self._interval_ns, now_ns),
            transactions,
            self.source.problem(),
        )

    def losses(self) -> tuple[dict[str, int], dict[str, int]]:
        """What was seen but is in no transaction, and messages without their counterpart."""
        return self._coverage.losses(self.totals)

    def cpu_used_s(self) -> float:
        """CPU time of this run, that of writing recordings included."""
        return cpu_s() - self._cpu_before_s

    def _health(self, series: int, buckets: int) -> Health:
        lost, unmatched = self.losses()
        not_kept, skipped = self._coverage.spared()
        limits = CONTINUOUS
        return Health(
            lost=lost,
            unmatched=unmatched,
            recorded=self.recorder.rows if self.recorder else 0,
            not_kept=not_kept,
            skipped=skipped,
            sample=self.budget.keeping.share,
            cpu_s=self.cpu_used_s(),
            rss_bytes=rss_bytes(),
            tables={
                "transactions": (self.session.table.in_flight(), limits.slots),
                "series": (series, limits.series),
                "buckets": (buckets, limits.buckets),
            },
            names_problem=self.source.problem(),
            names_age_s=self.source.age_s(),
            recording_problem=self.recorder.problem if self.recorder else None,
            hooks=self.session.hooks or "none",
            devices=self.session.devices.count(),
        )

    def _finish(self) -> None:
        """Takes every program away, and accounts for all that is left."""
        self._is_ready = False
        self.session.pause()
        if self.session.table.in_flight() or self._connections.waiting():
            time.sleep(_LAST_ANSWERS_S)
        self.session.detach()
        self._read()
        self._sweep(time.monotonic_ns())
        while len(waiting := self.session.table.expire(time.monotonic_ns())):
            self._own_but_waiting(waiting)
        self.session.table.give_up()
        self._own_but_waiting(self._of_servers(self._connections.flush()))
        self.keep_up(at_once=True)
        if self.recorder is not None:
            self.recorder.try_again()
        self._name_late(0, at_once=True)
        self._reading(last=True)
        if self.recorder is not None:
            self.recorder.close()
