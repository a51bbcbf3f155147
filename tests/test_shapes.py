# SPDX-License-Identifier: Apache-2.0
"""The trace of other shapes of cluster DNS, against logs, conntrack and tcpdump.

Caches on the nodes, services of either family and port, clients of the nodes themselves, and
resolvers on a pod's loopback.
"""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests import stubs
from tests.asking import asked, dig, fresh_name, log_entries, logged
from tests.tracing import capturing, exchanges, tracing
from tracer.lab import Lab, topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.stubs import Stub
    from tests.tracing import Trace

    Start = Callable[[Lab, str, Path], AbstractContextManager[Stub]]
    Record = dict[str, Any]

pytestmark = pytest.mark.usefixtures("root")

LINK_LOCAL = "169.254.20.10"
SERVICE, SERVICE_V6 = topology.DNS_SERVICE.ips
SECOND, SECOND_V6 = topology.SECOND_DNS_SERVICE.ips
UPSTREAM_SERVICE = topology.UPSTREAM_DNS_SERVICE.ips[0]
OUTSIDE = topology.UPSTREAM_IPS[0]
SERVICES = {
    SERVICE: "kube-system/kube-dns",
    SERVICE_V6: "kube-system/kube-dns",
    SECOND: "dns2/kube-dns-2",
    SECOND_V6: "dns2/kube-dns-2",
}
NODES = ["node1", "node2"]
CACHE_ON = {
    "node1": "kube-system/node-local-dns-d8k4q",
    "node2": "kube-system/node-local-dns-w2r7x",
}
OTHER = "default/shop-0"
TRANSPORTS = {"udp": "+notcp", "tcp": "+tcp"}


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


def up(**options: Any) -> Lab:
    """The lab of that shape; brought up only where it is not yet."""
    lab = Lab(**options)
    lab.up()
    return lab


def names_of(lab: Lab) -> list[str]:
    """Where the tracer is to learn of pods."""
    if lab.options.api:
        nodes = [word for node in NODES for word in ("--node", node)]
        return ["--kubeconfig", str(lab.kubeconfig), *nodes]
    return ["--pods", str(lab.pods_file)]


@contextmanager
def traced(lab: Lab, tmp_path: Path, *arguments: str) -> Iterator[list[Trace]]:
    """What namespace sre asks in the block, once the block has ended: one trace in a list."""
    told: list[Trace] = []
    arguments = (*names_of(lab), "--namespace", "sre", *arguments)
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        yield told
        time.sleep(0.3)
        told.append(tracer.stop())
    summary = told[0].summary
    assert {kind: n for kind, n in summary["lost"].items() if n and kind != "filtered"} == {}
    assert summary["unmatched"] == {"responses": 0, "queries": 0}


def only(told: list[Trace], name: str) -> Record:
    """The one transaction of a name that a pod asked for, and that a process of it made."""
    (found,) = told[0].named(name)
    return found


def cluster_name() -> str:
    """A name of the cluster that no cache has; it does not exist."""
    return f"{fresh_name().split('.')[0]}.sre.svc.cluster.local"


def pod_of(side: Record) -> str:
    """namespace/name of a client or backend."""
    return f"{side['namespace']}/{side['pod']}"


def replica_asked(lab: Lab, name: str) -> str:
    """The replica in whose log a name is, once."""
    (found,) = (pod.full_name for pod in lab.dns_pods for _ in log_entries(lab, pod.node, name))
    return found


def replica_ips(lab: Lab, name: str) -> set[str]:
    (found,) = ({p.ipv4, p.ipv6} for p in lab.dns_pods if p.full_name == name)
    return found


