# SPDX-License-Identifier: Apache-2.0
"""Transactions from records that are made by hand, as the kernel would send them."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.samples import wire_query, wire_response
from tracer.assemble import Assembler
from tracer.cluster.identities import Identities
from tracer.cluster.model import Inventory, Pod, Service
from tracer.record import SMALL_RECORD, TRANSACTION, HopKind
from tracer.record import Status as Code
from tracer.tally import Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tracer.transaction import Transaction

_START_NS = 5_000_000_000
_CLIENT = "10.244.1.10"
_SERVICE = "10.96.0.10"
_POD = "10.244.2.2"
_QUERY = wire_query("www.example.com")
_RESPONSE = wire_response(_QUERY, "NOERROR", "93.184.216.34")

# What a hop is written as: > of the query, < of the response; what it was; the number of its flow.
_KINDS = {
    "send": HopKind.SEND,
    "in": HopKind.INGRESS,
    "out": HopKind.EGRESS,
    "receive": HopKind.RECEIVE,
    "drop": HopKind.DROP,
}


_INVENTORY = Inventory(
    (Pod("kube-system", "coredns", "", None, (_POD,), False, None, (), ()),),
    (Service("kube-system", "kube-dns", (_SERVICE,), (53,), (_POD,)),),
)


def v16(ip: str) -> bytes:
    address = ipaddress.ip_address(ip)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def slot(
    hops: str, *servers: str, status: Code = Code.ANSWERED, end_ns: int = 600
) -> NDArray[np.void]:
    """A transaction with hops 100 ns apart, and a flow for each server."""
    made = np.zeros(1, TRANSACTION)
    one = made[0]
    one["start_ns"] = _START_NS
    one["end_ns"] = _START_NS + end_ns if end_ns else 0
    one["status"], one["dns_id"], one["attempt"] = status, 3112, 1
    one["query"], one["query_captured"] = _QUERY.ljust(272, b"\0"), len(_QUERY)
    one["nflows"] = len(servers)
    for number, server in enumerate(servers):
        one["flows"][number] = (v16(_CLIENT), v16(server), 47911, 53, 0)
    words = hops.split()
    one["nhops"] = len(words)
    for number, word in enumerate(words):
        kind, _, flow = word[1:].partition("/")
        t_ns = _START_NS + 100 * number
        direction = word.startswith("<")
        one["hops"][number] = (t_ns, 0, 0, 0, _KINDS[kind], direction, int(flow or 0), 0)
    return made


def assembled(batch: NDArray[np.void]) -> list[Transaction]:
    return list(
        Assembler(Identities(_INVENTORY, None), {2: "NO_SOCKET"}, lambda _: None).assemble(batch)
    )


def one(hops: str, *servers: str, status: Code = Code.ANSWERED, end_ns: int = 600) -> Transaction:
    (made,) = assembled(slot(hops, *servers, status=status, end_ns=end_ns))
    return made


@pytest.mark.parametrize(
    ("hops", "servers", "backend"),
    [
        # Its own packets tell, and most of all those at its sockets.
        (">send >out/1 <in/1 <out <receive", (_SERVICE, _POD), _POD),
        (">send >in >receive/1 <send/1 <receive", (_SERVICE, _POD), _POD),
        # NAT on a loopback is undone before the answer is seen to leave.
        (">send/1 >receive/1 <send <receive", (_SERVICE, _POD), _POD),
        (">send >in", (_SERVICE,), None),
        (">send >out/1", (_SERVICE, _POD), _POD),
        # Without NAT the server is who was asked.
        (">send >out <in <receive", ("8.8.8.8",), "8.8.8.8"),
        (">send >in <out <receive", ("8.8.8.8",), "8.8.8.8"),
        (">send >out", ("8.8.8.8",), "8.8.8.8"),
        # At the client's sockets NAT is not done yet, or undone.
        (">send <receive", (_SERVICE,), None),
        (">send <receive", ("8.8.8.8",), None),
        # So it may be on devices, where the address is a service's.
        (">send >in <out <receive", (_SERVICE,), None),
        (">send >out <in <receive", (_SERVICE,), None),
        ("<out <receive", (_SERVICE,), None),
        # Then the query may have told.
        (">send >in >out/1 <out <receive", (_SERVICE, _POD), _POD),
        # A server that listens at the service's address, as caches on nodes do.
        (">send >receive <send <receive", (_SERVICE,), _SERVICE),
        (">send >receive", (_SERVICE,), _SERVICE),
        (">send <send <receive", (_SERVICE,), _SERVICE),
    ],
)
def test_backend_is_who_was_seen_to_answer(
    hops: str, servers: tuple[str, ...], backend: str | None
) -> None:
    found = one(hops, *servers).backend
    assert (found and found.ip) == backend
    if backend == _POD:
        assert found is not None
        assert (found.namespace, found.pod) == ("kube-system", "coredns")


@pytest.mark.parametrize(
    ("hops", "code", "status"),
    [
        (">send <receive", Code.ANSWERED, "answered"),
        (">send >drop <receive", Code.ANSWERED, "answered"),
        (">send <drop", Code.ANSWERED, "answered"),
        (">send >in", Code.TIMEOUT, "timeout"),
        (">send >in", Code.OPEN, "timeout"),
        (">send >drop", Code.TIMEOUT, "dropped"),
        (">send >drop", Code.OPEN, "dropped"),
        (">send >drop >send", Code.OPEN, "timeout"),
        (">send >in", Code.REFUSED, "refused"),
        ("", Code.OPEN, "timeout"),
    ],
)
def test_status_is_the_kernels_unless_the_last_was_a_drop(
    hops: str, code: Code, status: str
) -> None:
    assert one(hops, _SERVICE, status=code).status == status


@pytest.mark.parametrize(
    ("hops", "end_ns", "latency_ns"),
    [
        (">send <receive", 600, 600),
        (">in <receive", 600, None),  # when it was sent is not known
        (">send >in", 0, None),
    ],
)
def test_latency_is_from_send_to_receive(hops: str, end_ns: int, latency_ns: int | None) -> None:
    assert one(hops, _SERVICE, end_ns=end_ns).latency_ns == latency_ns


def test_latencies_of_a_mixed_batch_stay_in_their_rows() -> None:
    batch = np.concatenate(
        [slot(">send <receive", _SERVICE), slot(">send", _SERVICE, end_ns=0)] * 2
    )
    assert [t.latency_ns for t in assembled(batch)] == [600, None, 600, None]


def test_batch_of_none_is_none() -> None:
    assert assembled(np.zeros(0, TRANSACTION)) == []


def test_record_becomes_a_transaction() -> None:
    batch = np.zeros(1, SMALL_RECORD)
    batch["transaction"] = slot(">send >out/1 <in/1 <receive", _SERVICE, _POD)
    batch["transaction"]["response_len"] = len(_RESPONSE)
    batch["transaction"]["response_captured"] = len(_RESPONSE)
    batch["transaction"]["response_flags"] = 0x8180
    batch["response"] = np.void(_RESPONSE.ljust(320, b"\0"))
    (made,) = assembled(batch)
    assert (made.name, made.type, made.rcode) == ("www.example.com.", "A", "NOERROR")
    assert (made.dns_id, made.flags, made.response) == (3112, ("rd", "ra"), _RESPONSE)
    assert (made.client.ip, made.client.port, made.client.netns) == (_CLIENT, 47911, None)
    assert (made.server.ip, made.server.service) == (_SERVICE, "kube-system/kube-dns")
    assert [(hop.kind, hop.direction, hop.t_ns) for hop in made.hops] == [
        ("send", "query", 0),
        ("egress", "query", 100),
        ("ingress", "response", 200),
        ("receive", "response", 300),
    ]
    assert made.hops[1].nat
    assert made.hops[1].nat.dnat == ((_SERVICE, 53), (_POD, 53))


@pytest.mark.parametrize(
    ("reason", "where", "status"),
    [
        (2, "here", "refused"),  # nothing listens in the client's own namespace
        (2, "elsewhere", "dropped"),  # whether it hears so is not known
        (3, "here", "dropped"),
        (0, "here", "dropped"),
    ],
)
def test_drop_for_want_of_a_listener_is_a_refusal_where_the_client_hears_of_it(
    reason: int, where: str, status: str
) -> None:
    batch = slot(">send >drop", "127.0.0.1", status=Code.OPEN, end_ns=0)
    batch["netns"] = 4026532246
    batch["hops"]["netns"][0, 1] = 4026532246 if where == "here" else 4026532247
    batch["hops"]["drop_reason"][0, 1] = reason
    (made,) = assembled(batch)
    assert made.status == status
    assert made.latency_ns is None
    tally = Tally({2: "NO_SOCKET"})
    tally.add(batch)
    assert tally.read().keys["status"].tolist() == [
        Code.REFUSED if status == "refused" else Code.DROPPED
    ]
