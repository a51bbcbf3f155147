# SPDX-License-Identifier: Apache-2.0
"""Packets as bytes, from the inside out: `ethernet(ipv4(udp(dns_query())))`.

Lengths and checksums can be given, so that they lie.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

ETH_HLEN = 14
IPV4, IPV6, VLAN, QINQ = 0x0800, 0x86DD, 0x8100, 0x88A8
ICMP, IPIP, TCP, UDP, ICMPV6 = 1, 4, 6, 17, 58

VXLAN_PORT, FLANNEL_PORT, GENEVE_PORT = 4789, 8472, 6081

NAME = b"\3www\7Example\3com\0"
TYPE_A, CLASS_IN = 1, 1
DNS_ID = 0x25D2


class Flow(NamedTuple):
    """Who asks whom."""

    client: str = "10.244.2.3"
    server: str = "10.96.0.10"
    client_port: int = 50668
    server_port: int = 53

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.client).version


FLOW = Flow()
FLOW6 = Flow("fd00:244::3", "fd00:96::a")


def question(name: bytes = NAME, type_: int = TYPE_A) -> bytes:
    return name + struct.pack("!HH", type_, CLASS_IN)


def dns(
    *questions: bytes,
    dns_id: int = DNS_ID,
    flags: int = 0x0100,
    qdcount: int | None = None,
    rest: bytes = b"",
    counts: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """A DNS message. `counts` are of answers, authorities and additional records."""
    number = len(questions) if qdcount is None else qdcount
    return struct.pack("!6H", dns_id, flags, number, *counts) + b"".join(questions) + rest


def dns_query(name: bytes = NAME, type_: int = TYPE_A, dns_id: int = DNS_ID) -> bytes:
    return dns(question(name, type_), dns_id=dns_id)


def dns_response(
    name: bytes = NAME, type_: int = TYPE_A, dns_id: int = DNS_ID, rcode: int = 0
) -> bytes:
    return dns(question(name, type_), dns_id=dns_id, flags=0x8180 | rcode)


def dns_response_of(size: int, dns_id: int = DNS_ID) -> bytes:
    """A response of exactly that many bytes: one answer of a private type fills it."""
    head = 12 + len(question()) + 12
    data = bytes(range(256)) * (size // 256 + 1)
    answer = b"\xc0\x0c" + struct.pack("!HHIH", 65280, CLASS_IN, 30, size - head)
    message = dns(
        question(),
        dns_id=dns_id,
        flags=0x8180,
        counts=(1, 0, 0),
        rest=answer + data[: size - head],
    )
    assert len(message) == size
    return message


def name_of(size: int) -> bytes:
    """A well-formed name, but for its length, which is that many bytes on the wire."""
    labels = b""
    left = size - 1
    while left:
        label = min(63, left - 1)
        if left - label - 1 == 1:  # nothing shorter than a label of one byte is left for
            label -= 1
        labels += bytes([label]) + b"x" * label
        left -= label + 1
    return labels + b"\0"


def udp(payload: bytes, source: int, destination: int, *, length: int | None = None) -> bytes:
    length = 8 + len(payload) if length is None else length
    return struct.pack("!HHHH", source, destination, length, 0) + payload


FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def tcp(
    payload: bytes,
    source: int,
    destination: int,
    *,
    seq: int = 1,
    flags: int = PSH | ACK,
    options: bytes = b"",
    data_offset: int | None = None,
) -> bytes:
    """`data_offset`: in words of 32 bits, as the header says."""
    words = 5 + len(options) // 4 if data_offset is None else data_offset
    head = (source, destination, seq % 2**32, 1, words << 4, flags, 64240, 0, 0)
    return struct.pack("!HHIIBBHHH", *head) + options + payload


def ipv4(
    payload: bytes,
    source: str,
    destination: str,
    protocol: int = UDP,
    *,
    options: bytes = b"",
    fragment: int = 0,
    length: int | None = None,
) -> bytes:
    """`fragment`: flags and offset as they are in the header; `length`: what it says."""
    header_len = 20 + len(options)
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | header_len // 4,
        0,
        min(header_len + len(payload), 0xFFFF) if length is None else length,
        1,
        fragment,
        64,
        protocol,
        0,
        ipaddress.IPv4Address(source).packed,
        ipaddress.IPv4Address(destination).packed,
    )
    return header + options + payload


def ipv6(
    payload: bytes,
    source: str,
    destination: str,
    protocol: int = UDP,
    *,
    extensions: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """`extensions`: (number, body after the first byte) of each header before the payload."""
    first, *following = [number for number, _ in extensions] + [protocol]
    chain = b"".join(
        bytes([after]) + body for after, (_, body) in zip(following, extensions, strict=True)
    )
    return (
        struct.pack("!IHBB", 6 << 28, min(len(chain) + len(payload), 0xFFFF), first, 64)
        + ipaddress.IPv6Address(source).packed
        + ipaddress.IPv6Address(destination).packed
        + chain
        + payload
    )


def ip(payload: bytes, source: str, destination: str, protocol: int = UDP) -> bytes:
    if ":" in source:
        return ipv6(payload, source, destination, protocol)
    return ipv4(payload, source, destination, protocol)


def ethernet(packet: bytes, *tags: int) -> bytes:
    """`tags`: the types of VLAN tags, outermost first."""
    ethertype = IPV6 if packet[:1] and packet[0] >> 4 == 6 else IPV4
    types = [*tags, ethertype]
    frame = bytes(12) + struct.pack("!H", types[0])
    for number, after in enumerate(types[1:]):
        frame += struct.pack("!HH", 100 + number, after)
    return frame + packet


def query_packet(message: bytes, flow: Flow = FLOW) -> bytes:
    """From the client to the server, from the IP header on."""
    return ip(udp(message, flow.client_port, flow.server_port), flow.client, flow.server)


def response_packet(message: bytes, flow: Flow = FLOW) -> bytes:
    """From the server to the client, from the IP header on."""
    return ip(udp(message, flow.server_port, flow.client_port), flow.server, flow.client)


NODES = ("172.18.0.2", "172.18.0.3")


def vxlan(packet: bytes, port: int = VXLAN_PORT, nodes: tuple[str, str] = NODES) -> bytes:
    inner = struct.pack("!BxxxI", 0x08, 1 << 8) + ethernet(packet)
    return ip(udp(inner, 40000, port), *nodes)


def geneve(packet: bytes, options: bytes = b"") -> bytes:
    inner = struct.pack("!BBHI", len(options) // 4, 0, 0x6558, 1 << 8) + options + ethernet(packet)
    return ip(udp(inner, 40000, GENEVE_PORT), *NODES)


def ipip(packet: bytes) -> bytes:
    return ipv4(packet, *NODES, IPIP)


def unreachable(query: bytes, flow: Flow = FLOW, quoted: int = 548) -> bytes:
    """What says that nobody listens at the server's port, and quotes the query's packet."""
    if flow.version == 6:
        error = struct.pack("!BBHI", 1, 4, 0, 0) + query[:quoted]
        return ipv6(error, flow.server, flow.client, ICMPV6)
    error = struct.pack("!BBHI", 3, 3, 0, 0) + query[:quoted]
    return ipv4(error, flow.server, flow.client, ICMP)
