# SPDX-License-Identifier: Apache-2.0
"""What a run amounts to, in words: how much, how fast, what was wasted, and what is missing.

Memory does not grow with the run: latencies are kept as counts, in buckets less than 1 % wide.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from tracer.show.cells import duration, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tracer.transaction import Lookup, Transaction

_SUB_BITS = 7  # each doubling of the latency has 128 buckets
_WIDTH = 80
_STATUSES = {
    "answered": "answered",
    "timeout": "timed out",
    "dropped": "dropped",
    "refused": "refused (nothing listens there)",
}
# What a counter counts, and what became of them. One that is not here is named as it is.
_LOSSES = {
    "ring_full": (
        "transaction",
        "lost, since they were read too slowly; filters help, and more CPU time for dnstrace",
    ),
    "table_full": ("query", "not followed, since too many were in flight; raise --max-in-flight"),
    "undecodable": ("DNS message", "not readable"),
    "filtered": ("query", "left out by the filters"),
    "preempted": ("packet", "not looked at, since the kernel was busy with another one"),
    "devices": ("device", "not watched, so hops there are missing"),
    "hops": ("hop", "not recorded, since the path was longer than there is room for"),
    "segments": ("piece of a TCP segment", "lost, since they were read too slowly"),
    "tcp_bytes": (
        "byte of DNS over TCP",
        "not understood: the connection was not seen from its start, or not whole",
    ),
    "connections": ("TCP connection", "not followed, since there were too many"),
    "upstream": ("query of a server", "forgotten before what it was asked for was over"),
    "lookups": ("lookup", "cut short, since too many were open; the waste is counted too low"),
}
_UNMATCHED = {
    "responses": ("response", "without a query: it was asked before the start, or never"),
    "queries": ("query", "still waiting at the end, and shown as unanswered"),
}


class Histogram:
    """Counts of durations in nanoseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.min_ns = self.max_ns = 0
        self._buckets: Counter[int] = Counter()

    def add(self, ns: int) -> None:
        """Counts one; a negative duration counts as none."""
        ns = max(ns, 0)
        shift = max(0, ns.bit_length() - _SUB_BITS - 1)
        self._buckets[(shift << _SUB_BITS) + (ns >> shift)] += 1
        self.min_ns = min(self.min_ns, ns) if self.count else ns
        self.max_ns = max(self.max_ns, ns)
        self.count += 1

    def percentile(self, percent: float) -> int | None:
        """What this share of the durations is not longer than; None of none."""
        left = self.count * percent / 100
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return max(self.min_ns, min(_middle_ns(bucket), self.max_ns))
        return None


def _middle_ns(bucket: int) -> int:
    shift = max(0, (bucket >> _SUB_BITS) - 1)
    return (bucket - (shift << _SUB_BITS) << shift) + (1 << shift >> 1)


class Summary:
    """Counts what is shown, for the end."""

    def __init__(self) -> None:
        self.transactions = 0
        self.lookups = 0
        self.latencies = Histogram()
        self._statuses: Counter[str] = Counter()
        self._rcodes: Counter[str] = Counter()
        self._wasteful = 0
        self._wasted = 0
        self._wasted_ns = 0

    def add(self, t: Transaction) -> None:
        """Counts a transaction."""
        self.transactions += 1
        self._statuses[t.status] += 1
        if t.rcode is not None:
            self._rcodes[t.rcode] += 1
        if t.latency_ns is not None and t.status == "answered":
            self.latencies.add(t.latency_ns)

    def add_lookup(self, found: Lookup) -> None:
        """Counts a lookup, and what it wasted."""
        self.lookups += 1
        if found.wasted:
            self._wasteful += 1
            self._wasted += found.wasted
            self._wasted_ns += found.wasted_ns

    def text(
        self,
        duration_ns: int,
        lost: Mapping[str, int],
        unmatched: Mapping[str, int],
        names_problem: str | None = None,
    ) -> str:
        """A few lines, without a last line end. Of losses only those that there were.

        `names_problem`: why pods may have no name, or an old one.
        """
        lines = [f"{_counted(self.transactions, 'transaction')} in {duration(duration_ns)}"]
        if self.transactions:
            statuses = [
                f"{self._statuses[status]:,} {words}"
                for status, words in _STATUSES.items()
                if self._statuses[status]
            ]
            lines[0] += ": " + ", ".join(statuses)
        if self._rcodes:
            rcodes = (f"{rcode} {count:,}" for rcode, count in self._rcodes.most_common(8))
            lines.append("rcodes: " + ", ".join(rcodes))
        if self.latencies.count:
            parts = [f"p{p} {duration(self.latencies.percentile(p))}" for p in (50, 90, 99)]
            lines.append(
                f"latency of answers: {', '.join(parts)}, max {duration(self.latencies.max_ns)}"
            )
        if self._wasteful:
            lines.append(
                f"search lists: {self._wasteful:,} of {_counted(self.lookups, 'lookup')} wasted"
                f" {_counted(self._wasted, 'query')} and {duration(self._wasted_ns)}"
            )
        lines += losses(lost, unmatched)
        if names_problem:
            lines.append(f"names: {printable(names_problem)}")
        return "\n".join(
            textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            for line in lines
        )


def _counted(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    what, of, rest = what.partition(" of ")
    return _plural(count, what) + of + rest


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what.removesuffix('y')}ies" if what.endswith("y") else f"{count:,} {what}s"


def losses(lost: Mapping[str, int], unmatched: Mapping[str, int]) -> list[str]:
    """What is missing, each in a line of any length; of what is not missing nothing."""
    return [*_in_words(lost, _LOSSES), *_in_words(unmatched, _UNMATCHED)]


def _in_words(counts: Mapping[str, int], words: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for name, count in counts.items():
        if count and name in words:
            what, fate = words[name]
            yield f"{_counted(count, what)} {fate}"
        elif count:
            yield f"{name.replace('_', ' ')}: {count:,}"
