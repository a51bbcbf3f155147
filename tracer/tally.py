# SPDX-License-Identifier: Apache-2.0
"""Counts transactions as the kernel does, and in the same form.

For those that the kernel does not end itself: DNS over TCP, which is put together in user space,
and what is never answered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tracer.decode.words import COUNTED_TYPES
from tracer.kernel.aggregates import OVERFLOW_IDS, Counted, overflow_key
from tracer.kernel.limits import CONTINUOUS
from tracer.record import (
    BUCKET_KEY,
    SERIES,
    SERIES_KEY,
    BackendKnown,
    HopKind,
    SeriesKind,
    Stage,
    Status,
)
from tracer.slots import backends, no_socket, statuses
from tracer.stages import buckets_of, stage_times

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

# As many as the kernel has room for (bpf/maps.h).
SERIES_MAX = CONTINUOUS.series
SERIES_PER_CLIENT = SERIES_MAX // 8
BUCKETS_MAX = CONTINUOUS.buckets  # of all series together

_NO_RCODE = 255


@dataclass(slots=True)
class _Own:
    """One series of ours."""

    id: int
    count: int = 0
    last_ns: int = 0  # CLOCK_MONOTONIC
    sum_ns: list[int] = field(default_factory=lambda: [0] * len(Stage))
    max_ns: list[int] = field(default_factory=lambda: [0] * len(Stage))
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)  # (stage, bucket)


class Tally:
    """Series and buckets of our own.

    Where there is no room for a series, or its client has begun too many, one for all such counts
    instead (`overflowed`). Where there is none for a bucket, a time is left out (`untimed`).
    """

    def __init__(self, drop_reasons: Mapping[int, str]) -> None:
        self._no_socket = no_socket(drop_reasons)
        self._all: dict[bytes, _Own] = {}
        self._ids = itertools.count()
        self._begun: Counter[tuple[int, int]] = Counter()  # series, by cgroup id and netns
        self._buckets = 0  # of all series together
        self.overflowed = 0
        self.untimed = 0

    def add(self, slots: NDArray[np.void]) -> None:
        """Counts transactions that have ended (fields of TRANSACTION)."""
        if not len(slots):
            return
        of_questions = _keys_of(slots, self._no_socket)
        of_stages = _keys_of_stages(of_questions)
        answered = (slots["status"] == Status.ANSWERED).tolist()
        timed = (slots["end_ns"] != 0) & (slots["hops"]["kind"][:, 0] == HopKind.SEND)
        latency = slots["end_ns"].astype(np.int64) - slots["start_ns"].astype(np.int64)
        times = stage_times(slots)
        last_ns = slots["hops"]["t_ns"].max(axis=1).tolist()
        for row in range(len(slots)):
            series = self._counted(of_questions[row], last_ns[row])
            if not answered[row]:
                continue
            if timed[row]:
                self._time(series, Stage.TOTAL, int(latency[row]))
            series = self._counted(of_stages[row], last_ns[row])
            for stage in np.flatnonzero(times[row]).tolist():
                self._time(series, stage, int(times[row, stage]))

    def read(self) -> Counted:
        """All of it, since the start."""
        series = np.zeros(len(self._all), SERIES)
        buckets = np.zeros(self._buckets, BUCKET_KEY)
        counts = np.zeros(len(buckets), np.uint64)
        at = 0
        for row, one in enumerate(self._all.values()):
            series[row] = one.id, one.last_ns, one.count, one.sum_ns, one.max_ns
            for (stage, bucket), count in one.buckets.items():
                buckets[at] = one.id, stage, bucket, 0
                counts[at] = count
                at += 1
        return Counted(np.frombuffer(b"".join(self._all), SERIES_KEY), series, buckets, counts)

    def forget(self, before_ns: int, spare: Collection[int] = ()) -> set[int]:
        """Makes room: drops series that nothing was added to since, but for `spare`; their ids."""
        gone = {
            key: one.id
            for key, one in self._all.items()
            if one.last_ns < before_ns and one.id not in spare
        }
        for key in gone:
            self._buckets -= len(self._all.pop(key).buckets)
        self._begun.clear()
        for name in self._all:
            key = np.frombuffer(name, SERIES_KEY)[0]
            if key["backend"] != BackendKnown.OVERFLOW:
                self._begun[int(key["cgroup_id"]), int(key["netns"])] += 1
        return set(gone.values())

    def _counted(self, key: np.void, last_ns: int) -> _Own:
        """The series of that key, counted once more."""
        series = self._all.get(key.tobytes()) or self._begin(key)
        series.count += 1
        series.last_ns = max(series.last_ns, last_ns)
        return series

    def _begin(self, key: np.void) -> _Own:
        """The series of that key, or what stands for it; as series_for in bpf/latency.h."""
        client = int(key["cgroup_id"]), int(key["netns"])
        room = SERIES_MAX - len(OVERFLOW_IDS) - len(self._all)
        if room > 0 and self._begun[client] < SERIES_PER_CLIENT:
            self._begun[client] += 1
            return self._all.setdefault(key.tobytes(), _Own(next(self._ids)))
        self.overflowed += 1
        kind, status = int(key["kind"]), int(key["status"])
        others = overflow_key(kind, status, key), overflow_key(kind, status)
        for name in others:
            if name in self._all:
                return self._all[name]
        return self._all.setdefault(others[room <= 0], _Own(next(self._ids)))

    def _time(self, series: _Own, stage: int, ns: int) -> None:
        key = stage, int(buckets_of(np.array([ns]))[0])
        if key not in series.buckets:
            if self._buckets >= BUCKETS_MAX:
                self.untimed += 1
                return
            self._buckets += 1
        series.buckets[key] += 1
        series.sum_ns[stage] += ns
        series.max_ns[stage] = max(series.max_ns[stage], ns)


def _keys_of(slots: NDArray[np.void], no_socket: int) -> NDArray[np.void]:
    keys = np.zeros(len(slots), SERIES_KEY)
    keys["kind"] = SeriesKind.OF_QUESTIONS
    for name in ("cgroup_id", "server_cgroup_id", "netns", "protocol", "by_server"):
        keys[name] = slots[name]
    asked = slots["flows"][:, 0]
    is_here = slots["netns"] != 0
    keys["client_addr"][is_here] = asked["client_addr"][is_here]
    keys["server_addr"], keys["server_port"] = asked["server_addr"], asked["server_port"]
    keys["type"] = np.where(np.isin(slots["type"], COUNTED_TYPES), slots["type"], 0)
    flags = slots["response_flags"].astype(np.int64)
    keys["rcode"] = np.where(flags != 0, flags & 15, _NO_RCODE)
    keys["status"] = [Status[name.upper()] for name in statuses(slots, no_socket)]
    for row, found in enumerate(backends(slots)):
        if found:
            address, port, as_asked = found
            keys["backend_addr"][row] = np.void(address)
            keys["backend_port"][row] = port
            keys["backend"][row] = BackendKnown.AS_ASKED if as_asked else BackendKnown.KNOWN
    return keys


def _keys_of_stages(of_questions: NDArray[np.void]) -> NDArray[np.void]:
    """The same without what was asked."""
    keys = of_questions.copy()
    keys["kind"] = SeriesKind.OF_STAGES
    keys["server_addr"] = np.void(bytes(16))
    for name in ("server_port", "type", "rcode"):
        keys[name] = 0
    return keys
