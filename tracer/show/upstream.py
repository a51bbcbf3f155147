# SPDX-License-Identifier: Apache-2.0
"""What a server asked itself to answer a query, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.show.cells import address, duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.transaction import Server, Transaction

_SHOWN = 3
_SLOW_NS = 100_000_000
_FAILED = {"SERVFAIL", "REFUSED", "FORMERR", "NOTIMP"}
_ROLES = {
    "node-cache": "NodeLocal DNSCache",
    "stub": "a stub resolver",
    "upstream": "an upstream resolver",
}


def role(server: Server) -> str | None:
    """What a server is that no service stands for."""
    return _ROLES.get(server.role or "") if server.service is None else None


def in_short(t: Transaction) -> str | None:
    """Who kept the server waiting, or failed it; None if nobody did."""
    told = list(_told(t))
    if not told:
        return None
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    unsure = ""
    if t.upstream_unsure:
        unsure = f" ({t.upstream_unsure} more may be for this one, or for another client)"
    return f"because of upstream {', '.join(told[:_SHOWN])}{more}{unsure}"


def longest_wait(t: Transaction) -> str | None:
    """Whom the server waited for most of the time, if it waited for somebody."""
    served = t.served
    if not t.upstream or served is None or served.answered_ns is None:
        return None
    whole_ns = served.answered_ns - served.received_ns
    longest = max(t.upstream, key=lambda query: query.latency_ns or whole_ns)
    wait_ns = longest.latency_ns
    if wait_ns is None:
        return f"which waited for {_server(longest)} in vain"
    if 2 * wait_ns < whole_ns:
        return None
    return f"which waited {duration(wait_ns)} for {_server(longest)}"


def unsure(t: Transaction) -> str | None:
    """That there is more, which may be another's."""
    if not t.upstream_unsure:
        return None
    queries = "query" if t.upstream_unsure == 1 else "queries"
    return (
        f"{t.upstream_unsure} more {queries} of its server may be because of this one, or because "
        "of others that asked the same meanwhile"
    )


def _told(t: Transaction) -> Iterator[str]:
    for query in t.upstream or ():
        if query.status != "answered":
            yield f"{_server(query)}: {query.status}"
        elif query.rcode in _FAILED:
            yield f"{_server(query)}: {query.rcode}"
        elif query.latency_ns is not None and query.latency_ns >= _SLOW_NS:
            yield f"{_server(query)}: {duration(query.latency_ns)}"
        yield from _told(query)


def _server(t: Transaction) -> str:
    if t.server.service is not None:
        return t.server.service
    return t.server.ip if t.server.port == 53 else address(t.server.ip, t.server.port)
