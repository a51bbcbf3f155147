# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts of transactions is what the records of the same transactions say."""

from __future__ import annotations

import math
import random
import time
from collections import Counter as Tallies
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import packets as p
from tests.packets import FLOW, FLOW6, Flow, dns_query, dns_response
from tests.programs import (
    BUCKETS,
    EGRESS,
    INGRESS,
    NODE,
    OTHER_NODE,
    RECEIVE,
    SEND,
    Programs,
    compiled_programs,
    loaded_programs,
)
from tracer.kernel import bpf
from tracer.kernel.aggregates import OVERFLOW_IDS, Aggregates, Counted
from tracer.kernel.session import Keeping
from tracer.record import (
    BUCKET_KEY,
    SERIES_KEY,
    BackendKnown,
    Counter,
    SeriesKind,
    Stage,
    Status,
)
from tracer.record import SERIES as SERIES_DTYPE
from tracer.stages import ERROR, bounds, buckets_of, quantile, stage_times
from tracer.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tracer.record import HopKind

SERIES = 256
TYPES = (1, 28, 12, 33, 99)
RCODES = (0, 3, 2)
POD = FLOW._replace(server="10.244.2.2")  # after DNAT


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: None) -> Iterator[None]:
    del root
    with compiled_programs(SERIES):
        yield


@pytest.fixture
def kernel() -> Iterator[Programs]:
    with loaded_programs(SERIES) as programs:
        yield programs


@pytest.fixture
def counted(kernel: Programs) -> Aggregates:
    return Aggregates(kernel.session.built.map_fds)


def canonical(counted: Counted) -> dict[bytes, tuple[object, ...]]:
    """By key; series that nothing is in are left out."""
    buckets: dict[int, dict[tuple[int, int], int]] = {}
    for key, count in zip(counted.bucket_keys, counted.counts.tolist(), strict=True):
        buckets.setdefault(int(key["id"]), {})[int(key["stage"]), int(key["bucket"])] = count
    return {
        key.tobytes(): (
            int(series["count"]),
            series["sum_ns"].tolist(),
            series["max_ns"].tolist(),
            buckets.get(int(series["id"]), {}),
        )
        for key, series in zip(counted.keys, counted.series, strict=True)
        if series["count"]
    }


def tallied(batches: list[NDArray[np.void]]) -> Counted:
    tally = Tally({})
    for batch in batches:
        tally.add(batch["transaction"] if "transaction" in (batch.dtype.names or ()) else batch)
    return tally.read()


# A way from pod to pod: (hook, namespace, flow) of the query; the response goes back.
WAYS = {
    "from pod to pod": [
        (SEND, NODE, FLOW), (INGRESS, NODE, FLOW), (EGRESS, NODE, POD), (INGRESS, OTHER_NODE, POD),
        (EGRESS, OTHER_NODE, POD), (RECEIVE, OTHER_NODE, POD),
    ],
    "the server is elsewhere": [(SEND, NODE, FLOW), (INGRESS, NODE, FLOW), (EGRESS, NODE, POD)],
    "the client is elsewhere": [(INGRESS, NODE, POD), (EGRESS, NODE, POD), (RECEIVE, NODE, POD)],
    "sockets alone": [(SEND, NODE, FLOW), (RECEIVE, NODE, FLOW)],
    "over IPv6": [(SEND, NODE, FLOW6), (EGRESS, NODE, FLOW6)],
    "the service's address alone": [(SEND, NODE, FLOW), (INGRESS, NODE, FLOW)],
}  # fmt: skip
BACK = {SEND: RECEIVE, RECEIVE: SEND, INGRESS: EGRESS, EGRESS: INGRESS}


