# SPDX-License-Identifier: Apache-2.0
"""The lab's DNS services: other ports behind them, a second one, both address families."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.asking import CLIENTS, asked, dig, fresh_name, logged, on_the_wire, tracked
from tests.tracing import capturing
from tracer.lab import Lab, topology

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

NODES = ["node1", "node2"]
FIRST, SECOND = topology.DNS_SERVICE, topology.SECOND_DNS_SERVICE
ADDRESSES = [*FIRST.ips, *SECOND.ips]
WWW = "93.184.216.34"


@pytest.fixture(scope="module", params=[53, 5353])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The lab, whose servers listen on either port; down afterwards."""
    with Lab(dns_port=request.param) as up:
        yield up


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_pod_is_answered_by_whom_it_asked(lab: Lab, address: str) -> None:
    for pod in CLIENTS:
        for transport in ("+notcp", "+tcp"):
            name = fresh_name()
            assert asked(lab, pod, transport, f"@{address}", name) == ("NOERROR", address)
            assert sum(len(logged(lab, node, name)) for node in NODES) == 1


@pytest.mark.parametrize("address", ADDRESSES)
def test_conntrack_has_the_port_that_the_replica_listens_on(lab: Lab, address: str) -> None:
    asked(lab, "sre/web-0", f"@{address}", fresh_name())
    family = ":" in address
    backends = {(pod.ipv4, pod.ipv6)[family] for pod in lab.dns_pods}
    entries = tracked(lab, "node1", address, "udp")
    assert entries
    for entry in entries:
        there, back = re.findall(r"src=(\S+) dst=\S+ sport=(\d+) dport=(\d+)", entry)
        assert there[2] == "53"
        assert back[0] in backends
        assert back[1] == str(lab.options.dns_port)


def test_pods_see_port_53_and_replicas_their_own(lab: Lab, tmp_path: Path) -> None:
    """tcpdump at both ends: the client's has the service's address, the replica's its own."""
    port = lab.options.dns_port
    names = [fresh_name() for _ in range(12)]
    replica = lab.dns_pods[0]
    with (
        capturing(lab, "sre/web-0", tmp_path) as near,
        capturing(lab, replica.full_name, tmp_path, port) as far,
    ):
        for name in names:
            dig(lab, "sre/web-0", "+notcp", name)
    service = f"{FIRST.ips[0]}.53"
    assert [packet[i % 2 == 0] for i, packet in enumerate(on_the_wire(near))] == [service] * 24
    client = lab.pod("sre/web-0").ipv4
    seen = [packet for packet in on_the_wire(far) if packet[0].startswith(f"{client}.")]
    assert len(seen) == sum(len(logged(lab, replica.node, name)) for name in names)
    assert {target for _, target in seen} <= {f"{replica.ipv4}.{port}"}


def test_a_replica_is_asked_without_the_service_on_its_own_port_only(lab: Lab) -> None:
    replica = lab.dns_pods[1]
    answers = {
        port: dig(lab, "sre/web-0", f"@{replica.ipv4}", "-p", str(port), "www.example.com")
        for port in (53, 5353)
    }
    assert answers.pop(lab.options.dns_port) == WWW
    (other,) = answers.values()
    assert "connection refused" in other


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_service_is_served_by_both_replicas(lab: Lab, address: str) -> None:
    names = [fresh_name() for _ in range(24)]
    for name in names:
        dig(lab, "sre/worker-0", f"@{address}", name)
    counts = [sum(len(logged(lab, node, name)) for name in names) for node in NODES]
    assert sum(counts) == len(names)
    assert all(counts)


def test_services_are_in_their_own_zones(lab: Lab) -> None:
    name = "kube-dns-2.dns2.svc.cluster.local"
    assert (dig(lab, "sre/web-0", name), dig(lab, "sre/web-0", name, "AAAA")) == SECOND.ips
    assert dig(lab, "sre/web-0", "-x", SECOND.ips[0]) == f"{name}."
    assert dig(lab, "sre/web-0", f"_dns._udp.{name}", "SRV") == f"0 100 53 {name}."


@pytest.mark.parametrize("resolver", ["coredns", "unbound"])
def test_either_server_listens_where_it_is_told(resolver: str) -> None:
    with Lab(resolver=resolver, dns_port=5353) as lab:
        assert asked(lab, "sre/web-0", "www.example.com") == ("NOERROR", FIRST.ips[0])
