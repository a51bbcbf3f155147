# SPDX-License-Identifier: Apache-2.0
"""What the programs make of each packet, at every hook; every one is let pass unchanged."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests import packets as p
from tests.packets import FLOW, FLOW6, NAME, Flow, dns, dns_query, dns_response, ethernet
from tests.programs import (
    DEVICE_HOOKS,
    EGRESS,
    HOOKS,
    INGRESS,
    LARGE_RECORDS,
    LOOPBACK,
    NODE,
    OTHER_NODE,
    RECEIVE,
    SEND,
    SLOTS,
    SMALL_RECORDS,
    Programs,
    compiled_programs,
    loaded_programs,
)
from tracer.assemble import comm_text
from tracer.kernel import bpf, table
from tracer.kernel.session import Selection
from tracer.record import (
    MAX_FLOWS,
    MAX_HOPS,
    QUERY_BYTES,
    RESPONSE_LARGE,
    RESPONSE_SMALL,
    TRANSACTION,
    Counter,
    HopKind,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_VARIANTS = 4
LATER_S = 0.002  # after which a query that comes again was asked again, and not doubled
OTHER_SERVER = FLOW._replace(server="10.96.0.11")

# How an IP packet may look: its flow, and what makes it of (UDP or TCP, source, destination, perhaps protocol).
INNER: dict[str, tuple[Flow, Callable[..., bytes]]] = {
    "IPv4": (FLOW, p.ipv4),
    "IPv4 with options": (FLOW, lambda *of: p.ipv4(*of, options=bytes([1] * 12))),
    "IPv4 with 40 bytes of options": (FLOW, lambda *of: p.ipv4(*of, options=bytes(40))),
    "IPv6": (FLOW6, p.ipv6),
    "IPv6 with hop-by-hop options": (
        FLOW6,
        lambda *of: p.ipv6(*of, extensions=((0, b"\0" + bytes(6)),)),
    ),
    "IPv6 with destination options of 24 bytes": (
        FLOW6,
        lambda *of: p.ipv6(*of, extensions=((60, b"\2" + bytes(22)),)),
    ),
    "IPv6 in a fragment that is the whole": (
        FLOW6,
        lambda *of: p.ipv6(*of, extensions=((44, bytes(7)),)),
    ),
    "IPv6 with four extension headers": (
        FLOW6,
        lambda *of: p.ipv6(*of, extensions=tuple((n, b"\0" + bytes(6)) for n in (0, 60, 43, 60))),
    ),
}
# How a frame may carry such a packet.
OUTER: dict[str, Callable[[bytes], bytes]] = {
    "plain": ethernet,
    "one VLAN tag": lambda packet: ethernet(packet, p.VLAN),
    "two VLAN tags": lambda packet: ethernet(packet, p.QINQ, p.VLAN),
    "VXLAN": lambda packet: ethernet(p.vxlan(packet)),
    "VXLAN on flannel's port": lambda packet: ethernet(p.vxlan(packet, p.FLANNEL_PORT)),
    "VXLAN over IPv6": lambda packet: ethernet(p.vxlan(packet, nodes=("fd00::2", "fd00::3"))),
    "VXLAN with a VLAN tag": lambda packet: ethernet(p.vxlan(packet), p.VLAN),
    "Geneve": lambda packet: ethernet(p.geneve(packet)),
    "Geneve with options": lambda packet: ethernet(p.geneve(packet, bytes(8))),
    "Geneve with 252 bytes of options": lambda packet: ethernet(p.geneve(packet, bytes(252))),
    "IP in IP": lambda packet: ethernet(p.ipip(packet)),
    "IP in IP with a VLAN tag": lambda packet: ethernet(p.ipip(packet), p.VLAN),
}
# IPv6 in IPv4 is another protocol, which no network of pods uses.
CARRIED = [
    (inner, outer)
    for inner in INNER
    for outer in OUTER
    if INNER[inner][0] is FLOW or "IP in IP" not in outer
]

QUERY, RESPONSE = p.query_packet(dns_query()), p.response_packet(dns_response())
NOT_DNS = {
    "TCP": p.ipv4(p.tcp(dns_query(), 50000, 443), FLOW.client, FLOW.server, p.TCP),
    "TCP over IPv6": p.ipv6(p.tcp(dns_query(), 50000, 443), FLOW6.client, FLOW6.server, p.TCP),
    "UDP on another port": p.ipv4(p.udp(dns_query(), 50000, 123), FLOW.client, FLOW.server),
    "UDP over IPv6 on another port": p.ipv6(
        p.udp(dns_query(), 50000, 123), FLOW6.client, FLOW6.server
    ),
    "no payload": p.ipv4(b"", FLOW.client, FLOW.server),
    "UDP header cut off": p.ipv4(b"\xc5\xec\0\x35\0", FLOW.client, FLOW.server),
    "later fragment": p.ipv4(
        p.udp(dns_query(), 50000, 53), FLOW.client, FLOW.server, fragment=0x2001
    ),
    "last fragment": p.ipv4(p.udp(dns_query(), 50000, 53), FLOW.client, FLOW.server, fragment=185),
    "later fragment over IPv6": p.ipv6(
        p.udp(dns_query(), 50000, 53),
        FLOW6.client,
        FLOW6.server,
        extensions=((44, b"\0\x05\xa8" + bytes(4)),),
    ),
    "second fragment over IPv6": p.ipv6(
        p.udp(dns_query(), 50000, 53),
        FLOW6.client,
        FLOW6.server,
        extensions=((44, b"\0\0\x08" + bytes(4)),),
    ),
    "five extension headers": p.ipv6(
        p.udp(dns_query(), 50000, 53),
        FLOW6.client,
        FLOW6.server,
        extensions=tuple((60, b"\0" + bytes(6)) for _ in range(5)),
    ),
    "extension header that goes beyond the packet": p.ipv6(
        p.udp(dns_query(), 50000, 53), FLOW6.client, FLOW6.server, extensions=((0, b"\xff"),)
    ),
    "no next header": p.ipv6(p.udp(dns_query(), 50000, 53), FLOW6.client, FLOW6.server, 59),
    "encrypted": p.ipv6(p.udp(dns_query(), 50000, 53), FLOW6.client, FLOW6.server, 50),
    "echo request": p.ipv4(b"\x08\0\0\0" + QUERY, FLOW.client, FLOW.server, p.ICMP),
    "neighbour solicitation": p.ipv6(b"\x87" + bytes(63), FLOW6.client, FLOW6.server, p.ICMPV6),
    "time exceeded": p.ipv4(b"\x0b" + bytes(7) + QUERY, FLOW.client, FLOW.server, p.ICMP),
    "fragmentation needed": p.ipv4(
        b"\x03\x04" + bytes(6) + QUERY, FLOW.client, FLOW.server, p.ICMP
    ),
    "unreachable TCP": p.unreachable(
        p.ipv4(p.tcp(b"", 50000, 53), FLOW.client, FLOW.server, p.TCP)
    ),
    # UDP would begin with the destination's address, and that would be port 53.
    "IPv4 header of 16 bytes": b"\x44"
    + p.ipv4(struct.pack("!HH", 100, 0) + dns_query(), FLOW.client, "10.0.0.53")[1:],
    "IPv4 header longer than the packet": b"\x4f" + QUERY[1:20] + bytes(20),
    "another version": b"\x50" + QUERY[1:],
    "VXLAN that carries TCP": p.vxlan(
        p.ipv4(p.tcp(dns_query(), 50000, 53), FLOW.client, FLOW.server, p.TCP)
    ),
    "VXLAN that carries other UDP": p.vxlan(
        p.ipv4(p.udp(dns_query(), 50000, 123), FLOW.client, FLOW.server)
    ),
    "VXLAN that is cut off": p.vxlan(QUERY)[:60],
    "VXLAN that carries nothing": p.ipv4(p.udp(b"", 40000, p.VXLAN_PORT), "192.0.2.1", "192.0.2.2"),
    "Geneve with fewer options than it says": p.ipv4(
        p.udp(b"\x3f" + bytes(7) + ethernet(QUERY), 40000, p.GENEVE_PORT), "192.0.2.1", "192.0.2.2"
    ),
    "IP in IP that carries TCP": p.ipip(
        p.ipv4(p.tcp(dns_query(), 50000, 53), FLOW.client, FLOW.server, p.TCP)
    ),
    "IP in IP that carries nothing": p.ipip(b""),
    "IP in IP in IP": p.ipip(p.ipip(QUERY)),
}
NOT_DNS_FRAMES = {
    **{what: ethernet(packet) for what, packet in NOT_DNS.items()},
    "ARP": bytes(12) + b"\x08\x06" + bytes(28),
    "LLDP": bytes(12) + b"\x88\xcc" + bytes(64),
    "three VLAN tags": ethernet(QUERY, p.QINQ, p.VLAN, p.VLAN),
    "VLAN tag that is cut off": bytes(12) + b"\x81\0\0",
    "VLAN tag and no packet": bytes(12) + b"\x81\0\0\1\x08\0",
}
# On the port of DNS, but not DNS.
UNDECODABLE = {
    "nothing": p.query_packet(b""),
    "eleven bytes": p.query_packet(dns_query()[:11]),
    "a length of 0": p.ipv4(p.udp(dns_query(), 50000, 53, length=0), FLOW.client, FLOW.server),
    "a length of 7": p.ipv4(p.udp(dns_query(), 50000, 53, length=7), FLOW.client, FLOW.server),
    "a length of 19": p.ipv4(p.udp(dns_query(), 50000, 53, length=19), FLOW.client, FLOW.server),
    "a query from the server": p.response_packet(dns_query()),
    "a response to the server": p.query_packet(dns_response()),
    "nothing over IPv6": p.query_packet(b"", FLOW6),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: None) -> Iterator[None]:
    del root
    with compiled_programs():
        yield


@pytest.fixture
def kernel() -> Iterator[Programs]:
    with loaded_programs() as programs:
        yield programs


def frames(inner: str, outer: Callable[[bytes], bytes] = ethernet) -> tuple[Flow, bytes, bytes]:
    """A flow, and a query and its response in such packets."""
    flow, make = INNER[inner]
    query = p.udp(dns_query(), flow.client_port, flow.server_port)
    response = p.udp(dns_response(), flow.server_port, flow.client_port)
    return (
        flow,
        outer(make(query, flow.client, flow.server)),
        outer(make(response, flow.server, flow.client)),
    )


def ask(kernel: Programs, flow: Flow = FLOW, dns_id: int = p.DNS_ID, name: bytes = NAME) -> None:
    """A client's socket sends a query."""
    kernel.show(SEND, p.query_packet(dns_query(name, dns_id=dns_id), flow))