def walk(
    kernel: Programs, way: Sequence[tuple[HopKind, int, Flow]], dns_id: int, type_: int, rcode: int
) -> None:
    """A query, and its response."""
    query = dns_query(type_=type_, dns_id=dns_id)
    response = dns_response(type_=type_, dns_id=dns_id, rcode=rcode)
    for hook, netns, flow in way:
        kernel.show(hook, p.query_packet(query, flow), netns)
    for hook, netns, flow in reversed(way):
        kernel.show(BACK[hook], p.response_packet(response, flow), netns)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_counted_as_its_record_says(
    kernel: Programs, counted: Aggregates, way: str
) -> None:
    walk(kernel, WAYS[way], 1, 1, 0)
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record["type"] == 1
    assert record["weight"] == 1
    found = canonical(counted.read())
    assert found == canonical(tallied([record.batch]))
    kinds = sorted(key[72] for key in found)
    assert kinds == [SeriesKind.OF_QUESTIONS, SeriesKind.OF_STAGES]
    times = stage_times(record.batch["transaction"])[0]
    hops = record.transaction["hops"]["t_ns"][: record["nhops"]].tolist()
    assert times.sum() == hops[-1] - hops[0]


def test_stages_are_between_the_hops_that_they_are_named_after(kernel: Programs) -> None:
    walk(kernel, WAYS["from pod to pod"], 1, 1, 0)
    record = kernel.record()
    t = [int(n) for n in record.transaction["hops"]["t_ns"][: record["nhops"]]]
    times = dict(zip(Stage, stage_times(record.batch["transaction"])[0].tolist(), strict=False))
    assert times == {
        Stage.APPLICATION_SEND: t[1] - t[0],
        Stage.NODE: t[2] - t[1] + t[4] - t[3],
        Stage.NETWORK: t[3] - t[2],
        Stage.SERVER_QUEUE: t[5] - t[4],
        Stage.SERVER: t[6] - t[5],
        Stage.UPSTREAM: 0,
        Stage.RETURN: t[10] - t[6],
        Stage.WAKE_UP: t[11] - t[10],
        Stage.REMOTE: 0,
    }
    assert sum(times.values()) == t[11] - t[0] == record["end_ns"] - record["start_ns"]


def test_any_mixture_is_counted_as_its_records_say(kernel: Programs, counted: Aggregates) -> None:
    dice = random.Random(5)  # noqa: S311 - no secret
    batches = []
    for number in range(60):
        way = WAYS[dice.choice(sorted(WAYS))]
        walk(kernel, way, number, dice.choice(TYPES[:2]), dice.choice(RCODES[:2]))
        batches += [record.batch for record in kernel.records()]
    assert sum(map(len, batches)) == 60
    found = counted.read()
    assert canonical(found) == canonical(tallied(batches))
    of_questions = found.keys["kind"] == SeriesKind.OF_QUESTIONS
    assert found.series["count"][of_questions].sum() == 60
    assert Counter.BUCKETS_FULL not in kernel.counted()


def test_query_that_is_refused_is_counted_without_a_time(
    kernel: Programs, counted: Aggregates
) -> None:
    refused = p.query_packet(dns_query())
    kernel.show(SEND, refused)
    kernel.show(EGRESS, p.unreachable(refused))
    found = counted.read()
    assert canonical(found) == canonical(tallied([kernel.record().batch]))
    assert Tallies(found.keys["status"][found.series["count"] == 1].tolist()) == {Status.REFUSED: 1}
    assert len(found.counts) == 0


def test_query_that_its_client_repeats_leaves_to_be_counted_outside(
    kernel: Programs, counted: Aggregates
) -> None:
    kernel.session.keep(Keeping(share=0, notable_share=0))
    query = p.query_packet(dns_query())
    kernel.show(SEND, query)
    time.sleep(0.002)
    kernel.show(SEND, query)
    assert not canonical(counted.read())
    record = kernel.record()
    assert record.status == Status.TIMEOUT
    found = tallied([record.batch])
    assert found.keys["status"].tolist() == [Status.TIMEOUT]
    assert found.series["count"].tolist() == [1]
    assert len(found.counts) == 0


