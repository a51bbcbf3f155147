# SPDX-License-Identifier: Apache-2.0
"""A report as one JSON object: `"event": "report"`. Unknown is null; names end in `_ns` as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracer.export.jsonl import rfc3339
from tracer.report.figures import SHARES
from tracer.stages import ERROR

if TYPE_CHECKING:
    from datetime import datetime

    from tracer.report.figures import Group, Report, Times


def to_json(report: Report) -> dict[str, Any]:
    """Only what JSON knows."""
    coverage = report.coverage
    return {
        "event": "report",
        "start": _time(report.start),
        "end": _time(report.end),
        "nodes": report.nodes,
        "filters": report.filters,
        "counted": report.counted,
        "stages_counted": report.stages_counted,
        "relative_error": ERROR,
        "transactions": report.transactions,
        "by_servers": report.by_servers,
        "clients_unseen": report.clients_unseen,
        "statuses": report.statuses,
        "latency": _times(report.total),
        "stages": {name: _times(times) for name, times in report.stages.items()},
        "by": {name: [_group(group) for group in groups] for name, groups in report.by.items()},
        "slowest": [{**one, "time": rfc3339(one["time_ns"])} for one in report.slowest],
        "failures": [
            {
                "count": one.count,
                "client": one.client,
                "name": one.question,
                "status": one.status,
                "rcode": one.rcode,
                "reason": one.reason,
                "place": one.place,
            }
            for one in report.failures
        ],
        "heat": {
            "starts": [_time(start) for start in report.heat.starts],
            "seconds": report.heat.seconds,
            "lower_ns": [2 ** (octave / 2) for octave in report.heat.octaves],
            "counts": report.heat.counts,
        },
        "coverage": {
            "transactions": coverage.transactions,
            "recorded": coverage.recorded,
            "not_kept": coverage.not_kept,
            "skipped": coverage.skipped,
            "lost": coverage.lost,
            "unmatched": coverage.unmatched,
            "gaps": [
                {"node": node, "start": _time(start), "end": _time(end), "recorded": known}
                for node, start, end, known in coverage.gaps
            ],
            "problems": coverage.problems,
            "unreadable": [{"file": file, "why": why} for file, why in coverage.unreadable],
            "pending": coverage.pending,
            "files": coverage.files,
        },
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": group.count,
        "failed": group.failed,
        "recorded": group.recorded,
        "estimated": group.is_estimated,
        "latency": _times(group.times),
    }


def _times(times: Times) -> dict[str, Any]:
    quantiles = {
        f"p{share * 100:g}_ns".replace(".", "_"): ns
        for share, ns in zip(SHARES, times.quantiles, strict=True)
    }
    return {
        "count": times.count,
        "sum_ns": times.sum_ns,
        **quantiles,
        "max_ns": times.max_ns,
        "octaves": [{"lower_ns": 1 << exponent, "count": n} for exponent, n in times.octaves],
    }


def _time(when: datetime | None) -> str | None:
    if when is None:
        return None
    return rfc3339(int(when.timestamp()) * 1_000_000_000 + when.microsecond * 1000)
