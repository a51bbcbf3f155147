# SPDX-License-Identifier: Apache-2.0
"""A report for people, as text: no colour, nothing that a terminal would obey."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.cells import cell_len

from tracer.report.figures import SHARES
from tracer.report.words import STAGES, completeness, counted, marks, notes, outcome, precision
from tracer.show.cells import clean, duration, fit, fit_name
from tracer.stages import STAGE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tracer.report.figures import Coverage, Group, Report, Times

_WIDTH = 80
_NAME = 30  # of the widest column, at that width
_CLIENT = 21
_WIDEST = 100  # for names, where nothing is cut
_BLOCKS = " ▁▂▃▄▅▆▇█"
_FIRST_OCTAVE, _LAST_OCTAVE = 9, 33  # 512 ns to 17 s; what is beyond is drawn at the ends
_SHOWN = 5  # of the slowest
_TITLES = {
    "pod": "CLIENT POD", "name": "NAME", "server": "SERVER", "backend": "BACKEND", "type": "TYPE",
    "rcode": "RCODE",
}  # fmt: skip


def render(report: Report, width: int | None = _WIDTH) -> str:
    """All of it; each line ends. `width`: of the terminal; None: names are not cut."""
    room = _room(report, width)
    # A client and a name beside each other share it, unless there is no end to it.
    rooms = (room, room) if width is None else (room // 2, room - room // 2)
    lines = [*_head(report), "", *_stages(report)]
    for name in ("pod", "backend", "server", "rcode", "type", "name"):
        if report.by[name]:
            lines += ["", *_groups(name, report.by[name], room)]
    for said in marks(report):
        lines += _note(said)
    if report.failures:
        lines += ["", *_failures(report, *rooms)]
    if report.slowest:
        lines += ["", *_slowest(report, *rooms)]
    lines += ["", *_coverage(report.coverage)]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _room(report: Report, width: int | None) -> int:
    """How much wider than at 80 columns names may be."""
    names = [
        *(group.name for groups in report.by.values() for group in groups),
        *(one.client for one in report.failures),
        *(one.question for one in report.failures),
        *(one["name"] for one in report.slowest),
    ]
    longest = max((cell_len(clean(name)) + 1 for name in names if name), default=0)
    widest = _WIDEST if width is None else _NAME + max(0, width - _WIDTH)
    return max(0, min(longest, widest) - _NAME)


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
    yield f"{about}{counted(report.transactions, 'transaction')}" + (
        f": {statuses}" if statuses else ""
    )
    if report.filters:
        yield from _note(f"filters: {clean(report.filters)}")
    for note in notes(report):
        yield from _note(clean(note))


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
            yield _stage_line(STAGES[name], times, whole_ns)
    yield _stage_line("all of it, to clients", report.total, 0)
    for said in precision(report):
        yield from _note(said)
    yield ""
    yield f"{'':<21} {_axis()}"
    for name in STAGE_NAMES:
        if name in report.stages:
            yield f"{STAGES[name]:<21} {_drawn(report.stages[name])}"
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


def _groups(name: str, groups: Sequence[Group], room: int) -> Iterator[str]:
    width = _NAME + room
    yield f"{_TITLES[name]:<{width}}{'COUNT':>10}{'FAILED':>9}{'P50':>9}{'P99':>9}{'MAX':>9}"
    nobody = "no answer" if name == "rcode" else "unknown"
    for group in groups:
        label = nobody if group.name is None else clean(group.name)
        cell = fit_name(label, width - 1) if name == "name" else fit(label, width - 1)
        about = "~" if group.is_estimated else ""
        p50, _, p99, _ = group.times.quantiles
        yield (
            f"{cell} {f'{about}{group.count:,}':>10}{group.failed:>9,}{duration(p50):>9}"
            f"{duration(p99):>9}{duration(group.times.max_ns):>9}"
        )


def _failures(report: Report, for_client: int, for_name: int) -> Iterator[str]:
    client, name = _CLIENT + for_client, _NAME - 1 + for_name
    yield f"{'FAILED':>8}  {'CLIENT':<{client + 1}}{'NAME':<{name + 1}}WHAT"
    for one in report.failures:
        what, _, why = outcome(one).partition(": ")
        yield (
            f"{one.count:>8,}  {fit(clean(one.client or 'unknown'), client)} "
            f"{fit_name(clean(one.question or '-'), name)} {clean(what)}"
        )
        if why:
            yield from _wrap(clean(why), 10)
        if one.place:
            yield from _wrap(f"at {clean(one.place)}", 10)


def _slowest(report: Report, for_client: int, for_name: int) -> Iterator[str]:
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
            f"{fit(clean(who or 'unknown'), _CLIENT + for_client)} "
            f"{fit_name(clean(one['name'] or '-'), _NAME + for_name)} "
            f"{clean(one['type'] or '-')}"
        )
        took = sorted(
            ((ns, name) for name, ns in (one["stages"] or {}).items() if ns), reverse=True
        )
        parts = ", ".join(f"{duration(ns)} {STAGES[name]}" for ns, name in took[:3])
        yield from _wrap(f"answered by {clean(by)}" + (f": {parts}" if parts else ""), 10)


def _coverage(coverage: Coverage) -> Iterator[str]:
    yield "HOW COMPLETE THIS IS"
    for line in completeness(coverage):
        yield from _wrap(clean(line), 2)


def _note(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _wrap(text: str, indent: int) -> Iterable[str]:
    pad = " " * indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=pad, subsequent_indent=pad + "  ", break_on_hyphens=False
    )
