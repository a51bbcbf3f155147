# SPDX-License-Identifier: Apache-2.0
"""Cases: the ways in which a service's address becomes a server's."""

from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.kernels import ask
from tests.kernels.clients import SERVICE, answered_by
from tests.kernels.world import Case, Check, NotOffered, Seen, World
from tests.tracing import conntrack_backends
from tracer.lab import go_build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NFTABLES_SERVICE = "10.96.0.20"
IPVS_SERVICE = "10.96.0.21"
NODE_LOCAL = "169.254.20.10"

# As kube-proxy writes it in nftables mode: a verdict map to services, numgen to endpoints.
NFTABLES = """\
table ip dnstrace-services {{
  chain endpoint-0 {{
    meta l4proto udp dnat to {0}:53
  }}
  chain endpoint-1 {{
    meta l4proto udp dnat to {1}:53
  }}
  chain service-dns {{
    numgen random mod 2 vmap {{ 0 : goto endpoint-0, 1 : goto endpoint-1 }}
  }}
  map service-ips {{
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = {{ {2} . udp . 53 : goto service-dns }}
  }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority dstnat
    jump services
  }}
}}
"""
COREFILE = """\
.:53 {
    bind 169.254.20.10
    errors
    cache 30
    forward . 10.96.0.10 {
        prefer_udp
    }
}
"""


def _names(zone: str, count: int) -> list[str]:
    """That many, so that no two questions are alike where tcpdump sees them."""
    return [f"{number}.{zone}" for number in range(count)]


def _translated(
    world: World, names: Sequence[str], server: str
) -> Callable[[Seen], list[dict[str, Any]]]:
    """A check: each with the backend at which tcpdump saw it, each at both ends; gives them."""

    def check(seen: Seen) -> list[dict[str, Any]]:
        told = []
        for name in names:
            (t,) = seen.named(name)
            told.append(t)
            assert t["status"] == "answered"
            assert t["server"]["ip"] == server
            assert t["backend"]["ip"] == answered_by(world, t)
            kinds = [hop["kind"] for hop in t["hops"]]
            assert kinds.count("send") == kinds.count("receive") == 2
            dnat = [hop["nat"]["dnat"] for hop in t["hops"] if hop["nat"]]
            assert dnat[0] == [f"{server}:53", f"{t['backend']['ip']}:53"]
        return told

    return check


def _iptables(variant: str, name: str) -> Callable[[World], Check]:
    def traffic(world: World) -> Check:
        node = next((n for n, used in world.iptables.items() if used == variant), None)
        if node is None:
            raise NotOffered(f"iptables-{variant} is refused by this kernel")
        pod = {"node1": "sre/web-0", "node2": "sre/worker-0"}[node]
        names = _names(f"{name}.bench.example.com.", 6)
        world.dig(pod, *names)
        backends = conntrack_backends(world.lab, node)
        translated = _translated(world, names, SERVICE)

        def check(seen: Seen) -> None:
            for t in translated(seen):
                client = t["client"]
                assert t["backend"]["ip"] == backends[client["ip"], client["port"]]

        return check

    traffic.__name__ = f"iptables_{variant}"
    return traffic


def nftables(world: World) -> Check:
    """Rules in kube-proxy's nftables shape."""
    names = _names("nftables.bench.example.com.", 6)
    endpoints = [pod.ipv4 for pod in world.lab.dns_pods]
    world.offered("node1", "nft -f -", NFTABLES.format(*endpoints, NFTABLES_SERVICE))
    try:
        world.dig("sre/web-0", f"@{NFTABLES_SERVICE}", *names)
    finally:
        world.node("node1", "nft delete table ip dnstrace-services")
    translated = _translated(world, names, NFTABLES_SERVICE)

    def check(seen: Seen) -> None:
        translated(seen)

    return check


def ipvs(world: World) -> Check:
    """The service's address on a dummy device, and IPVS behind it, as kube-proxy's ipvs mode."""
    names = _names("ipvs.bench.example.com.", 4)
    for module in ("ip_vs", "ip_vs_rr", "dummy"):
        world.lab.node_exec("node1", ["modprobe", module])
    world.offered("node1", "ip link add kube-ipvs0 type dummy")
    try:
        world.node("node1", f"ip addr add {IPVS_SERVICE}/32 dev kube-ipvs0")
        world.offered("node1", f"ipvsadm -A -u {IPVS_SERVICE}:53 -s rr")
        world.node("node1", "sysctl -w net.ipv4.vs.conntrack=1")
        for pod in world.lab.dns_pods:
            world.node("node1", f"ipvsadm -a -u {IPVS_SERVICE}:53 -r {pod.ipv4}:53 -m")
        world.dig("sre/web-0", f"@{IPVS_SERVICE}", *names)
        listed = world.node("node1", "ipvsadm -Lnc")
    finally:
        world.lab.node_exec("node1", ["ipvsadm", "-C"])
        world.node("node1", "ip link del kube-ipvs0")
    chosen = {
        int(port): backend
        for port, backend in re.findall(rf"\S+:(\d+) +{IPVS_SERVICE}:53 +(\S+):53", listed)
    }
    translated = _translated(world, names, IPVS_SERVICE)

    def check(seen: Seen) -> None:
        for t in translated(seen):
            assert t["backend"]["ip"] == chosen[t["client"]["port"]]

    return check


