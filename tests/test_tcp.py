# SPDX-License-Identifier: Apache-2.0
"""DNS over TCP in the lab, against what both ends, tcpdump, conntrack and the servers' logs say."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import log_text
from tests.tracing import Trace, capturing, tcp_messages, tracing
from tracer.lab import Lab
from tracer.lab.zones import CROWD

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("root")

PEER = [sys.executable, str(Path(__file__).with_name("tcp_peer.py"))]
SERVICE = "10.96.0.10"
NAME = "www.example.com"
SERVER = "sre/api-0"
CLIENT = "sre/web-0"


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.up()
    return lab


@pytest.fixture
def sre(lab: Lab) -> list[str]:
    return ["--pods", str(lab.pods_file), "--namespace", "sre"]


@pytest.fixture
def all_(lab: Lab) -> list[str]:
    return ["--pods", str(lab.pods_file)]


@contextmanager
def serving(lab: Lab, pod: str = SERVER, ip: str = "") -> Iterator[str]:
    """A server of ours in a pod; its address."""
    address = ip or lab.pod(pod).ipv4
    process = lab.popen(pod, [*PEER, "serve", address], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        yield address
    finally:
        process.kill()
        process.communicate()


def ask(lab: Lab, pod: str, address: str, how: str, *names: str) -> dict[str, Any]:
    """Runs a client of ours: its pid, and what it got."""
    done = lab.run(pod, [*PEER, "ask", address, how, *names], check=True)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@contextmanager
def rule(lab: Lab, node: str, *rule: str, table: str = "filter", chain: str = "FORWARD") -> Iterator[None]:  # fmt: skip
    """An iptables rule on a node, before all others."""
    iptables = ["iptables", "-w", "-t", table]
    lab.node_exec(node, [*iptables, "-I", chain, "1", *rule], check=True)
    try:
        yield
    finally:
        lab.node_exec(node, [*iptables, "-D", chain, *rule], check=True)


def tcp_of(trace: Trace) -> list[dict[str, Any]]:
    return [t for t in trace.transactions if t["protocol"] == "tcp"]


def check_times(t: dict[str, Any]) -> None:
    times = [hop["t_ns"] for hop in t["hops"]]
    assert times[0] == 0
    assert times == sorted(times)
    if t["latency_ns"] is not None:
        assert t["latency_ns"] == times[-1]
        assert t["hops"][-1]["kind"] == "receive"


def check_lost(trace: Trace, *expected: str) -> None:
    lost = {kind: n for kind, n in trace.summary["lost"].items() if n and kind != "filtered"}
    assert set(lost) <= set(expected), lost


def check_against_tcpdump(pcap: Path, transactions: list[dict[str, Any]]) -> int:
    """The same queries and answers, and times around those on the wire; how many."""
    seen = tcp_messages(pcap)
    asked = {(m.port, m.id): m.complete_s for m in seen if not m.is_response}
    answered = {(m.port, m.id): m.complete_s for m in seen if m.is_response}
    told = {(t["client"]["port"], t["id"]): t for t in transactions}
    assert len(told) == len(transactions)
    assert told.keys() == asked.keys()
    assert {k for k, t in told.items() if t["status"] == "answered"} == answered.keys()
    later_s = [
        told[key]["latency_ns"] / 1e9 - (wire_s - asked[key]) for key, wire_s in answered.items()
    ]
    assert min(later_s) >= -5e-6
    assert statistics.median(later_s) < 0.02
    return len(asked)


def test_dig_is_what_tcpdump_conntrack_and_the_servers_say(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """Both sides' process and pod, every hop of both nodes, DNAT at its place."""
    pids, backends = [], {}
    nodes = [pod.node for pod in lab.dns_pods]
    before = {node: len(log_text(lab, node).splitlines()) for node in nodes}
    with capturing(lab, CLIENT, tmp_path) as pcap, tracing(*sre, tmp_path=tmp_path) as tracer:
        for _ in range(20):
            process = lab.popen(CLIENT, ["dig", "+tcp", NAME], stdout=subprocess.DEVNULL)
            process.wait()
            pids.append(process.pid)
            listed = lab.node_exec(
                "node1", ["conntrack", "-L", "-p", "tcp", "--dport", "53"]
            ).stdout
            for line in listed.splitlines():
                sources, ports = re.findall(r"src=(\S+)", line), re.findall(r"sport=(\d+)", line)
                backends[sources[0], int(ports[0])] = sources[1]
            lab.run("default/shop-0", ["dig", "+tcp", NAME])
        time.sleep(0.5)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert check_against_tcpdump(pcap, found) == 20
    assert [t["client"]["pid"] for t in sorted(found, key=lambda t: t["time"])] == pids
    logged = [
        (int(m[1]), int(m[2]))
        for node in nodes
        for line in log_text(lab, node).splitlines()[before[node] :]
        if (m := re.search(r"10\.244\.1\.10:(\d+) - (\d+) .* tcp ", line))
    ]
    assert sorted(logged) == sorted((t["client"]["port"], t["id"]) for t in found)
    web = lab.pod(CLIENT)
    assert {t["backend"]["pod"] for t in found} == {pod.name for pod in lab.dns_pods}
    for t in found:
        check_times(t)
        client = t["client"]
        assert (client["comm"], client["pod"], client["container"]) == ("dig", "web-0", "app")
        assert (client["netns"], client["cgroup_id"]) == (web.netns, web.cgroup_id)
        assert (t["status"], t["rcode"], t["attempt"]) == ("answered", "NOERROR", 1)
        assert t["server"]["service"] == "kube-system/kube-dns"
        assert t["backend"]["ip"] == backends[client["ip"], client["port"]]
        (backend,) = [pod for pod in lab.dns_pods if pod.name == t["backend"]["pod"]]
        there = f"kube-system/{backend.name}"
        way = [("send", None, "sre/web-0"), ("ingress", web.veth, "sre/web-0")]
        if backend.node == "node2":
            way += [("egress", "eth0", "node1"), ("ingress", "eth0", "node2")]
        way += [("egress", backend.veth, there), ("receive", None, there)]
        back = {"send": "receive", "receive": "send", "ingress": "egress", "egress": "ingress"}
        told = [
            (h["kind"], h["ifname"], h["owner"]) for h in t["hops"] if h["direction"] == "query"
        ]
        assert told == way
        told = [
            (h["kind"], h["ifname"], h["owner"]) for h in t["hops"] if h["direction"] != "query"
        ]
        assert told == [(back[kind], *where) for kind, *where in reversed(way)]
        (first,) = [h for h in t["hops"][:6] if h["nat"]]
        assert first["nat"] == {"dnat": [f"{SERVICE}:53", f"{backend.ipv4}:53"]}
    check_lost(trace)
    assert trace.summary["unmatched"] == {"responses": 0, "queries": 0}


