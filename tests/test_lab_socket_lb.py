# SPDX-License-Identifier: Apache-2.0
"""Services balanced at the socket, judged by rule counters, conntrack, tcpdump and logs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.asking import CLIENTS, asked, dig, fresh_name, logged, on_the_wire, rule_packets, tracked
from tests.socket_lb import PROGRAMS, socket_lb
from tests.tracing import capturing
from tracer.lab import Lab, topology

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

NODES = ["node1", "node2"]
SERVICE, SERVICE_V6 = topology.DNS_SERVICE.ips
BACKENDS = {ip for pair in topology.DNS_SERVICE.endpoints for ip in pair}
DNS_CHAINS = ["KUBE-SVC-TCOU7JCQXEZGVUNU", "KUBE-SVC-ERIFXISQEP7F7OF4"]  # kube-dns: UDP, TCP


@pytest.fixture(scope="module", params=[53, 5353])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab whose sockets are balanced; its servers listen on either port."""
    with Lab(dns_port=request.param) as up, socket_lb(up):
        yield up


def through_the_rules(lab: Lab) -> list[int]:
    """Packets that each node's rules for the service's addresses have counted."""
    return [
        rule_packets(lab, node, chain="KUBE-SERVICES", having=chain, family=family)
        for node in NODES
        for family in (4, 6)
        for chain in DNS_CHAINS
    ]


@pytest.mark.parametrize("address", [SERVICE, SERVICE_V6])
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_pods_are_answered_by_the_service_without_its_rules(
    lab: Lab, address: str, transport: str
) -> None:
    """dig takes no answer from whom it did not ask."""
    before = through_the_rules(lab)
    for pod in CLIENTS:
        name = fresh_name()
        assert asked(lab, pod, transport, f"@{address}", name) == ("NOERROR", address)
        assert sum(len(logged(lab, node, name)) for node in NODES) == 1
    assert through_the_rules(lab) == before
    assert [tracked(lab, node, address, "udp") for node in NODES] == [[], []]


def test_the_rules_count_where_nothing_is_balanced(lab: Lab) -> None:
    """What the counters are worth: a service that is not balanced moves them."""
    second = topology.SECOND_DNS_SERVICE.ips[0]
    chain = "kube-dns-2:dns cluster IP"
    before = rule_packets(lab, "node1", chain="KUBE-SERVICES", having=chain)
    assert asked(lab, "sre/web-0", f"@{second}", fresh_name()) == ("NOERROR", second)
    assert rule_packets(lab, "node1", chain="KUBE-SERVICES", having=chain) == before + 1
    assert tracked(lab, "node1", second, "udp")


@pytest.mark.parametrize("address", [SERVICE, SERVICE_V6])
def test_only_replicas_are_on_the_wire(lab: Lab, tmp_path: Path, address: str) -> None:
    """From the first packet on, and each replica in turn."""
    with capturing(lab, "sre/web-0", tmp_path, lab.options.dns_port) as pcap:
        for _ in range(24):
            dig(lab, "sre/web-0", "+notcp", f"@{address}", fresh_name())
    packets = on_the_wire(pcap)
    port = f".{lab.options.dns_port}"
    servers = {
        place.removesuffix(port) for pair in packets for place in pair if place.endswith(port)
    }
    assert len(packets) == 48
    assert servers == {ip for ip in BACKENDS if (":" in ip) == (":" in address)}


# A question to the service by sockets of each kind; what they then say of whom they talk to.
SOCKETS = """
import json, socket, struct, sys
address, name = sys.argv[1:]
labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split("."))
query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\\0" + struct.pack("!HH", 1, 1)
said = {}
def family(ip):
    return socket.AF_INET6 if ":" in ip else socket.AF_INET
def ask(ip):
    with socket.socket(family(ip), socket.SOCK_DGRAM) as plain:
        plain.settimeout(5)
        plain.sendto(query, (ip, 53))
        said["recvfrom " + ip] = plain.recvfrom(512)[1][:2]
    with socket.socket(family(ip), socket.SOCK_DGRAM) as connected:
        connected.settimeout(5)
        connected.connect((ip, 53))
        connected.send(query)
        said["connected " + ip] = connected.recvfrom(512)[1][:2]
        said["peer " + ip] = connected.getpeername()[:2]
    with socket.create_connection((ip, 53), 5) as stream:
        stream.sendall(struct.pack("!H", len(query)) + query)
        assert len(stream.recv(512)) > 12
        said["stream peer " + ip] = stream.getpeername()[:2]
ask(address)
if ":" not in address:
    ask("::ffff:" + address)
print(json.dumps(said))
"""


@pytest.mark.parametrize("address", [SERVICE, SERVICE_V6])
def test_sockets_of_all_kinds_see_the_service(lab: Lab, address: str) -> None:
    before = through_the_rules(lab)
    argv = [sys.executable, "-I", "-S", "-c", SOCKETS, address, fresh_name()]
    done = lab.run("sre/worker-0", argv)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == (4 if ":" in address else 8)
    assert {what: place for what, place in said.items() if place != [what.split()[-1], 53]} == {}
    assert through_the_rules(lab) == before


def test_getent_and_both_replicas(lab: Lab) -> None:
    before = through_the_rules(lab)
    names = [fresh_name() for _ in range(24)]
    for name in names:
        assert "198.51.100.1" in lab.run("sre/api-0", ["getent", "ahostsv4", f"{name}."]).stdout
    counts = [sum(len(logged(lab, node, name)) for name in names) for node in NODES]
    assert sum(counts) == len(names)
    assert all(counts)
    assert through_the_rules(lab) == before


def attached(cgroup: Path) -> list[str]:
    """Names of the programs on a cgroup itself, by bpftool."""
    shown = subprocess.check_output(["bpftool", "--json", "cgroup", "show", str(cgroup)])
    return sorted(program["name"] for program in json.loads(shown.strip() or "[]"))


def test_nothing_is_attached_outside_of_the_lab_nor_left_behind() -> None:
    with Lab() as lab:
        with socket_lb(lab) as cgroup:
            assert attached(cgroup) == sorted([*PROGRAMS] * 2)
            ours = set(PROGRAMS)
            for outer in cgroup.parents:
                if outer.is_relative_to(lab.cgroup_mount):
                    assert not ours & set(attached(outer))
        assert attached(cgroup) == []
        before = rule_packets(lab, "node1", chain="KUBE-SERVICES", having=DNS_CHAINS[0])
        assert asked(lab, "sre/web-0", "+notcp", fresh_name()) == ("NOERROR", SERVICE)
        after = rule_packets(lab, "node1", chain="KUBE-SERVICES", having=DNS_CHAINS[0])
        assert after == before + 1
