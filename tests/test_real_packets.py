# SPDX-License-Identifier: Apache-2.0
"""What no test run can show the programs: packets over 4 KB, in pieces, and with conntrack's NAT.

They run over the loopback of a namespace of the test's own, between sockets in a cgroup of its own.
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests import packets as p
from tests.namespaces import new_namespace, run
from tests.packets import dns_query, dns_response
from tests.programs import (
    DEVICE_HOOKS,
    EGRESS,
    INGRESS,
    LOOPBACK,
    RECEIVE,
    SEND,
    Programs,
    compiled_programs,
    loaded_programs,
)
from tracer.kernel import bpf, netns, programs
from tracer.kernel.bpf import AttachType
from tracer.record import RESPONSE_LARGE, RESPONSE_SMALL, Counter, Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 5.0
SERVICES = ("10.96.0.10", "10.96.0.11")
BACKENDS = ("127.0.0.2", "127.0.0.3")
HERE, CLIENT_PORT = "127.0.0.1", 40000


class Ends(NamedTuple):
    """The programs, attached, and both ends of an exchange."""

    kernel: Programs
    client: socket.socket
    servers: list[socket.socket]

    def ask(self, address: str, query: bytes | None = None) -> None:
        self.client.sendto(query or dns_query(), (address, 53))

    def arrived(self, server: int) -> None:
        """Waits until a query is there that nobody has read yet."""
        assert select.select([self.servers[server]], [], [], TIMEOUT_S)[0]

    def answer(self, server: int, response: bytes | None = None) -> None:
        """One query that has arrived at a server."""
        _, asker = self.servers[server].recvfrom(512)
        self.servers[server].sendto(response or dns_response(), asker)

    def take(self) -> bytes:
        """What the client's process is given."""
        return self.client.recv(1 << 16)