def hops_add_up(t: Record) -> None:
    """From the client's send to its receive, in the order of time."""
    hops = t["hops"]
    times = [hop["t_ns"] for hop in hops]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0, t["latency_ns"])
    assert (hops[0]["kind"], hops[0]["direction"]) == ("send", "query")
    assert (hops[-1]["kind"], hops[-1]["direction"]) == ("receive", "response")
    at_sockets = [(h["kind"], h["direction"]) for h in hops if h["kind"] in ("send", "receive")]
    assert at_sockets == [
        ("send", "query"),
        ("receive", "query"),
        ("send", "response"),
        ("receive", "response"),
    ]


def changes(t: Record) -> list[tuple[str, str]]:
    """What DNAT changed on the way of the query."""
    nats = [hop["nat"] for hop in t["hops"] if hop["direction"] == "query" and hop["nat"]]
    return [tuple(nat["dnat"]) for nat in nats if "dnat" in nat]


@pytest.fixture(
    params=[
        pytest.param(("link-local", False), id="link-local"),
        pytest.param(("link-local", True), id="link-local, API"),
        pytest.param(("cluster-ip", False), id="cluster-ip"),
        pytest.param(("cluster-ip", True), id="cluster-ip, API"),
    ],
    scope="module",
)
def cached(request: pytest.FixtureRequest) -> Lab:
    """A lab with a cache on each node."""
    node_local, api = request.param
    return up(node_local=node_local, api=api)


@pytest.fixture
def cache(cached: Lab) -> Record:
    """The server that pods of such a lab ask, as it is to be told."""
    if cached.options.node_local == "link-local":
        return {"ip": LINK_LOCAL, "port": 53, "service": None, "role": "node-cache"}
    return {"ip": SERVICE, "port": 53, "service": "kube-system/kube-dns", "role": "cluster"}


def test_a_cache_asks_the_cluster_on_a_miss_and_nobody_on_a_hit(
    cached: Lab, cache: Record, tmp_path: Path
) -> None:
    """The query to CoreDNS is there although its client is of another namespace than was asked for."""
    name = cluster_name()
    with traced(cached, tmp_path) as told:
        for transport in TRANSPORTS.values():
            assert asked(cached, "sre/web-0", transport, name) == ("NXDOMAIN", cache["ip"])
    miss, hit = told[0].named(f"{name}.")
    entries = log_entries(cached, "node-local-node1", name)
    assert [(t["client"]["port"], t["id"], t["protocol"]) for t in (miss, hit)] == [
        (entry.port, entry.id, entry.protocol) for entry in entries
    ]
    for t in (miss, hit):
        assert t["server"] == cache
        assert (t["status"], t["rcode"]) == ("answered", "NXDOMAIN")
        assert pod_of(t["client"]) == "sre/web-0"
        assert pod_of(t["backend"]) == CACHE_ON["node1"]
        assert (t["backend"]["ip"], t["backend"]["port"]) == (cache["ip"], 53)
        hops_add_up(t)
        # What arrives at the cache's socket is on the node, but it is the cache that has it.
        owners = {h["owner"] for h in t["hops"] if h["kind"] == "receive"}
        assert owners == {CACHE_ON["node1"], "sre/web-0"}
    assert (hit["upstream"], hit["upstream_unsure"]) == ([], 0)
    (query,) = miss["upstream"]
    assert miss["upstream_unsure"] == 0
    replica = replica_asked(cached, name)
    (entry,) = (entry for node in NODES for entry in log_entries(cached, node, name))
    assert (query["protocol"], query["status"], query["rcode"]) == ("tcp", "answered", "NXDOMAIN")
    assert query["id"] == entry.id
    assert pod_of(query["client"]) == CACHE_ON["node1"]
    assert query["client"]["container"] == "node-cache"
    assert query["server"] == {
        "ip": UPSTREAM_SERVICE,
        "port": 53,
        "service": "kube-system/kube-dns-upstream",
        "role": "cluster",
    }
    assert pod_of(query["backend"]) == replica
    assert query["backend"]["ip"] in replica_ips(cached, replica)
    assert changes(query) == [(f"{UPSTREAM_SERVICE}:53", f"{query['backend']['ip']}:53")]
    hops_add_up(query)
    # The replica logs whom it sees: the address that masquerading has given the cache.
    seen = next(h for h in query["hops"] if h["kind"] == "receive")
    assert seen["src"] == f"{entry.ip}:{entry.port}"
    assert query["upstream"] == []


