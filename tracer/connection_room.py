# SPDX-License-Identifier: Apache-2.0
"""Has the kernel forget TCP connections that are over, or that we do not know of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.record import Counter

if TYPE_CHECKING:
    from tracer.connections import Connections
    from tracer.kernel.session import Session

_UNKNOWN_NS = 10_000_000_000  # after which we will not hear of a connection any more


class ConnectionRoom:
    """To be called now and then."""

    def __init__(self, session: Session, connections: Connections) -> None:
        self._session = session
        self._connections = connections
        self._segments_lost = 0
        self._unknown_since_ns = 0  # there may be connections since then that we do not know of

    def __call__(self, now_ns: int) -> None:
        """Makes room. `now_ns` is CLOCK_MONOTONIC."""
        connections = self._connections
        self._session.forget_connections(connections.over)
        connections.over.clear()
        counters = self._session.counters()
        lost = counters[Counter.SEGMENTS_LOST] + counters[Counter.PREEMPTED]
        if lost > self._segments_lost:
            connections.records_lost(now_ns)
            self._segments_lost = lost
            self._unknown_since_ns = now_ns
        elif self._unknown_since_ns and now_ns - self._unknown_since_ns > _UNKNOWN_NS:
            self._session.forget_unknown_connections(connections, self._unknown_since_ns)
            self._unknown_since_ns = 0
