# SPDX-License-Identifier: Apache-2.0
"""From readings of the kernel's counts to what has come under which name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tracer.continuous.book import Book, Entry, statuses
from tracer.continuous.budget import Budget
from tracer.continuous.labels import Labels
from tracer.continuous.rows import histogram_rows
from tracer.kernel.aggregates import Counted
from tracer.kernel.session import Keeping
from tracer.record import (
    BUCKET_KEY,
    SERIES,
    SERIES_KEY,
    BackendKnown,
    SeriesKind,
    Stage,
    Status,
)
from tracer.stages import ERROR, buckets_of

CGROUP = 77
ADDRESS = bytes(10) + b"\xff\xff" + bytes([10, 96, 0, 10])
POD_ADDRESS = bytes(10) + b"\xff\xff" + bytes([10, 244, 2, 2])


class Names:
    """Who is who, for whom nobody has to be asked."""

    def __init__(self) -> None:
        self.named: dict[int, tuple[str, str, str, str]] = {CGROUP: ("sre", "web-0", "app", "n1")}
        self.services = {("10.96.0.10", 53): "kube-system/kube-dns"}
        self.servers = {"10.244.2.2": ("kube-system", "coredns-1")}
        self.version = 0

    def client(self, cgroup_id: int, netns: int, ip: str) -> tuple[str | None, ...]:
        del netns, ip
        return self.named.get(cgroup_id, (None, None, None, None))

    def service(self, ip: str, port: int) -> str | None:
        return self.services.get((ip, port))

    def server(self, cgroup_id: int, ip: str) -> tuple[str | None, str | None]:
        del cgroup_id
        return self.servers.get(ip, (None, None))

    def role(self, ip: str) -> str | None:
        return "cluster" if ip == "10.96.0.10" else None

    def place(self, netns: int, ifindex: int) -> tuple[str | None, str | None]:
        del netns, ifindex
        return None, None


class Kernel:
    """Tables as the kernel has them."""

    def __init__(self) -> None:
        self.keys: list[np.void] = []
        self.series: dict[int, dict[str, Any]] = {}
        self.buckets: Counter[tuple[int, int, int]] = Counter()

    def begin(self, number: int, **fields: Any) -> None:
        key = np.zeros(1, SERIES_KEY)
        key["cgroup_id"], key["status"], key["type"] = CGROUP, Status.ANSWERED, 1
        key["server_addr"], key["server_port"] = np.void(ADDRESS), 53
        key["backend_addr"], key["backend_port"] = np.void(POD_ADDRESS), 53
        key["backend"], key["protocol"] = BackendKnown.KNOWN, 17
        for name, value in fields.items():
            key[name] = value
        self.keys.append(key[0])
        self.series[number] = {"count": 0, "sum": [0] * len(Stage), "max": [0] * len(Stage)}

    def count(self, number: int, ns: int, bucket: int, stage: Stage = Stage.TOTAL) -> None:
        one = self.series[number]
        one["count"] += 1
        one["sum"][stage] += ns
        one["max"][stage] = max(one["max"][stage], ns)
        self.buckets[number, stage, bucket] += 1

    def read(self) -> Counted:
        series = np.zeros(len(self.series), SERIES)
        for row, (number, one) in enumerate(self.series.items()):
            series[row]["id"], series[row]["count"] = number, one["count"]
            series[row]["sum_ns"], series[row]["max_ns"] = one["sum"], one["max"]
        buckets = np.zeros(len(self.buckets), BUCKET_KEY)
        for row, (number, stage, bucket) in enumerate(self.buckets):
            buckets[row]["id"], buckets[row]["stage"] = number, stage
            buckets[row]["bucket"] = bucket
        keys = np.array(self.keys, SERIES_KEY)
        return Counted(keys, series, buckets, np.array(list(self.buckets.values()), np.uint64))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def book(settled: bool = True) -> tuple[Book, Names]:
    names = Names()
    is_settled = lambda cgroup_id: settled or cgroup_id in names.named  # noqa: E731
    return Book(names, is_settled, lambda: names.version), names  # type: ignore[arg-type]


def test_each_reading_gives_what_has_come_since_the_one_before(kernel: Kernel) -> None:
    reader, _ = book()
    kernel.begin(1000, netns=7)
    kernel.count(1000, 500, 40)
    ((labels, entry),) = reader.take(kernel.read())
    assert labels == Labels(
        False, "sre", "web-0", "app", "10.96.0.10", 53, "kube-system/kube-dns", "cluster",
        "10.244.2.2", "kube-system", "coredns-1", "A", "NOERROR", "answered", "udp",
    )  # fmt: skip
    assert (entry.count, entry.times[Stage.TOTAL].counts) == (1, {40: 1})
    assert list(reader.take(kernel.read())) == []
    kernel.count(1000, 700, 40)
    kernel.count(1000, 900, 44)
    ((_, entry),) = reader.take(kernel.read())
    histogram = entry.times[Stage.TOTAL]
    assert (entry.count, histogram.counts, histogram.sum_ns) == (2, {40: 1, 44: 1}, 1600)
    assert histogram.max_ns == 900


def test_longest_is_of_its_reading(kernel: Kernel) -> None:
    reader, _ = book()
    kernel.begin(1)
    found = []
    for ns in (3_000_000_000, 1_000_000, 4_000_000_000, 2_000_000):
        kernel.count(1, ns, int(buckets_of(np.array([ns]))[0]))
        ((_, entry),) = reader.take(kernel.read())
        found.append(entry.times[Stage.TOTAL].max_ns)
    assert (found[0], found[2]) == (3_000_000_000, 4_000_000_000)
    assert 1_000_000 <= found[1] <= 1_000_000 * (1 + 2 * ERROR)
    assert 2_000_000 <= found[3] <= 2_000_000 * (1 + 2 * ERROR)


def test_time_that_is_counted_between_buckets_and_series_is_whole_in_two_readings(
    kernel: Kernel,
) -> None:
    reader, _ = book()
    kernel.begin(1)
    kernel.count(1, 1000, int(buckets_of(np.array([1000]))[0]))
    list(reader.take(kernel.read()))
    before = kernel.read()
    kernel.count(1, 5_000_000, int(buckets_of(np.array([5_000_000]))[0]))
    after = kernel.read()
    torn = Counted(after.keys, after.series, before.bucket_keys, before.counts)
    ((labels, first),) = reader.take(torn)
    ((_, second),) = reader.take(after)
    rows = [
        histogram_rows(labels, entry, n * 10**9, (n + 1) * 10**9)[0]
        for n, entry in enumerate((first, second))
    ]
    assert [(row["count"], row["timed"]) for row in rows] == [(1, 0), (0, 1)]
    assert [row["sum_ns"] for row in rows] == [5_000_000, 0]
    assert rows[0]["max_ns"] == 5_000_000
    assert rows[1]["max_ns"] in (5_000_000, None)


def test_stages_are_told_apart_by_who_asked_and_who_answered_alone(kernel: Kernel) -> None:
    reader, _ = book()
    kernel.begin(1001, kind=SeriesKind.OF_STAGES)
    kernel.count(1001, 500, 40, Stage.SERVER)
    kernel.count(1001, 100, 20, Stage.NODE)
    ((labels, entry),) = reader.take(kernel.read())
    assert (labels.of_stages, labels.pod, labels.backend_pod) == (True, "web-0", "coredns-1")
    assert (labels.server_ip, labels.type, labels.rcode) == (None, None, None)
    assert {stage: times.sum_ns for stage, times in entry.times.items()} == {
        Stage.SERVER: 500,
        Stage.NODE: 100,
    }


def test_what_the_service_address_hides_is_unknown(kernel: Kernel) -> None:
    reader, _ = book()
    kernel.begin(1, backend=BackendKnown.AS_ASKED, backend_addr=np.void(ADDRESS))
    kernel.begin(2, backend=BackendKnown.UNKNOWN)
    kernel.begin(3, backend=BackendKnown.OVERFLOW)
    kernel.begin(4, backend=BackendKnown.OVERFLOW, cgroup_id=0)
    for number in (1, 2, 3, 4):
        kernel.count(number, 1, 1)
    found = [labels for labels, _ in reader.take(kernel.read())]
    assert [labels.backend_ip for labels in found] == [None] * 4
    assert [labels.overflow for labels in found] == [False, False, True, True]
    # Of a client that asked for too much, and of all.
    assert [labels.pod for labels in found[2:]] == ["web-0", None]
    assert [labels.server_ip for labels in found[2:]] == [None, None]


def test_name_that_comes_late_is_waited_for_and_nothing_is_lost(kernel: Kernel) -> None:
    reader, names = book(settled=False)
    names.named.clear()
    kernel.begin(5)
    kernel.count(5, 10, 10)
    assert list(reader.take(kernel.read())) == []
    kernel.count(5, 10, 10)
    names.named[CGROUP] = ("sre", "late-0", "app", "n1")
    ((labels, entry),) = reader.take(kernel.read())
    assert (labels.pod, entry.count, entry.times[Stage.TOTAL].counts) == ("late-0", 2, {10: 2})


@pytest.mark.parametrize("last", [True, False])
def test_name_that_never_comes_is_unknown(kernel: Kernel, last: bool) -> None:
    reader, names = book(settled=False)
    names.named.clear()
    kernel.begin(5)
    kernel.count(5, 10, 10)
    found: list[tuple[Labels, Entry]] = []
    for _ in range(1 if last else 5):
        found += reader.take(kernel.read(), last=last)
    ((labels, entry),) = found
    assert (labels.pod, entry.count) == (None, 1)
    assert statuses(found) == {"answered": 1}


def test_name_stays_when_the_pod_has_gone(kernel: Kernel) -> None:
    reader, names = book()
    kernel.begin(5)
    kernel.count(5, 10, 10)
    list(reader.take(kernel.read()))
    names.named.clear()
    kernel.count(5, 10, 10)
    ((labels, _),) = reader.take(kernel.read())
    assert labels.pod == "web-0"


def test_server_that_is_another_one_by_now_is_called_so(kernel: Kernel) -> None:
    """A DNS pod was made again at the same address; its service's name came late."""
    reader, names = book()
    names.services.clear()
    kernel.begin(5)
    told = []
    for version, (service, server) in enumerate(
        [(None, "coredns-1"), ("kube-system/kube-dns", "coredns-2"), (None, None)]
    ):
        names.version = version
        names.services = {("10.96.0.10", 53): service} if service else {}
        names.servers = {"10.244.2.2": ("kube-system", server)} if server else {}
        kernel.count(5, 10, 10)
        ((labels, entry),) = reader.take(kernel.read())
        told.append((labels.pod, labels.service, labels.backend_pod, entry.count))
    dns = "kube-system/kube-dns"
    assert told == [
        ("web-0", None, "coredns-1", 1),
        ("web-0", dns, "coredns-2", 1),
        ("web-0", dns, "coredns-2", 1),  # of what has gone, the last that was known
    ]