def test_an_outside_name_goes_past_the_cluster(cached: Lab, cache: Record, tmp_path: Path) -> None:
    """Straight from the cache to the resolver of the node; on the other node, from the other cache."""
    names = {pod: fresh_name() for pod in ("sre/web-0", "sre/worker-0", "sre/host-agent")}
    with traced(cached, tmp_path) as told:
        for pod, name in names.items():
            assert asked(cached, pod, "+notcp", name) == ("NOERROR", cache["ip"])
    for pod, name in names.items():
        t = only(told, f"{name}.")
        on = CACHE_ON[cached.pod(pod).node]
        assert (pod_of(t["client"]), pod_of(t["backend"])) == (pod, on)
        (query,) = t["upstream"]
        (entry,) = log_entries(cached, "upstream", name)
        assert (query["client"]["port"], query["id"]) == (entry.port, entry.id)
        assert (pod_of(query["client"]), query["upstream"]) == (on, [])
        assert (query["server"]["ip"], query["server"]["role"]) == (OUTSIDE, "upstream")
        assert [logged(cached, node, name) for node in NODES] == [[], []]


def test_three_levels_of_servers_are_told(cached: Lab, tmp_path: Path) -> None:
    """A reverse name: the cache asks the cluster, which is not that name's, and asks outside."""
    name = f"{int(time.time()) % 250}.{time.monotonic_ns() % 250}.51.198.in-addr.arpa"
    with traced(cached, tmp_path) as told:
        asked(cached, "sre/worker-0", "+notcp", name, "PTR")
    t = only(told, f"{name}.")
    (second,) = t["upstream"]
    (third,) = second["upstream"]
    replica = replica_asked(cached, name)
    assert [pod_of(level["client"]) for level in (t, second, third)] == [
        "sre/worker-0",
        CACHE_ON["node2"],
        replica,
    ]
    assert [level["protocol"] for level in (t, second, third)] == ["udp", "tcp", "tcp"]
    assert [level["server"]["role"] for level in (second, third)] == ["cluster", "upstream"]
    (entry,) = log_entries(cached, "upstream", name)
    assert (third["client"]["port"], third["id"]) == (entry.port, entry.id)
    assert t["latency_ns"] > second["latency_ns"] > third["latency_ns"]


def test_a_connection_from_before_the_start_is_followed(cached: Lab, tmp_path: Path) -> None:
    """Whose it is, its socket tells; which process made it, nothing does any more."""
    armed = threading.Event()

    def keep_warm() -> None:
        while not armed.is_set():
            asked(cached, OTHER, "+notcp", cluster_name())

    asking = threading.Thread(target=keep_warm)
    name = cluster_name()
    asking.start()
    try:
        with traced(cached, tmp_path) as told:
            armed.set()
            asking.join()
            before = conntrack_ports(cached)
            asked(cached, "sre/web-0", "+notcp", name)
    finally:
        armed.set()
        asking.join()
    (query,) = only(told, f"{name}.")["upstream"]
    assert query["client"]["port"] in before
    assert (query["client"]["pid"], query["client"]["comm"]) == (None, None)
    assert pod_of(query["client"]) == CACHE_ON["node1"]
    assert pod_of(query["backend"]) == replica_asked(cached, name)
    assert (query["status"], query["rcode"]) == ("answered", "NXDOMAIN")


def conntrack_ports(lab: Lab) -> set[int]:
    """The cache's ports of its connections to the cluster that are open."""
    argv = ["conntrack", "-L", "-p", "tcp", "-d", UPSTREAM_SERVICE, "--state", "ESTABLISHED"]
    listed = str(lab.node_exec("node1", argv).stdout)
    return {int(port) for port in re.findall(r"^tcp .*? sport=(\d+)", listed, re.MULTILINE)}