def test_only_what_is_slow_or_failed_leaves(kernel: Programs, counted: Aggregates) -> None:
    way = WAYS["sockets alone"]
    kernel.session.keep(Keeping(slower_ns=10**12, share=0))
    for number, rcode in enumerate((0, 3, 2, 5)):
        walk(kernel, way, number, 1, rcode)
    assert [record["response_flags"] & 15 for record in kernel.records()] == [2, 5]
    kernel.session.keep(Keeping(slower_ns=1, share=0))
    walk(kernel, way, 9, 1, 0)
    assert kernel.record()["weight"] == 1
    assert kernel.counted()[Counter.NOT_KEPT] == 2
    kernel.session.keep(Keeping(slower_ns=1, share=0, notable_share=0))
    walk(kernel, way, 9, 1, 0)
    assert kernel.records() == []
    assert kernel.counted()[Counter.SKIPPED] == 1
    kernel.check_accounts()
    found = counted.read()
    assert found.series["count"][found.keys["kind"] == SeriesKind.OF_QUESTIONS].sum() == 6


def test_sample_is_as_large_as_it_says(kernel: Programs) -> None:
    kernel.session.keep(Keeping(slower_ns=0, share=4))
    records = []
    for number in range(2000):
        walk(kernel, WAYS["sockets alone"], number, 1, 0)
        records += kernel.records()
    assert {record["weight"] for record in records} == {4}
    # Binomial: the mean is 500, and six times the standard deviation 116.
    assert 384 < len(records) < 616
    assert kernel.counted()[Counter.NOT_KEPT] == 2000 - len(records)


def test_what_finds_no_series_is_counted_all_the_same(
    kernel: Programs, counted: Aggregates
) -> None:
    for number in range(SERIES * 2):
        flow = FLOW._replace(server=f"10.96.{number >> 8}.{number & 255}")
        walk(kernel, [(SEND, NODE, flow), (RECEIVE, NODE, flow)], number, 1, 0)
        kernel.records()
    found = counted.read()
    of_questions = found.keys["kind"] == SeriesKind.OF_QUESTIONS
    assert found.series["count"][of_questions].sum() == SERIES * 2
    assert found.series["count"][~of_questions].sum() == SERIES * 2
    overflow = found.keys["backend"] == BackendKnown.OVERFLOW
    assert kernel.counted()[Counter.SERIES_FULL] == found.series["count"][overflow].sum() > 0
    # It is its client's own, who has taken no more than a share of the room.
    (client,) = {int(key["cgroup_id"]) for key in found.keys[found.series["count"] > 0]}
    assert client
    assert 0 < (~overflow).sum() <= SERIES // 8 + 1


def test_client_that_asks_ever_more_servers_leaves_room_for_others(
    kernel: Programs, counted: Aggregates
) -> None:
    """Clients on other machines are one, here, and this process is another."""
    for number in range(SERIES * 2):
        flow = POD._replace(server=f"10.245.{number >> 8}.{number & 255}")
        walk(kernel, [(INGRESS, NODE, flow), (RECEIVE, NODE, flow)], number, 1, 0)
    walk(kernel, WAYS["sockets alone"], 7, 1, 0)
    found = counted.read()
    told = (found.series["count"] > 0) & (found.keys["netns"] != 0)
    assert sorted(found.keys["kind"][told].tolist()) == [0, 1]
    assert BackendKnown.OVERFLOW not in found.keys["backend"][told].tolist()
    # As long as its series are there, it may not begin more.
    flow = POD._replace(server="10.244.4.1")
    for before_ns, begun in ((0, []), (1 << 62, [BackendKnown.KNOWN] * 2)):
        counted.forget(counted.read(), before_ns)
        walk(kernel, [(INGRESS, NODE, flow), (RECEIVE, NODE, flow)], 8, 1, 0)
        now = counted.read()
        fresh = ~np.isin(now.series["id"], found.series["id"])
        assert now.keys["backend"][fresh].tolist() == begun


