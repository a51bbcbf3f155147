# SPDX-License-Identifier: Apache-2.0
"""Of pytest's JUnit files, a table of kernel, case and result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xml.etree.ElementTree as ET
    from collections.abc import Iterator, Mapping, Sequence

BEGIN, END = "<!-- made by python -m tests.guests.matrix --readme -->", "<!-- end -->"
PASSED, FAILED, LACKING, ABSENT = "yes", "NO", "-", ""
_NOT_OFFERED = "not offered by this kernel: "
# Rows that are one test, or a whole module of them.
_TITLES = {
    "test_nothing_lost": "nothing lost over all cases",
    "test_both_sets_of_hooks_agree": "both sets of hooks agree",
    "test_devices_by_tcx": "devices by TCX",
    "test_devices_by_clsact": "devices by clsact",
    "test_no_filters_left": "nothing left at the end",
    "test_cgroup_v1_alone": "cgroup v1 alone: pods, no containers",
    "test_killed_tracer_is_cleaned_up_after": "nothing left after kill -9 and a next start",
    "test_unprivileged": "without privileges: said",
    "test_no_kernel_types": "without BTF: said",
    "test_no_cgroup_v2": "without cgroup v2: said",
    "test_no_right_to_devices": "without CAP_NET_ADMIN: sockets alone",
    "test_missing_symbol": "a function that cannot be probed: the other hooks",
    "test_kprobes_disarmed": "kprobes disarmed: the other hooks",
    "test_in_a_container_of_its_own": "in a container: said",
    "test_least_capabilities": "with three capabilities: traced",
    "test_hidden_kernel_symbols": "with hidden kernel symbols: traced",
    "test_doctor_tells_half_blind_hooks": "a hook that never runs: the doctor finds it",
    "test_doctor_that_is_terminated_leaves_nothing": "the doctor, terminated: nothing left",
    "test_filters_that_devices_alone_cannot_serve": (
        "filters by process where devices alone are watched: refused"
    ),
    "test_lockdown_confidentiality": "lockdown: said",
    "test_counted_in_the_kernel": "continuous mode: counted in the kernel",
    "test_latency": "what the kernel counts is what records say",
    "test_packets": "packets put into the programs",
    "test_real_packets": "large packets, fragments, conntrack's NAT",
    "test_clsact": "clsact filters of others stay",
}
_PER_HOOKS = re.compile(r"(?P<function>\w+)\[(?:(?P<title>.*)-)?(?P<hooks>kprobe|tracepoint)\]")


@dataclass(frozen=True)
class Outcome:
    """Of one row with one set of hooks (or "both"); several tests may make one row."""

    passed: int = 0
    failed: int = 0
    lacking: str | None = None  # why it was not run

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.passed + other.passed, self.failed + other.failed, self.lacking or other.lacking
        )

    @property
    def mark(self) -> str:
        if self.failed:
            return FAILED
        return PASSED if self.passed else LACKING


Outcomes = dict[tuple[str, str], Outcome]


def rows_of(suites: ET.Element) -> Outcomes:
    """(row, set of hooks) to what came of it, in the order of the tests."""
    found: Outcomes = {}
    for test in suites.iter("testcase"):
        key = _row(test.get("classname", ""), test.get("name", ""))
        if key:
            found[key] = found.get(key, Outcome()) + _outcome(test)
    return found


def recorded(suites: ET.Element) -> dict[str, str]:
    """What tests measured on their way, by name; not what Hypothesis says of itself."""
    found = {p.get("name", ""): p.get("value", "") for p in suites.iter("property")}
    return {name: value for name, value in found.items() if not name.startswith("hypothesis-")}


def _row(module: str, name: str) -> tuple[str, str] | None:
    per_hooks = _PER_HOOKS.fullmatch(name)
    if per_hooks:
        title = per_hooks["title"] or _TITLES.get(per_hooks["function"])
        return (title, per_hooks["hooks"]) if title else None
    title = _TITLES.get(name) or _TITLES.get(module.rpartition(".")[2])
    if title is None:
        title = name.removeprefix("test_").replace("_", " ")
    return title, "both"


def _outcome(test: ET.Element) -> Outcome:
    skipped = test.find("skipped")
    if skipped is not None:
        return Outcome(lacking=skipped.get("message", "").removeprefix(_NOT_OFFERED) or "skipped")
    broken = test.find("failure") is not None or test.find("error") is not None
    return Outcome(failed=1) if broken else Outcome(passed=1)


@dataclass(frozen=True)
class Table:
    """Columns of (kernel, outcomes)."""

    columns: Sequence[tuple[str, Mapping[tuple[str, str], Outcome]]]

    def _cells(self) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
        """(row, a cell per kernel, (kernel, why not) where something is lacking)"""
        titles = dict.fromkeys(row for _, outcomes in self.columns for row, _ in outcomes)
        for title in titles:
            cells, notes = [], []
            for kernel, outcomes in self.columns:
                marks = []
                for hooks in ("kprobe", "tracepoint", "both"):
                    outcome = outcomes.get((title, hooks))
                    if outcome is None:
                        continue
                    marks.append(outcome.mark)
                    if outcome.mark == LACKING and outcome.lacking:
                        notes.append((kernel, outcome.lacking))
                cells.append(" ".join(marks) or ABSENT)
            yield title, cells, notes

    def _notes(self) -> list[str]:
        reasons: dict[tuple[str, str], None] = {}
        for title, _, notes in self._cells():
            for kernel, why in notes:
                # Not a line per case: that a kernel has no kprobes is said once.
                about = "kprobe hooks" if "no kprobes" in why else title
                reasons[f"{kernel}: {about}", why] = None
        return [f"{what}: {why}" for what, why in reasons]

    def text(self) -> str:
        """For a terminal."""
        rows = [(title, cells) for title, cells, _ in self._cells()]
        width = max((len(title) for title, _ in rows), default=0)
        head = ("kprobe, tracepoint hooks", [kernel for kernel, _ in self.columns])
        wide = [max(len(kernel), len("yes yes")) for kernel, _ in self.columns]
        lines = [
            f"{title:<{width}}  "
            + "  ".join(f"{cell:<{w}}" for cell, w in zip(cells, wide, strict=True)).rstrip()
            for title, cells in (head, *rows)
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes()), ""])

    def markdown(self) -> str:
        """For the README."""
        lines = ["| | " + " | ".join(kernel for kernel, _ in self.columns) + " |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        lines += [f"| {title} | {' | '.join(cells)} |" for title, cells, _ in self._cells()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes())])


def readme_with(readme: str, table: str) -> str:
    """The README with the table between its marks. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