@pytest.fixture
def lab() -> Lab:
    """The lab with its usual options."""
    return up()


def test_services_are_told_over_either_family_and_protocol(lab: Lab, tmp_path: Path) -> None:
    """By a pod, and by one on the node's own network, whom SNAT gives another address."""
    asking = [
        (pod, ip, protocol, fresh_name())
        for pod in ("sre/web-0", "sre/host-agent")
        for ip in SERVICES
        for protocol in TRANSPORTS
    ]
    pids: dict[str, int] = {}
    with traced(lab, tmp_path) as told:
        for pod, ip, protocol, name in asking:
            argv = ["dig", "+tries=1", "+time=3", TRANSPORTS[protocol], f"@{ip}", name]
            with lab.popen(pod, argv, stdout=-3) as process:
                process.wait()
            pids[name] = process.pid
    assert len(told[0].transactions) == len(asking)
    for pod, ip, protocol, name in asking:
        t = only(told, f"{name}.")
        assert t["server"] == {"ip": ip, "port": 53, "service": SERVICES[ip], "role": "cluster"}
        assert (t["protocol"], t["status"], t["rcode"]) == (protocol, "answered", "NOERROR")
        assert (pod_of(t["client"]), t["client"]["pid"]) == (pod, pids[name])
        assert t["client"]["ip"] in (lab.pod(pod).ipv4, lab.pod(pod).ipv6)
        replica = replica_asked(lab, name)
        assert pod_of(t["backend"]) == replica
        assert t["backend"]["ip"] in replica_ips(lab, replica)
        ends = [
            f"[{each}]:53" if ":" in each else f"{each}:53" for each in (ip, t["backend"]["ip"])
        ]
        assert changes(t) == [tuple(ends)]
        hops_add_up(t)
        (entry,) = (entry for node in NODES for entry in log_entries(lab, node, name))
        seen = next(h for h in t["hops"] if h["kind"] == "receive")
        assert seen["src"].rsplit(":", 1) == [
            f"[{entry.ip}]" if ":" in entry.ip else entry.ip,
            str(entry.port),
        ]
        assert (t["id"], t["protocol"]) == (entry.id, entry.protocol)


def test_a_service_may_lead_to_another_port(tmp_path: Path) -> None:
    """Which has to be named where only a file tells of pods; an API server tells the port."""
    lab = up(dns_port=5353)
    names = {protocol: fresh_name() for protocol in TRANSPORTS}
    with traced(lab, tmp_path, "--port", "53", "--port", "5353") as told:
        for protocol, name in names.items():
            assert asked(lab, "sre/web-0", TRANSPORTS[protocol], name)[0] == "NOERROR"
    for protocol, name in names.items():
        t = only(told, f"{name}.")
        assert (t["server"]["ip"], t["server"]["port"], t["protocol"]) == (SERVICE, 53, protocol)
        assert t["backend"]["port"] == 5353
        assert pod_of(t["backend"]) == replica_asked(lab, name)
        assert changes(t) == [(f"{SERVICE}:53", f"{t['backend']['ip']}:5353")]
        hops_add_up(t)
        (query,) = t["upstream"]
        assert (query["server"]["ip"], query["server"]["port"]) == (OUTSIDE, 53)