def test_what_waits_for_its_name_is_told(kernel: Kernel) -> None:
    """Whoever makes room in the tables has to spare it."""
    reader, names = book(settled=False)
    names.named.clear()
    kernel.begin(5)
    kernel.count(5, 10, 10)
    assert list(reader.take(kernel.read())) == []
    assert reader.waiting() == {5}
    list(reader.take(kernel.read(), last=True))
    assert reader.waiting() == set()


def test_series_begun_anew_under_the_same_key_is_another_one(kernel: Kernel) -> None:
    reader, _ = book()
    kernel.begin(5)
    kernel.count(5, 10, 10)
    list(reader.take(kernel.read()))
    reader.forget({5})
    fresh = Kernel()
    fresh.begin(6)
    fresh.count(6, 10, 10)
    ((_, entry),) = reader.take(fresh.read())
    assert (entry.count, entry.times[Stage.TOTAL].counts) == (1, {10: 1})


class Clock:
    cpu_s = 0.0

    def __call__(self) -> float:
        return self.cpu_s


def test_budget_lets_less_leave_until_it_is_kept_and_more_when_there_is_room() -> None:
    clock = Clock()
    asked = Keeping(slower_ns=5, share=10, notable_share=1)
    budget = Budget(0.01, asked, clock)
    assert budget.look(0.0, 0, 0) == asked
    shares = []
    for second in range(1, 30):
        clock.cpu_s += 0.02
        kept = budget.look(float(second), 1000 * second, 0)
        shares.append((kept.share, kept.notable_share))
    assert shares[:3] == [(20, 1), (40, 1), (80, 1)]
    assert shares[-1][0] >= 1 << 20
    assert shares[-1][1] > 1
    assert budget.used == pytest.approx(0.02)
    for second in range(30, 300):
        clock.cpu_s += 0.001
        kept = budget.look(float(second), 29_000, 0)
    assert kept == asked