def answer(kernel: Programs, flow: Flow = FLOW, dns_id: int = p.DNS_ID, name: bytes = NAME) -> None:
    """The client's socket receives the response."""
    kernel.show(RECEIVE, p.response_packet(dns_response(name, dns_id=dns_id), flow))


# Where headers end.


@pytest.mark.parametrize(("inner", "outer"), CARRIED)
def test_query_and_response_at_a_device_are_one_transaction(
    kernel: Programs, inner: str, outer: str
) -> None:
    flow, query, response = frames(inner, OUTER[outer])
    before_ns = time.monotonic_ns()
    kernel.run(INGRESS, query)
    assert kernel.in_flight() == 1
    kernel.run(EGRESS, response)
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record.flows == [flow]
    assert record.hops == [(INGRESS, 0, 0), (EGRESS, 1, 0)]
    assert (record.query, record.response) == (dns_query(), dns_response())
    assert (record["query_len"], record["response_len"]) == (
        len(record.query),
        len(record.response),
    )
    assert (record["dns_id"], record["response_flags"]) == (p.DNS_ID, 0x8180)
    assert (record["family"], record["question_ok"]) == (flow.version, 1)
    hops = record.transaction["hops"][:2]
    assert hops["netns"].tolist() == [NODE, NODE]
    assert hops["ifindex"].tolist() == [LOOPBACK, LOOPBACK]
    assert before_ns < record["start_ns"] == hops["t_ns"][0] < hops["t_ns"][1]
    assert kernel.counted() == {Counter.STARTED: 1, Counter.EMITTED: 1}


