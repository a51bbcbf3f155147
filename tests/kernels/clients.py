# SPDX-License-Identifier: Apache-2.0
"""Cases: who asked, what for, over which hops, and when it was received."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from tests.kernels import ask
from tests.kernels.world import Case, Check, NotOffered, Seen, World
from tests.tracing import conntrack_backends

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "10.96.0.10"

QUESTIONS = [
    ("www.example.com", "A"), ("www.example.com", "AAAA"), ("web.sre.svc.cluster.local", "A"),
    ("api.sre.svc.cluster.local", "A"), ("nothing.sre.svc.cluster.local", "A"),
    ("10.0.96.10.in-addr.arpa", "PTR"), ("example.com", "SOA"), ("example.com", "NS"),
    ("big.example.com", "TXT"), ("servfail.example.com", "A"), ("refused.example.com", "A"),
    ("alias.example.com", "A"), ("WwW.eXaMpLe.CoM", "A"), ("li-rui.top", "A"),
    ("www.li-rui.top", "A"), ("ycwu314.top", "A"), ("x.bench.example.com", "A"),
    ("y.bench.example.com", "TYPE65280"), ("example.com", "HTTPS"), ("_dns._udp.example.com", "SRV"),
    ("nowhere.invalid", "A"), ("slow.example.com", "A"), ("www.example.com", "TXT"),
]  # fmt: skip


def epoch_ns(time: str) -> int:
    """Nanoseconds since 1970 of a JSON line's time."""
    whole, _, fraction = time.removesuffix("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 10**9 + int(fraction.ljust(9, "0"))


def questions(world: World) -> Check:
    """Ids, names, types, rcodes as tcpdump saw them; process, pod, container; conntrack's backend."""
    asked = [word for question in QUESTIONS for word in question]
    pid = world.dig("sre/web-0", *asked)
    backends = conntrack_backends(world.lab, "node1")
    world.dig("default/shop-0", *asked)
    pod = world.lab.pod("sre/web-0")

    def check(seen: Seen) -> None:
        told = seen.by_process(pid)
        names = {f"{name}." for name, _ in QUESTIONS}
        asked = {(t["client"]["port"], t["id"]) for t in told}
        seen_there = [e for e in world.witnessed("sre/web-0") if (e.port, e.id) in asked]
        truth = [e for e in seen_there if e.name in names]
        assert len(truth) == len(told) == len(QUESTIONS)
        assert sorted((t["id"], t["name"], t["type"], t["rcode"]) for t in told) == sorted(
            (e.id, e.name, e.type, e.rcode) for e in truth
        )
        latencies = {(e.port, e.id, e.name, e.type): e.latency_s for e in truth}
        assert len(latencies) == len(truth)
        for t in told:
            client = t["client"]
            assert t["status"] == "answered"
            assert (client["namespace"], client["pod"], client["container"]) == (
                "sre", "web-0", "app",
            )  # fmt: skip
            assert client["comm"] == "dig"
            assert (client["netns"], client["cgroup_id"]) == (pod.netns, pod.cgroup_id)
            assert (t["server"]["ip"], t["server"]["port"]) == (SERVICE, 53)
            assert t["server"]["service"] == "kube-system/kube-dns"
            assert t["backend"]["ip"] == backends[client["ip"], client["port"]]
            assert t["backend"]["pod"].startswith("coredns-")
            assert_times_add_up(t, latencies[client["port"], t["id"], t["name"], t["type"]])
        assert not [t for t in seen.trace.transactions if t["client"]["namespace"] == "default"]

    return check


def assert_times_add_up(t: Mapping[str, Any], seen_on_wire_s: float | None) -> None:
    """From 0 to the latency, never back; tcpdump stands between the two sockets."""
    times = [hop["t_ns"] for hop in t["hops"]]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == t["latency_ns"]
    assert seen_on_wire_s is not None
    assert seen_on_wire_s - 2e-6 <= t["latency_ns"] / 1e9


def path(world: World) -> Check:
    """Every hop over both nodes, DNAT told at the right one; tcpdump at the replica agrees."""
    name = "kubernetes.default.svc.cluster.local."
    world.dig("sre/web-0", *[name] * 24)
    web, remote = world.lab.pod("sre/web-0"), world.replica("node2")

    def check(seen: Seen) -> None:
        told = [t for t in seen.named(name) if t["backend"]["ip"] == remote.ipv4]
        arrivals = {(e.port, e.id): e.query_s for e in world.arrived(remote) if e.name == name}
        assert {(t["client"]["port"], t["id"]) for t in told} == arrivals.keys()
        assert told
        for t in told:
            hops = [(h["kind"], h["direction"], h["ifname"], h["owner"]) for h in t["hops"]]
            assert hops == [
                ("send", "query", None, "sre/web-0"),
                ("ingress", "query", web.veth, "sre/web-0"),
                ("egress", "query", "eth0", "node1"),
                ("ingress", "query", "eth0", "node2"),
                ("egress", "query", remote.veth, remote.full_name),
                ("receive", "query", None, remote.full_name),
                ("send", "response", None, remote.full_name),
                ("ingress", "response", remote.veth, remote.full_name),
                ("egress", "response", "eth0", "node2"),
                ("ingress", "response", "eth0", "node1"),
                ("egress", "response", web.veth, "sre/web-0"),
                ("receive", "response", None, "sre/web-0"),
            ]
            assert [h["nat"] for h in t["hops"]].count(None) == 10
            assert t["hops"][2]["nat"] == {"dnat": [f"{SERVICE}:53", f"{remote.ipv4}:53"]}
            assert t["hops"][10]["nat"] == {"dnat": [f"{remote.ipv4}:53", f"{SERVICE}:53"]}
            # tcpdump's time is taken between the veth's other end and the server's socket.
            sent_s = epoch_ns(t["time"]) / 1e9
            at = arrivals[t["client"]["port"], t["id"]] - sent_s
            assert t["hops"][4]["t_ns"] / 1e9 - 1e-3 <= at <= t["hops"][5]["t_ns"] / 1e9 + 1e-3

    return check


def receive_time(world: World) -> Check:
    """When the process takes the answer (kprobe), or when its socket has it (tracepoint)."""
    wait_s = 3.0
    name = "late.bench.example.com."
    _, said = world.python("sre/web-0", ask.LATE_TAKER, SERVICE, name, str(wait_s))
    whole_ns = int(said)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["latency_ns"] < whole_ns
        if seen.hooks == "kprobe":
            assert t["latency_ns"] > wait_s * 1e9
            return
        (exchange,) = [e for e in world.witnessed("sre/web-0") if e.name == name]
        assert exchange.latency_s is not None
        assert exchange.latency_s - 2e-6 <= t["latency_ns"] / 1e9 < wait_s

    return check


def short_lived(world: World) -> Check:
    """Processes that are gone before anybody could look: pid, pod, container are right all the same."""
    pids = {
        pod: {int(pid) for pid in world.python(pod, ask.BURST, SERVICE, "25")[1].split()}
        for pod in ("sre/web-0", "sre/worker-0", "default/shop-0")
    }

    def check(seen: Seen) -> None:
        told: dict[str, set[int]] = {"sre/web-0": set(), "sre/worker-0": set()}
        for t in seen.trace.transactions:
            if t["name"] and t["name"].endswith(".burst.bench.example.com."):
                client = t["client"]
                assert t["name"].startswith(f"p{client['pid']}.")
                assert client["container"] == "app"
                told[f"{client['namespace']}/{client['pod']}"].add(client["pid"])
        assert told == {pod: pids[pod] for pod in told}

    return check


def host_network(world: World) -> Check:
    """Told from the node's other processes by its cgroup, though SNAT renames it on the way."""
    name = "agent.bench.example.com."
    pid = world.dig("sre/host-agent", f"@{SERVICE}", name)
    world.node("node1", f"dig +tries=1 @{SERVICE} {name} AAAA")

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["type"] == "A"
        assert (t["client"]["pod"], t["client"]["pid"]) == ("host-agent", pid)
        assert t["backend"]["ip"] == answered_by(world, t)
        assert {hop["kind"] for hop in t["hops"]} >= {"send", "egress", "receive"}
        assert t["status"] == "answered"
        assert any("dnat" in hop["nat"] for hop in t["hops"] if hop["nat"])

    return check


def answered_by(world: World, t: Mapping[str, Any]) -> str:
    """The replica at whose eth0 tcpdump saw this query."""
    (ip,) = [
        pod.ipv4
        for pod in world.lab.dns_pods
        for e in world.arrived(pod)
        if (e.id, e.name, e.type) == (t["id"], t["name"], t["type"])
    ]
    return str(ip)


def ipv6(world: World) -> Check:
    """Over the service's IPv6 address, with DNAT."""
    name = "six.bench.example.com."
    world.dig("sre/web-0", "@fd00:10:96::a", name, "AAAA")

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["server"]["ip"] == "fd00:10:96::a"
        assert t["client"]["pod"] == "web-0"
        backends = {pod.ipv6: pod.full_name for pod in world.lab.dns_pods}
        told = f"{t['backend']['namespace']}/{t['backend']['pod']}"
        assert told == backends[t["backend"]["ip"]]
        assert (t["id"], name) in [(e.id, e.name) for e in world.witnessed(told)]

    return check


def cgroup_v2_only(world: World) -> Check:
    """Containers by their cgroup, where no hierarchy but v2 is mounted."""
    with open("/proc/self/mountinfo") as mounts:
        if any(" - cgroup " in line for line in mounts):
            raise NotOffered("cgroup v1 is mounted here too")
    name = "v2.bench.example.com."
    world.dig("sre/worker-0", name)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert (t["client"]["pod"], t["client"]["container"]) == ("worker-0", "app")

    return check


CASES = [
    Case("23 questions: process, container, backend", questions),
    Case("every hop of the path, DNAT at its place", path),
    Case("when the answer is received", receive_time),
    Case("processes that are gone at once", short_lived),
    Case("hostNetwork pod behind masquerade", host_network),
    Case("IPv6", ipv6),
    Case("cgroup v2 alone", cgroup_v2_only),
]