@pytest.mark.parametrize("cut", ["length", "bytes", "together"])
def test_queries_cut_anyhow_and_50_in_one_segment(
    lab: Lab, sre: list[str], tmp_path: Path, cut: str
) -> None:
    names = [f"n%.{NAME}*50"] if cut == "together" else [NAME, "mail.example.com", NAME]
    with capturing(lab, CLIENT, tmp_path) as pcap, tracing(*sre, tmp_path=tmp_path) as tracer:
        said = ask(lab, CLIENT, SERVICE, cut, *names)
        time.sleep(0.5)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert len(said["got"]) == (50 if cut == "together" else 3)
    assert check_against_tcpdump(pcap, found) == len(said["got"])
    assert {(t["id"], t["name"]) for t in found} == {
        (g["id"], g["name"] + ".") for g in said["got"]
    }
    assert {t["client"]["pid"] for t in found} == {said["pid"]}
    for t in found:
        check_times(t)
    check_lost(trace)


def test_answers_out_of_order_and_of_60_kb(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    names = ["late-1000.x", "size-60000.x", "late-100.y", "size-65535.x", "late-0.x", "size-1500.x"]
    with (
        serving(lab) as address,
        capturing(lab, CLIENT, tmp_path) as pcap,
        tracing(*sre, tmp_path=tmp_path) as tracer,
    ):
        said = ask(lab, CLIENT, address, "together", *names)
        time.sleep(0.5)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert check_against_tcpdump(pcap, found) == 6
    by_name = {t["name"]: t for t in found}
    assert {g["name"] + ".": g["len"] for g in said["got"]} == {
        name: t["response_len"] for name, t in by_name.items()
    }
    assert by_name["size-65535.x."]["response_len"] == 65535
    late_ns, earlier_ns = (by_name[name]["latency_ns"] for name in ("late-1000.x.", "late-100.y."))
    assert late_ns >= 1_000_000_000
    assert 100_000_000 <= earlier_ns < late_ns
    for t in found:
        check_times(t)
        assert len(t["hops"]) == 8
        assert t["backend"]["pod"] == "api-0"
    check_lost(trace)


@pytest.mark.parametrize("connections", [1, 5])
def test_thousands_of_queries_are_as_many_as_dnsperf_says(tmp_path: Path, connections: int) -> None:
    lab = Lab(quiet_servers=True)
    lab.up()
    queries = tmp_path / "queries"
    queries.write_text("kubernetes.default.svc.cluster.local A\nnothing.sre.svc.cluster.local A\n")
    argv = ["dnsperf", "-m", "tcp", "-s", SERVICE, "-d", str(queries), "-l", "8", "-Q", "400",
            "-c", str(connections), "-T", "1", "-q", "20", "-t", "5"]  # fmt: skip
    with tracing("--pods", str(lab.pods_file), tmp_path=tmp_path) as tracer:
        done = lab.run(CLIENT, argv, check=True)
        time.sleep(1)
        trace = tracer.stop()
    found = tcp_of(trace)
    sent, completed = (
        int(re.search(rf"Queries {what}:\s+(\d+)", done.stdout)[1])  # type: ignore[index]
        for what in ("sent", "completed")
    )
    assert (len(found), sum(t["status"] == "answered" for t in found)) == (sent, completed)
    assert completed > 2500
    assert len({t["client"]["port"] for t in found}) == connections
    rcodes = Counter(t["rcode"] for t in found)
    assert dict(re.findall(r"(\w+) (\d+) \(", done.stdout)).items() >= {
        (rcode, str(n)) for rcode, n in rcodes.items()
    }
    for t in found:
        check_times(t)
    check_lost(trace)


def test_host_network_pod_and_ipv6(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        process = lab.popen(
            "sre/host-agent", ["dig", "+tcp", f"@{SERVICE}", NAME], stdout=subprocess.DEVNULL
        )
        process.wait()
        lab.node_exec("node1", ["dig", "+tcp", f"@{SERVICE}", "mail.example.com"])
        lab.run(CLIENT, ["dig", "+tcp", "@fd00:10:96::a", NAME, "AAAA"], check=True)
        time.sleep(0.5)
        trace = tracer.stop()
    host, six = sorted(tcp_of(trace), key=lambda t: t["time"])
    assert (host["client"]["pod"], host["client"]["pid"]) == ("host-agent", process.pid)
    assert host["server"]["ip"] == SERVICE
    assert host["backend"]["pod"].startswith("coredns-")
    assert any("dnat" in (hop["nat"] or {}) for hop in host["hops"])
    assert (six["server"]["ip"], six["client"]["pod"]) == ("fd00:10:96::a", "web-0")
    assert six["backend"]["ip"] in {pod.ipv6 for pod in lab.dns_pods}
    for t in (host, six):
        assert t["status"] == "answered"
        assert {hop["kind"] for hop in t["hops"]} == {"send", "egress", "ingress", "receive"}
        check_times(t)
    check_lost(trace)


def test_connection_that_nobody_takes_is_refused(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """By the server's kernel; by a rule, with ICMP and with a reset."""
    address = lab.pod(SERVER).ipv4
    dig = ["dig", "+tcp", "+tries=1", "+retry=0", "+time=2", NAME]
    reject = ["-p", "tcp", "--dport", "53", "-d", "10.244.0.0/16", "-j", "REJECT"]
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        lab.run(CLIENT, [*dig, f"@{address}"])
        time.sleep(0.5)
        with rule(lab, "node1", *reject):
            lab.run(CLIENT, [*dig, f"@{SERVICE}"])
        with rule(lab, "node1", *reject, "--reject-with", "tcp-reset"):
            lab.run(CLIENT, [*dig, f"@{SERVICE}"])
        time.sleep(1)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert {t["server"]["ip"] for t in found} == {address, SERVICE}
    assert len(found) >= 3
    for t in found:
        assert t["status"] == "refused", t
        assert t["problem"] == "the TCP connection was refused, so nothing was asked"
        assert (t["id"], t["name"], t["client"]["comm"]) == (None, None, "dig")
        assert t["client"]["pod"] == "web-0"
        times = [hop["t_ns"] for hop in t["hops"]]
        assert times == sorted(times)
    check_lost(trace)


def test_connection_into_a_black_hole_is_dropped_with_the_reason(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    drop = ["-p", "tcp", "--dport", "53", "-s", lab.pod(CLIENT).ipv4, "-j", "DROP"]
    dig = ["dig", "+tcp", "+tries=1", "+retry=0", "+time=4", f"@{SERVICE}", NAME]
    with tracing(*sre, "--timeout", "2s", tmp_path=tmp_path) as tracer:
        with rule(lab, "node1", *drop):
            lab.run(CLIENT, dig)
        time.sleep(1)
        trace = tracer.stop()
    (t,) = tcp_of(trace)
    assert (t["status"], t["latency_ns"], t["id"]) == ("dropped", None, None)
    assert t["problem"] == "the TCP connection was never opened, so nothing was asked"
    # What is sent again may go to the other replica.
    assert [hop["kind"] for hop in t["hops"][:3]] == ["send", "ingress", "drop"]
    for hop in t["hops"][2:]:
        assert (hop["kind"], hop["reason"], hop["owner"]) == ("drop", "NETFILTER_DROP", "node1")
    assert t["hops"][-1]["location"]
    check_lost(trace)


@pytest.mark.parametrize("size", [100, 40_000])
def test_packets_lost_on_the_way_are_in_the_latency(
    lab: Lab, sre: list[str], tmp_path: Path, size: int
) -> None:
    """Every seventh, both ways: all is sent again until it is there."""
    every = "--mode nth --every 7 --packet 3"
    lose = ["-p", "tcp", "-m", "statistic", *every.split(), "-j", "DROP"]
    count = 60 if size == 100 else 20
    with (
        serving(lab) as address,
        capturing(lab, CLIENT, tmp_path) as pcap,
        tracing(*sre, "--timeout", "60s", tmp_path=tmp_path) as tracer,
    ):
        with rule(lab, "node1", "-s", address, *lose), rule(lab, "node1", "-d", address, *lose):
            said = ask(lab, CLIENT, address, "one-by-one", f"size-{size}.n%.x*{count}")
        time.sleep(0.7)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert len(said["got"]) == count
    told = {t["id"]: t for t in found if t["status"] == "answered"}
    assert {g["id"] for g in said["got"]} == told.keys()
    slow, excess_ns = 0, []
    for got in said["got"]:
        t = told[got["id"]]
        check_times(t)
        # What the client measures is from before its send until after its receive.
        assert t["latency_ns"] <= got["ns"]
        excess_ns.append(got["ns"] - t["latency_ns"])
        slow += t["latency_ns"] > 150_000_000
    assert statistics.median(excess_ns) < 30_000_000
    assert slow > 2 or size > 100  # of much that is lost, what comes next tells at once
    assert any(hop["kind"] == "drop" for t in found for hop in t["hops"])
    assert len(tcp_messages(pcap)) == len(found) + len(told)
    check_lost(trace)


def test_reset_close_and_silence_in_the_middle(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    with serving(lab) as address, tracing(*sre, "--timeout", "2s", tmp_path=tmp_path) as tracer:
        ask(lab, CLIENT, address, "together", "size-100.x", "reset.x")
        ask(lab, CLIENT, address, "together", "size-100.x", "close.x")
        lab.run(CLIENT, ["timeout", "6", *PEER, "ask", address, "together", "void.x"])
        time.sleep(0.7)
        trace = tracer.stop()
    found = {t["name"]: t for t in tcp_of(trace)}
    assert len(tcp_of(trace)) == 5
    assert found["size-100.x."]["status"] == "answered"
    for name in ("reset.x.", "close.x."):
        assert (found[name]["status"], found[name]["problem"]) == (
            "timeout", "the TCP connection ended before the answer",
        )  # fmt: skip
    assert (found["void.x."]["status"], found["void.x."]["problem"]) == ("timeout", None)
    check_lost(trace, "tcp_bytes")


def test_client_that_closes_its_half_gets_its_answers(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    with serving(lab) as address, tracing(*sre, tmp_path=tmp_path) as tracer:
        said = ask(lab, CLIENT, address, "half", "late-1200.x", "late-0.x")
        time.sleep(0.5)
        trace = tracer.stop()
    assert len(said["got"]) == 2
    assert [t["status"] for t in tcp_of(trace)] == ["answered"] * 2
    check_lost(trace)


def test_connection_that_was_there_before(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    """Its process is unknown, since only a SYN tells; its pod is not."""
    client = lab.popen(
        CLIENT, [*PEER, "ask", SERVICE, "lines"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    stdin, stdout = client.stdin, client.stdout
    assert stdin
    assert stdout
    lines = 0

    def ask_next(name: str) -> None:
        nonlocal lines
        lines += 1
        stdin.write(f"{name}\n")
        stdin.flush()
        stdout.readline()

    armed = threading.Event()

    def keep_alive() -> None:
        """The server ends a connection on which nothing was asked for ten seconds."""
        while not armed.wait(1):
            ask_next("www.example.com")

    asking = threading.Thread(target=keep_alive)
    try:
        for name in ("www.example.com", "mail.example.com"):
            ask_next(name)
        asking.start()
        with tracing(*sre, tmp_path=tmp_path) as tracer:
            armed.set()
            asking.join()
            before = lines
            for _ in range(3):
                ask_next("www.example.com")
            time.sleep(0.5)
            trace = tracer.stop()
    finally:
        armed.set()
        client.kill()
        client.communicate()
    # The tracer may have seen the last ones of those before, while it started.
    found = [t for t in tcp_of(trace) if t["id"] is None or t["id"] > before]
    assert [t["id"] for t in found] == [before + 1, before + 2, before + 3]
    for t in found:
        assert (t["status"], t["client"]["pod"], t["client"]["pid"]) == ("answered", "web-0", None)
        assert t["client"]["container"] == "app"
        check_times(t)
    assert {t["server"]["ip"] for t in found} == {SERVICE}
    check_lost(trace)


def test_filters_by_pod_and_process(lab: Lab, tmp_path: Path) -> None:
    pods = ["--pods", str(lab.pods_file)]
    client = lab.popen(
        CLIENT, [*PEER, "ask", SERVICE, "lines"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    client.send_signal(signal.SIGSTOP)
    shell = lab.popen(
        CLIENT,
        ["sh", "-c", f"read line; exec dig +tcp @{SERVICE} {NAME}"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        with (
            tracing(*pods, "--pid", str(shell.pid), tmp_path=tmp_path) as by_pid,
            tracing(*pods, "--pod", "web-*", tmp_path=tmp_path) as by_pod,
            tracing(
                *pods, "--side", "server", "--pod", "coredns-*", tmp_path=tmp_path
            ) as by_server,
        ):
            lab.run("default/shop-0", ["dig", "+tcp", f"@{SERVICE}", NAME], check=True)
            lab.run(CLIENT, ["dig", "+tcp", f"@{SERVICE}", "mail.example.com"], check=True)
            shell.communicate("\n", timeout=60)
            time.sleep(0.7)
            traces = [tracer.stop() for tracer in (by_pid, by_pod, by_server)]
    finally:
        client.kill()
        client.communicate()
    (one,) = tcp_of(traces[0])
    assert (one["client"]["pid"], one["name"]) == (shell.pid, f"{NAME}.")
    assert [t["name"] for t in tcp_of(traces[1])] == ["mail.example.com.", f"{NAME}."]
    assert {t["client"]["pod"] for t in tcp_of(traces[2])} == {"shop-0", "web-0"}
    for trace in traces[:2]:
        assert trace.summary["lost"]["filtered"] >= 1
        check_lost(trace)


def test_truncated_answer_and_its_retry_over_tcp_are_one_lookup(
    lab: Lab, sre: list[str], tmp_path: Path
) -> None:
    """By dig, and by glibc, which asks for both families over each."""
    with tracing(*sre, tmp_path=tmp_path) as tracer:
        lab.run(CLIENT, ["dig", "+bufsize=512", "crowd.example.com.", "AAAA"], check=True)
        time.sleep(0.3)
        done = lab.run(CLIENT, ["getent", "ahosts", "crowd.example.com."], check=True)
        time.sleep(0.5)
        trace = tracer.stop()
    assert len({line.split()[0] for line in done.stdout.splitlines()}) == CROWD + 1
    by_getent, by_dig = sorted(trace.lookups, key=lambda one: -one["queries"])
    own = [t for t in trace.transactions if t["client"]["comm"] == "dig"]
    assert [(t["protocol"], "tc" in t["flags"]) for t in own] == [("udp", True), ("tcp", False)]
    assert len(own[1]["answers"]) == CROWD
    assert (by_dig["queries"], by_dig["status"]) == (2, "NOERROR")
    assert by_dig["ids"] == [t["id"] for t in own]
    theirs = [t for t in trace.transactions if t["client"]["comm"] == "getent"]
    assert by_getent["queries"] == len(theirs) == 4
    assert {t["protocol"] for t in theirs} == {"udp", "tcp"}
    assert sorted(by_getent["ids"]) == sorted(t["id"] for t in theirs)
    assert (by_dig["wasted"], by_getent["wasted"]) == (0, 0)
    check_lost(trace)


def test_same_port_for_two_servers_at_once(lab: Lab, sre: list[str], tmp_path: Path) -> None:
    with (
        serving(lab) as address,
        serving(lab, "sre/worker-0") as other,
        tracing(*sre, tmp_path=tmp_path) as tracer,
    ):
        said = ask(lab, CLIENT, address, "same-port", other, *(f"n{n}.x" for n in range(5)))
        time.sleep(0.5)
        trace = tracer.stop()
    found = tcp_of(trace)
    assert len({g["port"] for g in said["got"]}) == 1
    assert len(said["got"]) == len(found) == 10
    by_server = {a: [t["id"] for t in found if t["server"]["ip"] == a] for a in (address, other)}
    assert by_server == {address: [1, 11, 21, 31, 41], other: [2, 12, 22, 32, 42]}
    assert {t["backend"]["pod"] for t in found} == {"api-0", "worker-0"}
    for t in found:
        check_times(t)
        assert t["backend"]["ip"] == t["server"]["ip"]
    check_lost(trace)


def test_many_short_connections_leave_the_tables_empty(tmp_path: Path) -> None:
    lab = Lab(quiet_servers=True)
    lab.up()
    pods = ["--pods", str(lab.pods_file)]
    with tracing(*pods, tmp_path=tmp_path) as tracer:
        said = ask(lab, CLIENT, SERVICE, "each", "kubernetes.default.svc.cluster.local*1000")
        sizes = []
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            sizes = [
                _entries(tracer.process.pid, name) for name in ("connections", "connection_ids")
            ]
            if sizes == [0, 0]:
                break
            time.sleep(0.5)
        trace = tracer.stop()
    assert len(said["got"]) == 1000
    check_lost(trace)
    found = [t for t in tcp_of(trace) if t["client"]["pid"] == said["pid"]]
    assert Counter(t["status"] for t in found) == {"answered": 1000}
    assert {(t["client"]["port"], t["id"]) for t in found} == {
        (g["port"], g["id"]) for g in said["got"]
    }
    assert sizes == [0, 0]


def _entries(pid: int, name: str) -> int:
    """How many entries a map of that process has, as bpftool says."""
    ids = set()
    for fd in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if m := re.search(r"^map_id:\s*(\d+)", fd.read_text(), re.MULTILINE):
                ids.add(int(m[1]))
    listed = json.loads(subprocess.check_output(["bpftool", "--json", "map", "list"]))
    (number,) = [m["id"] for m in listed if m["id"] in ids and m.get("name") == name[:15]]
    dumped = subprocess.check_output(["bpftool", "--json", "map", "dump", "id", str(number)])
    return len(json.loads(dumped))
