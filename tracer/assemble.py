# SPDX-License-Identifier: Apache-2.0
"""The kernel's records to transactions: a batch at a time, since that is where the time goes.

Whole columns are converted at once. Hops, which most output does not show, are kept as they came
and made only when somebody asks.
"""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tracer import decode
from tracer.record import HopKind as Kind
from tracer.record import Status as Code
from tracer.transaction import (
    Address,
    Backend,
    Client,
    Direction,
    Hop,
    HopKind,
    Nat,
    Server,
    Status,
    Transaction,
)

_KIND_NAMES: dict[int, HopKind] = {
    Kind.SEND: "send",
    Kind.INGRESS: "ingress",
    Kind.EGRESS: "egress",
    Kind.RECEIVE: "receive",
    Kind.DROP: "drop",
}
_DIRECTIONS: tuple[Direction, Direction] = ("query", "response")
_STATUSES: dict[int, Status] = {
    Code.OPEN: "timeout",
    Code.ANSWERED: "answered",
    Code.TIMEOUT: "timeout",
    Code.REFUSED: "refused",
}
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"


class Place(Protocol):
    """A device, as far as hops tell of it."""

    @property
    def name(self) -> str: ...


class Assembler:
    """Makes transactions. What it must look up elsewhere comes in as functions.

    `find_device(netns, ifindex)` names the devices of hops, `drop_reasons` the kernel's numbers
    for why it dropped a packet, `symbol(address)` the place where it did.
    """

    def __init__(
        self,
        find_device: Callable[[int, int], Place | None],
        drop_reasons: Mapping[int, str],
        symbol: Callable[[int], str | None],
    ) -> None:
        self._find_device = find_device
        self._drop_reasons = drop_reasons
        self._symbol = symbol

    def assemble(self, batch: NDArray[np.void]) -> list[Transaction]:
        """The transactions of a batch of records, or of bare slots that were never answered."""
        if batch.dtype.names and "response" in batch.dtype.names:
            slots = batch["transaction"]
            responses: list[bytes] = batch["response"].tolist()
        else:
            slots, responses = batch, [b""] * len(batch)
        to_epoch_ns = time.time_ns() - time.monotonic_ns()
        first_flow = slots["flows"][:, 0]
        backends = _backends(slots)
        result = []
        columns = zip(
            range(len(slots)),
            responses,
            backends,
            (slots["start_ns"].astype(np.int64) + to_epoch_ns).tolist(),
            _latencies(slots),
            _statuses(slots),
            first_flow["client_addr"].tolist(),
            first_flow["client_port"].tolist(),
            first_flow["server_addr"].tolist(),
            first_flow["server_port"].tolist(),
            *(
                slots[name].tolist()
                for name in (
                    "dns_id", "attempt", "netns", "cgroup_id", "pid", "comm",
                    "query", "query_captured", "response_len", "response_captured",
                    "response_flags",
                )
            ),
            strict=True,
        )  # fmt: skip
        for (
            row, response, backend, time_ns, latency_ns, status,
            client_addr, client_port, server_addr, server_port,
            dns_id, attempt, netns, cgroup_id, pid, comm,
            query, query_captured, response_len, response_captured, response_flags,
        ) in columns:  # fmt: skip
            query = query[:query_captured]
            question = decode.question(query)
            if response_captured:
                response = response[:response_captured]
                rcode = decode.rcode(response, response_len)
                flags = decode.flags(response_flags)
            else:
                response = None
                rcode = decode.rcode(bytes(2) + response_flags.to_bytes(2), 4) if response_flags else None
                flags = decode.flags(response_flags or int.from_bytes(query[2:4]))
            result.append(
                Transaction(
                    time_ns,
                    status,
                    dns_id,
                    "udp",
                    question.name,
                    question.type,
                    rcode,
                    flags,
                    latency_ns,
                    attempt,
                    Client(
                        ip_text(client_addr),
                        client_port,
                        netns or None,
                        cgroup_id or None,
                        pid or None,
                        comm_text(comm) if pid else None,
                    ),
                    Server(ip_text(server_addr), server_port),
                    None if backend is None else Backend(ip_text(backend[0]), backend[1]),
                    query,
                    response,
                    response_len if response else None,
                    functools.partial(self._hops, slots, row),
                )
            )
        return result

    def _hops(self, slots: NDArray[np.void], row: int) -> tuple[Hop, ...]:
        slot = slots[row]
        flows = [_flow(flow) for flow in slot["flows"][: slot["nflows"]]]
        start_ns = int(slot["start_ns"])
        hops = []
        previous = flows[0]
        for t_ns, ifindex, netns, reason, kind, direction, number, _ in slot["hops"][
            : slot["nhops"]
        ].tolist():
            client, server = flows[number]
            nat = _nat(previous, flows[number], direction)
            previous = flows[number]
            device = self._find_device(netns, ifindex) if ifindex else None
            dropped = kind == Kind.DROP
            location = int(slot["drop_location"])
            hops.append(
                Hop(
                    _KIND_NAMES[kind],
                    _DIRECTIONS[direction],
                    max(0, t_ns - start_ns),
                    ifindex or None,
                    device.name if device else None,
                    netns or None,
                    server if direction else client,
                    client if direction else server,
                    None,
                    nat,
                    self._drop_reasons.get(reason, f"reason {reason}") if dropped and reason else None,
                    self._symbol(location) if dropped and location else None,
                )
            )
        return tuple(hops)


