# SPDX-License-Identifier: Apache-2.0
"""Where the time of transactions went, stage by stage; and the buckets of histograms.

A stage is the time between two hops that follow each other, so that the stages of a transaction
add up to the time from its first hop to its last. The kernel counts the same way (bpf/latency.h).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tracer.record import HopKind, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# As users know them, in the order of the way.
STAGE_NAMES = tuple(stage.name.lower() for stage in Stage if stage != Stage.TOTAL)
PARTS = 16  # that each power of two is cut into
ERROR = 1 / (2 * PARTS + 1)  # how far a bucket's middle may be from what is in it


def stage_times(slots: NDArray[np.void]) -> NDArray[np.int64]:
    """Nanoseconds in each stage (columns: Stage, without the total) of each transaction.

    `slots` have the fields of TRANSACTION. What is upstream is in the server's time where the
    kernel does not count.
    """
    hops = slots["hops"]
    kinds, directions, netns = hops["kind"], hops["direction"], hops["netns"]
    places = np.arange(1, kinds.shape[1])
    there = places < slots["nhops"][:, None]
    # Hops of two CPUs may come in the wrong order.
    latest = np.maximum.accumulate(hops["t_ns"].astype(np.int64), axis=1)
    took = np.where(there, np.diff(latest, axis=1), 0)
    from_kind, to_kind = kinds[:, :-1], kinds[:, 1:]
    stages = np.where(
        directions[:, 1:] == 0,
        np.where(
            to_kind == HopKind.RECEIVE,
            Stage.SERVER_QUEUE,
            np.where(
                from_kind == HopKind.SEND,
                Stage.APPLICATION_SEND,
                np.where(netns[:, :-1] == netns[:, 1:], Stage.NODE, Stage.NETWORK),
            ),
        ),
        np.where(
            directions[:, :-1] == 0,
            np.where(from_kind == HopKind.RECEIVE, Stage.SERVER, Stage.REMOTE),
            np.where(to_kind == HopKind.RECEIVE, Stage.WAKE_UP, Stage.RETURN),
        ),
    )
    times = np.zeros((len(slots), Stage.TOTAL), np.int64)
    for stage in range(Stage.TOTAL):
        times[:, stage] = np.where(stages == stage, took, 0).sum(axis=1)
    upstream = slots["upstream_us"].astype(np.int64) * 1000
    times[:, Stage.SERVER] -= upstream
    times[:, Stage.UPSTREAM] += upstream
    return times


def buckets_of(ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the bucket that each time belongs to (bucket_of in bpf/latency.h)."""
    ns = ns.astype(np.int64)
    exponents = np.frexp(np.maximum(ns, 1).astype(np.float64))[1].astype(np.int64) - 1
    # Above 2^53 a float may round up to the next power of two; no DNS query takes 104 days.
    high = (exponents - 3) * PARTS + ((ns >> np.maximum(exponents - 4, 0)) & (PARTS - 1))
    return np.where(ns < PARTS, ns, high)


def bounds(bucket: int) -> tuple[int, int]:
    """The least time in a bucket, and the least of the next one; nanoseconds."""
    if bucket < PARTS:
        return bucket, bucket + 1
    exponent = bucket // PARTS - 1
    low = (PARTS + bucket % PARTS) << exponent
    return low, low + (1 << exponent)


def middle(low_ns: int, high_ns: int) -> float:
    """What is within ERROR of all times of a bucket with these bounds; nanoseconds."""
    return 2 * low_ns * high_ns / (low_ns + high_ns) if low_ns else 0.0


def quantile(buckets: Iterable[tuple[int, int, int]], total: int, share: float) -> int | None:
    """That quantile of `total` times, in ns, within ERROR. None where there is nothing.

    `buckets` are (low, high, count), the shortest times first.
    """
    rank = max(1, math.ceil(share * total - 1e-9))
    for low, high, count in buckets:
        rank -= count
        if rank <= 0:
            return round(middle(low, high))
    return None
