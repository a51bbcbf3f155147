# SPDX-License-Identifier: Apache-2.0
"""What CoreDNS asks because of its clients' queries, against its own log and the outside's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import asked, fresh_name, held, log_entries
from tests.tracing import capturing, exchanges, tracing
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.tracing import Exchange, Trace
    from tracer.lab import RunningPod

    Record = dict[str, Any]

pytestmark = pytest.mark.usefixtures("root")

OUTSIDE_IP = "172.18.0.53"
NOT_YET = "not answered when the client's own answer left"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as up:
        yield up


@pytest.fixture
def replica(lab: Lab) -> RunningPod:
    """The one that all are to ask, by its own address."""
    return lab.dns_pods[0]


@contextmanager
def traced(lab: Lab, tmp_path: Path, *arguments: str) -> Iterator[list[Trace]]:
    """What namespace sre asks in the block, once the block has ended: one trace in a list."""
    told: list[Trace] = []
    arguments = ("--pods", str(lab.pods_file), "--namespace", "sre", *arguments)
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        yield told
        time.sleep(0.3)
        told.append(tracer.stop())
    lost = told[0].summary["lost"]
    assert {kind: n for kind, n in lost.items() if n and kind != "filtered"} == {}


def ask_at_once(
    lab: Lab, replica: RunningPod, questions: Sequence[tuple[str, str]], hold_s: float = 0.0
) -> None:
    """A process for each (name, option for dig), none of which waits for another.

    `hold_s`: for how long the replica does nothing, so that it then has many to answer at once.
    """
    with held(lab, replica) if hold_s else nullcontext():
        started = [
            lab.popen(
                "sre/web-0",
                ["dig", "+tries=1", "+time=5", option, f"@{replica.ipv4}", name],
                stdout=subprocess.DEVNULL,
            )
            for name, option in questions
        ]
        time.sleep(hold_s)
    for process in started:
        assert process.wait() == 0


def told_as(entries: Sequence[Any]) -> list[tuple[int, int, str]]:
    """What a log and a trace both have of queries; SNAT leaves the ports as they are here."""
    return sorted((entry.port, entry.id, entry.protocol) for entry in entries)


def traced_as(transactions: Sequence[Record]) -> list[tuple[int, int, str]]:
    return sorted((t["client"]["port"], t["id"], t["protocol"]) for t in transactions)


def slow_name(number: int = 0) -> str:
    """A name that is answered after 300 ms, and that no cache has."""
    return f"{fresh_name().split('.')[0]}-{number}.slow.example.com"


@pytest.mark.parametrize("option", ["+notcp", "+tcp"])
def test_many_slow_names_each_have_their_own_upstream(
    lab: Lab, replica: RunningPod, tmp_path: Path, option: str
) -> None:
    """All at once, each for another name: nothing is unsure, and nothing is mixed up."""
    names = [slow_name(number) for number in range(20)]
    with traced(lab, tmp_path) as told:
        ask_at_once(lab, replica, [(name, option) for name in names])
    assert len(told[0].transactions) == len(names)
    for name in names:
        (t,) = told[0].named(f"{name}.")
        assert traced_as([t]) == told_as(log_entries(lab, replica.node, name))
        assert traced_as(t["upstream"]) == told_as(log_entries(lab, "upstream", name))
        assert t["upstream_unsure"] == 0
        (query,) = t["upstream"]
        assert query["client"]["pod"] == t["backend"]["pod"] == replica.name
        assert (query["server"]["ip"], query["server"]["role"]) == (OUTSIDE_IP, "upstream")
        assert query["latency_ns"] >= 300_000_000
        assert t["latency_ns"] > query["latency_ns"]


@pytest.mark.parametrize("options", [["+notcp"], ["+tcp"], ["+notcp", "+tcp"]], ids=" ".join)
def test_many_clients_of_one_slow_name_share_nothing(
    lab: Lab, replica: RunningPod, tmp_path: Path, options: list[str]
) -> None:
    """What could be several clients' is counted with each of them, and is nobody's."""
    name = slow_name()
    clients = 12
    with traced(lab, tmp_path) as told:
        questions = [(name, options[i % len(options)]) for i in range(clients)]
        ask_at_once(lab, replica, questions, hold_s=1.5)
    transactions = told[0].named(f"{name}.")
    assert traced_as(transactions) == told_as(log_entries(lab, replica.node, name))
    assert len(transactions) == clients
    asked_outside = Counter(told_as(log_entries(lab, "upstream", name)))
    nested = [query for t in transactions for query in t["upstream"]]
    assert max(Counter(traced_as(nested)).values(), default=1) == 1
    assert Counter(traced_as(nested)) <= asked_outside
    for t in transactions:
        assert {query["protocol"] for query in t["upstream"]} <= {t["protocol"]}
    # What is nobody's, is at least two clients'.
    unsure = asked_outside.total() - len(nested)
    counted = sum(t["upstream_unsure"] for t in transactions)
    assert 2 * unsure <= counted <= clients * unsure
    assert unsure > 0
    assert max(t["upstream_unsure"] for t in transactions) <= asked_outside.total()


def test_only_what_has_one_possible_reason_is_told_as_because_of_it(
    lab: Lab, replica: RunningPod, tmp_path: Path
) -> None:
    """By tcpdump at the replica: which clients were waiting all the while that it waited itself."""
    name = slow_name()
    with (
        capturing(lab, replica.full_name, tmp_path) as pcap,
        traced(lab, tmp_path) as told,
    ):
        for _ in range(6):
            ask_at_once(lab, replica, [(name, "+notcp")] * 3)
            name = slow_name()
            ask_at_once(lab, replica, [(slow_name(), "+notcp")])
    checked = Counter[str]()
    for asked_name in {t["name"] for t in told[0].transactions}:
        seen = [e for e in exchanges(pcap) if e.name == asked_name]
        spans = {(e.port, e.id, e.server == OUTSIDE_IP): e for e in seen}
        clients = told[0].named(asked_name)
        entries = log_entries(lab, "upstream", asked_name.rstrip("."))
        outside = [(entry.port, entry.id) for entry in entries]
        assert len(spans) == len(clients) + len(outside)
        for query in outside:
            # Sockets have a query later than the device, and give an answer earlier: they agree
            # with fewer reasons than the capture does, never with others.
            asked = spans[*query, True]
            waiting = [(t, spans[t["client"]["port"], t["id"], False]) for t in clients]
            possible = [t for t, span in waiting if is_within(asked, span, CLOCK_S)]
            certain = [t for t, span in waiting if is_within(asked, span, -BUSY_S)]
            by = [
                t
                for t in clients
                if query in [(one["client"]["port"], one["id"]) for one in t["upstream"]]
            ]
            if len(possible) == 1:
                assert by == possible
                checked["sure"] += 1
            else:
                assert len(by) <= 1
                assert all(t in possible for t in by)
                assert all(t in by for t in certain) or not by
                checked["one of several" if by else "unsure"] += 1
    assert checked["sure"] >= 6  # who asked alone
    assert checked.total() >= 12  # at least one for each name


CLOCK_S = 0.0001  # what times of one packet differ by
BUSY_S = 0.05  # how long a server on a busy machine may leave a query in its socket


def is_within(inner: Exchange, outer: Exchange, tolerance_s: float) -> bool:
    """Whether one question was asked and answered while the other one waited."""
    assert inner.latency_s is not None
    assert outer.latency_s is not None
    begins = outer.query_s - tolerance_s <= inner.query_s
    return begins and (
        inner.query_s + inner.latency_s <= outer.query_s + outer.latency_s + tolerance_s
    )


def test_clients_one_after_another_are_never_unsure(
    lab: Lab, replica: RunningPod, tmp_path: Path
) -> None:
    """Of the same name: the first one's query goes out, the others' answers are known."""
    name = slow_name()
    with traced(lab, tmp_path) as told:
        for option in ("+notcp", "+notcp", "+tcp", "+notcp"):
            ask_at_once(lab, replica, [(name, option)])
    transactions = sorted(told[0].named(f"{name}."), key=lambda t: t["time"])
    assert [len(t["upstream"]) for t in transactions] == [1, 0, 0, 0]
    assert [t["upstream_unsure"] for t in transactions] == [0, 0, 0, 0]
    assert traced_as(transactions[0]["upstream"]) == told_as(log_entries(lab, "upstream", name))


@pytest.mark.parametrize("zone", ["refused", "servfail"])
def test_a_failure_comes_from_upstream(
    lab: Lab, replica: RunningPod, tmp_path: Path, zone: str
) -> None:
    name = f"{fresh_name().split('.')[0]}.{zone}.example.com"
    with traced(lab, tmp_path) as told:
        assert asked(lab, "sre/web-0", f"@{replica.ipv4}", name)[0] == zone.upper()
    (t,) = told[0].named(f"{name}.")
    (query,) = t["upstream"]
    assert (t["rcode"], query["rcode"]) == (zone.upper(), zone.upper())
    assert traced_as([query]) == told_as(log_entries(lab, "upstream", name))


def test_a_server_that_waits_in_vain_fails_in_the_end(
    lab: Lab, replica: RunningPod, tmp_path: Path
) -> None:
    """Two queries are lost, two seconds each; none has timed out when the client's answer leaves."""
    name = f"{fresh_name().split('.')[0]}.lost.example.com"
    with traced(lab, tmp_path, "--timeout", "20s") as told:
        said = asked(lab, "sre/web-0", "+time=9", f"@{replica.ipv4}", name)
        assert said[0] == "SERVFAIL"
    (t,) = told[0].named(f"{name}.")
    assert (t["status"], t["rcode"]) == ("answered", "SERVFAIL")
    assert t["latency_ns"] >= 4_000_000_000
    assert [query["status"] for query in t["upstream"]] == ["timeout", "timeout"]
    assert [query["problem"] for query in t["upstream"]] == [NOT_YET, NOT_YET]
    assert {query["latency_ns"] for query in t["upstream"]} == {None}
    assert traced_as(t["upstream"]) == told_as(log_entries(lab, "upstream", name))
    assert t["upstream_unsure"] == 0


