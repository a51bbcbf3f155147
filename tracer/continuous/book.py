# SPDX-License-Identifier: Apache-2.0
"""The books: what was counted since the start, and in the last interval, by name.

The kernel, and we ourselves for what it does not end, count by numbers and since the start. Here
they become names when they are first seen, and anew when the cluster has changed: a pod that has gone
keeps its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tracer.continuous.labels import Labels, labels_of, renewed
from tracer.record import Stage
from tracer.stages import bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tracer.assemble import Names
    from tracer.kernel.aggregates import Counted

_PATIENCE = 4  # readings
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_SPREAD_PLACES = np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(slots=True)
class Histogram:
    """Times, in buckets (number: count; see stages.bounds). Nanoseconds.

    `max_ns` is exact, or where a longer time came earlier, no less than the longest of these and
    less than the next bucket's. 0: not known.
    """

    counts: Counter[int] = field(default_factory=Counter)
    sum_ns: int = 0
    max_ns: int = 0

    def add(self, other: Histogram) -> None:
        """Takes in the other's times."""
        self.counts.update(other.counts)
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def copy(self) -> Histogram:
        """One that does not change any more."""
        return Histogram(Counter(self.counts), self.sum_ns, self.max_ns)

    def count(self) -> int:
        """How many times."""
        return self.counts.total()


@dataclass(slots=True)
class Entry:
    """What was counted under the same labels: transactions, and times by stage."""

    count: int = 0
    times: dict[Stage, Histogram] = field(default_factory=dict)
    last_ns: int = 0  # CLOCK_MONOTONIC

    def add(self, other: Entry) -> None:
        """Takes in the other's."""
        self.count += other.count
        self.last_ns = max(self.last_ns, other.last_ns)
        for stage, histogram in other.times.items():
            self.times.setdefault(stage, Histogram()).add(histogram)


@dataclass(slots=True)
class _Known:
    """What was read of a series last, and its name once that is known."""

    count: int = 0
    sums: list[int] = field(default_factory=lambda: [0] * len(Stage))
    maxima: list[int] = field(default_factory=lambda: [0] * len(Stage))
    labels: Labels | None = None
    version: int = 0  # of the inventory that the labels are from
    unnamed: Entry | None = None  # what waits for the name
    readings: int = 0


class Book:
    """One source's series; `take` its own readings only, and in order.

    `is_settled(cgroup id)` says whether it will not become known any better who that is;
    `version()` is another one whenever services and pods may have other names.
    """

    def __init__(
        self, names: Names, is_settled: Callable[[int], bool], version: Callable[[], int]
    ) -> None:
        self._names = names
        self._is_settled = is_settled
        self._version = version
        self._known: dict[int, _Known] = {}
        self._marks = np.zeros(0, np.uint64)  # of the buckets of the last reading, in order
        self._counts = np.zeros(0, np.uint64)

    def take(self, counted: Counted, *, last: bool = False) -> Iterator[tuple[Labels, Entry]]:
        """What has come since the reading before, for each series that something has.

        What has no name yet is held back, a few readings at most, and not in the `last`.
        """
        fresh = self._fresh_buckets(counted)
        counts = counted.series["count"].tolist()
        sums, maxima = counted.series["sum_ns"].tolist(), counted.series["max_ns"].tolist()
        last_ns = counted.series["last_ns"].tolist()
        for row, number in enumerate(counted.series["id"].tolist()):
            if not counts[row]:
                continue
            known = self._known.setdefault(number, _Known())
            if counts[row] == known.count and number not in fresh and known.unnamed is None:
                continue
            entry = Entry(counts[row] - known.count, last_ns=last_ns[row])
            for stage, bucket, more in fresh.get(number, ()):
                entry.times.setdefault(Stage(stage), Histogram()).counts[bucket] += more
            for stage in Stage:
                if sums[row][stage] != known.sums[stage]:
                    histogram = entry.times.setdefault(stage, Histogram())
                    histogram.sum_ns = sums[row][stage] - known.sums[stage]
            for stage, histogram in entry.times.items():
                histogram.max_ns = _longest(histogram, known.maxima[stage], maxima[row][stage])
            known.count, known.sums, known.maxima = counts[row], sums[row], maxima[row]
            yield from self._named(known, counted.keys[row], entry, last=last)

    def _named(
        self, known: _Known, key: np.void, entry: Entry, *, last: bool
    ) -> Iterator[tuple[Labels, Entry]]:
        if known.labels is None:
            known.readings += 1
            patient = known.readings < _PATIENCE and not last
            if patient and not self._is_settled(int(key["cgroup_id"])):
                if known.unnamed is None:
                    known.unnamed = Entry()
                known.unnamed.add(entry)
                return
            known.labels = labels_of(key, self._names)
            known.version = self._version()
        elif known.version != self._version():
            known.labels = renewed(known.labels, labels_of(key, self._names), key)
            known.version = self._version()
        if known.unnamed is not None:
            entry.add(known.unnamed)
            known.unnamed = None
        yield known.labels, entry

    def waiting(self) -> set[int]:
        """The series that are held back for want of a name."""
        return {number for number, known in self._known.items() if known.unnamed is not None}

    def forget(self, gone: set[int]) -> None:
        """These series are no more."""
        for number in gone:
            self._known.pop(number, None)

    def _fresh_buckets(self, counted: Counted) -> dict[int, list[tuple[int, int, int]]]:
        """By series, (stage, bucket, by how much it has grown)."""
        keys = counted.bucket_keys
        places = (keys["stage"].astype(np.uint64) << np.uint64(16)) | keys["bucket"]
        # A number for each bucket, to find it again by: no two that we shall ever see are alike.
        marks = keys["id"] * _SPREAD ^ places * _SPREAD_PLACES
        # Not NumPy's default kind: on some emulated CPUs (QEMU's "max") that is wrong.
        order = np.argsort(marks, kind="stable")
        marks, counts = marks[order], counted.counts[order]
        before = np.zeros(len(marks), np.uint64)
        if len(self._marks):
            at = np.minimum(np.searchsorted(self._marks, marks), len(self._marks) - 1)
            same = self._marks[at] == marks
            before[same] = self._counts[at][same]
        self._marks, self._counts = marks, counts
        grown = np.flatnonzero(counts > before)
        rows = keys[order[grown]]
        fresh: dict[int, list[tuple[int, int, int]]] = {}
        for number, stage, bucket, more in zip(
            rows["id"].tolist(),
            rows["stage"].tolist(),
            rows["bucket"].tolist(),
            (counts[grown] - before[grown]).tolist(),
            strict=True,
        ):
            fresh.setdefault(number, []).append((stage, bucket, more))
        return fresh


def _longest(times: Histogram, before_ns: int, ever_ns: int) -> int:
    """Of these times: the kernel keeps the longest ever, which is theirs if there is a new one."""
    if ever_ns > before_ns or not times.counts:
        return ever_ns if ever_ns > before_ns else 0
    return min(bounds(max(times.counts))[1] - 1, ever_ns)


def statuses(entries: Iterable[tuple[Labels, Entry]]) -> Counter[str]:
    """How many transactions there were, by what became of them."""
    found: Counter[str] = Counter()
    for labels, entry in entries:
        if not labels.of_stages:
            found[labels.status] += entry.count
    return found
