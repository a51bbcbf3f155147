# SPDX-License-Identifier: Apache-2.0
"""The table of kernels: made of what pytest wrote, and in the README as it was made."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from tests.guests.matrix import KERNELS, MAY_LACK
from tests.guests.table import BEGIN, END, Outcome, Table, readme_with, rows_of
from tests.kernels.test_cases import CASES

if TYPE_CHECKING:
    from pathlib import Path

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_cases" name="test_case[IPv6-kprobe]"/>
<testcase classname="tests.kernels.test_cases" name="test_case[IPv6-tracepoint]">
  <failure message="AssertionError"/></testcase>
<testcase classname="tests.kernels.test_cases" name="test_devices_by_tcx">
  <skipped message="not offered by this kernel: TCX links (before 6.6)"/></testcase>
<testcase classname="tests.test_packets" name="test_one[x]"/>
<testcase classname="tests.test_packets" name="test_two"><error message="it broke"/></testcase>
</testsuite></testsuites>"""


def outcomes() -> dict[tuple[str, str], Outcome]:
    return rows_of(ET.fromstring(JUNIT))  # noqa: S314 - it stands above


def test_rows_are_cases_and_modules() -> None:
    """A module of many tests is one row, and one failure in it is the row's."""
    assert outcomes() == {
        ("IPv6", "kprobe"): Outcome(passed=1),
        ("IPv6", "tracepoint"): Outcome(failed=1),
        ("devices by TCX", "both"): Outcome(lacking="TCX links (before 6.6)"),
        ("packets put into the programs", "both"): Outcome(passed=1, failed=1),
    }


def test_table_has_a_column_per_kernel_and_says_what_is_lacking() -> None:
    """What was not run on a kernel stays empty."""
    table = Table([("6.1", outcomes()), ("7.2", {("IPv6", "both"): Outcome(passed=1)})])
    assert table.markdown().splitlines() == [
        "| | 6.1 | 7.2 |",
        "|---|---|---|",
        "| IPv6 | yes NO | yes |",
        "| devices by TCX | - |  |",
        "| packets put into the programs | NO |  |",
        "",
        "- 6.1: devices by TCX: TCX links (before 6.6)",
    ]


def test_table_replaces_the_one_before() -> None:
    """All else in the page stays; a page without the marks is refused."""
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert readme_with(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the marks"):
        readme_with("nothing", "new")


def test_readme_has_every_case_as_passed(project: Path) -> None:
    """On each stock kernel with both sets of hooks, but for what that kernel may lack."""
    page = (project / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    kernels = [title.strip() for title in lines[0][1:-1]]
    assert len(kernels) == len(KERNELS)
    rows = {row[0].strip(): [cell.strip() for cell in row[1:-1]] for row in lines[2:]}
    for case in CASES:
        for kernel, cell in zip(kernels, rows[case.title], strict=True):
            series = next(s for s in KERNELS if f"{kernel}.".startswith(s))
            lacking = series in MAY_LACK.get(case.title, ())
            assert cell == ("- -" if lacking else "yes yes"), (case.title, kernel)
    assert not any("NO" in cell.split() for cells in rows.values() for cell in cells)
