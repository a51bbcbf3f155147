# SPDX-License-Identifier: Apache-2.0
"""Transactions as the stages hand them on, for the tests of what comes after assembly."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tracer import decode
from tracer.transaction import Backend, Client, Hop, Nat, Server, Transaction

NS_PER_MS = 1_000_000
START_NS = 1_700_988_994_195_320_000  # 2023-11-26T08:56:34.195320Z

WEB = Client(
    "10.244.2.3",
    53100,
    4026532246,
    120,
    4242,
    "dig",
    "default",
    "my-nginx-646554d7fd-fd4jp",
    "app",
    "worker3",
)
DNS_SERVICE = Server("10.96.0.10", 53, "kube-system/kube-dns")
COREDNS = Backend("10.244.0.3", 53, "kube-system", "coredns-79c6f6447f-6f9xp")

_POD = ("10.244.2.3", 53100)
_SERVICE = ("10.96.0.10", 53)
_BACKEND = ("10.244.0.3", 53)

# One query from a pod to a service on another node and back, as seen on the pod's node.
HOPS = (
    Hop("send", "query", 0, None, None, 4026532246, _POD, _SERVICE, "default/my-nginx-646554d7fd-fd4jp"),
    Hop("egress", "query", 2_000, 2, "eth0", 4026532246, _POD, _SERVICE, "default/my-nginx-646554d7fd-fd4jp"),
    Hop("ingress", "query", 4_000, 3, "vethe281cb12", 4026532177, _POD, _SERVICE, "worker3"),
    Hop("egress", "query", 40_000, 5, "eth0", 4026532177, _POD, _BACKEND, "worker3", Nat(dnat=(_SERVICE, _BACKEND))),
    Hop("ingress", "response", 7_322_000, 5, "eth0", 4026532177, _BACKEND, _POD, "worker3"),
    Hop("egress", "response", 7_358_000, 3, "vethe281cb12", 4026532177, _SERVICE, _POD, "worker3", Nat(dnat=(_BACKEND, _SERVICE))),
    Hop("ingress", "response", 7_360_000, 2, "eth0", 4026532246, _SERVICE, _POD, "default/my-nginx-646554d7fd-fd4jp"),
    Hop("receive", "response", 7_400_000, None, None, 4026532246, _SERVICE, _POD, "default/my-nginx-646554d7fd-fd4jp"),
)  # fmt: skip


def wire_query(name: str, type_: str = "A", dns_id: int = 3112) -> bytes:
    return dns.message.make_query(name, type_, id=dns_id).to_wire()


def wire_response(query: bytes, rcode: str = "NOERROR", *data: str, ttl_s: int = 30) -> bytes:
    asked = dns.message.from_wire(query)
    message = dns.message.make_response(asked)
    message.flags |= dns.flags.RA
    message.set_rcode(dns.rcode.from_text(rcode))
    if data:
        question = asked.question[0]
        message.answer.append(
            dns.rrset.from_text_list(question.name, ttl_s, "IN", question.rdtype, data)
        )
    return message.to_wire()


def transaction(
    name: str = "www.example.com.",
    type_: str = "A",
    rcode: str | None = "NOERROR",
    *,
    data: tuple[str, ...] = ("93.184.216.34",),
    latency_ns: int | None = 7_400_000,
    time_ns: int = START_NS,
    dns_id: int = 3112,
    client: Client = WEB,
    hops: tuple[Hop, ...] = HOPS,
) -> Transaction:
    """An answered query; one that timed out where `rcode` is None."""
    query = wire_query(name, type_, dns_id)
    response = None
    if rcode is not None:
        response = wire_response(query, rcode, *(data if rcode == "NOERROR" else ()))
    return Transaction(
        time_ns=time_ns,
        status="timeout" if response is None else "answered",
        dns_id=dns_id,
        protocol="udp",
        name=decode.question(query).name,
        type=type_,
        rcode=rcode,
        flags=decode.flags(int.from_bytes((response or query)[2:4], "big")),
        latency_ns=None if response is None else latency_ns,
        attempt=1,
        client=client,
        server=DNS_SERVICE,
        backend=COREDNS,
        query=query,
        response=response,
        response_len=None if response is None else len(response),
        make_hops=lambda: hops,
    )
