# SPDX-License-Identifier: Apache-2.0
"""What the cluster's servers ask outside to answer, against tcpdump and the servers' own logs."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import held, log_entries
from tests.tracing import Trace, capturing, exchanges, tcp_messages, tracing
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

OUTSIDE = "172.18.0.53"
CLIENTS = ("sre/web-0", "sre/api-0", "sre/worker-0", "default/shop-0")


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.up()
    return lab


def dig(lab: Lab, pod: str, *arguments: str) -> subprocess.Popen[Any]:
    argv = ["dig", "+tries=1", "+time=9", "+ignore", *arguments]
    return lab.popen(pod, argv, stdout=subprocess.DEVNULL)


Query = tuple[int, int]  # its client's port, which SNAT leaves as it is here, and its id


def below(t: dict[str, Any]) -> list[tuple[Query, str]]:
    return [((one["client"]["port"], one["id"]), one["status"]) for one in t["upstream"]]


def seen_outside(pcap: Path, lab: Lab, name: str) -> tuple[set[Query], set[Query]]:
    """What tcpdump saw a replica ask outside, by UDP or TCP: answered, and not.

    A client's own query is never in the outside server's log.
    """
    entries = log_entries(lab, "upstream", name.rstrip("."))
    there = {(entry.port, entry.id) for entry in entries}
    asked, answered = set(), set()
    for e in exchanges(pcap):
        if e.name == name:
            asked.add((e.port, e.id))
            answered |= {(e.port, e.id)} if e.latency_s is not None else set()
    for m in tcp_messages(pcap):
        if m.name == name:
            (answered if m.is_response else asked).add((m.port, m.id))
    return there & asked & answered, asked - answered


def test_each_of_several_slow_names_has_what_was_asked_for_it(lab: Lab, tmp_path: Path) -> None:
    """Half over TCP, all at once and through one replica; the second time, they are cached."""
    replica = lab.dns_pods[0]
    full = f"kube-system/{replica.name}"
    names = [f"n{n}-{time.monotonic_ns()}.slow.example.com." for n in range(12)]
    with (
        capturing(lab, full, tmp_path) as pcap,
        tracing("--pods", str(lab.pods_file), "--namespace", "sre", tmp_path=tmp_path) as tracer,
    ):
        for _ in range(2):
            started = [
                dig(lab, CLIENTS[n % 3], "+tcp" if n % 2 else "+notcp", f"@{replica.ipv4}", name)
                for n, name in enumerate(names)
            ]
            for process in started:
                process.wait()
        time.sleep(1)
        trace = tracer.stop()
    for number, name in enumerate(names):
        first, second = sorted(trace.named(name), key=lambda t: t["time"])
        assert first["protocol"] == ("tcp" if number % 2 else "udp")
        outside, _ = seen_outside(pcap, lab, name)
        assert [(query, "answered") for query in outside] == below(first)
        assert first["upstream_unsure"] == second["upstream_unsure"] == 0
        (under,) = first["upstream"]
        assert (under["name"], under["server"]["ip"]) == (name, OUTSIDE)
        assert under["client"]["pod"] == replica.name
        assert under["latency_ns"] >= 300_000_000
        assert under["latency_ns"] <= first["latency_ns"]
        assert under["time"] > first["time"]
        assert below(second) == []


def test_many_clients_that_ask_the_same_at_once_are_unsure(lab: Lab, tmp_path: Path) -> None:
    replica = lab.dns_pods[1]
    name = f"same-{time.monotonic_ns()}.slow.example.com."
    with (
        capturing(lab, f"kube-system/{replica.name}", tmp_path) as pcap,
        tracing("--pods", str(lab.pods_file), tmp_path=tmp_path) as tracer,
    ):
        with held(lab, replica):
            started = [
                dig(lab, CLIENTS[n % 4], "+tcp" if n % 2 else "+notcp", f"@{replica.ipv4}", name)
                for n in range(20)
            ]
            time.sleep(1.5)
        for process in started:
            process.wait()
        time.sleep(1)
        trace = tracer.stop()
    outside, _ = seen_outside(pcap, lab, name)
    clients = [t for t in _of(trace, name) if t["server"]["ip"] != OUTSIDE]
    assert len(clients) == 20
    placed = [query for t in clients for query, _ in below(t)]
    assert len(placed) == len(set(placed))
    assert set(placed) <= outside
    unsure = [t["upstream_unsure"] for t in clients]
    # What is nobody's could have been because of either of two at least.
    assert sum(unsure) >= 2 * (len(outside) - len(placed)) > 0
    for t in clients:
        assert len(t["upstream"]) + t["upstream_unsure"] <= len(outside)


def test_lost_answers_show_what_stayed_unanswered(lab: Lab, tmp_path: Path) -> None:
    replica = lab.dns_pods[0]
    names = [f"n{n}-{time.monotonic_ns()}.lost.example.com." for n in range(2)]
    with (
        capturing(lab, f"kube-system/{replica.name}", tmp_path) as pcap,
        tracing("--pods", str(lab.pods_file), "--namespace", "sre", tmp_path=tmp_path) as tracer,
    ):
        started = [
            dig(lab, "sre/web-0", protocol, f"@{replica.ipv4}", name)
            for protocol, name in zip(("+notcp", "+tcp"), names, strict=True)
        ]
        for process in started:
            process.wait()
        time.sleep(8)
        trace = tracer.stop()
    for name in names:
        (t,) = trace.named(name)
        _, lost = seen_outside(pcap, lab, name)
        told = {query for query, status in below(t) if status != "answered"}
        assert told
        assert told <= lost
        assert t["upstream_unsure"] == 0


def _of(trace: Trace, name: str) -> list[dict[str, Any]]:
    return [t for t in trace.transactions if t["name"] == name]