def test_budget_is_not_sought_where_it_is_not_spent() -> None:
    """Pods come and go, say: then it would not help to know less of queries."""
    clock = Clock()
    asked = Keeping(slower_ns=5, share=10, notable_share=1)
    budget = Budget(0.01, asked, clock)
    for second in range(100):
        clock.cpu_s += 0.02
        assert budget.look(float(second), 10 * second, 0) == asked
    assert budget.used == pytest.approx(0.02)


def test_budget_is_not_sought_in_a_handful() -> None:
    """Barely over it, a few transactions a second are not what to save at."""
    clock = Clock()
    asked = Keeping(slower_ns=5, share=1, notable_share=1)
    budget = Budget(0.01, asked, clock)
    for second in range(100):
        clock.cpu_s += 0.0101
        assert budget.look(float(second), second, second) == asked


def test_budget_that_is_nearly_used_changes_nothing() -> None:
    clock = Clock()
    budget = Budget(0.01, Keeping(share=10), clock)
    for second in range(10):
        clock.cpu_s += 0.008
        assert budget.look(float(second), 1000 * second, 0).share == 10


def test_sample_of_nothing_stays_so() -> None:
    clock = Clock()
    budget = Budget(0.01, Keeping(share=0), clock)
    budget.look(0.0, 0, 0)
    clock.cpu_s += 1
    assert budget.look(1.0, 0, 10_000) == Keeping(share=0, notable_share=64)
    assert budget.look(200.0, 0, 10_000) == Keeping(share=0, notable_share=32)