def node_local(world: World) -> Check:
    """A cache on the node itself: link-local address on a dummy device, NOTRACK, no DNAT."""
    name = "nodelocal.bench.example.com."
    world.lab.node_exec("node1", ["modprobe", "dummy"])
    world.offered("node1", "ip link add nodelocaldns type dummy")
    rules = [
        f"PREROUTING -d {NODE_LOCAL} -p udp --dport 53 -j CT --notrack",
        f"OUTPUT -s {NODE_LOCAL} -p udp --sport 53 -j CT --notrack",
    ]
    corefile = world.tmp / "Corefile.nodelocal"
    corefile.write_text(COREFILE)
    server = None
    try:
        world.node("node1", f"ip addr add {NODE_LOCAL}/32 dev nodelocaldns")
        world.node("node1", "ip link set nodelocaldns up")
        for rule in rules:
            world.node("node1", f"iptables-nft -t raw -A {rule}")
        server = world.popen_on_node(
            "node1",
            [str(go_build.binary(go_build.COREDNS)), "-conf", str(corefile)],
            stdout=subprocess.DEVNULL,
        )
        _wait_for(world, f"udp.*{NODE_LOCAL}:53")
        world.dig("sre/web-0", f"@{NODE_LOCAL}", name, name)
        tracked = world.node("node1", f"conntrack -L -p udp --dst {NODE_LOCAL}")
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        for rule in rules:
            world.lab.node_exec("node1", ["iptables-nft", "-t", "raw", "-D", *rule.split()])
        world.node("node1", "ip link del nodelocaldns")
    web = world.lab.pod("sre/web-0")

    def check(seen: Seen) -> None:
        assert NODE_LOCAL not in tracked
        told = seen.named(name)
        assert len(told) == 2
        for t in told:
            assert t["status"] == "answered"
            assert t["server"]["ip"] == t["backend"]["ip"] == NODE_LOCAL
            assert [(h["kind"], h["direction"], h["ifname"]) for h in t["hops"]] == [
                ("send", "query", None),
                ("ingress", "query", web.veth),
                ("receive", "query", None),
                ("send", "response", None),
                ("egress", "response", web.veth),
                ("receive", "response", None),
            ]
            assert {h["owner"] for h in t["hops"][2:4]} == {"node1"}
            assert not any(h["nat"] for h in t["hops"])

    return check


def _wait_for(world: World, listening: str) -> None:
    deadline = time.monotonic() + 120
    while not re.search(listening, world.node("node1", "ss -Hlun").replace("UNCONN", "udp")):
        assert time.monotonic() < deadline, f"nobody listens: {listening}"
        time.sleep(0.1)


# Of a clash, each of the two has its own backend in half of the cases.
PAIRS, ENOUGH_CLASHES, MOST_PAIRS = 40, 20, 1000


def conntrack_race(world: World) -> Check:
    """Two queries of one new socket at the same moment: conntrack lets each have its own backend."""
    if len(world.cpus()) < 2:
        raise NotOffered("one CPU only: nothing happens at the same moment")
    slow = "".join("-A DNSTRACE-SLOW -s 203.0.113.77 -j RETURN\n" for _ in range(2000))
    restore = f"*filter\n:DNSTRACE-SLOW - [0:0]\n-A FORWARD -j DNSTRACE-SLOW\n{slow}COMMIT\n"
    world.node("node1", "iptables-nft-restore --noflush", restore)
    clashes = 0
    pairs = 0
    try:
        before = _clashes(world)
        while clashes < ENOUGH_CLASHES and pairs < MOST_PAIRS:
            name = f"{pairs}.race.bench.example.com"
            world.python("sre/web-0", ask.RACERS, SERVICE, name, str(PAIRS))
            pairs += PAIRS
            clashes = _clashes(world) - before
    finally:
        world.node("node1", "iptables-nft -D FORWARD -j DNSTRACE-SLOW")
        world.node("node1", "iptables-nft -F DNSTRACE-SLOW")
        world.node("node1", "iptables-nft -X DNSTRACE-SLOW")

    def check(seen: Seen) -> None:
        told = [
            t
            for t in seen.trace.transactions
            if t["name"] and t["name"].endswith(".race.bench.example.com.")
        ]
        assert len(told) == 2 * pairs
        backends: dict[str, set[str]] = {}
        for t in told:
            if t["status"] == "answered":
                assert t["backend"]["ip"] == answered_by(world, t)
                backends.setdefault(t["name"], set()).add(t["backend"]["ip"])
            else:
                assert t["status"] == "dropped"
                assert t["hops"][-1]["kind"] == "drop"
        assert clashes, f"no two of {pairs} pairs of queries raced"
        assert any(len(ips) == 2 for ips in backends.values())

    return check


def _clashes(world: World) -> int:
    """Insertions that conntrack found taken, over all CPUs of node1."""
    return sum(
        int(number)
        for number in re.findall(
            r"(?:insert_failed|clash_resolve)=(\d+)", world.node("node1", "conntrack -S")
        )
    )


CASES = [
    Case("service by iptables-nft", _iptables("nft", "ipt-nft")),
    Case("service by iptables-legacy", _iptables("legacy", "ipt-legacy")),
    Case("service by nftables, kube-proxy's shape", nftables),
    Case("service by IPVS", ipvs),
    Case("NodeLocal: link-local cache, NOTRACK", node_local),
    Case("conntrack insert race", conntrack_race),
]
