# SPDX-License-Identifier: Apache-2.0
"""What has to be said beside a report's figures, in sentences, wherever it is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tracer.stages import ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.report.figures import Coverage, Failure, Report

STAGES = {
    "application_send": "application sends",
    "node": "this node, NAT",
    "network": "network",
    "server_queue": "server's queue",
    "server": "server",
    "upstream": "upstream",
    "return": "way back",
    "wake_up": "application wakes up",
    "remote": "beyond this node",
}


def counted(number: int, what: str) -> str:
    """1 thing, 2 things."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def notes(report: Report) -> Iterator[str]:
    """What is in the number of transactions, and what is not."""
    about = "" if report.counted else "about "
    if report.filters and not report.transactions and report.coverage.transactions:
        known = f"; namespaces there: {', '.join(report.namespaces)}" if report.namespaces else ""
        yield (
            f"none of the {report.coverage.transactions:,} transactions in these recordings is "
            f"what the filters ask for{known}"
        )
    if report.clients_unseen:
        yield (
            f"of them, {about}{report.clients_unseen:,} from clients that are not on the node that "
            "served them, or whose sockets were not watched there; where the clients' own nodes are "
            "in this report, these are in it twice"
        )
    if report.by_servers:
        yield (
            f"and {about}{report.by_servers:,} that DNS servers asked themselves, which are in no "
            "other figure here (--namespace or --pod shows them)"
        )
    if not report.counted:
        yield (
            "estimated from the transactions that were recorded: the histograms cannot tell "
            "what these filters ask for"
        )


def precision(report: Report) -> Iterator[str]:
    """How far figures may be off."""
    if report.counted:
        yield f"percentiles are within {math.ceil(ERROR * 1000) / 10} %; '-': too few to tell"
    else:
        yield "percentiles are of the transactions that were recorded; '-': too few to tell"
    if report.stages and not report.stages_counted and report.counted:
        yield "stages: estimated from the transactions that were recorded"


def marks(report: Report) -> Iterator[str]:
    """What the marks beside figures mean."""
    if any(group.is_estimated for groups in report.by.values() for group in groups):
        yield (
            "'~': estimated from the transactions that were recorded one by one; from 100 of "
            "them, give or take 20 %, and from fewer, more"
        )


def outcome(one: Failure) -> str:
    """What became of transactions that failed alike."""
    what = one.rcode if one.status == "answered" and one.rcode else one.status
    if one.reason == "NO_SOCKET" and one.status == "dropped":
        return f"{what}: the client no longer waited (NO_SOCKET)"
    if one.reason == "NO_SOCKET" and one.status == "refused":
        return f"{what}: nothing listens there (NO_SOCKET)"
    return f"{what}: {one.reason}" if one.reason else what


def completeness(coverage: Coverage) -> Iterator[str]:
    """What was counted, and all that is known to be missing."""
    if coverage.transactions:
        yield (
            f"{counted(coverage.transactions, 'transaction')} counted, of which "
            f"{coverage.recorded:,} recorded one by one"
        )
    if coverage.skipped:
        yield (
            f"{coverage.skipped:,} slow or failed ones were not recorded, to keep to the CPU budget"
        )
    for kind, number in coverage.lost.items():
        if kind == "filtered":
            yield f"left out by the filters that were in force: {number:,}"
        else:
            yield f"lost: {number:,} ({kind.replace('_', ' ')})"
    for kind, number in coverage.unmatched.items():
        if kind == "queries":
            yield f"{number:,} still waited for an answer at the end, and in no figure"
        else:
            yield f"unmatched: {number:,} {kind}"
    yield from _gaps(coverage)
    for problem in coverage.problems:
        yield f"names may be missing: {problem}"
    for file, why in coverage.unreadable:
        yield f"not read: {file}: {why}"
    if coverage.is_complete:
        yield "nothing is known to be missing"


def _gaps(coverage: Coverage) -> Iterator[str]:
    for node, start, end, known in coverage.gaps:
        but = f", but for {known:,} that were recorded one by one" if known else ""
        yield f"nothing was counted on {node} from {start:%H:%M:%S} to {end:%H:%M:%S}{but}"
    for node in coverage.pending:
        yield (
            f"not in here: what {node} has recorded since its last complete file; SIGHUP to "
            "'dnstrace continuous' completes it (systemctl reload dnstrace)"
        )
