# SPDX-License-Identifier: Apache-2.0
"""What has to be said beside a report's figures, in sentences, wherever it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.report.figures import Coverage, Report


def counted(number: int, what: str) -> str:
    """1 thing, 2 things."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def notes(report: Report) -> Iterator[str]:
    """What is in the number of transactions, and what is not."""
    about = "" if report.counted else "about "
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
    for node, start, end in coverage.gaps:
        yield f"nothing was recorded on {node} from {start:%H:%M:%S} to {end:%H:%M:%S}"
    for problem in coverage.problems:
        yield f"names may be missing: {problem}"
    for file, why in coverage.unreadable:
        yield f"not read: {file}: {why}"
    if not (
        coverage.lost.keys() - {"filtered"}
        or coverage.gaps
        or coverage.unreadable
        or coverage.skipped
    ):
        yield "nothing is known to be missing"