@pytest.mark.parametrize("protocol", TRANSPORTS)
def test_a_stub_in_the_pod_asks_the_cluster(lab: Lab, tmp_path: Path, protocol: str) -> None:
    """systemd-resolved's way: three levels, of which the first two are of the pod."""
    name = fresh_name()
    with (
        stubs.systemd_resolved(lab, "sre/web-0", tmp_path) as stub,
        traced(lab, tmp_path) as told,
    ):
        for _ in range(2):  # the second time, the stub knows
            assert asked(lab, "sre/web-0", TRANSPORTS[protocol], name) == ("NOERROR", stub.ip)
    by_server = {(t["server"]["ip"], bool(t["upstream"])): t for t in told[0].named(f"{name}.")}
    assert set(by_server) == {(stub.ip, True), (stub.ip, False), (SERVICE, True)}
    first, again = by_server[stub.ip, True], by_server[stub.ip, False]
    for t in (first, again):
        assert t["server"] == {"ip": stub.ip, "port": 53, "service": None, "role": "stub"}
        assert (pod_of(t["client"]), pod_of(t["backend"])) == ("sre/web-0", "sre/web-0")
        assert (t["client"]["comm"], t["protocol"], t["status"]) == ("dig", protocol, "answered")
        hops_add_up(t)
    assert (again["upstream"], again["upstream_unsure"]) == ([], 0)
    (query,) = first["upstream"]
    assert query == by_server[SERVICE, True]  # the pod asked it too
    assert (query["client"]["pid"], query["server"]["service"]) == (stub.pid, SERVICES[SERVICE])
    assert pod_of(query["backend"]) == replica_asked(lab, name)
    (outside,) = query["upstream"]
    (entry,) = log_entries(lab, "upstream", name)
    assert outside["id"] == entry.id


def test_dockers_resolver_is_seen_where_its_ports_are_named(lab: Lab, tmp_path: Path) -> None:
    """Its rules lead to other ports before any packet is seen, on a loopback that has no port 53."""
    names = {protocol: fresh_name() for protocol in TRANSPORTS}
    targets = {"udp": stubs.DOCKER_UDP_PORT, "tcp": stubs.DOCKER_TCP_PORT}
    ports = [word for port in (53, *targets.values()) for word in ("--port", str(port))]
    with (
        stubs.docker_dns(lab, "sre/web-0", tmp_path) as stub,
        traced(lab, tmp_path, *ports) as told,
    ):
        for protocol, name in names.items():
            assert asked(lab, "sre/web-0", TRANSPORTS[protocol], name) == ("NOERROR", stub.ip)
    for protocol, name in names.items():
        by_server = {t["server"]["ip"]: t for t in told[0].named(f"{name}.")}
        t = by_server[stub.ip]
        assert t["server"] == {"ip": stub.ip, "port": 53, "service": None, "role": "stub"}
        assert (pod_of(t["client"]), t["client"]["comm"]) == ("sre/web-0", "dig")
        assert (t["protocol"], t["status"], t["rcode"]) == (protocol, "answered", "NOERROR")
        # dockerd is no pod's, and listens elsewhere.
        assert t["backend"] == {
            "ip": stub.ip,
            "port": targets[protocol],
            "namespace": None,
            "pod": None,
        }
        assert changes(t) == [(f"{stub.ip}:53", f"{stub.ip}:{targets[protocol]}")]
        hops_add_up(t)
        (query,) = t["upstream"]
        assert query == by_server[SERVICE]
        assert pod_of(query["backend"]) == replica_asked(lab, name)


def test_of_dockers_resolver_its_own_queries_are_seen_without_that(
    lab: Lab, tmp_path: Path
) -> None:
    """What tcpdump sees on the pod's link, is told: dockerd asks as the pod."""
    with (
        stubs.docker_dns(lab, "sre/web-0", tmp_path) as stub,
        capturing(lab, "sre/web-0", tmp_path) as pcap,
        traced(lab, tmp_path) as told,
    ):
        dig(lab, "sre/web-0", "+notcp", fresh_name())
    (t,) = told[0].transactions
    (seen,) = exchanges(pcap)
    assert (t["id"], t["name"], t["rcode"]) == (seen.id, seen.name, seen.rcode)
    assert (t["client"]["pid"], t["client"]["container"]) == (stub.pid, None)
    assert pod_of(t["client"]) == "sre/web-0"
