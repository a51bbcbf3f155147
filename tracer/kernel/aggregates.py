# SPDX-License-Identifier: Apache-2.0
"""The histograms that the kernel keeps (bpf/latency.h), as far as user space has a part in them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tracer.kernel import bpf
from tracer.record import BUCKET_KEY, SERIES, SERIES_KEY, BackendKnown, SeriesKind, Status

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

_COUNT = np.dtype("u8")
_CLIENT = np.dtype("u8")
_BEGUN = np.dtype("u4")
# The series that stand for all that found no room, by id: one for each outcome.
_ENDS = (Status.ANSWERED, Status.TIMEOUT, Status.REFUSED, Status.DROPPED)
_OVERFLOW = {
    **{int(status): (SeriesKind.OF_QUESTIONS, status) for status in _ENDS},
    len(Status): (SeriesKind.OF_STAGES, Status.ANSWERED),
}
OVERFLOW_IDS = tuple(_OVERFLOW)


def overflow_key(kind: int, status: int, client: np.void | None = None) -> bytes:
    """SERIES_KEY of the series that stands for others: of the client of that key, or of all."""
    key = np.zeros(1, SERIES_KEY)
    key["kind"], key["status"], key["backend"] = kind, status, BackendKnown.OVERFLOW
    if client is not None:
        key["cgroup_id"], key["netns"] = client["cgroup_id"], client["netns"]
    return key.tobytes()


class Counted(NamedTuple):
    """Series and buckets since the start. Rows of `keys` and `series` belong together, and rows of
    `bucket_keys` and `counts`; a bucket belongs to the series with its id."""

    keys: NDArray[np.void]  # SERIES_KEY
    series: NDArray[np.void]  # SERIES
    bucket_keys: NDArray[np.void]  # BUCKET_KEY
    counts: NDArray[np.uint64]


class Aggregates:
    """Reads the tables, and makes room in them."""

    def __init__(self, map_fds: Mapping[str, int]) -> None:
        self._series = map_fds["all_series"]
        self._buckets = map_fds["buckets"]
        self._begun = map_fds["series_begun"]
        for number, (kind, status) in _OVERFLOW.items():
            series = np.zeros(1, SERIES)
            series["id"] = number
            bpf.map_update(self._series, overflow_key(kind, status), series.tobytes())

    def read(self) -> Counted:
        """All of it. Buckets are read first, so that the series of each is there too."""
        bucket_keys, counts = bpf.map_items(self._buckets, BUCKET_KEY.itemsize, _COUNT.itemsize)
        keys, series = bpf.map_items(self._series, SERIES_KEY.itemsize, SERIES.itemsize)
        return Counted(
            np.frombuffer(keys, SERIES_KEY),
            np.frombuffer(series, SERIES),
            np.frombuffer(bucket_keys, BUCKET_KEY),
            np.frombuffer(counts, _COUNT),
        )

    def forget(self, counted: Counted, before_ns: int, spare: Collection[int] = ()) -> set[int]:
        """Makes room: drops series that nothing was added to since (CLOCK_MONOTONIC), but for
        `spare`; their ids.

        `counted` is what was read last; what has been counted since keeps its series. A series goes
        before its buckets do: should a transaction just be counted there, it finds a series of that
        name begun anew, and a bucket that comes too late goes the next time. A client whose series
        went may begin others.
        """
        series = counted.series
        idle = (series["last_ns"] < before_ns) & ~np.isin(series["id"], [*OVERFLOW_IDS, *spare])
        gone = set()
        for row in np.flatnonzero(idle).tolist():
            key = counted.keys[row].tobytes()
            now = bpf.map_lookup(self._series, key, SERIES.itemsize)
            if now == series[row].tobytes():
                bpf.map_delete(self._series, key)
                gone.add(int(series["id"][row]))
        there = np.array([n for n in series["id"].tolist() if n not in gone], np.uint64)
        for key in counted.bucket_keys[~np.isin(counted.bucket_keys["id"], there)]:
            bpf.map_delete(self._buckets, key.tobytes())
        self._count_begun(counted.keys[np.isin(series["id"], there)])
        return gone

    def _count_begun(self, keys: NDArray[np.void]) -> None:
        """How many series each client has now (client_number in bpf/latency.h)."""
        own = keys[keys["backend"] != BackendKnown.OVERFLOW]
        numbers = own["cgroup_id"] ^ (own["netns"].astype(np.uint64) << np.uint64(32))
        begun = Counter(numbers.tolist())
        known, _ = bpf.map_items(self._begun, _CLIENT.itemsize, _BEGUN.itemsize)
        for client in set(np.frombuffer(known, _CLIENT).tolist()) - begun.keys():
            bpf.map_delete(self._begun, _CLIENT.type(client).tobytes())
        for client, number in begun.items():
            value = _BEGUN.type(number).tobytes()
            bpf.map_update(self._begun, _CLIENT.type(client).tobytes(), value)