@pytest.mark.parametrize("inner", INNER)
def test_query_and_response_at_sockets_are_one_transaction(kernel: Programs, inner: str) -> None:
    flow, query, response = frames(inner)
    kernel.run(SEND, query)
    kernel.run(RECEIVE, response)
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record.flows == [flow]
    assert record.hops == [(SEND, 0, 0), (RECEIVE, 1, 0)]
    assert (record.query, record.response) == (dns_query(), dns_response())
    assert record["end_ns"] == record.transaction["hops"]["t_ns"][1]
    assert kernel.counted() == {Counter.STARTED: 1, Counter.EMITTED: 1}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("what", NOT_DNS_FRAMES)
def test_what_is_not_dns_leaves_no_trace(kernel: Programs, what: str, hook: HopKind) -> None:
    kernel.run(hook, NOT_DNS_FRAMES[what])
    assert kernel.counted() == {}
    assert kernel.index() == set()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("what", UNDECODABLE)
def test_what_cannot_be_dns_is_counted_at_sockets(
    kernel: Programs, what: str, hook: HopKind
) -> None:
    kernel.run(hook, ethernet(UNDECODABLE[what]))
    assert kernel.counted() == ({} if hook in DEVICE_HOOKS else {Counter.UNDECODABLE: 1})
    assert kernel.index() == set()


@pytest.mark.parametrize("port", [1, 63, 64, 5353, 65535])
def test_only_configured_ports_are_dns(kernel: Programs, port: int) -> None:
    kernel.session.select(Selection(ports=(port,)))
    ask(kernel)
    answer(kernel)
    assert kernel.counted() == {}
    flow = FLOW._replace(server_port=port)
    ask(kernel, flow)
    answer(kernel, flow)
    assert kernel.record().flows == [flow]


def test_several_ports_are_dns_at_once(kernel: Programs) -> None:
    kernel.session.select(Selection(ports=(53, 5353)))
    for port in (53, 5353, 54):
        flow = FLOW._replace(server_port=port)
        ask(kernel, flow)
        answer(kernel, flow)
    assert [record.flows[0][3] for record in kernel.records()] == [53, 5353]


def test_servers_ask_each_other_from_port_53(kernel: Programs) -> None:
    flow = FLOW._replace(client_port=53)
    ask(kernel, flow)
    answer(kernel, flow)
    assert kernel.record().flows == [flow]


# What the message says: (query, response, whether the query has a question that parses).
FORMERR = dns(flags=0x8181)
MESSAGES = {
    "the same question": (dns_query(), dns_response(), True),
    "another case": (dns_query(), dns_response(b"\3WWW\7eXAMPLE\3cOm\0"), True),
    "no question in the response": (dns_query(), FORMERR, True),
    "no question at all": (dns(), FORMERR, False),
    "two questions": (
        dns(p.question(), p.question(type_=28)),
        dns(p.question(), p.question(type_=28), flags=0x8180),
        True,
    ),
    "the second question not answered": (
        dns(p.question(), p.question(type_=28)),
        dns_response(),
        True,
    ),
    "a count of 65535": (dns(p.question(), qdcount=65535), FORMERR, True),
    "the root": (dns_query(b"\0"), dns_response(b"\0"), True),
    "a name that points at itself": (dns_query(b"\xc0\x0c"), dns_response(b"\xc0\x0c"), False),
    "a name that points back": (dns_query(b"\1a\xc0\x0c"), FORMERR, False),
    "a label of 63": (dns_query(p.name_of(65)), dns_response(p.name_of(65)), True),
    "a label of 64": (dns_query(b"\x40" + b"x" * 64 + b"\0"), FORMERR, False),
    "a name of 255": (dns_query(p.name_of(255)), dns_response(p.name_of(255)), True),
    "a name of 256": (dns_query(p.name_of(256)), FORMERR, False),
    "127 labels": (dns_query(b"\1x" * 127 + b"\0"), dns_response(b"\1x" * 127 + b"\0"), True),
    "128 labels": (dns_query(b"\1x" * 128 + b"\0"), FORMERR, False),
    "a name without an end": (dns_query(b"\1x" * 200), FORMERR, False),
    "a question without its class": (dns_query()[:-2], FORMERR, False),
    "a header and nothing more": (dns_query()[:12], FORMERR, False),
}


@pytest.mark.parametrize(("query", "response", "question_ok"), MESSAGES.values(), ids=MESSAGES)
def test_response_finds_its_query(
    kernel: Programs, query: bytes, response: bytes, question_ok: bool
) -> None:
    kernel.show(SEND, p.query_packet(query))
    kernel.show(RECEIVE, p.response_packet(response))
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record.query == query[:QUERY_BYTES]
    assert record["query_len"] == len(query)
    assert record.response == response
    assert bool(record["question_ok"]) == question_ok


@pytest.mark.parametrize("size", [1, *range(3, 26)])
def test_what_comes_after_the_question_does_not_matter(kernel: Programs, size: int) -> None:
    name = p.name_of(size)
    query = dns(p.question(name), counts=(0, 0, 1), rest=b"\xff" * 40)
    response = dns(p.question(name), flags=0x8180, counts=(1, 0, 0), rest=b"\x5a" * 40)
    kernel.show(SEND, p.query_packet(query))
    kernel.show(RECEIVE, p.response_packet(response))
    assert kernel.record().status == Status.ANSWERED


