# SPDX-License-Identifier: Apache-2.0
"""The same tests on stock kernels, each in a guest: `make test-kernels`.

Boots every kernel of KERNELS under emulation, runs what TESTS names in it, and this machine's own
kernel beside them, and prints a table of kernel, case and result. With --readme, the table goes into
the README too. Every guest's whole output is in build/kernels/VERSION.log.

    python -m tests.guests.matrix [--readme] [SERIES ...]

Exit status: 0 all passed; 1 something failed, or was not run that must be (see MUST_OFFER).
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guests.table import Outcome, Table, readme_with, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
OUTPUT = PROJECT / "build" / "kernels"
# Debian 11, 12 and 13, and what comes next.
KERNELS = ("5.10.", "6.1.", "6.12.", "7.")
# Two guests on two CPUs: while one waits for its disk or a time-out, the other runs.
AT_A_TIME = 2
GUEST_TIMEOUT_S = 600
TESTS = (
    "tests/kernels",
    "tests/test_packets.py",
    "tests/test_real_packets.py",
    "tests/test_clsact.py",
)
LAST = "tests/guests/locked_down.py"  # the machine must be booted anew after that
# What a stock kernel may lack, and up to which series. All else must run in every guest.
MAY_LACK = {
    "dropped by a rule: the kernel's reason": ("5.10.",),
    "devices by TCX": ("5.10.", "6.1."),
}


@dataclass
class Result:
    """One kernel's run."""

    version: str
    series: str | None  # None: this machine's own
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("series", nargs="*", default=KERNELS, metavar="SERIES")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    args = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    versions = {series: fetch(series) for series in args.series}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        results = list(pool.map(in_guest, versions, versions.values()))
    results.append(natively())
    for result in results:
        result.problems += holes(result)
    table = Table([(column(result), result.outcomes) for result in results])
    print(table.text())
    for result in results:
        said = "; ".join(result.problems) or "all passed"
        print(f"{result.version}: {said} ({result.seconds:.0f} s, {log_of(result.version)})")
    if args.readme:
        readme = PROJECT / "README.md"
        readme.write_text(readme_with(readme.read_text(), table.markdown()))
    return int(any(result.problems for result in results))


def fetch(series: str) -> str:
    """The newest version of a series, which is on this machine afterwards."""
    done = subprocess.run(
        [str(HERE / "fetch-kernel"), series], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"kernel {series}: could not be fetched (see above)")
    return done.stdout.strip()


def in_guest(series: str, version: str) -> Result:
    """Boots a kernel, and runs the tests in it."""
    result = Result(version, series)
    shared = OUTPUT / version
    shared.mkdir(exist_ok=True)
    junit = shared / "junit.xml"
    junit.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "SHARE": str(shared),
        "TIMEOUT": str(GUEST_TIMEOUT_S),
    }
    inside = f"PYTHONDONTWRITEBYTECODE=1 {shlex.join(pytest_command(junit, *TESTS, LAST))}"
    run(result, [str(HERE / "boot"), version, inside], environment, junit)
    return result


def natively() -> Result:
    """The same on this machine's own kernel."""
    result = Result(platform.release(), None)
    junit = OUTPUT / f"{result.version}.xml"
    junit.unlink(missing_ok=True)
    run(result, pytest_command(junit, *TESTS), dict(os.environ), junit)
    return result


def pytest_command(junit: Path, *tests: str) -> list[str]:
    options = ["-q", "--color=no", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    return [sys.executable, "-m", "pytest", *options, *tests]


def run(result: Result, argv: list[str], environment: dict[str, str], junit: Path) -> None:
    """Runs pytest with its output in the log, and takes in what came of each test."""
    print(f"{result.version}: runs, output in {log_of(result.version)}", flush=True)
    began = time.monotonic()
    with log_of(result.version).open("wb") as log:
        status = subprocess.run(
            argv, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT, check=False
        ).returncode
    result.seconds = time.monotonic() - began
    if not junit.exists():
        result.problems.append(f"ended with status {status} before its tests were through")
        return
    result.outcomes = rows_of(ET.parse(junit).getroot())  # noqa: S314 - our own pytest wrote it
    failed = sorted({row for (row, _), outcome in result.outcomes.items() if outcome.failed})
    if failed or status != 0:
        result.problems.append(f"failed: {', '.join(failed) or f'status {status}'}")


def holes(result: Result) -> Iterable[str]:
    """What was not run though this kernel has what it takes: then the test is at fault."""
    if result.series is None:
        return
    for (row, hooks), outcome in result.outcomes.items():
        if outcome.lacking and result.series not in MAY_LACK.get(row, ()):
            yield f"not run: {row} ({hooks}): {outcome.lacking}"


def log_of(version: str) -> Path:
    return (OUTPUT / f"{version}.log").relative_to(PROJECT)


def column(result: Result) -> str:
    """What a column is called: the series, since versions change by the week."""
    name = ".".join(result.version.split(".")[:2])
    return name if result.series else f"{name}, no kprobes"


if __name__ == "__main__":
    sys.exit(main())
