# SPDX-License-Identifier: Apache-2.0
"""The live trace of the lab, against what tcpdump, conntrack, dnsperf and the kernel say."""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernels.clients import QUESTIONS
from tests.kernels.test_degrade import NO_CGROUP2, hidden
from tests.tracing import (
    DNSTRACE,
    capturing,
    conntrack_backends,
    exchanges,
    our_links,
    our_programs,
    tracing,
)
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.tracing import Trace

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


@pytest.fixture
def lab() -> Lab:
    """The lab with its usual options; brought up only where it is not yet."""
    lab = Lab()
    lab.up()
    return lab


@pytest.fixture
def quiet_lab() -> Lab:
    """A lab whose servers log nothing, for tests that ask a lot."""
    lab = Lab(quiet_servers=True)
    lab.up()
    return lab


@pytest.fixture
def sre(lab: Lab) -> list[str]:
    return ["--pods", str(lab.pods_file), "--namespace", "sre"]


def dig(lab: Lab, pod: str, *arguments: str) -> int:
    """Runs one dig over UDP; returns its pid."""
    argv = ["dig", "+notcp", "+ignore", "+tries=1", "+time=3", *arguments]
    process = lab.popen(pod, argv, stdout=subprocess.DEVNULL)
    process.wait()
    return process.pid


