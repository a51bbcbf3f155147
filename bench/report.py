# SPDX-License-Identifier: Apache-2.0
"""Figures to tables. Ratios are taken within a round, so that what drifts from round to round cancels."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bench.throughput import Run

MIB = 1024  # KiB
# What a transaction that is missing can have been counted as.
_LOSSES = ("ring_full", "table_full", "filtered")


def throughput(rounds: Sequence[dict[str, Run]]) -> str:
    """Queries per second, and the shares of the untraced and of the physical limit."""
    head = ("variant", "median", "min", "max", "of untraced", "of empty", "lost", "others' CPU")
    rows = []
    for name in rounds[0]:
        runs = [each[name] for each in rounds]
        rates = [run.load.queries_per_s for run in runs]
        rows.append(
            (
                name,
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f}",
                f"{max(rates):,.0f}",
                _ratio(rounds, name, "untraced"),
                _ratio(rounds, name, "empty"),
                f"{sum(run.load.lost for run in runs)}",
                f"{statistics.median(run.others for run in runs):.0%}",
            )
        )
    return _table(head, rows)


def accounts(rounds: Sequence[dict[str, Run]]) -> str:
    """Whether every query of dnsperf's is in a transaction, or counted as lost."""
    names = [name for name, run in rounds[0].items() if run.figures.transactions is not None]
    if not names:
        return ""
    runs = {name: [each[name] for each in rounds] for name in names}
    counters = list(dict.fromkeys(c for n in names for c in runs[n][0].figures.lost))
    unmatched = list(dict.fromkeys(c for n in names for c in runs[n][0].figures.unmatched))

    def row(what: str, value: Callable[[Run], int]) -> tuple[str, ...]:
        return (what, *(f"{sum(map(value, runs[name])):,}" for name in names))

    rows = [
        row("dnsperf sent", lambda run: run.load.sent),
        row("transactions", lambda run: run.figures.transactions or 0),
        *(
            row(f"lost: {counter}", lambda run, c=counter: run.figures.lost.get(c, 0))  # type: ignore[misc]
            for counter in counters
        ),
        *(
            row(f"unmatched: {counter}", lambda run, c=counter: run.figures.unmatched.get(c, 0))  # type: ignore[misc]
            for counter in unmatched
        ),
        row("beyond dnsperf's", unaccounted),
    ]
    return _table(("all rounds", *names), rows)


def unaccounted(run: Run) -> int:
    """Transactions and losses less dnsperf's queries: the servers' own queries, if all is well."""
    figures = run.figures
    counted = sum(figures.lost.get(name, 0) for name in _LOSSES)
    return (figures.transactions or 0) + counted - run.load.sent


def processes(rounds: Sequence[dict[str, Run]]) -> str:
    """What the watching process takes: start, processor, memory."""
    head = ("variant", "armed", "CPU", "per 10,000", "idle RSS", "RSS", "peak", "output")
    rows = []
    for name, first in rounds[0].items():
        if first.figures.pid is None:
            continue
        runs = [each[name] for each in rounds]
        figures = [run.figures for run in runs]
        rows.append(
            (
                name,
                f"{statistics.median(f.armed_s or 0 for f in figures):.2f} s",
                f"{statistics.median(_share(run) for run in runs):.0%}",
                _cpu_per_10000(runs),
                _mib(f.idle_kib.get("VmRSS", 0) for f in figures),
                _mib(f.memory_kib["VmRSS"] for f in figures),
                _mib(f.memory_kib["VmHWM"] for f in figures),
                f"{statistics.median(f.output_bytes or 0 for f in figures) / 1e6:.0f} MB",
            )
        )
    return _table(head, rows) if rows else ""


def programs(
    runs: dict[str, dict[str, tuple[int, int]]], queries: dict[str, int], unit: str
) -> str:
    """Nanoseconds per program run, runs per query, and what that adds up to, per watcher."""
    head = ("program", *(f"{name}: {what}" for name in runs for what in ("ns/run", f"runs/{unit}")))
    names = sorted({program for by_program in runs.values() for program in by_program})
    rows = []
    for program in names:
        row = [program]
        for watcher, by_program in runs.items():
            ns, count = by_program.get(program, (0, 0))
            row += [f"{ns / count:.0f}" if count else "-", _per(count, queries[watcher])]
        rows.append(tuple(row))
    total = [f"all, ns/{unit}"]
    for watcher, by_program in runs.items():
        ns = sum(ns for ns, _ in by_program.values())
        count = sum(count for _, count in by_program.values())
        total += [_per(ns, queries[watcher], 0), _per(count, queries[watcher])]
    rows.append(tuple(total))
    return _table(head, rows)


def _per(count: int, queries: int, digits: int = 1) -> str:
    return f"{count / queries:,.{digits}f}" if queries else "-"


def _share(run: Run) -> float:
    """Of one processor, over the time of the load."""
    return (run.figures.cpu_s or 0.0) / run.elapsed_s


def _cpu_per_10000(runs: Sequence[Run]) -> str:
    """Transactions that were filtered out in user space cost too."""
    shares = [
        run.figures.cpu_s / done * 10_000
        for run in runs
        if run.figures.cpu_s is not None and (done := handled(run))
    ]
    return f"{statistics.median(shares):.2f} s" if shares else "-"


def handled(run: Run) -> int:
    """Transactions that reached user space."""
    figures = run.figures
    if figures.transactions is None:
        return 0
    return figures.transactions + figures.lost.get("filtered", 0)


def _mib(values: Iterable[int]) -> str:
    middle = statistics.median(values)
    return f"{middle / MIB:.0f} MiB" if middle else "-"


def _ratio(rounds: Sequence[dict[str, Run]], name: str, to: str) -> str:
    found = ratios(rounds, name, to)
    if not found or name == to:
        return "-"
    return f"{statistics.median(found):.2f} ({min(found):.2f}..{max(found):.2f})"


def ratios(rounds: Sequence[dict[str, Run]], name: str, to: str) -> list[float]:
    """One variant's throughput divided by another's, round by round."""
    return [
        each[name].load.queries_per_s / each[to].load.queries_per_s for each in rounds if to in each
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
