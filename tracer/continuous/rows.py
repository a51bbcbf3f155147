# SPDX-License-Identifier: Apache-2.0
"""Rows of recordings: transactions, histograms and coverage as in parquet.COLUMNS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracer.export import jsonl
from tracer.record import Stage
from tracer.stages import STAGE_NAMES, bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracer.continuous.book import Entry, Histogram
    from tracer.continuous.labels import Labels
    from tracer.transaction import Transaction

_FROM_JSON = (
    "status", "id", "protocol", "name", "type", "rcode", "flags", "answers", "latency_ns",
    "attempt", "response_len", "problem", "client", "server", "backend", "hops",
)  # fmt: skip
_ORDINARY = ("NOERROR", "NXDOMAIN", None)


def is_failed(status: str, rcode: str | None) -> bool:
    """As the kernel decides it: a search list makes NXDOMAIN of every other question."""
    return status != "answered" or rcode not in _ORDINARY


def why_kept(t: Transaction, slower_ns: int) -> str:
    """Why a transaction has left the kernel: "failed", "slow", "sample"."""
    if is_failed(t.status, t.rcode):
        return "failed"
    if slower_ns and t.latency_ns is not None and t.latency_ns >= slower_ns:
        return "slow"
    return "sample"


def transaction_row(
    t: Transaction,
    kept: str,
    weight: int,
    stages: Sequence[int],
    *,
    client_seen: bool,
    by_server: bool,
) -> dict[str, Any]:
    """`stages`: nanoseconds in each, as stage_times has them; the rest as in Labels."""
    whole = jsonl.transaction_object(t)
    row: dict[str, Any] = {name: whole[name] for name in _FROM_JSON}
    row["time_ns"] = t.time_ns
    row["kept"] = kept
    row["weight"] = weight
    row["client_seen"] = client_seen
    row["by_server"] = by_server
    row["stages"] = {name: ns or None for name, ns in zip(STAGE_NAMES, stages, strict=True)}
    if t.status != "answered":  # what was upstream of that is not known
        row["stages"]["server"] = row["stages"]["upstream"] = None
    return row


def histogram_rows(
    labels: Labels, entry: Entry, start_ns: int, end_ns: int
) -> list[dict[str, Any]]:
    """What came under these labels in an interval; times since 1970."""
    common = {
        "time_start_ns": start_ns,
        "time_end_ns": end_ns,
        "client_namespace": labels.namespace,
        "client_pod": labels.pod,
        "client_container": labels.container,
        "server_ip": labels.server_ip,
        "server_port": labels.server_port,
        "service": labels.service,
        "server_role": labels.server_role,
        "backend_ip": labels.backend_ip,
        "backend_namespace": labels.backend_namespace,
        "backend_pod": labels.backend_pod,
        "type": labels.type,
        "rcode": labels.rcode,
        "status": None if labels.of_stages else labels.status,
        "protocol": labels.protocol,
        "client_seen": labels.client_seen,
        "by_server": labels.by_server,
    }
    if labels.of_stages:
        return [
            {**common, "stage": stage.name.lower(), "count": times.count(), **_times(times)}
            for stage, times in entry.times.items()
        ]
    total = entry.times.get(Stage.TOTAL)
    nothing: dict[str, Any] = {"timed": 0, "sum_ns": 0, "max_ns": None, "buckets": []}
    return [
        {
            **common,
            "stage": "total",
            "count": entry.count,
            **(nothing if total is None else _times(total)),
        }
    ]


def _times(histogram: Histogram) -> dict[str, Any]:
    return {
        "timed": histogram.count(),
        "sum_ns": histogram.sum_ns,
        "max_ns": histogram.max_ns or None,
        "buckets": [
            {"lower_ns": bounds(bucket)[0], "upper_ns": bounds(bucket)[1], "count": count}
            for bucket, count in sorted(histogram.counts.items())
        ],
    }
