# SPDX-License-Identifier: Apache-2.0
"""Makes a report of recordings: every question to the database is here."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.decode.words import printable
from tracer.report import where
from tracer.report.distributions import distributions, heat_of
from tracer.report.figures import Coverage, Failure, Group, Heat, Report, Times
from tracer.report.recordings import RecordingError, Recordings, leave_out_damaged, load
from tracer.stages import PARTS, STAGE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

    from tracer.filters import Filters
    from tracer.report.where import Where

__all__ = ["RecordingError", "make"]

TOP = 10
HEAT_COLUMNS = 120
_GAP = timedelta(seconds=2)
_GAPS_MAX = 20
_LOGGED = f"""
    CASE WHEN ns < {PARTS} THEN ns
    ELSE (ns >> (CAST(floor(log2(ns)) AS INTEGER) - 4)) << (CAST(floor(log2(ns)) AS INTEGER) - 4)
    END"""
_WIDTH = f"""
    CASE WHEN ns < {PARTS} THEN 1 ELSE CAST(1 AS BIGINT) << (CAST(floor(log2(ns)) AS INTEGER) - 4) END"""
_POD = "{0}_namespace || '/' || {0}_pod"
_FAILED = "(status <> 'answered' OR coalesce(rcode, 'NOERROR') NOT IN ('NOERROR', 'NXDOMAIN'))"
# Names of groups: of histograms' rows, and of transactions'.
_GROUPS = {
    "pod": (_POD.format("client"), "client.namespace || '/' || client.pod"),
    "server": ("coalesce(service, server_ip)", "coalesce(server.service, server.ip)"),
    "backend": (
        f"coalesce({_POD.format('backend')}, backend_ip)",
        "coalesce(backend.namespace || '/' || backend.pod, backend.ip)",
    ),
    "type": ("type", "type"),
    "rcode": ("rcode", "rcode"),
}


def make(paths: Sequence[Path], filters: Filters) -> Report:
    """Reads recordings: files, or directories of them. Raises RecordingError, NotRecorded."""
    import duckdb

    kept = where.of_transactions(filters)
    whole = where.of_histograms(filters, of_stages=False)
    parts = where.of_histograms(filters, of_stages=True)
    clients_alone = where.leaves_out_servers(filters)
    with tempfile.TemporaryDirectory(prefix="dnstrace-report-") as scratch:
        found = load(paths, Path(scratch))
        try:
            try:
                return _Maker(found, filters, kept, whole, parts, clients_alone).report()
            except duckdb.Error as error:
                if not leave_out_damaged(found):
                    raise RecordingError(f"cannot be read: {str(error)[:200]}") from error
            try:
                return _Maker(found, filters, kept, whole, parts, clients_alone).report()
            except duckdb.Error as error:
                raise RecordingError(f"cannot be read: {str(error)[:200]}") from error
        finally:
            found.close()


class _Maker:
    def __init__(
        self,
        found: Recordings,
        filters: Filters,
        kept: Where,
        whole: Where,
        parts: Where,
        clients_alone: bool,
    ) -> None:
        self._found = found
        self._filters = filters
        self._kept = kept
        self._whole = whole
        self._parts = parts
        # Where nothing was asked, there are no histograms of it.
        ((asked,),) = found.rows("SELECT sum(transactions) FROM coverage")
        has_counts = bool(found.files["histograms"]) or asked == 0
        self._counted = has_counts and whole.possible
        self._stages_counted = has_counts and parts.possible
        self._by_servers = 0
        if clients_alone:
            self._by_servers = self._count_where("by_server")
            self._kept, self._whole, self._parts = map(where.of_clients, (kept, whole, parts))

    def report(self) -> Report:
        start, end = self._window()
        totals = self._totals("status") if self._counted else self._kept_totals("status")
        total = self._times(None).get(None, Times())
        statuses = {str(name): count for name, (count, *_) in totals.items()}
        coverage = self._coverage()
        return Report(
            start,
            end,
            [row[0] for row in self._found.rows(_NODES)],
            self._filters.spelled(),
            [] if statuses else [row[0] for row in self._found.rows(_NAMESPACES)],
            self._counted,
            self._stages_counted,
            sum(statuses.values()),
            self._by_servers,
            self._count_where("NOT coalesce(client_seen, true)"),
            statuses,
            total,
            self._stages(),
            {name: self._groups(name) for name in _GROUPS}
            | {"name": self._names(has_each=coverage.has_each)},
            self._slowest(),
            self._failures(),
            self._heat(start, end),
            coverage,
        )

    def _count_where(self, condition: str) -> int:
        """Transactions of which that is true as well."""
        if self._counted:
            ((number,),) = self._found.rows(
                f"SELECT sum(count) FROM histograms WHERE stage = 'total' AND {condition} "
                f"AND {self._whole.sql}",
                self._whole.parameters,
            )
        else:
            ((number,),) = self._found.rows(
                f"SELECT sum(weight) FROM transactions WHERE {condition} AND {self._kept.sql}",
                self._kept.parameters,
            )
        return int(number or 0)

    def _window(self) -> tuple[datetime | None, datetime | None]:
        ((start, end),) = self._found.rows(
            "SELECT min(a), max(b) FROM (SELECT min(time_start) a, max(time_end) b FROM coverage "
            "UNION ALL SELECT min(time), max(time) FROM transactions "
            "UNION ALL SELECT min(time_start), max(time_end) FROM histograms)"
        )
        return start, end

    def _totals(self, by: str) -> dict[str | None, tuple[int, int]]:
        """(count, failed) of each."""
        rows = self._found.rows(
            f"SELECT {by}, sum(count), sum(count) FILTER ({_FAILED}) FROM histograms "
            f"WHERE stage = 'total' AND {self._whole.sql} GROUP BY 1",
            self._whole.parameters,
        )
        return {name: (int(count), int(failed or 0)) for name, count, failed in rows}

    def _kept_totals(self, by: str) -> dict[str | None, tuple[int, int, int]]:
        """(count, failed, how many that is estimated from) of each."""
        rows = self._found.rows(
            f"SELECT {by}, sum(weight), sum(weight) FILTER ({_FAILED}), count(*) FROM transactions "
            f"WHERE {self._kept.sql} GROUP BY 1",
            self._kept.parameters,
        )
        return {
            name: (int(count), int(failed or 0), recorded) for name, count, failed, recorded in rows
        }

    def _times(self, group: str | None) -> dict[str | None, Times]:
        """The client's latency, by group, or of all under None."""
        if self._counted:
            name = "NULL" if group is None else _GROUPS[group][0]
            condition = f"stage = 'total' AND {self._whole.sql}"
            return self._from_counts(name, condition, self._whole.parameters)
        name = "NULL" if group is None else _GROUPS[group][1]
        return self._from_kept(name, "latency_ns", self._kept.sql, self._kept.parameters)

    def _stages(self) -> dict[str, Times]:
        found: dict[str | None, Times] = {}
        if self._stages_counted:
            condition = f"stage <> 'total' AND {self._parts.sql}"
            found = self._from_counts("stage", condition, self._parts.parameters)
        else:
            for name in STAGE_NAMES:
                times = self._from_kept(
                    "NULL", f'stages."{name}"', self._kept.sql, self._kept.parameters
                )
                if None in times:
                    found[name] = times[None]
        return {name: found[name] for name in STAGE_NAMES if name in found}

    def _from_counts(
        self, name: str, condition: str, parameters: Sequence[object]
    ) -> dict[str | None, Times]:
        sums = self._found.rows(
            f"SELECT {name} AS g, sum(sum_ns), max(max_ns) FROM histograms "
            f"WHERE (timed > 0 OR sum_ns > 0) AND {condition} GROUP BY g",
            parameters,
        )
        buckets = self._found.rows(
            f"SELECT g, b.lower_ns, b.upper_ns, sum(b.count) FROM (SELECT {name} AS g, "
            f"unnest(buckets) AS b FROM histograms WHERE {condition}) GROUP BY ALL",
            parameters,
        )
        return distributions(sums, buckets)

    def _from_kept(
        self, name: str, value: str, condition: str, parameters: Sequence[object]
    ) -> dict[str | None, Times]:
        source = (
            f"(SELECT {name} AS g, {value} AS ns, weight FROM transactions "
            f"WHERE status = 'answered' AND {value} IS NOT NULL AND {condition})"
        )
        sums = self._found.rows(
            f"SELECT g, sum(ns * weight), max(ns), count(*) FROM {source} GROUP BY g", parameters
        )
        buckets = self._found.rows(
            f"SELECT g, {_LOGGED} AS low, {_LOGGED} + {_WIDTH} AS high, sum(weight) "
            f"FROM {source} GROUP BY ALL",
            parameters,
        )
        return distributions(sums, buckets)

    def _groups(self, group: str) -> list[Group]:
        by_count, by_kept = _GROUPS[group]
        totals = self._totals(by_count) if self._counted else self._kept_totals(by_kept)
        times = self._times(group)
        return _top(
            Group(
                name,
                count,
                failed,
                times.get(name, Times()),
                recorded[0] if recorded else None,
                is_estimated=any(one != count for one in recorded),
            )
            for name, (count, failed, *recorded) in totals.items()
        )

    def _names(self, *, has_each: bool) -> list[Group]:
        """Names are in transactions alone."""
        rows = self._found.rows(
            f"SELECT name, sum(weight) AS n, sum(weight) FILTER ({_FAILED}), count(*) "
            f"FROM transactions WHERE {self._kept.sql} GROUP BY name ORDER BY n DESC, name "
            f"LIMIT {TOP}",
            self._kept.parameters,
        )
        names = [row[0] for row in rows]
        times = self._from_kept(
            "name",
            "latency_ns",
            f"{self._kept.sql} AND list_contains(?, name)",
            [*self._kept.parameters, [name for name in names if name is not None]],
        )
        return [
            Group(
                name,
                int(count),
                int(failed or 0),
                times.get(name, Times()),
                recorded,
                # Of what is not failed or slow, some others may not have been recorded.
                is_estimated=recorded != count or (not has_each and recorded > int(failed or 0)),
            )
            for name, count, failed, recorded in rows
        ]

    def _slowest(self) -> list[dict[str, Any]]:
        columns = (
            "node", "time", "time_ns", "status", "id", "protocol", "name", "type", "rcode",
            "latency_ns", "client", "server", "backend", "hops", "stages",
        )  # fmt: skip
        rows = self._found.rows(
            f"SELECT {', '.join(columns)} FROM transactions WHERE time_ns IN (SELECT time_ns FROM "
            f"transactions WHERE latency_ns IS NOT NULL AND {self._kept.sql} "
            f"ORDER BY latency_ns DESC LIMIT {TOP}) AND latency_ns IS NOT NULL "
            f"AND {self._kept.sql} ORDER BY latency_ns DESC LIMIT {TOP}",
            [*self._kept.parameters, *self._kept.parameters],
        )
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _failures(self) -> list[Failure]:
        rows = self._found.rows(
            "SELECT sum(weight) AS n, client.namespace || '/' || client.pod, name, status, rcode, "
            "hops[-1].reason, coalesce(hops[-1].owner, hops[-1].ifname) AS place FROM transactions "
            f"WHERE {_FAILED} AND {self._kept.sql} GROUP BY ALL ORDER BY n DESC, 2, 3, 4 LIMIT {TOP}",
            self._kept.parameters,
        )
        return [
            Failure(
                int(n), client, name, status, rcode, reason, place if status == "dropped" else None
            )
            for n, client, name, status, rcode, reason, place in rows
        ]

    def _heat(self, start: datetime | None, end: datetime | None) -> Heat:
        if start is None or end is None or end <= start:
            return Heat()
        seconds = max(1.0, (end - start).total_seconds() / HEAT_COLUMNS)
        if self._counted:
            source = (
                "(SELECT time_end AS t, unnest(buckets) AS b FROM histograms "
                f"WHERE stage = 'total' AND {self._whole.sql})"
            )
            value, number, parameters = "b.lower_ns", "b.count", self._whole.parameters
        else:
            source = (
                "(SELECT time AS t, latency_ns, weight FROM transactions "
                f"WHERE latency_ns IS NOT NULL AND {self._kept.sql})"
            )
            value, number, parameters = "latency_ns", "weight", self._kept.parameters
        rows = self._found.rows(
            f"SELECT CAST(greatest(0, least({HEAT_COLUMNS}, floor((epoch(t) - ?) / ?))) AS INTEGER), "
            f"CAST(floor(2 * log2(greatest({value}, 1))) AS INTEGER), sum({number}) "
            f"FROM {source} GROUP BY ALL",
            [start.timestamp(), seconds, *parameters],
        )
        return heat_of(rows, start, seconds)

    def _coverage(self) -> Coverage:
        found = self._found
        ((transactions, not_kept, skipped),) = found.rows(
            "SELECT sum(transactions), sum(not_kept), sum(skipped) FROM coverage"
        )
        ((known,),) = found.rows("SELECT count(*) FROM transactions")
        lost = found.rows(
            "SELECT e.key, sum(e.value) AS n FROM (SELECT unnest(map_entries(lost)) AS e "
            "FROM coverage) GROUP BY 1 HAVING n > 0 ORDER BY 1"
        )
        unmatched = found.rows(
            "SELECT e.key, sum(e.value) AS n FROM (SELECT unnest(map_entries(unmatched)) AS e "
            "FROM coverage) GROUP BY 1 HAVING n > 0 ORDER BY 1"
        )
        gaps = found.rows(
            "SELECT node, before, time_start FROM (SELECT node, time_start, "
            "lag(time_end) OVER (PARTITION BY node ORDER BY time_start) AS before FROM coverage) "
            f"WHERE time_start - before > INTERVAL {_GAP.total_seconds()} SECOND "
            "ORDER BY node, time_start"
        )
        problems = found.rows(
            "SELECT DISTINCT problem FROM coverage WHERE problem IS NOT NULL ORDER BY 1 LIMIT 5"
        )
        return Coverage(
            int(transactions or 0),
            known,
            int(not_kept or 0),
            int(skipped or 0),
            {name: int(n) for name, n in lost},
            {name: int(n) for name, n in unmatched},
            self._gaps(gaps),
            [problem for (problem,) in problems],
            [(printable(str(path)), why) for path, why in found.unreadable],
            sorted(found.pending),
            sum(map(len, found.files.values())),
        )

    def _gaps(
        self, gaps: Iterable[tuple[str, datetime, datetime]]
    ) -> list[tuple[str, datetime, datetime, int]]:
        """The longest ones, in order; with how many transactions are known of each, all the same."""
        longest = sorted(_joined(gaps), key=lambda gap: gap[1] - gap[2])[:_GAPS_MAX]
        told = []
        for node, start, end in sorted(longest, key=lambda gap: (gap[1], gap[0])):
            ((known,),) = self._found.rows(
                "SELECT count(*) FROM transactions WHERE node = ? AND time >= ? AND time < ?",
                [node, start, end],
            )
            told.append((node, start, end, int(known)))
        return told


_NAMESPACES = (
    "SELECT DISTINCT client_namespace FROM histograms WHERE client_namespace IS NOT NULL "
    "ORDER BY 1 LIMIT 20"
)
_NODES = (
    "SELECT node FROM (SELECT node FROM coverage UNION SELECT node FROM transactions UNION "
    "SELECT node FROM histograms) WHERE node IS NOT NULL ORDER BY node"
)


def _joined(
    gaps: Iterable[tuple[str, datetime, datetime]],
) -> Iterator[tuple[str, datetime, datetime]]:
    """Of a node's gaps, in their order, those as one with next to nothing in between."""
    last: tuple[str, datetime, datetime] | None = None
    for node, start, end in gaps:
        if last is not None and last[0] == node and start - last[2] < _GAP:
            last = node, last[1], end
            continue
        if last is not None:
            yield last
        last = node, start, end
    if last is not None:
        yield last


def _top(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda g: (-g.count, g.name or ""))[:TOP]
