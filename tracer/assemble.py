# SPDX-License-Identifier: Apache-2.0
"""The kernel's records to transactions: a batch at a time, since that is where the time goes.

Whole columns are converted at once. Hops, which most output does not show, are kept as they came
and made only when somebody asks.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

_COLUMNS = (
    "dns_id", "attempt", "netns", "cgroup_id", "pid", "comm",
    "query", "query_captured", "response_len", "response_captured", "response_flags",
)  # fmt: skip
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
_CLOCK_STEP_NS = 10_000_000
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"


class Names(Protocol):
    """Who is who, as far as it is known. Addresses are in presentation format."""

    def client(
        self, cgroup_id: int, netns: int, ip: str
    ) -> tuple[str | None, str | None, str | None, str | None]:
        """(namespace, pod, container, node) of a process; 0 is unknown."""

    def service(self, ip: str, port: int) -> str | None:
        """ "namespace/name" of the service whose address it is."""

    def pod(self, ip: str) -> tuple[str | None, str | None]:
        """(namespace, name) of the pod whose address it is."""

    def place(self, netns: int, ifindex: int) -> tuple[str | None, str | None]:
        """(name of the device, whose it is); ifindex 0: a socket of that namespace."""


class Assembler:
    """Makes transactions.

    `drop_reasons` are the kernel's numbers for why it dropped a packet, `symbol(address)` names
    the place where it did.
    """

    def __init__(
        self, names: Names, drop_reasons: Mapping[int, str], symbol: Callable[[int], str | None]
    ) -> None:
        self._names = names
        self._drop_reasons = drop_reasons
        self._symbol = symbol
        self._epoch_ns = 0

    def assemble(self, batch: NDArray[np.void]) -> Iterator[Transaction]:
        """The transactions of a batch of records, or of bare slots that were never answered."""
        responses: Iterable[bytes]
        if batch.dtype.names and "response" in batch.dtype.names:
            slots, responses = batch["transaction"], batch["response"].tolist()
        else:
            slots, responses = batch, itertools.repeat(b"", len(batch))
        to_epoch_ns = self._to_epoch_ns()
        first_flow = slots["flows"][:, 0]
        hops = _Hops(slots)
        name_client, name_service, name_pod = (
            self._names.client,
            self._names.service,
            self._names.pod,
        )
        columns = zip(
            responses,
            _backends(slots),
            (slots["start_ns"].astype(np.int64) + to_epoch_ns).tolist(),
            _latencies(slots),
            _statuses(slots),
            first_flow["client_addr"].tolist(),
            first_flow["client_port"].tolist(),
            first_flow["server_addr"].tolist(),
            first_flow["server_port"].tolist(),
            *(slots[name].tolist() for name in _COLUMNS),
            strict=True,
        )
        for row, (
            response, backend_at, time_ns, latency_ns, status,
            client_addr, client_port, server_addr, server_port,
            dns_id, attempt, netns, cgroup_id, pid, comm,
            query, query_captured, response_len, response_captured, response_flags,
        ) in enumerate(columns):  # fmt: skip
            query = query[:query_captured]  # noqa: PLW2901 - what follows was never the query
            question = decode.question(query)
            if response_captured:
                message: bytes | None = response[:response_captured]
                rcode = decode.rcode(response[:response_captured], response_len)
                flags = decode.flags(response_flags)
            else:
                message = None
                rcode = _rcode_of_flags(response_flags) if response_flags else None
                flags = decode.flags(response_flags or int.from_bytes(query[2:4]))
            client_ip, server_ip = ip_text(client_addr), ip_text(server_addr)
            client = Client(
                client_ip,
                client_port,
                netns or None,
                cgroup_id or None,
                pid or None,
                comm_text(comm) if pid else None,
                *name_client(cgroup_id, netns, client_ip),
            )
            service = name_service(server_ip, server_port)
            backend = None
            # Before NAT, and once it is undone, a service's address says nothing of who is behind.
            if backend_at and not (service is not None and backend_at[2]):
                backend_ip = ip_text(backend_at[0])
                backend = Backend(backend_ip, backend_at[1], *name_pod(backend_ip))
            yield Transaction(
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
                client,
                Server(server_ip, server_port, service),
                backend,
                query,
                message,
                response_len if response_captured else None,
                functools.partial(self._make_hops, hops, row, client),
            )

    def _to_epoch_ns(self) -> int:
        """What turns CLOCK_MONOTONIC into time since 1970: the same until the clock is set."""
        now_ns = time.time_ns() - time.monotonic_ns()
        if abs(now_ns - self._epoch_ns) > _CLOCK_STEP_NS:
            self._epoch_ns = now_ns
        return self._epoch_ns

    def _make_hops(self, hops: _Hops, row: int, client: Client) -> tuple[Hop, ...]:
        flows, places = hops.of(row)
        asker = f"{client.namespace}/{client.pod}" if client.pod else None
        made = []
        previous = 0
        for t_ns, ifindex, netns, reason, kind, direction, number, _ in places:
            flow = flows[number]
            nat = None
            if number != previous:
                nat = _nat(flows[previous], flow)
                previous = number
            where = (netns, ifindex)
            named = hops.places.get(where)
            if named is None:
                named = hops.places[where] = self._names.place(netns, ifindex)
            ifname, owner = named
            if kind == Kind.DROP:  # in the namespace that the device is in, not at its other end
                owner = self._names.place(netns, 0)[1]
            if asker and kind == (Kind.RECEIVE if direction else Kind.SEND):
                owner = asker
            dropped = kind == Kind.DROP
            made.append(
                Hop(
                    _KIND_NAMES[kind],
                    _DIRECTIONS[direction],
                    t_ns,
                    ifindex or None,
                    ifname,
                    netns or None,
                    flow[1] if direction else flow[0],
                    flow[0] if direction else flow[1],
                    owner,
                    nat,
                    self._drop_reasons.get(reason, f"reason {reason}")
                    if dropped and reason
                    else None,
                    self._symbol(hops.drop_location(row)) if dropped else None,
                )
            )
        return tuple(made)


class _Hops:
    """The hops of a batch, converted all at once when the first of them is asked for."""

    def __init__(self, slots: NDArray[np.void]) -> None:
        self.places: dict[tuple[int, int], tuple[str | None, str | None]] = {}
        self._slots = slots
        self._hops: list[list[tuple[int, ...]]] | None = None
        self._flows: list[list[tuple[bytes, bytes, int, int, int]]] = []
        self._counts: list[int] = []

    def of(self, row: int) -> tuple[list[tuple[Address, Address]], list[tuple[int, ...]]]:
        """(client, server) of each flow, and the hops with times from the first one on."""
        if self._hops is None:
            slots = self._slots
            hops = slots["hops"][:, : max(1, int(slots["nhops"].max()))].copy()
            hops["t_ns"] -= np.minimum(slots["start_ns"][:, None], hops["t_ns"])
            self._hops = hops.tolist()
            self._flows = slots["flows"][:, : max(1, int(slots["nflows"].max()))].tolist()
            self._counts = slots["nhops"].tolist()
        flows = [
            ((ip_text(client), client_port), (ip_text(server), server_port))
            for client, server, client_port, server_port, _ in self._flows[row]
        ]
        return flows, self._hops[row][: self._counts[row]]

    def drop_location(self, row: int) -> int:
        """Kernel address of the last drop, 0 if there was none."""
        return int(self._slots["drop_location"][row])


@functools.lru_cache(maxsize=65536)
def ip_text(address: bytes) -> str:
    """16 bytes in presentation format; IPv4 where it is mapped into IPv6."""
    if address.startswith(_MAPPED_IPV4):
        return ".".join(map(str, address[12:]))
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
    return [
        end if is_known else None
        for end, is_known in zip(ends.tolist(), known.tolist(), strict=True)
    ]


def _statuses(slots: NDArray[np.void]) -> list[Status]:
    codes = slots["status"].tolist()
    last = np.maximum(slots["nhops"].astype(np.int64) - 1, 0)
    kinds = slots["hops"]["kind"][np.arange(len(slots)), last].tolist()
    return [
        "dropped" if kind == Kind.DROP and code != Code.ANSWERED else _STATUSES[code]
        for code, kind in zip(codes, kinds, strict=True)
    ]


def _backends(slots: NDArray[np.void]) -> list[tuple[bytes, int, bool] | None]:
    """Who answered, or was asked last: the server's address where its own packets were seen.

    At the client's sockets NAT is not done yet, or undone again, so these alone do not tell. Also
    says whether it is just the address that was asked, seen at no socket of the server.
    """
    rows = np.arange(len(slots))
    hops, flows = slots["hops"], slots["flows"]
    kinds = hops["kind"]
    places = np.arange(hops.shape[1])
    there = places < slots["nhops"][:, None]
    response = there & (hops["direction"] == 1)
    query = there & (hops["direction"] == 0)

    first_response = np.argmax(response, axis=1)
    response_kind = kinds[rows, first_response]
    response_flow = flows[rows, hops["flow"][rows, first_response]]
    answered = response.any(axis=1) & (response_kind != Kind.RECEIVE)
    # A response that is seen only after NAT was undone tells less than the query may have.
    telling = ~_same_server(response_flow, flows[:, 0]) | (response_kind == Kind.SEND)

    last_query = hops.shape[1] - 1 - np.argmax(query[:, ::-1], axis=1)
    query_kind = kinds[rows, last_query]
    query_flow = hops["flow"][rows, last_query]
    arrived = (
        (query_kind == Kind.EGRESS) | (query_kind == Kind.RECEIVE) | (query_flow != 0)
    ) & query.any(axis=1)

    by_response = answered & (telling | ~arrived)
    flow = np.where(by_response, response_flow, flows[rows, query_flow])
    at_socket = np.where(by_response, response_kind == Kind.SEND, query_kind == Kind.RECEIVE)
    as_asked = _same_server(flow, flows[:, 0]) & ~at_socket
    return [
        (address, port, is_as_asked) if is_known else None
        for address, port, is_as_asked, is_known in zip(
            flow["server_addr"].tolist(),
            flow["server_port"].tolist(),
            as_asked.tolist(),
            (answered | arrived).tolist(),
            strict=True,
        )
    ]


def _same_server(flows: NDArray[np.void], others: NDArray[np.void]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (flows["server_addr"] == others["server_addr"]) & (
        flows["server_port"] == others["server_port"]
    )
    return same


def _nat(before: tuple[Address, Address], after: tuple[Address, Address]) -> Nat:
    """What changed between two hops, in client and server."""
    return Nat(
        dnat=(before[1], after[1]) if before[1] != after[1] else None,
        snat=(before[0], after[0]) if before[0] != after[0] else None,
    )


@functools.lru_cache(maxsize=16)
def _rcode_of_flags(flags16: int) -> str | None:
    return decode.rcode(bytes(2) + flags16.to_bytes(2), 4)