def test_23_digs_are_exactly_what_tcpdump_saw(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """Same ids, names, types and rcodes; right process, pod and backend; times that add up."""
    assert len(QUESTIONS) == 23
    pids: list[int] = []
    backends: dict[tuple[str, int], str] = {}
    with capturing(lab, "sre/web-0", tmp_path) as pcap, tracing(*sre, tmp_path=tmp_path) as tracer:
        for name, type_ in QUESTIONS:
            pids.append(dig(lab, "sre/web-0", name, type_))
            backends |= conntrack_backends(lab, "node1")
            dig(lab, "default/shop-0", name, type_)
        time.sleep(0.5)
        trace = tracer.stop()
    seen = exchanges(pcap)
    assert len(seen) == 23
    told = [(t["id"], t["name"], t["type"], t["rcode"]) for t in trace.transactions]
    assert sorted(told) == sorted((e.id, e.name, e.type, e.rcode) for e in seen)
    pod = lab.pod("sre/web-0")
    by_question = {(t["name"], t["type"]): t for t in trace.transactions}
    later_s = []
    for exchange, pid in zip(seen, pids, strict=True):
        t = by_question[exchange.name, exchange.type]
        client = t["client"]
        assert t["status"] == "answered"
        assert (client["namespace"], client["pod"], client["container"]) == ("sre", "web-0", "app")
        assert (client["comm"], client["pid"]) == ("dig", pid)
        assert (client["netns"], client["cgroup_id"]) == (pod.netns, pod.cgroup_id)
        assert t["server"] == {
            "ip": "10.96.0.10",
            "port": 53,
            "service": "kube-system/kube-dns",
            "role": "cluster",
        }
        assert t["backend"]["ip"] == backends[client["ip"], client["port"]]
        assert t["backend"]["pod"].startswith("coredns-")
        times = [hop["t_ns"] for hop in t["hops"]]
        assert times[0] == 0
        assert times == sorted(times)
        assert times[-1] == t["latency_ns"]
        assert exchange.latency_s is not None
        # tcpdump stands between the two sockets, and has microseconds.
        later_s.append(t["latency_ns"] / 1e9 - exchange.latency_s)
    assert min(later_s) >= -2e-6
    assert statistics.median(later_s) < 0.01
    assert trace.summary["transactions"] == 23
    lost = {kind: n for kind, n in trace.summary["lost"].items() if n and kind != "filtered"}
    assert lost == {}


def test_path_has_every_hop_of_both_nodes(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """A query answered by the other node's replica passes eleven hops, DNAT told at the right one."""
    remote = next(p for p in lab.dns_pods if p.node == "node2")
    with tracing(*sre, "--backend", remote.ipv4, tmp_path=tmp_path) as tracer:
        for _ in range(24):
            dig(lab, "sre/web-0", "kubernetes.default.svc.cluster.local")
        time.sleep(0.3)
        trace = tracer.stop()
    assert trace.transactions
    web = lab.pod("sre/web-0")
    for t in trace.transactions:
        told = [(h["kind"], h["direction"], h["ifname"], h["owner"]) for h in t["hops"]]
        name = f"kube-system/{t['backend']['pod']}"
        assert told == [
            ("send", "query", None, "sre/web-0"),
            ("ingress", "query", web.veth, "sre/web-0"),
            ("egress", "query", "eth0", "node1"),
            ("ingress", "query", "eth0", "node2"),
            ("egress", "query", remote.veth, name),
            ("receive", "query", None, name),
            ("send", "response", None, name),
            ("ingress", "response", remote.veth, name),
            ("egress", "response", "eth0", "node2"),
            ("ingress", "response", "eth0", "node1"),
            ("egress", "response", web.veth, "sre/web-0"),
            ("receive", "response", None, "sre/web-0"),
        ]
        assert [h["nat"] for h in t["hops"]].count(None) == 10
        assert t["hops"][2]["nat"] == {"dnat": ["10.96.0.10:53", f"{remote.ipv4}:53"]}
        assert t["hops"][10]["nat"] == {"dnat": [f"{remote.ipv4}:53", "10.96.0.10:53"]}


def test_ipv6_is_traced_like_ipv4(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """Over the service's IPv6 address, with DNAT."""
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        dig(lab, "sre/web-0", "@fd00:10:96::a", "www.example.com", "AAAA")
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.transactions
    assert t["server"]["ip"] == "fd00:10:96::a"
    assert t["client"]["pod"] == "web-0"
    assert t["backend"]["ip"] in {pod.ipv6 for pod in lab.dns_pods}
    assert t["rcode"] == "NOERROR"


def test_host_network_pod_is_followed_through_masquerade(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """Told from the node's other processes by its cgroup, though SNAT renames it on the way."""
    with tracing(*sre, "--pod", "host-agent", tmp_path=tmp_path) as tracer:
        pid = dig(lab, "sre/host-agent", "@10.96.0.10", "www.example.com")
        lab.node_exec("node1", ["dig", "+short", "@10.96.0.10", "www.example.com"])
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.transactions
    assert (t["client"]["pod"], t["client"]["pid"]) == ("host-agent", pid)
    assert t["backend"]["pod"].startswith("coredns-")
    assert {hop["kind"] for hop in t["hops"]} == {"send", "egress", "ingress", "receive"}
    assert t["status"] == "answered"
    changed = [hop["nat"] for hop in t["hops"] if hop["nat"]]
    assert any("dnat" in nat for nat in changed)


def test_1000_short_lived_processes_are_attributed(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """Each has gone before anybody could look it up; pid, cgroup and pod are right all the same."""
    script = tmp_path / "burst.py"
    script.write_text(
        """
import os, socket, struct, sys
for i in range(500):
    if (pid := os.fork()) == 0:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        name = b"".join(bytes([len(l)]) + l for l in (b"p%d" % os.getpid(), b"bench", b"example", b"com"))
        s.sendto(struct.pack("!6H", i, 0x100, 1, 0, 0, 0) + name + b"\\0\\0\\1\\0\\1", ("10.96.0.10", 53))
        s.settimeout(3)
        try: s.recv(512)
        except OSError: pass
        os._exit(0)
    os.waitpid(pid, 0)
    print(pid)
"""
    )
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        bursts = {
            pod: lab.popen(pod, [sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
            for pod in ("sre/web-0", "sre/api-0", "default/shop-0")
        }
        pids = {
            pod: set(map(int, b.communicate(timeout=120)[0].split())) for pod, b in bursts.items()
        }
        time.sleep(0.5)
        trace = tracer.stop()
    told: dict[str, set[int]] = {"sre/web-0": set(), "sre/api-0": set()}
    for t in trace.transactions:
        told[f"{t['client']['namespace']}/{t['client']['pod']}"].add(t["client"]["pid"])
        assert t["name"] == f"p{t['client']['pid']}.bench.example.com."
    assert told == {pod: pids[pod] for pod in told}
    assert len(trace.transactions) == 1000


NAMES = [f"q{i}.bench.example.com" for i in range(200)]


def dnsperf(
    lab: Lab, tmp_path: Path, *arguments: str, names: Sequence[str] = NAMES
) -> dict[str, int]:
    """Runs dnsperf in sre/web-0; returns its own counts."""
    queries = tmp_path / "queries.txt"
    queries.write_text("".join(f"{name} A\n" for name in names))
    argv = ["dnsperf", "-s", "10.96.0.10", "-d", str(queries), *arguments]
    said = lab.run("sre/web-0", argv).stdout
    return {
        what.lower(): int(number)
        for what, number in re.findall(r"Queries (sent|completed|lost): +(\d+)", said)
    }


def test_nothing_is_lost_at_a_rate_that_leaves_time_to_spare(
    quiet_lab: Lab, tmp_path: Path
) -> None:
    """For ten seconds: as many lines as dnsperf has queries, and no word of a loss.

    5,000 a second, where that is a fifth of what the lab answers when nobody traces it: how many
    a machine can do, `make bench` tells.
    """
    rate = min(5000, dnsperf(quiet_lab, tmp_path, "-l", "2", "-c", "4")["completed"] // 2 // 5)
    shown = tmp_path / "shown.txt"
    command = [sys.executable, "-m", "tracer", "--namespace", "sre"]
    with (
        shown.open("wb") as stdout,
        subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as tracer,
    ):
        assert tracer.stderr
        while "tracing" not in tracer.stderr.readline():
            assert tracer.poll() is None
        counts = dnsperf(quiet_lab, tmp_path, "-Q", str(rate), "-l", "10", "-c", "4")
        time.sleep(0.5)
        tracer.send_signal(signal.SIGINT)
        summary = tracer.stderr.read()
    assert counts["sent"] == counts["completed"] + counts["lost"]
    assert counts["completed"] > 8 * rate
    lines = shown.read_text().splitlines()
    statuses = Counter(line.split()[8] for line in lines if line[0].isdigit())
    assert statuses.total() == counts["sent"], summary
    assert statuses["NOERROR"] == counts["completed"], summary
    assert f"{counts['completed']:,} answered" in summary
    assert "lost" not in summary
    assert "not followed" not in summary


def test_at_full_speed_every_query_is_a_transaction_or_a_counted_loss(
    quiet_lab: Lab, tmp_path: Path
) -> None:
    """As fast as two cores allow for ten seconds, with as many queries waiting as dnsperf likes.

    Of a name that the servers know, so that they ask nobody: in the ring, there is no telling whose
    queries were lost.
    """
    names = ["kubernetes.default.svc.cluster.local"]
    arguments = ["--pods", str(quiet_lab.pods_file), "--namespace", "sre"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        counts = dnsperf(quiet_lab, tmp_path, "-l", "10", "-c", "4", "-q", "200", names=names)
        time.sleep(0.5)
        trace = tracer.stop(480)
    lost = {kind: n for kind, n in trace.summary["lost"].items() if kind != "filtered"}
    told = lost["ring_full"] + lost["table_full"]
    assert trace.summary["transactions"] == len(trace.transactions)
    # A packet that found no buffer may have been a query's only one, or any other.
    not_told = counts["sent"] - len(trace.transactions) - told
    assert 0 <= not_told <= lost["preempted"], (lost, counts)
    if told:
        assert "lost" in trace.stderr


def ask_into_the_void(lab: Lab, tmp_path: Path, count: int) -> None:
    """That many different queries for a name that is never answered."""
    script = tmp_path / "void.py"
    script.write_text(
        f"""
import socket, struct, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range({count}):
    q = struct.pack("!6H", i & 0xffff, 0x100, 1, 0, 0, 0)
    q += b"\\x04lost\\x07example\\x03com\\0" + struct.pack("!HH", 1, 1)
    s.sendto(q, ("172.18.0.53", 53))
    if i % 50 == 49: time.sleep(0.005)
"""
    )
    lab.run("sre/web-0", [sys.executable, str(script)])


def test_unanswered_queries_beyond_the_table_are_counted(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """2,000 into a table of 256: each a time-out or a counted eviction, and tracing goes on."""
    with tracing(*sre, "--max-in-flight", "256", "--timeout", "2s", tmp_path=tmp_path) as tracer:
        ask_into_the_void(lab, tmp_path, 2000)
        dig(lab, "sre/web-0", "www.example.com")
        time.sleep(3)
        dig(lab, "sre/web-0", "www.li-rui.top.")
        time.sleep(0.3)
        trace = tracer.stop()
    timeouts = trace.named("lost.example.com.")
    for t in timeouts:
        if t["status"] == "dropped":  # where the server does not read as fast as that
            assert t["hops"][-1]["reason"] == "SOCKET_RCVBUFF"
        else:
            assert t["status"] == "timeout"
        assert t["latency_ns"] is None
    assert len(timeouts) + trace.summary["lost"]["table_full"] == 2000
    assert 0 < len(timeouts) <= 256
    assert trace.summary["unmatched"]["queries"] == 0
    assert [t["status"] for t in trace.named("www.li-rui.top.")] == ["answered"]
    assert "in flight" in trace.stderr


def test_what_still_waits_at_the_end_is_reported(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """Ctrl-C before the time-out."""
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        ask_into_the_void(lab, tmp_path, 3)
        time.sleep(0.2)
        trace = tracer.stop()
    assert [t["status"] for t in trace.transactions] == ["timeout"] * 3
    assert trace.summary["unmatched"]["queries"] == 3


@pytest.mark.parametrize("count", [None, 2])
def test_what_still_waits_but_is_not_shown_is_not_counted(
    lab: Lab, tmp_path: Path, count: int | None
) -> None:
    """Left out by the filters, which the kernel does not know of; or beyond --count."""
    limit = [] if count is None else ["--count", str(count)]
    pods = ["--pods", str(lab.pods_file), "--timeout", "20s"]
    with (
        tracing(*pods, tmp_path=tmp_path) as unlimited,
        tracing(*pods, "--name", "lost.example.com", *limit, tmp_path=tmp_path) as tracer,
    ):
        ask_into_the_void(lab, tmp_path, 3)
        asked = ["dig", "+notcp", "+tries=1", "+time=1", "@172.18.0.53"]
        others = [
            lab.popen("sre/api-0", [*asked, f"{n}.lost.example.com"], stdout=subprocess.DEVNULL)
            for n in range(2)
        ]
        for other in others:
            other.wait()
        trace, whole = tracer.stop(), unlimited.stop()
    shown = min(3, count or 3)
    assert [t["status"] for t in trace.transactions] == ["timeout"] * shown
    assert trace.summary["unmatched"]["queries"] == shown
    if count is None:  # beyond that, nobody looks
        # What else this machine asks meanwhile, is left out too.
        most = len(whole.transactions) - len(whole.named("lost.example.com."))
        assert 2 <= trace.summary["lost"]["filtered"] <= most


def test_retries_are_attempts(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """The same query three times over one socket: two time-outs, then whatever the third gets."""
    script = tmp_path / "retry.py"
    script.write_text(
        """
import socket, struct, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
q = struct.pack("!6H", 77, 0x100, 1, 0, 0, 0) + b"\\x04lost\\x07example\\x03com\\0\\0\\1\\0\\1"
for i in range(3):
    s.sendto(q, ("172.18.0.53", 53)); time.sleep(0.1)
"""
    )
    with tracing(*sre, "--timeout", "3s", tmp_path=tmp_path) as tracer:
        lab.run("sre/web-0", [sys.executable, str(script)])
        time.sleep(3.5)
        trace = tracer.stop()
    assert [(t["attempt"], t["status"]) for t in trace.transactions] == [
        (1, "timeout"), (2, "timeout"), (3, "timeout"),
    ]  # fmt: skip


def test_refused_when_nobody_listens(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """An ICMP port unreachable is told as such, at once."""
    api = lab.pod("sre/api-0")
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        dig(lab, "sre/web-0", f"@{api.ipv4}", "www.example.com")
        time.sleep(0.3)
        trace = tracer.stop()
    assert trace.transactions
    assert {t["status"] for t in trace.transactions} == {"refused"}
    assert trace.summary["unmatched"]["queries"] == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "its own"])
def test_refused_when_nobody_listens_in_the_clients_own_namespace(
    lab: Lab, sre: list[str], tmp_path: Path, address: str
) -> None:
    """Told by the drop's reason, once the query's time is up."""
    server = lab.pod("sre/web-0").ipv4 if address == "its own" else address
    with tracing(*sre, "--timeout", "1s", tmp_path=tmp_path) as tracer:
        dig(lab, "sre/web-0", f"@{server}", "www.example.com")
        time.sleep(1.5)
        trace = tracer.stop()
    assert trace.transactions
    for t in trace.transactions:
        assert (t["status"], t["latency_ns"]) == ("refused", None)
        assert (t["hops"][-1]["kind"], t["hops"][-1]["reason"]) == ("drop", "NO_SOCKET")


def test_drop_in_the_node_names_the_reason(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """An iptables rule eats the query: the last hop is the drop, with the kernel's reason."""
    rule = ["FORWARD", "-s", lab.pod("sre/web-0").ipv4, "-d", "172.18.0.53", "-j", "DROP"]
    lab.node_exec("node1", ["iptables", "-I", *rule])
    try:
        with tracing(*sre, "--timeout", "1s", tmp_path=tmp_path) as tracer:
            dig(lab, "sre/web-0", "@172.18.0.53", "+time=1", "www.example.com")
            time.sleep(1.5)
            trace = tracer.stop()
    finally:
        lab.node_exec("node1", ["iptables", "-D", *rule])
    assert trace.transactions
    for t in trace.transactions:
        assert t["status"] == "dropped"
        drop = t["hops"][-1]
        assert (drop["kind"], drop["reason"]) == ("drop", "NETFILTER_DROP")
        assert drop["owner"] == "node1"


def test_killed_tracer_leaves_nothing_and_foreign_filters_stay(lab: Lab, tmp_path: Path) -> None:
    """kill -9; a clsact qdisc and filter of somebody else on the same veth survive it all."""
    veth = lab.pod("sre/web-0").veth
    assert veth
    for command in (
        f"tc qdisc add dev {veth} clsact",
        f"tc filter add dev {veth} ingress protocol ip prio 7 u32 match u32 0 0 flowid 1:1",
    ):
        lab.node_exec("node1", command.split(), check=True)
    arguments = ["--pods", str(lab.pods_file)]
    try:
        with tracing(*arguments, tmp_path=tmp_path) as tracer:
            assert our_programs()
            tracer.process.send_signal(signal.SIGKILL)
            tracer.process.wait()
        wait_for(lambda: our_programs() == [])
        with tracing(*arguments, tmp_path=tmp_path) as tracer:
            dig(lab, "sre/web-0", "www.example.com")
            time.sleep(0.3)
            trace = tracer.stop()
        assert trace.named("www.example.com.")
        wait_for(lambda: our_programs() == [])
        qdiscs = lab.node_exec("node1", ["tc", "qdisc", "show", "dev", veth]).stdout
        filters = lab.node_exec("node1", ["tc", "filter", "show", "dev", veth, "ingress"]).stdout
        assert "clsact" in qdiscs
        assert "pref 7 u32" in filters
    finally:
        lab.node_exec("node1", ["tc", "qdisc", "del", "dev", veth, "clsact"])


def test_new_veth_is_followed(lab: Lab, tmp_path: Path) -> None:
    """A device that appears while tracing is attached to, and let go of when it is deleted."""
    with tracing("--pods", str(lab.pods_file), tmp_path=tmp_path) as tracer:
        before = our_links()
        lab.node_exec(
            "node1",
            ["ip", "link", "add", "dnstest0", "type", "veth", "peer", "name", "dnstest1"],
            check=True,
        )
        try:
            wait_for(lambda: our_links() == before + 4)
        finally:
            lab.node_exec("node1", ["ip", "link", "del", "dnstest0"])
        wait_for(lambda: our_links() == before)
        tracer.stop()


def wait_for(condition: object, seconds: float = 30.0) -> None:
    """Fails if it does not become true in time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.05)


def malformed() -> dict[str, bytes]:
    """DNS packets that strangers might send, each with an id of its own."""
    question = b"\3www\7example\3com\0\0\1\0\1"

    def header(number: int, questions: int = 1) -> bytes:
        return struct.pack("!6H", number, 0x100, questions, 0, 0, 0)

    return {
        "empty": b"",
        "one byte": b"\0",
        "header cut": header(9003)[:7],
        "no question": header(9004, 0),
        "question cut": header(9005) + question[:9],
        "compression loop": header(9006) + b"\xc0\x0c\0\1\0\1",
        "label over 63": header(9007) + b"\x50" + b"a" * 80 + b"\0\0\1\0\1",
        "name over 255": header(9008) + (b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1",
        "escapes": header(9009) + b"\x0b\x1b]0;pwned\x07\0\0\1\0\1",
        "response to the server": struct.pack("!6H", 9010, 0x8180, 1, 0, 0, 0) + question,
        **{
            f"{length} bytes": (header(length) + question).ljust(length, b"\0")
            for length in (*range(248, 256), *range(504, 512))
        },
    }


def test_malformed_queries_are_counted_or_shown_and_neighbours_stay(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """Each bad packet between two good queries; nothing is lost without a word."""
    script = tmp_path / "bad.py"
    script.write_text(
        f"""
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for packet in {list(malformed().values())!r}:
    s.sendto(packet, ("10.96.0.10", 53)); time.sleep(0.01)
"""
    )
    with tracing(*sre, "--timeout", "1s", tmp_path=tmp_path) as tracer:
        dig(lab, "sre/web-0", "before.bench.example.com")
        lab.run("sre/web-0", [sys.executable, str(script)])
        dig(lab, "sre/web-0", "after.bench.example.com")
        time.sleep(1.5)
        trace = tracer.stop()
    assert trace.named("before.bench.example.com.")
    assert trace.named("after.bench.example.com.")
    assert "Traceback" not in trace.stderr
    told = {t["id"]: t for t in trace.transactions if t["client"]["comm"] != "dig"}
    for number in (9004, 9005, 9006, 9007, 9008):
        assert told[number]["name"] is None
        assert told[number]["problem"]
    for number in (*range(248, 256), *range(504, 512)):
        assert told[number]["name"] == "www.example.com."
    assert told[9009]["name"].isprintable()
    assert 9010 not in told
    # The undecodable ones are counted where they are sent and where they arrive.
    assert trace.summary["lost"]["undecodable"] >= 4


def test_edns_answer_of_4_kb_and_fragments(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """A response that needs three fragments is one transaction with all of its answer."""
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        dig(lab, "sre/web-0", "+bufsize=4096", "big.example.com", "TXT")
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.transactions
    assert t["rcode"] == "NOERROR"
    assert t["response_len"] > 3000
    assert sum(len(answer["data"]) for answer in t["answers"]) > 2500
    assert t["problem"] is None


def test_memory_and_start_up(lab: Lab, tmp_path: Path) -> None:
    """The steady process stays below 80 MiB."""
    with tracing("--pods", str(lab.pods_file), tmp_path=tmp_path) as tracer:
        dnsperf(lab, tmp_path, "-l", "2", "-Q", "5000")
        status = Path(f"/proc/{tracer.process.pid}/status").read_text()
        tracer.stop()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match
    assert int(match[1]) < 80 * 1024


def test_500_veths_are_attached_to_soon(lab: Lab, tmp_path: Path) -> None:
    """A crowded node: the tracer is armed all the same, and not much later than without them."""
    plain_s = min(armed(lab, tmp_path)[0] for _ in range(2))
    commands = "".join(f"link add dnsx{i} type veth peer name dnsy{i}\n" for i in range(250))
    lab.node_exec("node2", ["ip", "-batch", "-"], input=commands, check=True)
    try:
        starts = [armed(lab, tmp_path) for _ in range(2)]
    finally:
        removal = "".join(f"link del dnsx{i}\n" for i in range(250))
        lab.node_exec("node2", ["ip", "-batch", "-"], input=removal)
    for _, trace in starts:
        devices = re.search(r"(\d+) devices", trace.stderr)
        assert devices
        assert int(devices[1]) > 500
    assert min(took_s for took_s, _ in starts) < max(4, 3 * plain_s)


def armed(lab: Lab, tmp_path: Path) -> tuple[float, Trace]:
    """How long a tracer takes until it traces, in seconds, and what it says."""
    started_s = time.monotonic()
    with tracing("--pods", str(lab.pods_file), tmp_path=tmp_path) as tracer:
        took_s = time.monotonic() - started_s
        return took_s, tracer.stop()


def test_output_cut_off_by_its_reader_is_no_error(lab: Lab) -> None:
    """`dnstrace | head -1`."""
    command = [sys.executable, "-m", "tracer", "--json", "--no-kubernetes"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert process.stdout
        while "tracing" not in process.stderr.readline():
            assert process.poll() is None
        dig(lab, "sre/web-0", "www.example.com")
        assert process.stdout.readline()
        process.stdout.close()
        dig(lab, "sre/web-0", "www.example.com")
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()


def test_process_outside_of_any_pod_is_named_by_process_only(tmp_path: Path, lab: Lab) -> None:
    """No pod is guessed for a process of the host's own namespace that asks itself."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    port = server.getsockname()[1]
    arguments = ["--pods", str(lab.pods_file), "--port", str(port), "--timeout", "1s"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        query = struct.pack("!6H", 5, 0x100, 1, 0, 0, 0) + b"\1a\0\0\1\0\1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(query, ("127.0.0.1", port))
            request, address = server.recvfrom(512)
            server.sendto(request[:2] + b"\x81\x83" + request[4:], address)
            client.recv(512)
        time.sleep(0.3)
        trace = tracer.stop()
    server.close()
    (t,) = trace.transactions
    assert (t["client"]["pod"], t["client"]["namespace"]) == (None, None)
    assert t["client"]["pid"] == os.getpid()
    assert (t["rcode"], t["status"]) == ("NXDOMAIN", "answered")
    assert t["backend"]["ip"] == "127.0.0.1"


def test_devices_alone_are_traced_where_sockets_cannot_be_watched(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """Neither kprobes nor cgroup v2: pods are told by their veths, processes not at all."""
    command = hidden(NO_CGROUP2, *DNSTRACE)
    with tracing(*sre, tmp_path=tmp_path, command=command) as tracer:
        dig(lab, "sre/web-0", "web.bench.example.com")
        dig(lab, "default/shop-0", "shop.bench.example.com")
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.transactions
    assert t["name"] == "web.bench.example.com."
    assert (t["client"]["pod"], t["client"]["pid"]) == ("web-0", None)
    assert t["status"] == "answered"
    assert {hop["kind"] for hop in t["hops"]} == {"ingress", "egress"}
    assert "sockets are not watched" in trace.stderr


def test_no_alarm_is_pending_once_all_is_written(tmp_path: Path) -> None:
    """On a slow machine, the one that guards against a stalled reader would kill a run that is over."""
    last = (
        "import atexit, signal, sys; from tracer.cli import main;"
        "tell = lambda: print(signal.getitimer(signal.ITIMER_REAL), file=sys.stderr);"
        "atexit.register(tell); sys.exit(main())"
    )
    command = [sys.executable, "-c", last]
    with tracing("--no-kubernetes", tmp_path=tmp_path, command=command) as tracer:
        trace = tracer.stop()
    assert trace.stderr.splitlines()[-1] == "(0.0, 0.0)"