def test_what_finds_no_room_of_its_clients_own_is_counted_with_all_others(
    kernel: Programs, counted: Aggregates
) -> None:
    for number in range(SERIES - len(OVERFLOW_IDS)):
        key = np.zeros(1, SERIES_KEY)
        key["cgroup_id"] = 1 << 40 | number
        bpf.map_update(
            kernel.session.built.map_fds["all_series"], key.tobytes(), bytes(SERIES_DTYPE.itemsize)
        )
    walk(kernel, WAYS["sockets alone"], 1, 1, 0)
    found = counted.read()
    told = found.series["count"] > 0
    assert set(found.series["id"][told].tolist()) < set(OVERFLOW_IDS)
    assert sorted(found.keys["kind"][told].tolist()) == [0, 1]
    assert kernel.counted()[Counter.SERIES_FULL] == 2


def test_what_finds_no_bucket_is_counted_as_such(kernel: Programs, counted: Aggregates) -> None:
    room = 6
    for number in range(BUCKETS - room):
        key = np.zeros(1, BUCKET_KEY)
        key["id"], key["bucket"] = 1 << 40, number
        bpf.map_update(kernel.session.built.map_fds["buckets"], key.tobytes(), bytes(8))
    for number in range(40):
        walk(kernel, WAYS["sockets alone"], number, TYPES[number % 2], 0)
        kernel.records()
    found = counted.read()
    # Each has a whole, and three stages.
    missing = kernel.counted()[Counter.BUCKETS_FULL]
    assert found.counts.sum() + missing == 4 * 40
    assert len(found.counts) == BUCKETS
    assert found.series["count"][found.keys["kind"] == SeriesKind.OF_QUESTIONS].sum() == 40
    assert found.series["sum_ns"].sum() > 0


def test_series_that_nothing_was_added_to_are_forgotten(
    kernel: Programs, counted: Aggregates
) -> None:
    walk(kernel, WAYS["sockets alone"], 1, 1, 0)
    kernel.records()
    found = counted.read()
    last = int(found.series["last_ns"].max())
    assert counted.forget(found, last) == set()
    assert len(counted.forget(found, last + 1)) == 2
    left = counted.read()
    assert set(left.series["id"].tolist()) == set(OVERFLOW_IDS)
    assert len(left.counts) == 0


def test_making_room_costs_nothing_that_was_counted(kernel: Programs, counted: Aggregates) -> None:
    """Not what came after the reading, nor what is to be spared; buckets of nobody go."""
    walk(kernel, WAYS["sockets alone"], 1, 1, 0)
    orphan = np.zeros(1, BUCKET_KEY)
    orphan["id"] = 1 << 40
    bpf.map_update(kernel.session.built.map_fds["buckets"], orphan.tobytes(), bytes(8))
    before = counted.read()
    walk(kernel, WAYS["sockets alone"], 1, 1, 0)
    kernel.records()
    ever = 1 << 62
    assert counted.forget(before, ever) == set()
    now = counted.read()
    assert now.series["count"].sum() == 2 * 2
    assert now.counts.sum() == 2 * 4
    assert orphan[0] not in now.bucket_keys
    assert counted.forget(now, ever, set(now.series["id"].tolist())) == set()
    assert counted.read().counts.sum() == 2 * 4


@given(st.integers(0, 1 << 50))
def test_bucket_holds_its_times_and_its_middle_is_near_them(ns: int) -> None:
    (bucket,) = buckets_of(np.array([ns]))
    low, high = bounds(int(bucket))
    assert low <= ns < high
    found = quantile([(low, high, 1)], 1, 0.5)
    assert found is not None
    assert abs(found - ns) <= math.ceil(ns * ERROR)
    assert ERROR < 0.05


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_quantile_is_within_the_error_of_the_exact_one(times: list[int], share: float) -> None:
    numbers, counts = np.unique(buckets_of(np.array(times)), return_counts=True)
    buckets = [(*bounds(n), c) for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)]
    found = quantile(buckets, len(times), share)
    exact = sorted(times)[max(1, math.ceil(share * len(times))) - 1]
    assert found is not None
    assert abs(found - exact) <= math.ceil(exact * ERROR)
