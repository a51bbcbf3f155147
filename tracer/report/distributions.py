# SPDX-License-Identifier: Apache-2.0
"""Distributions of times, from what the database has counted in buckets."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tracer.report.figures import SHARES, Heat, Times
from tracer.stages import quantile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

# With fewer values than that, a quantile would be one value's whim; or where each stands for several.
_FEWEST = {0.99: 100, 0.999: 1000}
_FEWEST_OF_SAMPLE = {0.5: 10, 0.9: 50, 0.99: 500, 0.999: 5000}


def distributions(
    sums: Iterable[tuple[Any, ...]], buckets: Iterable[tuple[Any, ...]]
) -> dict[str | None, Times]:
    """`sums`: (group, sum, max, perhaps how many values that is from); `buckets`: (group, lower,
    upper, count)."""
    by_group: dict[str | None, list[tuple[int, int, int]]] = {}
    for name, low, high, count in buckets:
        by_group.setdefault(name, []).append((int(low), int(high), int(count)))
    return {
        name: _times_of(by_group.get(name, []), int(sum_ns or 0), top, *map(int, values))
        for name, sum_ns, top, *values in sums
    }


def _times_of(
    buckets: list[tuple[int, int, int]], sum_ns: int, max_ns: int | None, values: int | None = None
) -> Times:
    """`values`: how many there were, where each stands for several."""
    buckets.sort()
    total = sum(count for _, _, count in buckets)
    values = total if values is None else values
    fewest = _FEWEST if values == total else _FEWEST_OF_SAMPLE
    octaves: Counter[int] = Counter()
    for low, _, count in buckets:
        octaves[max(low, 1).bit_length() - 1] += count
    quantiles = tuple(
        None if values < fewest.get(share, 1) else quantile(buckets, total, share)
        for share in SHARES
    )
    if max_ns is not None:
        quantiles = tuple(None if ns is None else min(ns, max_ns) for ns in quantiles)
    return Times(total, sum_ns, max_ns, quantiles, tuple(sorted(octaves.items())))


def heat_of(rows: list[tuple[Any, ...]], start: datetime, seconds: float) -> Heat:
    """`rows`: (column, half octave, count); columns are `seconds` wide."""
    if not rows:
        return Heat()
    columns = max(row[0] for row in rows) + 1
    low, high = min(row[1] for row in rows), max(row[1] for row in rows)
    counts = [[0] * (high - low + 1) for _ in range(columns)]
    for column, octave, number in rows:
        counts[column][octave - low] += int(number)
    starts = [start + timedelta(seconds=seconds * n) for n in range(columns)]
    return Heat(starts, seconds, list(range(low, high + 1)), counts)