def sockets_of(cgroup: Path, family: int, count: int) -> list[socket.socket]:
    """Sockets belong to the cgroup of who makes them: a process for just that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        (cgroup / "cgroup.procs").write_text("0")
        made = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(count)]
        socket.send_fds(theirs, [b"x"], [s.fileno() for s in made])
        os._exit(0)
    theirs.close()
    with ours:
        _, fds, _, _ = socket.recv_fds(ours, 1, count)
    assert os.waitpid(child, 0)[1] == 0
    return [socket.socket(fileno=fd) for fd in fds]


@contextmanager
def new_cgroup() -> Iterator[Path]:
    root = netns.cgroup2_root()
    assert root
    cgroup = root / f"test-{os.getpid()}"
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        cgroup.rmdir()


@contextmanager
def exchange(*setup: str, family: int = socket.AF_INET, at_sockets: bool = False) -> Iterator[Ends]:
    """Watches at the sockets, or at the device. `setup`: commands that prepare the namespace."""
    with ExitStack() as stack:
        namespace = stack.enter_context(new_namespace())
        stack.enter_context(netns.entered(namespace))
        cgroup = stack.enter_context(new_cgroup())
        for command in ("ip link set lo up", *setup):
            run(command)
        client, *servers = sockets_of(cgroup, family, 3)
        for one in (client, *servers):
            stack.enter_context(one).settimeout(TIMEOUT_S)
        client.bind((HERE if family == socket.AF_INET else "::1", CLIENT_PORT))
        addresses = BACKENDS if family == socket.AF_INET else ("::1", "::1")
        for number, (server, address) in enumerate(zip(servers, addresses, strict=True)):
            server.bind((address, 53 + (number if family == socket.AF_INET6 else 0)))
        kernel = stack.enter_context(loaded_programs())
        if at_sockets:
            directory = os.open(cgroup, os.O_RDONLY)
            for hook, attach in (
                (SEND, AttachType.CGROUP_INET_EGRESS),
                (RECEIVE, AttachType.CGROUP_INET_INGRESS),
            ):
                link = bpf.link_create(kernel.program(hook), directory, attach)
                stack.callback(os.close, link)
            stack.callback(os.close, directory)
        else:
            loaded = {hook: kernel.program(hook) for hook in DEVICE_HOOKS}
            detach, _ = programs.attach_to_device(loaded, LOOPBACK)
            stack.callback(detach)
        yield Ends(kernel, client, servers)


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: None) -> Iterator[None]:
    del root
    with compiled_programs():
        yield


FAMILIES = {"IPv4": (socket.AF_INET, BACKENDS[0]), "IPv6": (socket.AF_INET6, "::1")}


@pytest.mark.parametrize("size", [RESPONSE_SMALL, 4095, 4096, 4097, 9000, 65000])
@pytest.mark.parametrize("at_sockets", [True, False], ids=["sockets", "device"])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_answer_is_captured_as_far_as_the_record_reaches(
    family: str, at_sockets: bool, size: int
) -> None:
    number, address = FAMILIES[family]
    response = p.dns_response_of(size)
    with exchange(family=number, at_sockets=at_sockets) as ends:
        ends.ask(address)
        ends.answer(0, response)
        assert ends.take() == response
        record = ends.kernel.record()
    assert record.status == Status.ANSWERED
    assert record["response_len"] == size
    assert record.response == response[:RESPONSE_LARGE]
    if at_sockets:
        assert record.hops == [(SEND, 0, 0), (RECEIVE, 0, 0), (SEND, 1, 0), (RECEIVE, 1, 0)]
    else:
        assert record.hops == [(EGRESS, 0, 0), (INGRESS, 0, 0), (EGRESS, 1, 0), (INGRESS, 1, 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_are_one_message_at_sockets_and_a_beginning_at_devices(family: str) -> None:
    number, address = FAMILIES[family]
    response = p.dns_response_of(4000)
    for at_sockets in (True, False):
        with exchange("ip link set lo mtu 1500", family=number, at_sockets=at_sockets) as ends:
            ends.ask(address)
            ends.answer(0, response)
            assert ends.take() == response
            record = ends.kernel.record()
            assert ends.kernel.counted() == {Counter.STARTED: 1, Counter.EMITTED: 1}
        assert record.status == Status.ANSWERED
        assert record["response_len"] == 4000
        assert record["nhops"] == 4
        if at_sockets:
            assert record.response == response
        else:
            assert 1400 < len(record.response) < 1500
            assert response.startswith(record.response)


DNAT = [
    "ip route add local 10.96.0.0/16 dev lo",
    *(
        f"iptables -t nat -A OUTPUT -p udp -d {service} --dport 53 -j DNAT --to {backend}:53"
        for service, backend in zip(SERVICES, BACKENDS, strict=True)
    ),
]
SNAT = "iptables -t nat -A POSTROUTING -p udp --dport 53 -j SNAT --to 127.0.0.9:2000-2009"


@pytest.mark.parametrize("at_sockets", [True, False], ids=["sockets", "device"])
def test_answer_finds_its_query_through_nat_of_both_ends(at_sockets: bool) -> None:
    with exchange(*DNAT, SNAT, at_sockets=at_sockets) as ends:
        ends.ask(SERVICES[0])
        ends.arrived(0)
        named = ends.kernel.index()
        ends.answer(0)
        assert ends.take() == dns_response()
        record = ends.kernel.record()
        assert ends.kernel.index() == set()
    client = (HERE, CLIENT_PORT)
    (translated,) = {name[:2] for name in named} - {client}
    assert named == {(*client, p.DNS_ID, 0), (*translated, p.DNS_ID, 0)}
    assert translated[0] == "127.0.0.9"
    asked = (HERE, SERVICES[0], client[1], 53)
    sent = (translated[0], BACKENDS[0], translated[1], 53)
    assert record.status == Status.ANSWERED
    assert record.flows == [asked, sent]
    # On one machine both ends' NAT is done, and undone again, before anybody sees the packet.
    assert [(direction, flow) for _, direction, flow in record.hops] == [
        (0, 1),
        (0, 1),
        (1, 0),
        (1, 0),
    ]


def test_query_that_snat_renamed_expires_under_both_names() -> None:
    with exchange(*DNAT, SNAT, at_sockets=True) as ends:
        for _ in range(20):
            ends.ask(SERVICES[0])
            ends.servers[0].recv(512)  # it has arrived
            assert len(ends.kernel.index()) == 2
            assert len(ends.kernel.expire()) == 1
            assert ends.kernel.index() == set()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("nat", [[], [SNAT]], ids=["DNAT", "DNAT and SNAT"])
@pytest.mark.parametrize("at_sockets", [True, False], ids=["sockets", "device"])
def test_one_query_to_two_services_is_two_transactions_through_nat(
    at_sockets: bool, nat: list[str], order: tuple[int, int]
) -> None:
    """As musl asks all servers of resolv.conf at once, with one socket and one id."""
    with exchange(*DNAT, *nat, at_sockets=at_sockets) as ends:
        for service in SERVICES:
            ends.ask(service)
        for number in order:
            ends.answer(number)
            assert ends.take() == dns_response()
            record = ends.kernel.record()
            assert record.status == Status.ANSWERED
            assert [flow[1] for flow in record.flows] == [SERVICES[number], BACKENDS[number]]
            hooks = (SEND, RECEIVE) if at_sockets else (EGRESS, INGRESS)
            assert [hop[:2] for hop in record.hops] == [(h, n) for n in (0, 1) for h in hooks]
        assert ends.kernel.counted() == {Counter.STARTED: 2, Counter.EMITTED: 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_port_where_nobody_listens_refuses(family: str) -> None:
    number, address = FAMILIES[family]
    with exchange(family=number) as ends:
        ends.servers[0].close()
        ends.ask(address)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (records := ends.kernel.records()):
            assert time.monotonic() < deadline_s
    (record,) = records
    assert record.status == Status.REFUSED
    assert record.hops == [(EGRESS, 0, 0), (INGRESS, 0, 0), (EGRESS, 1, 0)]