def test_storm_of_failures_costs_the_failed_ones() -> None:
    """A tenth of all is ordinary, and an interval is ten seconds."""
    clock = Clock()
    budget = Budget(0.01, Keeping(share=100), clock)
    budget.look(0.0, 0, 0)
    clock.cpu_s += 1.3
    assert budget.look(10.0, 1000, 20_000) == Keeping(share=100, notable_share=16)
    clock.cpu_s += 0.15
    assert budget.look(20.0, 2000, 21_300) == Keeping(share=100, notable_share=32)


def test_moment_of_work_now_and_then_changes_nothing() -> None:
    clock = Clock()
    budget = Budget(0.01, Keeping(share=10), clock)
    for second in range(600):
        clock.cpu_s += 0.2 if second % 60 == 59 else 0.002
        assert budget.look(float(second), 10_000 * second, 0).share == 10


@pytest.mark.parametrize(("cgroup_id", "named"), [(1, "web-1"), (CGROUP, "web-0")])
def test_network_namespace_is_its_present_owners_where_cgroups_tell_nothing(
    kernel: Kernel, cgroup_id: int, named: str
) -> None:
    """Its number, and the pod's address, are soon another pod's."""
    reader, names = book()
    kernel.begin(1000, netns=7, cgroup_id=cgroup_id)
    for pod in ("web-0", "web-1"):
        names.named[cgroup_id] = ("sre", pod, "app", "n1")
        names.version += 1
        kernel.count(1000, 500, 40)
        ((labels, _),) = reader.take(kernel.read())
    assert labels.pod == named


def test_client_of_another_node_is_not_seen(kernel: Kernel) -> None:
    reader, _ = book()
    for number, netns in ((1000, 7), (1001, 0)):
        kernel.begin(number, netns=netns, cgroup_id=CGROUP if netns else 0)
        kernel.count(number, 500, 40)
    seen = [labels.client_seen for labels, _ in reader.take(kernel.read())]
    assert seen == [True, False]
