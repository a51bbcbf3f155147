# SPDX-License-Identifier: Apache-2.0
"""The lab with NodeLocal DNSCache, judged by logs, conntrack, rule counters and tcpdump."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.asking import CLIENTS, asked, dig, fresh_name, logged, on_the_wire, rule_packets, tracked
from tests.tracing import capturing
from tracer.lab import Lab, LabError, commands, topology

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("root")

LINK_LOCAL = "169.254.20.10"
SERVICE, SERVICE_V6 = topology.DNS_SERVICE.ips
UPSTREAM_SERVICE = topology.UPSTREAM_DNS_SERVICE.ips[0]
NODES = ["node1", "node2"]
SERVICE_CHAIN = "KUBE-SVC-TCOU7JCQXEZGVUNU"  # kube-system/kube-dns:dns
ANSWERS = {
    "web.sre.svc.cluster.local": "10.96.11.10",
    "kube-dns.kube-system.svc.cluster.local": SERVICE,
    "kube-dns-upstream.kube-system.svc.cluster.local": UPSTREAM_SERVICE,
    "www.example.com": "93.184.216.34",
    "www.li-rui.top": "li-rui.top.\n203.0.113.10",
}


@pytest.fixture(scope="module", params=["link-local", "cluster-ip"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The lab with caches on its nodes, in either way; down afterwards."""
    with Lab(node_local=request.param) as up:
        yield up


@pytest.fixture
def resolver(lab: Lab) -> str:
    """Whom pods ask."""
    return {"link-local": LINK_LOCAL, "cluster-ip": SERVICE}[lab.options.node_local]


def test_every_pod_is_answered_by_its_nodes_cache(lab: Lab, resolver: str) -> None:
    """All kinds of names, over UDP and TCP; the answer comes from whom the pod asked."""
    for pod in CLIENTS:
        assert {name: dig(lab, pod, name) for name in ANSWERS} == ANSWERS
        assert dig(lab, pod, "-x", SERVICE) == "kube-dns.kube-system.svc.cluster.local."
        assert dig(lab, pod, "-x", "fd00:10:96::a") == "kube-dns.kube-system.svc.cluster.local."
        for option, protocol in (("+notcp", "udp"), ("+tcp", "tcp")):
            name = fresh_name()
            assert asked(lab, pod, option, name) == ("NOERROR", resolver)
            seen = logged(lab, f"node-local-{lab.pod(pod).node}", name)
            assert [used for _, used in seen] == [protocol]
        assert asked(lab, pod, "nowhere.sre.svc.cluster.local") == ("NXDOMAIN", resolver)


def test_what_the_cache_knows_it_answers_itself(lab: Lab) -> None:
    """An outside name goes straight out, once; asked again, the cache has it."""
    name = fresh_name()
    first, second = (asked(lab, "sre/web-0", name) for _ in range(2))
    assert first == second
    assert len(logged(lab, "node-local-node1", name)) == 2
    assert logged(lab, "upstream", name) == [("172.18.0.2", "udp")]
    assert [logged(lab, node, name) for node in NODES] == [[], []]


def test_cluster_names_go_to_the_replicas_over_tcp(lab: Lab) -> None:
    name = f"{fresh_name().split('.')[0]}.sre.svc.cluster.local"
    for _ in range(3):
        assert asked(lab, "sre/worker-0", name)[0] == "NXDOMAIN"
    assert len(logged(lab, "node-local-node2", name)) == 3
    upstream = [query for node in NODES for query in logged(lab, node, name)]
    assert [protocol for _, protocol in upstream] == ["tcp"]
    assert upstream[0][0] in ("172.18.0.3", "10.244.2.1")  # node2's, as seen by either replica
    assert tracked(lab, "node2", UPSTREAM_SERVICE, "tcp")


def test_conntrack_sees_no_packet_between_pod_and_cache(lab: Lab, resolver: str) -> None:
    def counted(chain: str) -> int:
        return rule_packets(lab, "node1", chain=chain, having=f"{resolver}/32 -p udp")

    chains = ("PREROUTING", "INPUT", "OUTPUT")
    before = {chain: counted(chain) for chain in chains}
    for _ in range(5):
        asked(lab, "sre/web-0", "www.example.com")
    assert tracked(lab, "node1", resolver, "udp") == []
    after = {chain: counted(chain) - before[chain] for chain in chains}
    # In OUTPUT the answer passes a rule in raw and one in filter.
    assert after == {"PREROUTING": 5, "INPUT": 5, "OUTPUT": 10}


def test_a_pod_on_the_host_network_is_untracked_too(lab: Lab, resolver: str) -> None:
    name = fresh_name()
    assert asked(lab, "sre/host-agent", name) == ("NOERROR", resolver)
    assert len(logged(lab, "node-local-node1", name)) == 1
    assert tracked(lab, "node1", resolver, "udp") == []


