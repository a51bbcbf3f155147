# SPDX-License-Identifier: Apache-2.0
"""A query of our own over the loopback, to see that what is attached also sees."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from tracer.kernel.session import Selection
from tracer.record import HopKind, Status

if TYPE_CHECKING:
    import numpy as np

    from tracer.kernel.session import Session

_WITHIN_S = 2.0
_ID = 0x646E
_QUERY = struct.pack("!6H", _ID, 0x0100, 1, 0, 0, 0) + b"\x08dnstrace\x04test\0\0\1\0\1"
_RESPONSE = struct.pack("!2H", _ID, 0x8183) + _QUERY[4:]  # NXDOMAIN


class Seen(NamedTuple):
    """What the programs told of it."""

    hops: list[HopKind]
    latency_ns: int
    pid: int


EXPECTED = [HopKind.SEND, HopKind.RECEIVE, HopKind.SEND, HopKind.RECEIVE]


def ask_ourselves(session: Session, family: socket.AddressFamily) -> Seen | None:
    """Sends a query to a socket of ours, which answers. None: nothing was seen of it.

    The session traces only that from now on. Raises OSError where there is no loopback.
    """
    with (
        socket.socket(family, socket.SOCK_DGRAM) as server,
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        for one in (server, client):
            one.settimeout(_WITHIN_S)
        session.select(Selection(ports=(server.getsockname()[1],)))
        client.sendto(_QUERY, server.getsockname())
        _, asker = server.recvfrom(len(_QUERY))
        server.sendto(_RESPONSE, asker)
        client.recv(len(_RESPONSE))
    deadline = time.monotonic() + _WITHIN_S
    while time.monotonic() < deadline:
        for batch in session.read():
            for record in batch["transaction"]:
                if record["dns_id"] == _ID and record["status"] == Status.ANSWERED:
                    return _seen(record)
        time.sleep(0.01)
    return None


def _seen(record: np.void) -> Seen:
    hops = [HopKind(int(hop["kind"])) for hop in record["hops"][: record["nhops"]]]
    return Seen(hops, int(record["end_ns"] - record["start_ns"]), int(record["pid"]))
