# SPDX-License-Identifier: Apache-2.0
"""Queries over TCP as the records that the kernel makes of those over UDP."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tracer.record import MAX_FLOWS, MAX_HOPS, TRANSACTION, HopKind, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from tracer.passage import Flow, Place

RECORD = np.dtype([("transaction", TRANSACTION), ("response", "O"), ("problem", "O")])
# TRANSACTION's parts: NumPy would take several times as long to fill one in.
_HEAD = struct.Struct("=QQQQQIIIIHHHH2s2s10BHB7xI4x16s")
_FLOW = struct.Struct("=16s16s2s2s4x")
_HOP = struct.Struct("=QIIIBBBx")
_FLOWS_AT = _HEAD.size
_HOPS_AT = _FLOWS_AT + MAX_FLOWS * _FLOW.size
_QUERY_AT = _HOPS_AT + MAX_HOPS * _HOP.size
_TCP = 6


class Who(NamedTuple):
    """Who connected, as in the kernel's records of segments; 0 is unknown."""

    cgroup_id: int
    netns: int
    pid: int
    comm: bytes
    family: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A query and what became of it. Times are CLOCK_MONOTONIC, in nanoseconds."""

    status: Status
    who: Who
    asked: Flow
    t_ns: int  # of the query, where no hop of it is known
    query: bytes  # QUERY_BYTES of it, at most; none: nothing was asked
    query_len: int
    query_hops: Mapping[Place, int]
    response: bytes | None = None
    response_hops: Mapping[Place, int] | None = None
    refused_ns: int = 0
    drop_location: int = 0
    server_cgroup_id: int = 0
    problem: str = ""


def records(ended: Sequence[Ended]) -> tuple[NDArray[np.void], int]:
    """RECORD for each, and how many hops there was no room for."""
    made = np.zeros(len(ended), RECORD)
    size = TRANSACTION.itemsize
    slots = bytearray(size * len(ended))
    lost = 0
    for number, one in enumerate(ended):
        lost += _fill(slots, number * size, one)
    made["transaction"] = np.frombuffer(slots, TRANSACTION)
    made["response"] = [one.response or b"" for one in ended]
    made["problem"] = [one.problem for one in ended]
    return made, lost


def _fill(slots: bytearray, at: int, one: Ended) -> int:
    """Writes a TRANSACTION; returns how many hops there was no room for."""
    hops, received_ns = _hops(one)
    flows = {one.asked: 0}
    kept = 0
    for t_ns, direction, place in hops:
        kind, ifindex, netns, drop_reason, flow = place
        number = flows.get(flow)
        if number is None and len(flows) < MAX_FLOWS:
            number = flows[flow] = len(flows)
        if number is not None and kept < MAX_HOPS:
            _HOP.pack_into(
                slots, at + _HOPS_AT + kept * _HOP.size,
                t_ns, ifindex, netns, drop_reason, kind, direction, number,
            )  # fmt: skip
            kept += 1
    for number, (client, server, client_port, server_port, _) in enumerate(flows):
        _FLOW.pack_into(
            slots, at + _FLOWS_AT + number * _FLOW.size,
            client, server, client_port.to_bytes(2), server_port.to_bytes(2),
        )  # fmt: skip
    response, who = one.response, one.who
    response_len = len(response) if response is not None else 0
    _HEAD.pack_into(
        slots,
        at,
        hops[0][0] if hops and not hops[0][1] else one.t_ns,
        one.refused_ns if one.status == Status.REFUSED else received_ns,
        who.cgroup_id,
        one.server_cgroup_id,
        one.drop_location,
        who.netns,
        who.pid,
        0,  # question_hash
        0,  # generation
        one.query_len,
        len(one.query),
        response_len,
        response_len,
        one.query[:2],  # dns_id
        response[2:4] if response is not None else b"",
        one.status,
        1,  # attempt
        kept,
        len(flows),
        0,  # hops_lost
        0,  # variant
        who.family,
        1,  # question_ok
        _TCP,
        0,  # balanced
        _type_of(one.query),
        0,  # by_server
        0,  # weight
        who.comm,
    )
    slots[at + _QUERY_AT : at + _QUERY_AT + len(one.query)] = one.query
    return len(hops) - kept


def _type_of(query: bytes) -> int:
    """That of the question; 0: there is none. Decoding, which is for all to see, is stricter."""
    end = query.find(b"\0", 12)
    return int.from_bytes(query[end + 1 : end + 3]) if end >= 0 and query[4:6] != b"\0\0" else 0


def _hops(one: Ended) -> tuple[list[tuple[int, int, Place]], int]:
    """(time, direction, where), in the order of time; and when the client had the answer, or 0."""
    hops: list[tuple[int, int, Place]] = []
    received_ns = 0
    for direction, passed in enumerate((one.query_hops, one.response_hops or {})):
        received_ns = min(_times(passed, HopKind.RECEIVE), default=0)
        for place, t_ns in passed.items():
            # Who has it already drops what comes again.
            if place.kind == HopKind.DROP and 0 < received_ns <= t_ns:
                continue
            hops.append((t_ns, direction, place))
    hops.sort(key=lambda hop: hop[:2])
    return hops, received_ns if one.response is not None else 0


def _times(passed: Mapping[Place, int], kind: HopKind) -> Iterable[int]:
    return (t_ns for place, t_ns in passed.items() if place.kind == kind)
