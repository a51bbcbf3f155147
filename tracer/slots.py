# SPDX-License-Identifier: Apache-2.0
"""What transactions tell by themselves, as the kernel sends them: a column at a time, no names yet.

`slots` have the fields of TRANSACTION, a row each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tracer.record import HopKind as Kind
from tracer.record import Status as Code
from tracer.transaction import Served, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_STATUSES: dict[int, Status] = {
    Code.OPEN: "timeout",
    Code.ANSWERED: "answered",
    Code.TIMEOUT: "timeout",
    Code.REFUSED: "refused",
}


def slots_of(records: NDArray[np.void]) -> NDArray[np.void]:
    """The transactions of records, which are slots and what came with them; of bare slots, these."""
    return records["transaction"] if "transaction" in (records.dtype.names or ()) else records


def latencies(slots: NDArray[np.void]) -> list[int | None]:
    """From the client's send to its receive, None where either was not seen."""
    known = (slots["end_ns"] != 0) & (slots["hops"]["kind"][:, 0] == Kind.SEND)
    ends = slots["end_ns"].astype(np.int64) - slots["start_ns"].astype(np.int64)
    if known.all():
        return list(ends.tolist())
    return [
        end if is_known else None
        for end, is_known in zip(ends.tolist(), known.tolist(), strict=True)
    ]


def no_socket(drop_reasons: Mapping[int, str]) -> int:
    """The kernel's number for "nothing listens there"; -1: it tells no reasons (before 5.17)."""
    return next((n for n, reason in drop_reasons.items() if reason == "NO_SOCKET"), -1)


def statuses(slots: NDArray[np.void], no_socket: int) -> list[Status]:
    """What became of each. `no_socket`: see above.

    Where nothing listens in the client's own network namespace, it hears so over the loopback,
    which passes no device that is watched.
    """
    codes = slots["status"].tolist()
    at = np.maximum(slots["nhops"].astype(np.int64) - 1, 0)
    last = slots["hops"][np.arange(len(slots)), at]
    dropped = (last["kind"] == Kind.DROP) & (slots["status"] != Code.ANSWERED)
    told = dropped & (last["drop_reason"].astype(np.int64) == no_socket)
    told &= (last["netns"] == slots["netns"]) & (last["direction"] == 0)
    return [
        "refused" if is_told else "dropped" if is_dropped else _STATUSES[code]
        for code, is_dropped, is_told in zip(codes, dropped.tolist(), told.tolist(), strict=True)
    ]


def served_at(slots: NDArray[np.void], to_epoch_ns: int) -> list[Served | None]:
    """Where the query reached the socket of its server, and the answer left it."""
    hops = slots["hops"]
    rows, places = np.arange(len(slots)), np.arange(hops.shape[1])
    there = places < slots["nhops"][:, None]
    received = there & (hops["direction"] == 0) & (hops["kind"] == Kind.RECEIVE)
    if not received.any():
        return [None] * len(slots)
    answered = there & (hops["direction"] == 1) & (hops["kind"] == Kind.SEND)
    first, last = np.argmax(received, axis=1), np.argmax(answered, axis=1)
    return [
        Served(netns or None, cgroup_id or None, start + to_epoch_ns, end + to_epoch_ns if was else None)
        if is_
        else None
        for is_, was, netns, cgroup_id, start, end in zip(
            received.any(axis=1).tolist(),
            answered.any(axis=1).tolist(),
            hops["netns"][rows, first].tolist(),
            slots["server_cgroup_id"].tolist(),
            hops["t_ns"][rows, first].tolist(),
            hops["t_ns"][rows, last].tolist(),
            strict=True,
        )
    ]  # fmt: skip


def backends(slots: NDArray[np.void]) -> list[tuple[bytes, int, bool] | None]:
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

    # Where the query has reached a socket, that is who; the answer may leave with NAT undone already.
    by_response = answered & (telling | ~arrived) & ~(arrived & (query_kind == Kind.RECEIVE))
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
