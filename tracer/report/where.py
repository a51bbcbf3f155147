# SPDX-License-Identifier: Apache-2.0
"""The user's filters as conditions of SQL, for each of the tables that can tell."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracer import decode
from tracer.decode.words import is_counted
from tracer.filters import COMM_LEN_MAX, duration_ns, ip_named

if TYPE_CHECKING:
    from tracer.filters import Filters

# A set as in fnmatch, where a bracket that comes first is in it; or what means something to DuckDB alone.
_SET_OR_SPECIAL = re.compile(r"\[!?+.[^]]*\]|[\\\[]", re.DOTALL)
_FAILED = "(status <> 'answered' OR coalesce(rcode, 'NOERROR') <> 'NOERROR')"


class NotRecorded(ValueError):
    """A filter asks for what recordings do not have."""


@dataclass(slots=True)
class Where:
    """A condition and its parameters. `possible`: whether that table can tell at all."""

    conditions: list[str] = field(default_factory=list)
    parameters: list[object] = field(default_factory=list)
    possible: bool = True

    def add(self, condition: str, *parameters: object) -> None:
        """One more that must hold."""
        self.conditions.append(condition)
        self.parameters += parameters

    @property
    def sql(self) -> str:
        """Always a condition."""
        return " AND ".join(self.conditions) or "true"


def leaves_out_servers(filters: Filters) -> bool:
    """Whether what DNS servers ask is none of the user's business.

    It is for their clients' sake, and in their clients' time already. Who asks for pods, processes
    or what servers see gets all that these do.
    """
    asks = filters.namespaces or filters.pods or filters.container or filters.comm
    return not asks and filters.pid is None and filters.side == "client"


def of_clients(where: Where) -> Where:
    """The same, without what DNS servers ask."""
    conditions = [*where.conditions, "NOT coalesce(by_server, false)"]
    return Where(conditions, list(where.parameters), where.possible)


def of_transactions(filters: Filters) -> Where:
    """For the table `transactions`."""
    where = Where()
    side = "backend" if filters.side == "server" else "client"
    _pods(where, filters, f"{side}.namespace", f"{side}.pod", "client.container")
    _questions(where, filters, "server.ip", "backend.ip", "backend.namespace", "backend.pod")
    if filters.pid is not None:
        where.add("client.pid = ?", filters.pid)
    if filters.comm is not None:
        pattern = filters.comm
        if not re.search(r"[*?\[]", pattern):
            pattern = pattern[:COMM_LEN_MAX]
        where.add("client.comm GLOB ?", _glob(pattern))
    if filters.name is not None:
        lower = filters.name.lower()
        where.add("rtrim(lower(name), '.') GLOB ?", _glob(lower.rstrip(".") or lower))
    if filters.slower is not None:
        where.add(
            "CASE WHEN latency_ns IS NULL THEN status IN ('timeout', 'dropped') "
            "ELSE latency_ns >= ? END",
            duration_ns(filters.slower),
        )
    return where


def of_histograms(filters: Filters, *, of_stages: bool) -> Where:
    """For the rows of `histograms` that count whole transactions, or stages."""
    where = Where()
    side = "backend" if filters.side == "server" else "client"
    _pods(where, filters, f"{side}_namespace", f"{side}_pod", "client_container")
    _questions(where, filters, "server_ip", "backend_ip", "backend_namespace", "backend_pod")
    beyond = (filters.pid, filters.comm, filters.name, filters.slower)
    where.possible = all(value is None for value in beyond)
    if filters.type is not None:
        # The others are counted together.
        where.possible &= is_counted(decode.type_named(filters.type))
    if of_stages:
        untold = (filters.type, filters.rcode, filters.server)
        where.possible &= not filters.failed and all(value is None for value in untold)
    return where


def _pods(where: Where, filters: Filters, namespace: str, pod: str, container: str) -> None:
    if filters.selector is not None:
        raise NotRecorded(
            "recordings do not have the pods' labels: --selector is for live windows alone"
        )
    if filters.namespaces:
        where.add(f"{namespace} IN (SELECT unnest(?))", list(filters.namespaces))
    if filters.pods:
        parts = []
        for glob in filters.pods:
            what = f"{namespace} || '/' || {pod}" if "/" in glob else pod
            parts.append(f"{what} GLOB ?")
            where.parameters.append(_glob(glob))
        where.conditions.append(f"({' OR '.join(parts)})")
    if filters.container is not None:
        where.add(f"{container} GLOB ?", _glob(filters.container))


def _questions(
    where: Where, filters: Filters, server: str, backend: str, namespace: str, pod: str
) -> None:
    if filters.type is not None:
        where.add("type = ?", decode.type_named(filters.type))
    if filters.rcode is not None:
        where.add("rcode = ?", decode.rcode_named(filters.rcode))
    if filters.failed:
        where.add(_FAILED)
    if filters.server is not None:
        where.add(f"{server} = ?", ip_named("--server", filters.server))
    if filters.backend is not None:
        try:
            where.add(f"{backend} = ?", ip_named("--backend", filters.backend))
        except ValueError:
            what = f"{namespace} || '/' || {pod}" if "/" in filters.backend else pod
            where.add(f"{what} GLOB ?", _glob(filters.backend))


def _glob(pattern: str) -> str:
    """As DuckDB wants it, which takes a backslash for an escape, and a bracket for an open set."""
    return _SET_OR_SPECIAL.sub(lambda m: m[0] if len(m[0]) > 1 else f"\\{m[0]}", pattern)