@functools.lru_cache(maxsize=65536)
def ip_text(address: bytes) -> str:
    """16 bytes in presentation format; IPv4 where it is mapped into IPv6."""
    if address.startswith(_MAPPED_IPV4):
        return "%d.%d.%d.%d" % tuple(address[12:])
    return str(ipaddress.IPv6Address(address))


@functools.lru_cache(maxsize=4096)
def comm_text(comm: bytes) -> str:
    """A task's name; the kernel lets it be any bytes."""
    return comm.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _latencies(slots: NDArray[np.void]) -> list[int | None]:
    """From the client's send to its receive, None where either was not seen."""
    known = (slots["end_ns"] != 0) & (slots["hops"]["kind"][:, 0] == Kind.SEND)
    ends = slots["end_ns"].astype(np.int64) - slots["start_ns"].astype(np.int64)
    if known.all():
        return list(ends.tolist())
    return [end if is_known else None for end, is_known in zip(ends.tolist(), known.tolist(), strict=True)]


def _statuses(slots: NDArray[np.void]) -> list[Status]:
    codes = slots["status"].tolist()
    last = np.maximum(slots["nhops"].astype(np.int64) - 1, 0)
    kinds = slots["hops"]["kind"][np.arange(len(slots)), last].tolist()
    return [
        "dropped" if kind == Kind.DROP and code != Code.ANSWERED else _STATUSES[code]
        for code, kind in zip(codes, kinds, strict=True)
    ]


def _backends(slots: NDArray[np.void]) -> list[tuple[bytes, int] | None]:
    """Who answered, or was asked last: the server's address where its own packets were seen.

    At the client's sockets NAT is not done yet, or undone again, so these alone do not tell.
    """
    rows = np.arange(len(slots))
    hops = slots["hops"]
    places = np.arange(hops.shape[1])
    there = places < slots["nhops"][:, None]
    response = there & (hops["direction"] == 1)
    query = there & (hops["direction"] == 0)
    first_response = np.argmax(response, axis=1)
    answered = response.any(axis=1) & (hops["kind"][rows, first_response] != Kind.RECEIVE)
    last_query = hops.shape[1] - 1 - np.argmax(query[:, ::-1], axis=1)
    last_kind = hops["kind"][rows, last_query]
    arrived = (
        (last_kind == Kind.EGRESS)
        | (last_kind == Kind.RECEIVE)
        | (hops["flow"][rows, last_query] != 0)
    ) & query.any(axis=1)
    hop = np.where(answered, first_response, last_query)
    flow = slots["flows"][rows, hops["flow"][rows, hop]]
    known = (answered | arrived).tolist()
    return [
        (address, port) if is_known else None
        for address, port, is_known in zip(
            flow["server_addr"].tolist(), flow["server_port"].tolist(), known, strict=True
        )
    ]


def _flow(flow: np.void) -> tuple[Address, Address]:
    return (
        (ip_text(flow["client_addr"].tobytes()), int(flow["client_port"])),
        (ip_text(flow["server_addr"].tobytes()), int(flow["server_port"])),
    )


def _nat(
    before: tuple[Address, Address], after: tuple[Address, Address], direction: int
) -> Nat | None:
    """What changed between two hops. A response's source is what DNAT changes back."""
    if before == after:
        return None
    client = (before[0], after[0]) if before[0] != after[0] else None
    server = (before[1], after[1]) if before[1] != after[1] else None
    del direction
    return Nat(dnat=server, snat=client)
