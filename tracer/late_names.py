# SPDX-License-Identifier: Apache-2.0
"""What is of a container that has no name yet waits for it, for a moment."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from tracer.slots import slots_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tracer.cluster.identities import Identities

_WAIT_NS = 2_000_000_000  # how long to wait for the name of a pod that has just begun


class LateNames:
    """Holds back batches of records, `batches_max` of them; what is beyond goes on without names."""

    def __init__(self, identities: Identities, batches_max: int) -> None:
        self._identities = identities
        self._batches_max = batches_max
        self._held: deque[tuple[int, NDArray[np.void]]] = deque()

    def hold(self, records: NDArray[np.void]) -> NDArray[np.void]:
        """Keeps what has to wait, and gives back the rest."""
        if not len(records):
            return records
        self._identities.look()
        cgroups = slots_of(records)["cgroup_id"]
        nameless = [
            cgroup_id
            for cgroup_id in set(cgroups.tolist())
            if not self._identities.is_settled(cgroup_id)
        ]
        if not nameless or len(self._held) >= self._batches_max:
            return records
        waits = np.isin(cgroups, nameless)
        self._held.append((time.monotonic_ns() + _WAIT_NS, records[waits]))
        return records[~waits]

    def due(self, now_ns: int, *, at_once: bool = False) -> Iterator[NDArray[np.void]]:
        """What has its names by now, or whose time is up (CLOCK_MONOTONIC)."""
        for _ in range(len(self._held)):
            due_ns, records = self._held.popleft()
            cgroups = set(slots_of(records)["cgroup_id"].tolist())
            if at_once or now_ns >= due_ns or all(map(self._identities.is_settled, cgroups)):
                yield records
            else:
                self._held.append((due_ns, records))
