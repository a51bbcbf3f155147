# SPDX-License-Identifier: Apache-2.0
"""A report for people, as text of 80 columns: no colour, nothing that a terminal would obey."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from tracer.report.figures import SHARES
from tracer.show.cells import clean, duration, fit, fit_name
from tracer.stages import ERROR, STAGE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tracer.report.figures import Coverage, Group, Report, Times

_WIDTH = 80
_NAME = 30
_BLOCKS = " ▁▂▃▄▅▆▇█"
_FIRST_OCTAVE, _LAST_OCTAVE = 9, 33  # 512 ns to 17 s; what is beyond is drawn at the ends
_SHOWN = 5  # of the slowest
_TITLES = {
    "pod": "CLIENT POD", "name": "NAME", "server": "SERVER", "backend": "BACKEND", "type": "TYPE",
    "rcode": "RCODE",
}  # fmt: skip
_WORDS = {
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


def render(report: Report) -> str:
    """All of it; each line ends."""
    lines = [*_head(report), "", *_stages(report)]
    for name in ("pod", "backend", "server", "rcode", "type"):
        if report.by[name]:
            lines += ["", *_groups(name, report.by[name])]
    if report.by["name"]:
        lines += ["", *_groups("name", report.by["name"])]
        lines += _note("names: estimated from the transactions that were recorded")
    if report.failures:
        lines += ["", *_failures(report)]
    if report.slowest:
        lines += ["", *_slowest(report)]
    lines += ["", *_coverage(report.coverage)]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _head(report: Report) -> Iterator[str]:
    nodes = ", ".join(map(clean, report.nodes[:5])) or "unknown"
    if len(report.nodes) > 5:
        nodes += f" and {len(report.nodes) - 5} more"
    if report.start and report.end:
        seconds = (report.end - report.start).total_seconds()
        yield (
            f"{report.start:%Y-%m-%d %H:%M:%S} to {report.end:%Y-%m-%d %H:%M:%S} UTC "
            f"({duration(round(seconds * 1e9))}), nodes: {nodes}"
        )
    statuses = ", ".join(
        f"{count:,} {clean(name)}"
        for name, count in sorted(report.statuses.items(), key=lambda one: -one[1])
    )
    about = "" if report.counted else "about "
    yield f"{about}{report.transactions:,} transactions" + (f": {statuses}" if statuses else "")
    if not report.counted:
        yield from _note(
            "estimated from the transactions that were recorded: the histograms cannot tell "
            "what these filters ask for"
        )


def _stages(report: Report) -> Iterator[str]:
    if not report.total.count and not report.stages:
        yield "no answer's latency is known"
        return
    yield (
        f"{'WHERE THE TIME GOES':<21}{'COUNT':>9}{'SHARE':>6}"
        + "".join(f"{_share_name(share):>8}" for share in SHARES)
        + f"{'MAX':>8}"
    )
    whole_ns = sum(times.sum_ns for times in report.stages.values())
    for name in STAGE_NAMES:
        if name in report.stages:
            times = report.stages[name]
            yield _stage_line(_WORDS[name], times, whole_ns)
    yield _stage_line("all of it, to clients", report.total, 0)
    error = f"percentiles are within {ERROR * 100:.1f} %; '-': too few to tell"
    yield from _note(error)
    if report.stages and not report.stages_counted and report.counted:
        yield from _note("stages: estimated from the transactions that were recorded")
    yield ""
    yield f"{'':<21} {_axis()}"
    for name in STAGE_NAMES:
        if name in report.stages:
            yield f"{_WORDS[name]:<21} {_drawn(report.stages[name])}"
    yield f"{'all of it, to clients':<21} {_drawn(report.total)}"


def _stage_line(name: str, times: Times, whole_ns: int) -> str:
    share = f"{times.sum_ns / whole_ns:.0%}" if whole_ns else ""
    cells = [duration(ns) for ns in (*times.quantiles, times.max_ns)]
    return f"{name:<21}{times.count:>9,}{share:>6}" + "".join(f"{cell:>8}" for cell in cells)


def _share_name(share: float) -> str:
    return f"p{share * 100:g}"


def _axis() -> str:
    """Where a microsecond, a millisecond and a second are."""
    marks = {10: "1µs", 20: "1ms", 30: "1s"}
    text = ""
    for octave in range(_FIRST_OCTAVE, _LAST_OCTAVE + 1):
        if octave in marks:
            text = text.ljust((octave - _FIRST_OCTAVE) * 2) + marks[octave]
    return text


def _drawn(times: Times) -> str:
    """A column for each power of two; heights are of the tallest, and what there is can be seen."""
    counts = [0] * (_LAST_OCTAVE - _FIRST_OCTAVE + 1)
    for octave, count in times.octaves:
        counts[min(max(octave, _FIRST_OCTAVE), _LAST_OCTAVE) - _FIRST_OCTAVE] += count
    tallest = max(counts)
    if not tallest:
        return ""
    return "".join(
        _BLOCKS[0 if not n else max(1, round(n / tallest * (len(_BLOCKS) - 1)))] * 2 for n in counts
    )


def _groups(name: str, groups: Sequence[Group]) -> Iterator[str]:
    yield f"{_TITLES[name]:<{_NAME}}{'COUNT':>10}{'FAILED':>9}{'P50':>9}{'P99':>9}{'MAX':>9}"
    for group in groups:
        label = "unknown" if group.name is None else clean(group.name)
        cell = fit_name(label, _NAME - 1) if name == "name" else fit(label, _NAME - 1)
        p50, _, p99, _ = group.times.quantiles
        yield (
            f"{cell} {group.count:>10,}{group.failed:>9,}{duration(p50):>9}{duration(p99):>9}"
            f"{duration(group.times.max_ns):>9}"
        )


def _failures(report: Report) -> Iterator[str]:
    yield f"{'FAILED':>8}  {'CLIENT':<22}{'NAME':<30}WHAT"
    for one in report.failures:
        what = one.rcode if one.status == "answered" and one.rcode else one.status
        if one.reason:
            what += f": {clean(one.reason)}"
        yield (
            f"{one.count:>8,}  {fit(clean(one.client or 'unknown'), 21)} "
            f"{fit_name(clean(one.question or '-'), 29)} {clean(what)}"
        )
        if one.place:
            yield from _wrap(f"at {clean(one.place)}", 10)


def _slowest(report: Report) -> Iterator[str]:
    yield "SLOWEST"
    for one in report.slowest[:_SHOWN]:
        client = one["client"] or {}
        who = (
            f"{client.get('namespace')}/{client['pod']}" if client.get("pod") else client.get("ip")
        )
        backend = one["backend"] or {}
        by = backend.get("pod") or backend.get("ip") or "unknown"
        yield (
            f"{duration(one['latency_ns']):>8}  {one['time']:%H:%M:%S} "
            f"{fit(clean(who or 'unknown'), 21)} {fit_name(clean(one['name'] or '-'), 30)} "
            f"{clean(one['type'] or '-')}"
        )
        took = sorted(
            ((ns, name) for name, ns in (one["stages"] or {}).items() if ns), reverse=True
        )
        parts = ", ".join(f"{duration(ns)} {_WORDS[name]}" for ns, name in took[:3])
        yield from _wrap(f"answered by {clean(by)}" + (f": {parts}" if parts else ""), 10)


def _coverage(coverage: Coverage) -> Iterator[str]:
    yield "HOW COMPLETE THIS IS"
    if coverage.transactions:
        yield from _wrap(
            f"{coverage.transactions:,} transactions were counted, of which "
            f"{coverage.recorded:,} are recorded one by one",
            2,
        )
    if coverage.skipped:
        yield from _wrap(
            f"{coverage.skipped:,} slow or failed ones were not recorded, to keep to the CPU budget",
            2,
        )
    for kind, number in coverage.lost.items():
        if kind == "filtered":
            yield f"  left out by the filters that were in force: {number:,}"
        else:
            yield f"  lost: {number:,} ({clean(kind.replace('_', ' '))})"
    for kind, number in coverage.unmatched.items():
        yield f"  unmatched: {number:,} {clean(kind)}"
    for node, start, end in coverage.gaps:
        yield from _wrap(
            f"nothing was recorded on {clean(node)} from {start:%H:%M:%S} to {end:%H:%M:%S}", 2
        )
    for problem in coverage.problems:
        yield from _wrap(f"names may be missing: {clean(problem)}", 2)
    for file, why in coverage.unreadable:
        yield from _wrap(f"not read: {clean(file)}: {clean(why)}", 2)
    if not (
        coverage.lost.keys() - {"filtered"}
        or coverage.gaps
        or coverage.unreadable
        or coverage.skipped
    ):
        yield "  nothing is known to be missing"


def _note(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _wrap(text: str, indent: int) -> Iterable[str]:
    pad = " " * indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=pad, subsequent_indent=pad + "  ", break_on_hyphens=False
    )