def test_the_services_rules_see_only_what_goes_past_the_cache(lab: Lab) -> None:
    """The service's address is the cache's own in one way, and leads past it in the other."""
    past = lab.options.node_local == "link-local"
    name = fresh_name()
    before = rule_packets(lab, "node1", chain="KUBE-SERVICES", having=SERVICE_CHAIN)
    assert asked(lab, "sre/web-0", f"@{SERVICE}", name) == ("NOERROR", SERVICE)
    after = rule_packets(lab, "node1", chain="KUBE-SERVICES", having=SERVICE_CHAIN)
    assert after - before == (1 if past else 0)
    assert bool(tracked(lab, "node1", SERVICE, "udp")) is past
    assert len(logged(lab, "node-local-node1", name)) == (0 if past else 1)
    assert sum(len(logged(lab, node, name)) for node in NODES) == (1 if past else 0)


def test_the_services_ipv6_address_leads_past_the_cache(lab: Lab) -> None:
    """A cache has addresses of one family only."""
    name = fresh_name()
    assert asked(lab, "sre/web-0", f"@{SERVICE_V6}", name) == ("NOERROR", SERVICE_V6)
    assert logged(lab, "node-local-node1", name) == []
    assert sum(len(logged(lab, node, name)) for node in NODES) == 1


def test_the_answer_on_the_wire_is_from_the_address_that_was_asked(
    lab: Lab, resolver: str, tmp_path: Path
) -> None:
    with capturing(lab, "sre/web-0", tmp_path) as pcap:
        asked(lab, "sre/web-0", "+notcp", fresh_name())
    (client, *query), (*answer, server) = on_the_wire(pcap)
    assert (client.rpartition(".")[0], *query) == (lab.pod("sre/web-0").ipv4, f"{resolver}.53")
    assert (*answer, server) == (f"{resolver}.53", client)


def test_resolv_conf_names_whom_pods_ask(lab: Lab, resolver: str) -> None:
    """The caches themselves have the node's."""
    for pod in lab.pods:
        content = Path(f"/proc/{pod.pid}/root/etc/resolv.conf").read_text()
        servers = "172.18.0.53" if pod.namespace == "kube-system" else resolver
        assert f"nameserver {servers}\n" in content


def test_the_caches_are_pods_on_the_host_network(lab: Lab) -> None:
    content = json.loads(lab.pods_file.read_text())
    caches = [pod for pod in content["pods"] if pod["labels"] == {"k8s-app": "node-local-dns"}]
    assert [(pod["node"], pod["host_network"]) for pod in caches] == [
        ("node1", True),
        ("node2", True),
    ]
    for pod in caches:
        assert pod["name"].startswith("node-local-dns-")
        node = next(node for node in content["nodes"] if node["name"] == pod["node"])
        assert (pod["ips"], pod["netns"]) == (node["ips"], node["netns"])
        server = lab.state.process(f"node-local-{pod['node']}").pid
        (container,) = pod["containers"]
        assert container["name"] == "node-cache"
        assert f"0::/{container['cgroup']}\n" in Path(f"/proc/{server}/cgroup").read_text()
    upstream = next(s for s in content["services"] if s["name"] == "kube-dns-upstream")
    assert upstream["ips"][0] == UPSTREAM_SERVICE


def test_the_device_has_the_addresses_and_is_down(lab: Lab, resolver: str) -> None:
    for node in NODES:
        argv = ["ip", "-4", "-j", "addr", "show", "nodelocaldns"]
        (device,) = json.loads(lab.node_exec(node, argv).stdout)
        assert device["operstate"] == "DOWN"
        addresses = [(each["local"], each["prefixlen"]) for each in device["addr_info"]]
        assert addresses == [(ip, 32) for ip in dict.fromkeys((LINK_LOCAL, resolver))]


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_either_iptables_takes_the_rules(variant: str) -> None:
    probe = ["unshare", "--net", f"iptables-{variant}", "-t", "raw", "-L"]
    if subprocess.run(probe, check=False, capture_output=True).returncode != 0:
        pytest.skip(f"this kernel has no iptables-{variant}: enable it, or test on one that has")
    with Lab(node_local="cluster-ip", iptables=variant) as lab:
        assert asked(lab, "sre/web-0", "www.example.com") == ("NOERROR", SERVICE)
        saved = lab.node_exec("node1", [f"iptables-{variant}-save", "-t", "raw"]).stdout
        assert saved.count("NodeLocal DNS Cache: skip conntrack") == 16
        assert tracked(lab, "node1", SERVICE, "udp") == []


def test_caches_work_with_servers_on_another_port_and_an_overlay() -> None:
    with Lab(node_local="link-local", dns_port=5353, overlay=True) as lab:
        for pod in CLIENTS:
            assert {name: dig(lab, pod, name) for name in ANSWERS} == ANSWERS


def test_a_cache_needs_coredns() -> None:
    if commands.find("unbound") is None:
        pytest.skip("unbound is not installed: apt install unbound")
    with pytest.raises(LabError, match="a cache on each node is a CoreDNS"):
        Lab(node_local="link-local", resolver="unbound").up()
