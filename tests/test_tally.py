# SPDX-License-Identifier: Apache-2.0
"""What user space counts itself is bounded, and counted where it finds no room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.test_assemble import slot
from tracer import tally as module
from tracer.kernel.aggregates import OVERFLOW_IDS
from tracer.tally import Tally

if TYPE_CHECKING:
    import numpy as np
    import pytest
    from numpy.typing import NDArray


def answered(cgroup_id: int, took_ns: int) -> NDArray[np.void]:
    batch = slot(">send >receive <send <receive", end_ns=0)
    batch["cgroup_id"] = cgroup_id
    batch["hops"]["t_ns"][0, 3] = batch["hops"]["t_ns"][0, 2] + took_ns
    batch["end_ns"] = batch["hops"]["t_ns"][0, 3]
    return batch


def test_times_without_a_bucket_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKETS_MAX", 10)
    tally = Tally({})
    for number in range(20):
        tally.add(answered(7, 1000 << number))
    found = tally.read()
    assert found.series["count"].tolist() == [20, 20]
    assert len(found.counts) == 10
    # Each has a time as a whole, and one for each of three stages.
    assert found.counts.sum() + tally.untimed == 20 * 4
    assert tally.untimed > 0

    last_ns = int(found.series["last_ns"].max())
    assert len(tally.forget(last_ns + 1)) == 2
    untimed = tally.untimed
    tally.add(answered(7, 1000))
    assert tally.untimed == untimed
    assert tally.read().counts.sum() == 4


def test_client_of_many_addresses_and_minutes_has_its_share_alone() -> None:
    tally = Tally({})
    for minute in range(4):
        for number in range(2 * module.SERIES_PER_CLIENT):
            batch = answered(7, 1000)
            batch["netns"] = 1
            batch["flows"]["client_addr"][0, 0] = bytes(12) + (minute << 16 | number).to_bytes(4)
            tally.add(batch)
        tally.forget(0)
    assert len(tally.read().series) <= module.SERIES_PER_CLIENT + len(OVERFLOW_IDS)
    before = tally.overflowed
    tally.add(answered(8, 1000))
    assert tally.overflowed == before


def test_series_without_room_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERIES_MAX", 4 + len(OVERFLOW_IDS))
    tally = Tally({})
    for cgroup_id in range(10):
        tally.add(answered(cgroup_id, 1000))
    found = tally.read()
    assert found.series["count"].sum() == 20
    assert sorted(found.series["count"].tolist()) == [1, 1, 1, 1, 8, 8]
    assert tally.overflowed == 16
