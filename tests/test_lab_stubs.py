# SPDX-License-Identifier: Apache-2.0
"""Resolvers on a pod's loopback, judged by tcpdump on it, conntrack and logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import stubs
from tests.asking import asked, dig, fresh_name, logged, on_the_wire
from tests.tracing import capturing, let_finish
from tracer.lab import Lab, topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.stubs import Stub

    Start = Callable[[Lab, str, Path], AbstractContextManager[Stub]]

pytestmark = pytest.mark.usefixtures("root")

POD = "sre/web-0"
NODES = ["node1", "node2"]
SERVICE = topology.DNS_SERVICE.ips[0]
STUBS = pytest.mark.parametrize("start", [stubs.systemd_resolved, stubs.docker_dns])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as up:
        yield up


@STUBS
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_a_pod_asks_its_loopback_which_asks_the_cluster(
    lab: Lab, tmp_path: Path, start: Start, transport: str
) -> None:
    """The query is answered by the stub's address; the replica is asked by the pod's."""
    name = fresh_name()
    with start(lab, POD, tmp_path) as stub:
        assert asked(lab, POD, transport, name) == ("NOERROR", stub.ip)
        assert dig(lab, POD, "web.sre.svc.cluster.local") == "10.96.11.10"
        found = lab.run(POD, ["getent", "ahosts", "www.li-rui.top"]).stdout
        assert "203.0.113.10" in found
        let_finish(stub.pid)
        assert name in stub.log.read_text()
    clients = [client for node in NODES for client, _ in logged(lab, node, name)]
    assert clients == [lab.pod(POD).ipv4]
    assert asked(lab, POD, fresh_name()) == ("NOERROR", SERVICE)  # as it was before


@STUBS
def test_loopback_and_link_carry_a_query_each(lab: Lab, tmp_path: Path, start: Start) -> None:
    with (
        start(lab, POD, tmp_path) as stub,
        capturing(lab, POD, tmp_path, port=0, device="lo") as inner,
        capturing(lab, POD, tmp_path) as outer,
    ):
        assert asked(lab, POD, "+notcp", fresh_name()) == ("NOERROR", stub.ip)
    port = 53 if stub.ip == stubs.RESOLVED_IP else stubs.DOCKER_UDP_PORT
    (client, there), (back, again) = on_the_wire(inner)
    # Docker's rules have led the query to another port before it is on lo; its answer is from 53.
    assert (there, back, again) == (f"{stub.ip}.{port}", f"{stub.ip}.53", client)
    assert client.startswith("127.0.0.1.")
    (stub_client, service), (answering, _) = on_the_wire(outer)
    assert stub_client.startswith(f"{lab.pod(POD).ipv4}.")
    assert service == answering == f"{SERVICE}.53"


def test_resolved_is_in_the_pod_and_caches(lab: Lab, tmp_path: Path) -> None:
    name = fresh_name()
    with stubs.systemd_resolved(lab, POD, tmp_path) as stub:
        for _ in range(3):
            asked(lab, POD, name)
        assert f"0::/{lab.pod(POD).cgroup}\n" in Path(f"/proc/{stub.pid}/cgroup").read_text()
        let_finish(stub.pid)
        assert stub.log.read_text().count(name) == 3
    assert sum(len(logged(lab, node, name)) for node in NODES) == 1


def test_dockers_is_translated_in_the_pod_and_runs_outside_of_it(lab: Lab, tmp_path: Path) -> None:
    with stubs.docker_dns(lab, POD, tmp_path) as stub:
        asked(lab, POD, "+notcp", fresh_name())
        asked(lab, POD, "+tcp", fresh_name())
        cgroup = Path(f"/proc/{stub.pid}/cgroup").read_text()
        assert "0::/dnstrace-lab/system.slice/docker.service\n" in cgroup
        netns = Path(f"/proc/{stub.pid}/ns/net").stat().st_ino
        assert netns == lab.pod(POD).netns
        listed = lab.run(POD, ["conntrack", "-L", "-d", stub.ip]).stdout
    ports = re.findall(
        r"^(\w+) .* dport=53 src=127\.0\.0\.11 \S+ sport=(\d+)", listed, re.MULTILINE
    )
    assert set(ports) == {
        ("udp", str(stubs.DOCKER_UDP_PORT)),
        ("tcp", str(stubs.DOCKER_TCP_PORT)),
    }
    saved = lab.run(POD, ["iptables-save"]).stdout
    assert "DOCKER" not in saved
