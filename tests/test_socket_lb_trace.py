# SPDX-License-Identifier: Apache-2.0
"""The trace where services are balanced at the socket, against logs and what dig says."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.asking import fresh_name, log_entries
from tests.socket_lb import socket_lb
from tests.tracing import tracing
from tracer.lab import Lab, topology

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Record = dict[str, Any]

pytestmark = pytest.mark.usefixtures("root")

NODES = ["node1", "node2"]
SERVICE, SERVICE_V6 = topology.DNS_SERVICE.ips
# One socket that is connected, and one that is told each time whom to send to.
CONNECTED = """
import socket, sys
asked = bytes.fromhex(sys.argv[2])
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as client:
    client.settimeout(3)
    if sys.argv[3] == "connect":
        client.connect((sys.argv[1], 53))
        client.send(asked)
    else:
        client.sendto(asked, (sys.argv[1], 53))
    client.recv(512)
"""
MIXED = """
import socket, sys
replica, service, once, *after = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(3)
    client.connect((replica, 53))
    client.sendto(bytes.fromhex(once), (service, 53))
    for query in after:
        client.send(bytes.fromhex(query))
        client.recv(512)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab whose sockets are balanced."""
    with Lab() as up, socket_lb(up):
        yield up


def ask(lab: Lab, pod: str, *argv: str) -> int:
    """Runs a client in a pod; its pid."""
    with lab.popen(pod, list(argv), stdout=subprocess.DEVNULL) as process:
        assert process.wait() == 0
    return process.pid


def place(ip: str) -> str:
    return f"[{ip}]:53" if ":" in ip else f"{ip}:53"


@pytest.mark.parametrize("service", [SERVICE, SERVICE_V6])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("pod", ["sre/web-0", "sre/host-agent"])
def test_who_was_meant_is_told_and_who_was_asked(
    lab: Lab, tmp_path: Path, service: str, protocol: str, pod: str
) -> None:
    """No packet has the service's address; the application gave no other."""
    arguments = ["--pods", str(lab.pods_file), "--namespace", "sre"]
    option = {"udp": "+notcp", "tcp": "+tcp"}[protocol]
    names = [fresh_name() for _ in range(6)]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        pids = [ask(lab, pod, "dig", "+tries=1", option, f"@{service}", name) for name in names]
        time.sleep(0.3)
        trace = tracer.stop()
    for name, pid in zip(names, pids, strict=True):
        (t,) = trace.named(f"{name}.")
        check(lab, t, service, name)
        assert (t["protocol"], t["client"]["pid"]) == (protocol, pid)
        assert f"{t['client']['namespace']}/{t['client']['pod']}" == pod


@pytest.mark.parametrize("service", [SERVICE, SERVICE_V6])
@pytest.mark.parametrize("way", ["connect", "sendto"])
def test_either_way_to_name_a_server_is_told(
    lab: Lab, tmp_path: Path, service: str, way: str
) -> None:
    """By connect() once, or with each message."""
    name = fresh_name()
    asked = message(name)
    arguments = ["--pods", str(lab.pods_file), "--namespace", "sre"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        ask(lab, "sre/web-0", "python3", "-c", CONNECTED, service, asked.hex(), way)
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.named(f"{name}.")
    check(lab, t, service, name)


def test_who_asks_a_replica_itself_means_it(lab: Lab, tmp_path: Path) -> None:
    replica, name = lab.dns_pods[1], fresh_name()
    arguments = ["--pods", str(lab.pods_file), "--namespace", "sre"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        ask(lab, "sre/web-0", "dig", "+tries=1", f"@{replica.ipv4}", name)
        time.sleep(0.3)
        trace = tracer.stop()
    (t,) = trace.named(f"{name}.")
    assert (t["server"]["ip"], t["server"]["service"]) == (replica.ipv4, None)
    assert {str(hop["nat"]) for hop in t["hops"]} == {"None"}


def test_connected_socket_may_send_one_message_elsewhere(lab: Lab, tmp_path: Path) -> None:
    """What comes after it goes to whom the socket is connected."""
    replica, names = lab.dns_pods[1], [fresh_name() for _ in range(3)]
    once, after, again = (message(name).hex() for name in names)
    arguments = ["--pods", str(lab.pods_file), "--namespace", "sre"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        ask(lab, "sre/web-0", "python3", "-c", MIXED, replica.ipv4, SERVICE, once, after, again)
        time.sleep(0.3)
        trace = tracer.stop()
    servers = [[t["server"]["ip"] for t in trace.named(f"{name}.")] for name in names]
    assert servers == [[SERVICE], [replica.ipv4], [replica.ipv4]]


def message(name: str) -> bytes:
    """A query for an A record."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return bytes.fromhex("1234 0100 0001 0000 0000 0000") + labels + bytes([0, 0, 1, 0, 1])


def check(lab: Lab, t: Record, service: str, name: str) -> None:
    """The cluster's address was meant, and DNAT to the replica came with the send."""
    assert t["server"] == {
        "ip": service,
        "port": 53,
        "service": "kube-system/kube-dns",
        "role": "cluster",
    }
    (found,) = ((pod, entry) for pod in lab.dns_pods for entry in log_entries(lab, pod.node, name))
    pod, entry = found
    assert (t["status"], t["rcode"], t["id"]) == ("answered", "NOERROR", entry.id)
    ip = pod.ipv6 if ":" in service else pod.ipv4
    assert t["backend"] == {"ip": ip, "port": 53, "namespace": "kube-system", "pod": pod.name}
    first, *others = t["hops"]
    assert (first["kind"], first["direction"]) == ("send", "query")
    assert first["nat"]["dnat"] == [place(service), place(ip)]
    assert first["dst"] == place(ip)
    assert t["hops"][-1]["kind"] == "receive"
    assert t["hops"][-1]["t_ns"] == t["latency_ns"]
    balanced = [hop for hop in others if hop["nat"] and "dnat" in hop["nat"]]
    assert balanced == []
