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
from tracer.slots import backends, latencies, no_socket, served_at, slots_of, statuses
from tracer.transaction import (
    Address,
    Backend,
    Client,
    Direction,
    Hop,
    HopKind,
    Nat,
    Server,
    Transaction,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

_COLUMNS = (
    "dns_id", "attempt", "netns", "cgroup_id", "server_cgroup_id", "pid", "comm",
    "query", "query_captured", "response_len", "response_captured", "response_flags", "protocol",
)  # fmt: skip
_KIND_NAMES: dict[int, HopKind] = {
    Kind.SEND: "send",
    Kind.INGRESS: "ingress",
    Kind.EGRESS: "egress",
    Kind.RECEIVE: "receive",
    Kind.DROP: "drop",
}
_DIRECTIONS: tuple[Direction, Direction] = ("query", "response")
_CLOCK_READINGS = 20
_CLOCK_STEP_NS = 10_000_000
_TCP = 6
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"


class Names(Protocol):
    """Who is who, as far as it is known. Addresses are in presentation format."""

    def client(
        self, cgroup_id: int, netns: int, ip: str
    ) -> tuple[str | None, str | None, str | None, str | None]:
        """(namespace, pod, container, node) of a process; 0 is unknown."""

    def service(self, ip: str, port: int) -> str | None:
        """ "namespace/name" of the service whose address it is."""

    def server(self, cgroup_id: int, ip: str) -> tuple[str | None, str | None]:
        """(namespace, name) of the pod that answers, by its socket's cgroup if that is known."""

    def role(self, ip: str) -> str | None:
        """What kind of server has the address."""

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
        self._no_socket = no_socket(drop_reasons)
        self._symbol = symbol
        self._epoch_ns = 0

    def assemble(self, batch: NDArray[np.void]) -> Iterator[Transaction]:
        """The transactions of a batch of records, or of bare slots that were never answered.

        Records may have a third field, `problem`: a string, empty if there is none.
        """
        responses: Iterable[bytes] = itertools.repeat(b"", len(batch))
        problems: Iterable[str] = itertools.repeat("", len(batch))
        slots = slots_of(batch)
        if batch.dtype.names and "response" in batch.dtype.names:
            responses = batch["response"].tolist()
            if "problem" in batch.dtype.names:
                problems = batch["problem"].tolist()
        to_epoch_ns = self._to_epoch_ns()
        first_flow = slots["flows"][:, 0]
        hops = _Hops(slots)
        names = self._names
        name_client, name_service, name_server = names.client, names.service, names.server
        columns = zip(
            responses,
            problems,
            served_at(slots, to_epoch_ns),
            backends(slots),
            (slots["start_ns"].astype(np.int64) + to_epoch_ns).tolist(),
            latencies(slots),
            statuses(slots, self._no_socket),
            first_flow["client_addr"].tolist(),
            first_flow["client_port"].tolist(),
            first_flow["server_addr"].tolist(),
            first_flow["server_port"].tolist(),
            *(slots[name].tolist() for name in _COLUMNS),
            strict=True,
        )
        for row, (
            response, problem, served, backend_at, time_ns, latency_ns, status,
            client_addr, client_port, server_addr, server_port,
            dns_id, attempt, netns, cgroup_id, server_cgroup_id, pid, comm,
            query, query_captured, response_len, response_captured, response_flags, protocol,
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
                backend = Backend(
                    backend_ip, backend_at[1], *name_server(server_cgroup_id, backend_ip)
                )
            yield Transaction(
                time_ns,
                status,
                dns_id if query else None,
                "tcp" if protocol == _TCP else "udp",
                question.name,
                question.type,
                rcode,
                flags,
                latency_ns,
                attempt,
                client,
                Server(server_ip, server_port, service, names.role(server_ip)),
                backend,
                query,
                message,
                response_len if response_captured else None,
                functools.partial(self._make_hops, hops, row, client, backend),
                served,
                problem or None,
                () if served else None,
            )

    def _to_epoch_ns(self) -> int:
        """What turns CLOCK_MONOTONIC into time since 1970: the same until the clock is set."""
        now_ns = time.time_ns() - time.monotonic_ns()
        if abs(now_ns - self._epoch_ns) > _CLOCK_STEP_NS:
            self._epoch_ns = _epoch_ns()
        return self._epoch_ns

    def _make_hops(
        self, hops: _Hops, row: int, client: Client, backend: Backend | None
    ) -> tuple[Hop, ...]:
        flows, places = hops.of(row)
        asker = f"{client.namespace}/{client.pod}" if client.pod else None
        server = f"{backend.namespace}/{backend.pod}" if backend and backend.pod else None
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
            if kind == (Kind.RECEIVE if direction else Kind.SEND):
                owner = asker or owner
            elif kind == (Kind.SEND if direction else Kind.RECEIVE):
                owner = server or owner
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


def _epoch_ns() -> int:
    """When CLOCK_MONOTONIC was 0, since 1970: by the pair of readings with least between them."""
    found = []
    for _ in range(_CLOCK_READINGS):
        before_ns = time.monotonic_ns()
        now_ns = time.time_ns()
        after_ns = time.monotonic_ns()
        found.append((after_ns - before_ns, now_ns - (before_ns + after_ns) // 2))
    return min(found)[1]


def apart(t: Transaction) -> Transaction:
    """The same, to be kept for longer: it no longer holds what else came with it."""
    make = t.make_hops
    if not isinstance(make, functools.partial):
        return t
    hops, row, *who = make.args
    return t._replace(make_hops=functools.partial(make.func, hops.only(row), 0, *who))


class _Hops:
    """The hops of a batch, converted all at once when the first of them is asked for."""

    def __init__(self, slots: NDArray[np.void]) -> None:
        self.places: dict[tuple[int, int], tuple[str | None, str | None]] = {}
        self._slots = slots
        self._hops: list[list[tuple[int, ...]]] | None = None
        self._flows: list[list[tuple[bytes, bytes, int, int, int]]] = []
        self._counts: list[int] = []

    def only(self, row: int) -> _Hops:
        """Those of one row, copied."""
        return _Hops(self._slots[row : row + 1].copy())

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


@functools.lru_cache(maxsize=8192)
def ip_text(address: bytes) -> str:
    """16 bytes in presentation format; IPv4 where it is mapped into IPv6."""
    if address.startswith(_MAPPED_IPV4):
        return ".".join(map(str, address[12:]))
    return str(ipaddress.IPv6Address(address))


@functools.lru_cache(maxsize=4096)
def comm_text(comm: bytes) -> str:
    """A task's name; the kernel lets it be any bytes."""
    return comm.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _nat(before: tuple[Address, Address], after: tuple[Address, Address]) -> Nat:
    """What changed between two hops, in client and server."""
    return Nat(
        dnat=(before[1], after[1]) if before[1] != after[1] else None,
        snat=(before[0], after[0]) if before[0] != after[0] else None,
    )


@functools.lru_cache(maxsize=16)
def _rcode_of_flags(flags16: int) -> str | None:
    return decode.rcode(bytes(2) + flags16.to_bytes(2), 4)