STRANGERS = {
    "another id": p.response_packet(dns_response(dns_id=p.DNS_ID + 1)),
    "another name": p.response_packet(dns_response(b"\3www\7example\3org\0")),
    "another type": p.response_packet(dns_response(type_=28)),
    "another type that differs in one bit": p.response_packet(dns_response(type_=p.TYPE_A | 0x20)),
    "another client": p.response_packet(dns_response(), FLOW._replace(client="10.244.2.4")),
    "another port": p.response_packet(dns_response(), FLOW._replace(client_port=50669)),
    "another family": p.response_packet(dns_response(), FLOW6),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_response_that_fits_no_query_changes_nothing(kernel: Programs, what: str) -> None:
    ask(kernel)
    for hook in DEVICE_HOOKS:
        kernel.show(hook, STRANGERS[what])
    assert kernel.counted() == {Counter.STARTED: 1}
    kernel.show(RECEIVE, STRANGERS[what])
    assert kernel.counted() == {Counter.STARTED: 1, Counter.UNMATCHED_RESPONSES: 1}
    (record,) = kernel.expire()
    assert record.hops == [(SEND, 0, 0)]


@pytest.mark.parametrize("version", ["IPv4", "IPv6"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name.lower())
def test_query_cut_off_anywhere_is_a_query_once_its_header_is_whole(
    kernel: Programs, hook: HopKind, version: str
) -> None:
    flow, query, _ = frames(version)
    ip_len = 20 if flow is FLOW else 40
    header_end = p.ETH_HLEN + ip_len + 8 + 12
    started = undecodable = 0
    # What is shorter than an IP header, the kernel does not take for a packet.
    for size in range(p.ETH_HLEN + ip_len, len(query)):
        kernel.run(hook, query[:size])
        if size >= header_end:
            started += 1
            (record,) = kernel.expire()
            assert record["question_ok"] == 0
            assert record["query_captured"] == size - (header_end - 12)
            assert record["query_len"] == len(dns_query())
        elif size >= header_end - 12 and hook not in DEVICE_HOOKS:
            undecodable += 1
    expected = {Counter.STARTED: started, Counter.UNDECODABLE: undecodable}
    assert kernel.counted() == {counter: n for counter, n in expected.items() if n}


@pytest.mark.parametrize("hook", DEVICE_HOOKS, ids=lambda hook: hook.name.lower())
@pytest.mark.parametrize("outer", [name for name in OUTER if name != "plain"])
def test_query_in_a_tunnel_can_be_cut_off_anywhere(
    kernel: Programs, outer: str, hook: HopKind
) -> None:
    _, query, _ = frames("IPv4", OUTER[outer])
    ip_len = 40 if "IPv6" in outer else 20
    without = len(query) - len(dns_query()) + 12
    for size in range(p.ETH_HLEN + ip_len, len(query)):
        kernel.run(hook, query[:size])
        assert len(kernel.expire()) == (size >= without)


def test_response_cut_off_anywhere_after_its_header_ends_its_query(kernel: Programs) -> None:
    response = ethernet(RESPONSE)
    header_end = p.ETH_HLEN + 20 + 8 + 12
    for size in range(header_end, len(response)):
        ask(kernel)
        kernel.run(RECEIVE, response[:size])
        record = kernel.record()
        assert record["response_len"] == len(dns_response())
        assert record.response == dns_response()[: size - header_end + 12]


# How long it is, and how long it says that it is.


@pytest.mark.parametrize("udp_len", [*range(254, 266), *range(510, 522)])
def test_length_of_a_response_is_read_as_16_bits(kernel: Programs, udp_len: int) -> None:
    ask(kernel)
    response = p.dns_response_of(udp_len - 8)
    kernel.show(RECEIVE, p.response_packet(response))
    record = kernel.record()
    assert record["response_len"] == len(response)
    assert record.response == response


@pytest.mark.parametrize("udp_len", [*range(254, 266), *range(510, 522)])
def test_length_of_a_query_is_read_as_16_bits(kernel: Programs, udp_len: int) -> None:
    """EDNS padding makes queries that long."""
    size = udp_len - 8
    query = dns(p.question(), rest=bytes(size - len(dns_query())), counts=(0, 0, 1))
    kernel.show(SEND, p.query_packet(query))
    answer(kernel)
    record = kernel.record()
    assert record["query_len"] == size
    assert record.query == query[:QUERY_BYTES]


@pytest.mark.parametrize("size", [RESPONSE_SMALL, RESPONSE_SMALL + 1, 1232, 1472, 3600])
def test_long_response_leaves_by_the_large_ring(kernel: Programs, size: int) -> None:
    ask(kernel)
    response = p.dns_response_of(size)
    kernel.show(RECEIVE, p.response_packet(response))
    record = kernel.record()
    captured = RESPONSE_SMALL if size <= RESPONSE_SMALL else RESPONSE_LARGE
    assert record.batch.dtype["response"].itemsize == captured
    assert record["response_len"] == size
    assert record.response == response


@pytest.mark.parametrize("lie", [60, 320, 321, 4096, 5000, 65527])
def test_message_shorter_than_it_says_is_captured_as_it_is(kernel: Programs, lie: int) -> None:
    query = p.udp(dns_query(), FLOW.client_port, FLOW.server_port, length=lie + 8)
    response = p.udp(dns_response(), FLOW.server_port, FLOW.client_port, length=lie + 8)
    kernel.show(SEND, p.ip(query, FLOW.client, FLOW.server))
    kernel.show(RECEIVE, p.ip(response, FLOW.server, FLOW.client))
    record = kernel.record()
    assert (record["query_len"], record["response_len"]) == (lie, lie)
    assert (record.query, record.response) == (dns_query(), dns_response())


@pytest.mark.parametrize("padding", [1, 18, 400, 1000])
def test_bytes_after_the_message_are_not_part_of_it(kernel: Programs, padding: int) -> None:
    """Ethernet pads short frames, and UDP may end before IP does."""
    kernel.run(SEND, ethernet(QUERY) + b"x" * padding)
    kernel.run(RECEIVE, ethernet(RESPONSE) + b"x" * padding)
    record = kernel.record()
    assert (record.query, record.response) == (dns_query(), dns_response())
    assert (record["query_len"], record["response_len"]) == (len(dns_query()), len(dns_response()))


def test_question_beyond_the_end_of_its_message_is_none(kernel: Programs) -> None:
    query = p.udp(dns_query(), FLOW.client_port, FLOW.server_port, length=8 + 20)
    kernel.show(SEND, p.ip(query, FLOW.client, FLOW.server))
    (record,) = kernel.expire()
    assert record["question_ok"] == 0
    assert record.query == dns_query()[:20]


def test_first_fragment_of_a_response_ends_its_query_and_others_are_passed_over(
    kernel: Programs,
) -> None:
    response = p.udp(p.dns_response_of(3000), FLOW.server_port, FLOW.client_port)
    kernel.show(INGRESS, QUERY)
    for offset in range(0, len(response), 1480):
        more = 0x2000 if offset + 1480 < len(response) else 0
        part = response[offset : offset + 1480]
        fragment = p.ipv4(part, FLOW.server, FLOW.client, fragment=more | offset // 8)
        kernel.show(EGRESS, fragment)
    record = kernel.record()
    assert record.hops == [(INGRESS, 0, 0), (EGRESS, 1, 0)]
    assert record["response_len"] == 3000
    assert record.response == p.dns_response_of(3000)[: 1480 - 8]
    assert kernel.counted() == {Counter.STARTED: 1, Counter.EMITTED: 1}


# ICMP errors.


@pytest.mark.parametrize("flow", [FLOW, FLOW6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("outer", ["plain", "one VLAN tag", "VXLAN"])
def test_unreachable_port_refuses_the_query(kernel: Programs, flow: Flow, outer: str) -> None:
    query = p.query_packet(dns_query(), flow)
    kernel.run(INGRESS, OUTER[outer](query))
    kernel.run(EGRESS, OUTER[outer](p.unreachable(query, flow)))
    record = kernel.record()
    assert record.status == Status.REFUSED
    assert record.hops == [(INGRESS, 0, 0), (EGRESS, 1, 0)]
    assert record.flows == [flow]
    assert record["end_ns"] == record.transaction["hops"]["t_ns"][1]
    assert (record["response_len"], record["response_flags"], record.response) == (0, 0, b"")


@pytest.mark.parametrize("flow", [FLOW, FLOW6], ids=["IPv4", "IPv6"])
def test_unreachable_port_refuses_a_query_of_which_it_quotes_the_header(
    kernel: Programs, flow: Flow
) -> None:
    query = p.query_packet(dns_query(), flow)
    kernel.show(INGRESS, query)
    headers_len = (40 if flow is FLOW6 else 20) + 8
    kernel.show(EGRESS, p.unreachable(query, flow, quoted=headers_len + 11))
    assert kernel.in_flight() == 1
    kernel.show(EGRESS, p.unreachable(query, flow, quoted=headers_len + 12))
    assert kernel.record().status == Status.REFUSED


def test_unreachable_port_on_its_way_is_a_hop(kernel: Programs) -> None:
    ask(kernel)
    kernel.show(INGRESS, QUERY)
    kernel.show(INGRESS, p.unreachable(QUERY), OTHER_NODE)
    assert kernel.in_flight() == 1
    kernel.show(EGRESS, p.unreachable(QUERY))
    record = kernel.record()
    assert record.status == Status.REFUSED
    assert record.hops == [(SEND, 0, 0), (INGRESS, 0, 0), (INGRESS, 1, 0), (EGRESS, 1, 0)]


@pytest.mark.parametrize("hook", [SEND, RECEIVE])
def test_error_at_a_socket_changes_nothing(kernel: Programs, hook: HopKind) -> None:
    ask(kernel)
    kernel.show(hook, p.unreachable(QUERY))
    assert kernel.counted() == {Counter.STARTED: 1}
    (record,) = kernel.expire()
    assert record.hops == [(SEND, 0, 0)]


@pytest.mark.parametrize(
    "quoted", [QUERY[:20], QUERY[:28], RESPONSE], ids=["no UDP", "no DNS", "a response"]
)
def test_error_that_quotes_no_query_changes_nothing(kernel: Programs, quoted: bytes) -> None:
    kernel.show(INGRESS, QUERY)
    kernel.show(EGRESS, p.unreachable(quoted))
    (record,) = kernel.expire()
    assert record.hops == [(INGRESS, 0, 0)]
    assert kernel.counted() == {Counter.STARTED: 1}


# Which hop ends a transaction.


@pytest.mark.parametrize(
    ("first", "last"), [(INGRESS, EGRESS), (EGRESS, INGRESS), (SEND, RECEIVE), (RECEIVE, SEND)]
)
def test_response_ends_where_the_query_began(
    kernel: Programs, first: HopKind, last: HopKind
) -> None:
    kernel.show(first, QUERY)
    for hook in DEVICE_HOOKS:  # of another node on the way, and back
        kernel.show(hook, QUERY, OTHER_NODE)
    for hook in DEVICE_HOOKS:
        kernel.show(hook, RESPONSE, OTHER_NODE)
    assert kernel.in_flight() == 1
    kernel.show(last, RESPONSE)
    record = kernel.record()
    on_the_way = [(hook, n, 0) for n in (0, 1) for hook in DEVICE_HOOKS]
    assert record.hops == [(first, 0, 0), *on_the_way, (last, 1, 0)]
    times = record.transaction["hops"]["t_ns"][: record["nhops"]].tolist()
    assert times == sorted(times)


def test_receive_ends_a_query_wherever_it_was_first_seen(kernel: Programs) -> None:
    kernel.show(INGRESS, QUERY)
    answer(kernel)
    assert kernel.record().hops == [(INGRESS, 0, 0), (RECEIVE, 1, 0)]


def test_second_response_to_one_query_fits_no_query(kernel: Programs) -> None:
    ask(kernel)
    answer(kernel)
    answer(kernel)
    assert kernel.counted() == {
        Counter.STARTED: 1,
        Counter.EMITTED: 1,
        Counter.UNMATCHED_RESPONSES: 1,
    }


def test_sender_is_the_process_that_sends(kernel: Programs) -> None:
    ask(kernel)
    (record,) = kernel.expire()
    comm = comm_text(record.transaction["comm"].tobytes())
    assert (record["pid"], comm) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
    assert record["netns"] == os.stat("/proc/self/ns/net").st_ino
    assert record["cgroup_id"] != 0


def test_hop_that_is_not_a_send_tells_of_no_sender(kernel: Programs) -> None:
    ask(kernel)
    kernel.expire()  # so that a slot with a sender in it is used again
    for _ in range(SLOTS):
        kernel.show(INGRESS, QUERY)
        (record,) = kernel.expire()
        assert (record["pid"], record["cgroup_id"], record["netns"]) == (0, 0, 0)
        assert not any(record.transaction["comm"].tobytes())


def test_slot_tells_nothing_of_who_had_it_before(kernel: Programs) -> None:
    for number in range(SLOTS):
        garbage = b"\xaa" * TRANSACTION.itemsize
        bpf.map_update(kernel.session.built.map_fds["slots"], struct.pack("=I", number), garbage)
    kernel.show(INGRESS, QUERY)
    (record,) = kernel.expire()
    told = record.numbers()
    now = {name: told.pop(name) for name in ("start_ns", "question_hash", "generation")}
    assert time.monotonic_ns() - now["start_ns"] < 1e9
    assert told == {
        "end_ns": 0,
        "cgroup_id": 0,
        "server_cgroup_id": 0,
        "protocol": socket.IPPROTO_UDP,
        "drop_location": 0,
        "netns": 0,
        "pid": 0,
        "query_len": len(dns_query()),
        "query_captured": len(dns_query()),
        "response_len": 0,
        "response_captured": 0,
        "dns_id": p.DNS_ID,
        "response_flags": 0,
        "status": Status.OPEN,
        "attempt": 1,
        "nhops": 1,
        "nflows": 1,
        "hops_lost": 0,
        "variant": 0,
        "family": 4,
        "question_ok": 1,
        "balanced": 0,
        "type": 1,
        "by_server": 0,
        "weight": 0,
        "upstream_us": 0,
    }
    assert (record.flows, record.hops, record.query) == ([FLOW], [(INGRESS, 0, 0)], dns_query())


# What is wanted.


def _here() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def test_query_of_another_process_is_counted_and_left_alone(kernel: Programs) -> None:
    kernel.session.select(Selection(pid=os.getpid() + 1))
    ask(kernel)
    for hook in DEVICE_HOOKS:
        kernel.show(hook, QUERY)
        kernel.show(hook, RESPONSE)
    answer(kernel)
    assert kernel.counted() == {Counter.FILTERED: 1}
    kernel.session.select(Selection(pid=os.getpid()))
    ask(kernel)
    kernel.show(INGRESS, QUERY)
    answer(kernel)
    assert kernel.record().hops == [(SEND, 0, 0), (INGRESS, 0, 0), (RECEIVE, 1, 0)]


def test_query_of_another_namespace_is_counted_and_left_alone(kernel: Programs) -> None:
    kernel.session.select(Selection(pods=True, netns={_here(): False}))
    ask(kernel)
    assert kernel.counted() == {Counter.FILTERED: 1}
    kernel.session.select(Selection(pods=True, netns={_here(): True}))
    ask(kernel)
    assert kernel.in_flight() == 1


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name.lower())
def test_nothing_begins_during_a_pause_and_what_is_in_flight_goes_on(
    kernel: Programs, hook: HopKind
) -> None:
    ask(kernel)
    kernel.session.pause()
    kernel.show(hook, p.query_packet(dns_query(dns_id=1)))
    assert kernel.in_flight() == 1
    answer(kernel)
    assert kernel.record().hops == [(SEND, 0, 0), (RECEIVE, 1, 0)]
    assert kernel.counted() == {Counter.STARTED: 1, Counter.EMITTED: 1}


# Queries that share a client's socket and id.


def other_name(number: int) -> bytes:
    return b"\1" + bytes([ord("a") + number]) + NAME


ORDERS = [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]


@pytest.mark.parametrize("order", ORDERS)
def test_answers_to_different_questions_with_one_id_go_to_the_right_query(
    kernel: Programs, order: tuple[int, ...]
) -> None:
    for number in range(MAX_VARIANTS):
        ask(kernel, name=other_name(number))
    for number in range(MAX_VARIANTS):
        kernel.show(INGRESS, p.query_packet(dns_query(other_name(number))))
    for number in order:
        kernel.show(EGRESS, p.response_packet(dns_response(other_name(number))))
        answer(kernel, name=other_name(number))
        record = kernel.record()
        assert record.query == dns_query(other_name(number))
        assert record.response == dns_response(other_name(number))
        assert record.hops == [(SEND, 0, 0), (INGRESS, 0, 0), (EGRESS, 1, 0), (RECEIVE, 1, 0)]
    assert kernel.counted() == {Counter.STARTED: 4, Counter.EMITTED: 4}


@pytest.mark.parametrize("order", ORDERS)
def test_answers_of_different_servers_with_one_id_go_to_the_right_query(
    kernel: Programs, order: tuple[int, ...]
) -> None:
    """As musl asks all servers of resolv.conf at once."""
    flows = [FLOW._replace(server=f"10.96.0.{10 + number}") for number in range(MAX_VARIANTS)]
    for flow in flows:
        ask(kernel, flow)
    for flow in flows:
        kernel.show(INGRESS, p.query_packet(dns_query(), flow))
    for number in order:
        kernel.show(EGRESS, p.response_packet(dns_response(), flows[number]))
        answer(kernel, flows[number])
        record = kernel.record()
        assert record.flows == [flows[number]]
        assert record.hops == [(SEND, 0, 0), (INGRESS, 0, 0), (EGRESS, 1, 0), (RECEIVE, 1, 0)]
    assert kernel.counted() == {Counter.STARTED: 4, Counter.EMITTED: 4}


def test_answers_from_different_ports_of_one_server_go_to_the_right_query(
    kernel: Programs,
) -> None:
    kernel.session.select(Selection(ports=(53, 5353)))
    flows = (FLOW, FLOW._replace(server_port=5353))
    for flow in flows:
        ask(kernel, flow)
    for flow in reversed(flows):
        answer(kernel, flow)
        assert kernel.record().flows == [flow]


def test_answers_without_a_question_go_to_the_server_that_was_asked(kernel: Programs) -> None:
    ask(kernel)
    ask(kernel, OTHER_SERVER)
    for flow in (OTHER_SERVER, FLOW):
        kernel.show(RECEIVE, p.response_packet(FORMERR, flow))
        assert kernel.record().flows == [flow]


def test_server_that_nat_hides_still_gets_its_hops(kernel: Programs) -> None:
    """Behind NAT without conntrack the server's address is new, and the rest must do."""
    ask(kernel)
    kernel.show(EGRESS, p.query_packet(dns_query(), OTHER_SERVER))
    kernel.show(INGRESS, p.response_packet(dns_response(), OTHER_SERVER))
    answer(kernel)
    record = kernel.record()
    assert record.flows == [FLOW, OTHER_SERVER]
    assert record.hops == [(SEND, 0, 0), (EGRESS, 0, 1), (INGRESS, 1, 1), (RECEIVE, 1, 0)]


def test_variant_too_many_is_counted(kernel: Programs) -> None:
    for number in range(MAX_VARIANTS + 2):
        ask(kernel, name=other_name(number))
    assert kernel.in_flight() == MAX_VARIANTS
    assert kernel.counted()[Counter.TABLE_FULL] == 2
    kernel.check_accounts()


@pytest.mark.parametrize("hook", [INGRESS, EGRESS, RECEIVE])
def test_query_without_room_begins_nothing_further_on(kernel: Programs, hook: HopKind) -> None:
    """Otherwise what was lost at its socket would come up again, as somebody else's."""
    for number in range(MAX_VARIANTS + 1):
        ask(kernel, name=other_name(number))
    kernel.show(hook, p.query_packet(dns_query(other_name(MAX_VARIANTS))))
    assert kernel.in_flight() == MAX_VARIANTS
    assert kernel.counted() == {
        Counter.STARTED: MAX_VARIANTS + 1,
        Counter.TABLE_FULL: 1,
        Counter.HOPS_LOST: 1,
    }
    kernel.show(hook, p.query_packet(dns_query(other_name(0))))
    assert kernel.counted()[Counter.HOPS_LOST] == 1


def test_query_asked_again_is_an_attempt_more(kernel: Programs) -> None:
    ask(kernel)
    kernel.show(INGRESS, QUERY)
    ask(kernel, name=NAME.upper())
    record = kernel.record()
    assert (record.status, record["attempt"]) == (Status.TIMEOUT, 1)
    assert record.hops == [(SEND, 0, 0), (INGRESS, 0, 0)]
    assert (record["response_len"], record["end_ns"], record.response) == (0, 0, b"")
    answer(kernel)
    record = kernel.record()
    assert (record.status, record["attempt"]) == (Status.ANSWERED, 2)
    assert record.query == dns_query(NAME.upper())
    assert record.hops == [(SEND, 0, 0), (RECEIVE, 1, 0)]
    assert kernel.counted() == {Counter.STARTED: 2, Counter.EMITTED: 2}


@pytest.mark.parametrize(("first", "last"), [(INGRESS, EGRESS), (EGRESS, INGRESS), (RECEIVE, SEND)])
def test_query_asked_again_from_afar_is_an_attempt_more(
    kernel: Programs, first: HopKind, last: HopKind
) -> None:
    """The client's socket is on another machine: what comes by where it first did, is sent anew."""
    for number in range(3):
        time.sleep(LATER_S)
        kernel.show(first, QUERY)
        kernel.show(EGRESS, QUERY, OTHER_NODE)
        assert [record["attempt"] for record in kernel.records()] == ([number] if number else [])
    kernel.show(last, RESPONSE)
    record = kernel.record()
    assert (record.status, record["attempt"]) == (Status.ANSWERED, 3)
    assert record.hops == [(first, 0, 0), (EGRESS, 0, 0), (last, 1, 0)]


def test_timeout_of_a_query_that_a_server_received_has_no_end(kernel: Programs) -> None:
    for _ in range(2):
        time.sleep(LATER_S)
        kernel.show(RECEIVE, QUERY)
    record = kernel.record()
    assert (record.status, record["end_ns"]) == (Status.TIMEOUT, 0)


def test_query_doubled_by_the_network_is_not_asked_again(kernel: Programs) -> None:
    kernel.show(INGRESS, QUERY, times=2)
    assert kernel.records() == []
    kernel.show(EGRESS, RESPONSE)
    assert kernel.record()["attempt"] == 1


def test_answer_of_somebody_who_was_not_asked_ends_nothing(kernel: Programs) -> None:
    kernel.show(SEND, QUERY)
    kernel.show(RECEIVE, p.response_packet(dns_response(), OTHER_SERVER))
    assert kernel.records() == []
    kernel.show(RECEIVE, RESPONSE)
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record.hops[-1][0] == RECEIVE


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_answers_of_different_servers_go_to_the_right_query_from_afar(
    kernel: Programs, order: tuple[int, int]
) -> None:
    flows = (FLOW, OTHER_SERVER)
    for flow in flows:
        kernel.show(INGRESS, p.query_packet(dns_query(), flow))
        kernel.show(EGRESS, p.query_packet(dns_query(), flow), OTHER_NODE)
    for number in order:
        kernel.show(INGRESS, p.response_packet(dns_response(), flows[number]), OTHER_NODE)
        kernel.show(EGRESS, p.response_packet(dns_response(), flows[number]))
        record = kernel.record()
        assert record.flows == [flows[number]]
        assert record["nhops"] == 4


def test_each_of_several_queries_with_one_id_can_be_asked_again(kernel: Programs) -> None:
    for _ in range(3):
        for flow in (FLOW, OTHER_SERVER):
            ask(kernel, flow)
    assert [record["attempt"] for record in kernel.records()] == [1, 1, 2, 2]
    for flow in (FLOW, OTHER_SERVER):
        answer(kernel, flow)
        record = kernel.record()
        assert (record["attempt"], record.flows) == (3, [flow])


# When there is more than there is room for.


def test_full_table_gives_up_the_oldest(kernel: Programs) -> None:
    asked = 3 * SLOTS
    for number in range(asked):
        ask(kernel, dns_id=number)
        kernel.check_accounts()
    assert kernel.counted() == {Counter.STARTED: asked, Counter.TABLE_FULL: asked - SLOTS}
    assert [record["dns_id"] for record in kernel.expire()] == [*range(asked - SLOTS, asked)]


def test_full_ring_is_counted_and_flows_again_once_read(kernel: Programs) -> None:
    for _ in range(2):
        kernel.reset()
        asked = SMALL_RECORDS + 10
        for number in range(asked):
            ask(kernel, dns_id=number)
            answer(kernel, dns_id=number)
            kernel.check_accounts()
        assert kernel.counted() == {
            Counter.STARTED: asked,
            Counter.EMITTED: SMALL_RECORDS,
            Counter.RING_FULL: 10,
        }
        assert [record["dns_id"] for record in kernel.records()] == [*range(SMALL_RECORDS)]


def test_full_large_ring_is_counted(kernel: Programs) -> None:
    asked = LARGE_RECORDS + 3
    for number in range(asked):
        ask(kernel, dns_id=number)
        kernel.show(RECEIVE, p.response_packet(p.dns_response_of(1000, dns_id=number)))
    assert kernel.counted() == {
        Counter.STARTED: asked,
        Counter.EMITTED: LARGE_RECORDS,
        Counter.RING_FULL: 3,
    }
    assert [record["dns_id"] for record in kernel.records()] == [*range(LARGE_RECORDS)]


@pytest.mark.parametrize("beyond", [1, 5, 300])
def test_hop_too_many_is_counted_and_the_answer_still_comes(kernel: Programs, beyond: int) -> None:
    ask(kernel)
    for _ in range(MAX_HOPS - 1 + beyond):
        kernel.show(INGRESS, QUERY)
    answer(kernel)
    record = kernel.record()
    assert record.status == Status.ANSWERED
    assert record["nhops"] == MAX_HOPS
    assert record["hops_lost"] == min(beyond + 1, 255)
    assert record["end_ns"] > record.transaction["hops"]["t_ns"].max()
    assert (record["response_flags"], record.response) == (0x8180, dns_response())
    assert kernel.counted()[Counter.HOPS_LOST] == beyond + 1


def test_flow_too_many_is_counted_and_the_answer_still_comes(kernel: Programs) -> None:
    ask(kernel)
    flows = [FLOW._replace(server=f"10.244.0.{number}") for number in range(MAX_FLOWS + 1)]
    for flow in flows:
        kernel.show(EGRESS, p.query_packet(dns_query(), flow))
    answer(kernel)
    record = kernel.record()
    assert record.flows == [FLOW, *flows][:MAX_FLOWS]
    assert record["hops_lost"] == 2
    assert kernel.counted()[Counter.HOPS_LOST] == 2


# When nobody answers.


def test_expired_queries_give_everything_back(kernel: Programs) -> None:
    asked = 0
    for _ in range(10):
        for _ in range(SLOTS):
            ask(kernel, dns_id=asked)
            asked += 1
        assert kernel.in_flight() == SLOTS
        assert len(kernel.index()) == SLOTS
        expired = kernel.expire()
        assert [record["dns_id"] for record in expired] == [*range(asked - SLOTS, asked)]
        assert {record.status for record in expired} == {Status.OPEN}
        kernel.check_nothing_leaked()
    assert kernel.counted() == {Counter.STARTED: asked}


def test_only_what_is_old_expires(kernel: Programs) -> None:
    for number in range(3):
        ask(kernel, dns_id=number)
    now_ns = time.monotonic_ns()
    for number in range(3, 6):
        ask(kernel, dns_id=number)
    assert [record["dns_id"] for record in kernel.expire(now_ns)] == [0, 1, 2]
    assert kernel.in_flight() == 3
    answer(kernel, dns_id=4)
    assert [record["dns_id"] for record in kernel.expire()] == [3, 5]


def test_expired_query_takes_its_other_names_with_it(kernel: Programs) -> None:
    """As SNAT leaves them: more than one client's address and port for one slot."""
    ask(kernel)
    natted = FLOW._replace(client="172.18.0.2", client_port=1024)
    fds = kernel.session.built.map_fds
    (number,) = np.flatnonzero(kernel.session.table._start)
    key = struct.pack("=I", number)
    raw = bpf.map_lookup(fds["slots"], key, TRANSACTION.itemsize)
    assert raw is not None
    slot = np.frombuffer(raw, TRANSACTION).copy()
    slot["nflows"] = 2
    slot["flows"][0, 1] = slot["flows"][0, 0]
    slot["flows"][0, 1]["client_addr"] = bytes(10) + b"\xff\xff" + bytes([172, 18, 0, 2])
    slot["flows"][0, 1]["client_port"] = natted.client_port
    bpf.map_update(fds["slots"], key, slot.tobytes())
    alias = bytes(10) + b"\xff\xff" + bytes([172, 18, 0, 2]) + struct.pack("!HH", 1024, p.DNS_ID)
    bpf.map_update(fds["slot_index"], alias + bytes(4), key)
    assert len(kernel.index()) == 2
    kernel.show(EGRESS, p.query_packet(dns_query(), natted))
    (record,) = kernel.expire()
    assert record.flows == [FLOW, natted]
    assert record.hops == [(SEND, 0, 0), (EGRESS, 0, 1)]
    assert kernel.index() == set()


@pytest.mark.parametrize("at_the_end", [False, True])
def test_slot_whose_key_is_lost_comes_back_after_a_while_or_at_the_end(
    kernel: Programs, monkeypatch: pytest.MonkeyPatch, at_the_end: bool
) -> None:
    """Not before: a program that took the key may just be held up."""
    ask(kernel)
    (key,) = bpf.map_keys(kernel.session.built.map_fds["slot_index"], 24)
    bpf.map_delete(kernel.session.built.map_fds["slot_index"], key)
    for _ in range(3):
        assert (kernel.expire(), kernel.in_flight()) == ([], 1)
    if at_the_end:
        kernel.session.table.give_up()
    else:
        monkeypatch.setattr(table, "_STUCK_S", 0.0)
        assert kernel.expire() == []
    assert kernel.in_flight() == 0
    assert kernel.session.table.leaked == 1
    kernel.session.table.leaked = 0


def test_slot_that_was_begun_anew_meanwhile_is_not_ended_twice(
    kernel: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CPU ends a transaction and begins one in its slot while user space takes its key."""
    ask(kernel)
    fds = kernel.session.built.map_fds
    delete = bpf.map_delete

    def deleted_too_late(fd: int, key: bytes) -> bool:
        answer(kernel)
        ask(kernel)
        return delete(fd, key)

    with monkeypatch.context() as patched:
        patched.setattr(bpf, "map_delete", deleted_too_late)
        assert kernel.expire() == []
    assert kernel.record().status == Status.ANSWERED
    assert list(bpf.map_keys(fds["slot_index"], 24)) == []
    assert (kernel.expire(), kernel.in_flight()) == ([], 1)
    kernel.session.table.give_up()
    assert kernel.in_flight() == 0
    assert kernel.session.table.leaked == 1
    kernel.session.table.leaked = 0


def test_everything_at_once_is_accounted_for(kernel: Programs) -> None:
    """Ten times the table, some answered, some asked again, some never ended."""
    expired = 0
    for number in range(10 * SLOTS):
        ask(kernel, dns_id=number)
        if number % 3 == 0:
            answer(kernel, dns_id=number)
        if number % 5 == 0:
            ask(kernel, dns_id=number)
        if number % 7 == 0:
            kernel.show(INGRESS, p.query_packet(dns_query(dns_id=number + 1000)))
        if number % 20 == 0:
            expired += len(kernel.expire())
        kernel.check_accounts(expired)
    counted = kernel.counted()
    assert counted[Counter.EMITTED] == SMALL_RECORDS == len(kernel.records())
    assert min(expired, counted[Counter.RING_FULL], counted[Counter.TABLE_FULL]) > 0
