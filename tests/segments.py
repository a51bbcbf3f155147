# SPDX-License-Identifier: Apache-2.0
"""TCP segments as the kernel's records, made by hand: a connection, hook by hook."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.samples import wire_query, wire_response
from tracer.record import SEGMENT_BYTES, SEGMENT_RECORD, HopKind, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from tracer.connections import Connections

FIN, SYN, RST, ACK = 1, 2, 4, 16
QUERY, RESPONSE = 0, 1
SEND, INGRESS, EGRESS, RECEIVE, DROP = HopKind
CLIENT_NETNS, NODE_NETNS, SERVER_NETNS = 11, 12, 13
SECOND = 1_000_000_000
# (kind, ifindex, netns) of each hook on the way of a query, and the response's back.
WAY = (
    (SEND, 0, CLIENT_NETNS),
    (EGRESS, 2, CLIENT_NETNS),
    (INGRESS, 5, NODE_NETNS),
    (EGRESS, 6, NODE_NETNS),
    (INGRESS, 2, SERVER_NETNS),
    (RECEIVE, 0, SERVER_NETNS),
)
BACK = {SEND: RECEIVE, RECEIVE: SEND, INGRESS: EGRESS, EGRESS: INGRESS}
WAY_BACK = tuple((BACK[kind], ifindex, netns) for kind, ifindex, netns in reversed(WAY))
CLIENT_IP, SERVICE_IP, POD_IP = (bytes(10) + b"\xff\xff" + bytes([10, 0, 0, n]) for n in (1, 2, 3))

QUERIES = [wire_query(f"host{n}.example.com", dns_id=n) for n in range(60)]
RESPONSES = [wire_response(query, "NOERROR", "192.0.2.1") for query in QUERIES]


def framed(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(2) + message for message in messages)


@dataclass(slots=True)
class Peer:
    """A connection's segments, in the order of time. Both directions' bytes go on by themselves."""

    number: int = 1
    port: int = 40000
    first_seq: tuple[int, int] = (1000, 5000)
    t_ns: int = SECOND
    way: tuple[Sequence[tuple[int, int, int]], Sequence[tuple[int, int, int]]] = (WAY, WAY_BACK)
    carrier: tuple[int, int] = (SEND, RECEIVE)
    made: list[np.void] = field(default_factory=list)
    sent: list[int] = field(default_factory=lambda: [0, 0])

    def at(
        self,
        place: tuple[int, int, int],
        direction: int,
        data: bytes = b"",
        *,
        flags: int = ACK,
        offset: int | None = None,
        carried: bool = False,
        **fields: int,
    ) -> None:
        """One segment at one hook, in pieces where its bytes go along."""
        seq = self.first_seq[direction] + (self.sent[direction] if offset is None else offset)
        pieces = [data[i : i + SEGMENT_BYTES] for i in range(0, len(data), SEGMENT_BYTES)] or [b""]
        for number, piece in enumerate(pieces if carried else [data]):
            record = np.zeros(1, SEGMENT_RECORD)[0]
            segment = record["segment"]
            kind, segment["ifindex"], segment["netns"] = place
            segment["t_ns"], segment["connection"], segment["kind"] = self.t_ns, self.number, kind
            segment["client_netns"], segment["pid"], segment["cgroup_id"] = CLIENT_NETNS, 4242, 120
            segment["comm"], segment["family"] = b"dig".ljust(16, b"\0"), 4
            segment["socket_cgroup_id"] = 130 if netns_of(place) == SERVER_NETNS else 0
            segment["direction"], segment["tcp_flags"] = direction, flags
            segment["seq"] = (seq + number * SEGMENT_BYTES) % 2**32
            segment["len"] = len(piece)
            if carried:
                segment["captured"] = len(piece)
                record["payload"] = piece.ljust(SEGMENT_BYTES, b"\0")
            segment["asked"] = (CLIENT_IP, SERVICE_IP, self.port, 53, 0)
            server = POD_IP if netns_of(place) == SERVER_NETNS else SERVICE_IP
            segment["flow"] = (CLIENT_IP, server, self.port, 53, 0)
            for name, value in fields.items():
                segment[name] = value
            self.made.append(record)
        self.t_ns += 1000

    def segment(
        self,
        direction: int,
        data: bytes = b"",
        *,
        flags: int = ACK,
        offset: int | None = None,
        hops: slice = slice(None),
        step_ns: int = 0,
    ) -> None:
        """One segment at all hooks. `offset` in its stream: where it stands, else what comes next."""
        for place in self.way[direction][hops]:
            carried = bool(data) and place[0] == self.carrier[direction]
            self.at(place, direction, data, flags=flags, offset=offset, carried=carried)
            self.t_ns += step_ns
        if offset is None:
            self.sent[direction] += len(data)

    def open(self) -> None:
        """SYN and SYN-ACK."""
        self.segment(QUERY, flags=SYN)
        self.segment(RESPONSE, flags=SYN | ACK)

    def ask(self, *messages: bytes) -> None:
        self.segment(QUERY, framed(*messages))

    def answer(self, *messages: bytes) -> None:
        self.segment(RESPONSE, framed(*messages))

    def take(self) -> NDArray[np.void]:
        """All that was made since the last call."""
        batch = np.array(self.made, SEGMENT_RECORD)
        self.made.clear()
        return batch


def netns_of(place: tuple[int, int, int]) -> int:
    return place[2]


class Ended:
    """A transaction that came out."""

    def __init__(self, record: np.void) -> None:
        self.slot = record["transaction"]
        self.response: bytes = record["response"]
        self.problem: str = record["problem"]
        self.status = Status(int(self.slot["status"]))
        self.query: bytes = self.slot["query"].tobytes()[: int(self.slot["query_captured"])]
        self.dns_id = int(self.slot["dns_id"])

    @property
    def hops(self) -> list[tuple[int, int, int, int, int]]:
        """(time, direction, kind, ifindex, netns) of each."""
        names = ("t_ns", "direction", "kind", "ifindex", "netns")
        hops = self.slot["hops"][: int(self.slot["nhops"])]
        return [tuple(int(hop[name]) for name in names) for hop in hops]  # type: ignore[misc]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        return [hop[2:] for hop in self.hops]

    @property
    def latency_ns(self) -> int | None:
        end_ns = int(self.slot["end_ns"])
        return end_ns - int(self.slot["start_ns"]) if end_ns else None


def ended(batch: NDArray[np.void]) -> list[Ended]:
    return [Ended(record) for record in batch]


def run(connections: Connections, peers: Iterable[Peer]) -> list[Ended]:
    """Shows what the peers have made, in the order of time."""
    made = list(itertools.chain.from_iterable(peer.take() for peer in peers))
    made.sort(key=lambda record: int(record["segment"]["t_ns"]))
    return ended(connections.feed(np.array(made, SEGMENT_RECORD)))