RETRY = """
import socket, struct, sys, time
server, name, count, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
asked = struct.pack("!6H", 77, 0x100, 1, 0, 0, 0)
asked += b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + bytes([0, 0, 1, 0, 1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(9)
    for _ in range(count):
        client.sendto(asked, (server, 53))
        time.sleep(pause)
    client.recv(512)
"""


def test_of_a_client_that_asks_again_no_upstream_query_is_told_twice(
    lab: Lab, replica: RunningPod, tmp_path: Path
) -> None:
    """The same query three times over one socket, each of which the server follows up."""
    name = slow_name()
    argv = [sys.executable, "-c", RETRY, replica.ipv4, name, "3", "0.05"]
    with traced(lab, tmp_path) as told:
        lab.run("sre/web-0", argv, check=True)
        time.sleep(0.3)
    attempts = told[0].named(f"{name}.")
    assert [(t["attempt"], t["status"]) for t in attempts] == [
        (1, "timeout"),
        (2, "timeout"),
        (3, "answered"),
    ]
    outside = told_as(log_entries(lab, "upstream", name))
    nested = Counter(traced_as([query for t in attempts for query in t["upstream"]]))
    assert max(nested.values(), default=1) == 1
    assert nested <= Counter(outside)
    unsure = len(outside) - nested.total()
    assert sum(t["upstream_unsure"] for t in attempts) >= unsure
