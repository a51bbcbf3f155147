# SPDX-License-Identifier: Apache-2.0
"""The kernel's table of transactions in flight, as far as user space has a part in it.

The kernel ends what is answered; what is not, ends here when its time is up. Whoever deletes a
transaction's key from the index owns its slot (see bpf/maps.h), so both sides may try at once.
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import TYPE_CHECKING

import numpy as np

from tracer.kernel import bpf
from tracer.record import TRANSACTION, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_U32 = struct.Struct("=I")
_KEY = struct.Struct("=16s2s2sI")
_STUCK_S = 5.0
_AT_MOST = 2048  # slots ended in one go, so that the rings are not kept waiting


class Table:
    """Ends transactions that have waited too long. `slots` is the table's size."""

    def __init__(self, map_fds: Mapping[str, int], slots: int) -> None:
        self._index = map_fds["slot_index"]
        self._slots = map_fds["slots"]
        self._free = map_fds["free_slots"]
        self._map = mmap.mmap(map_fds["slot_start"], slots * 8)
        self._start = np.frombuffer(self._map, np.uint64)
        # Slot: start_ns of what could not be claimed, and since when.
        self._stuck: dict[int, tuple[int, float]] = {}
        self.leaked = 0

    def in_flight(self) -> int:
        """How many transactions wait for an answer."""
        return int(np.count_nonzero(self._start))

    def peek(self) -> NDArray[np.void]:
        """What waits for an answer, as it is now; it goes on waiting."""
        found = []
        for number in np.flatnonzero(self._start.copy())[:_AT_MOST].tolist():
            raw = bpf.map_lookup(self._slots, _U32.pack(number), TRANSACTION.itemsize)
            if raw is not None:
                found.append(raw)
        slots: NDArray[np.void] = np.frombuffer(b"".join(found), TRANSACTION)
        waiting: NDArray[np.void] = slots[slots["status"] == Status.OPEN]
        return waiting

    def expire(self, before_ns: int) -> NDArray[np.void]:
        """Ends what began before that time (CLOCK_MONOTONIC) and returns it, oldest first.

        What has lost its key nobody else will end. But a program that has just taken the key may be
        held up before it is through, so that is believed only after a while.
        """
        start = self._start.copy()
        due = np.flatnonzero((start != 0) & (start < before_ns))
        due = due[np.argsort(start[due], kind="stable")][:_AT_MOST]
        ended = []
        for number in due.tolist():
            raw = bpf.map_lookup(self._slots, _U32.pack(number), TRANSACTION.itemsize)
            if raw is None:
                continue
            slot = np.frombuffer(raw, TRANSACTION)[0]
            if slot["start_ns"] != start[number]:
                continue  # ended and begun anew since
            if self._claim(number, slot):
                ended.append(raw)
                self._release(number)
                self._stuck.pop(number, None)
                continue
            began_ns, since_s = self._stuck.get(number, (0, 0.0))
            if began_ns != start[number]:
                self._stuck[number] = int(start[number]), time.monotonic()
            elif time.monotonic() - since_s > _STUCK_S:
                self._leak(number)
        return np.frombuffer(b"".join(ended), TRANSACTION)

    def give_up(self) -> None:
        """Counts what `expire` could not end as lost. No program may run any more."""
        for number in np.flatnonzero(self._start).tolist():
            self._leak(number)

    def _leak(self, number: int) -> None:
        self.leaked += 1
        self._stuck.pop(number, None)
        self._release(number)

    def _claim(self, number: int, slot: np.void) -> bool:
        """As claim in bpf/transactions.h does."""
        # NumPy's scalars are in host byte order, whatever the order of the array.
        dns_id, variant = int(slot["dns_id"]).to_bytes(2, "big"), int(slot["variant"])
        names = [
            (flow["client_addr"].tobytes(), int(flow["client_port"]).to_bytes(2, "big"))
            for flow in slot["flows"][: slot["nflows"]]
        ]
        if not bpf.map_delete(self._index, _KEY.pack(*names[0], dns_id, variant)):
            return False
        raw = bpf.map_lookup(self._slots, _U32.pack(number), TRANSACTION.itemsize)
        if raw is None or np.frombuffer(raw, TRANSACTION)[0]["generation"] != slot["generation"]:
            return False  # begun anew since: that one has lost its key now, and comes up as stuck
        ended = np.frombuffer(raw, TRANSACTION).copy()
        ended["generation"] += 1
        bpf.map_update(self._slots, _U32.pack(number), ended.tobytes())
        for name in set(names[1:]) - {names[0]}:
            bpf.map_delete(self._index, _KEY.pack(*name, dns_id, variant))
        return True

    def _release(self, number: int) -> None:
        self._start[number] = 0
        bpf.map_update(self._free, None, _U32.pack(number))
