# SPDX-License-Identifier: Apache-2.0
"""The same tests on stock kernels, each in a guest: `make test-kernels`.

Boots every kernel of KERNELS under emulation, runs what TESTS names in it, and prints a table of
kernel, case and result. On this machine's own kernel, newer releases' BCC is tried; all else, which
`make test` has, with --own alone. With --readme, all of it goes into the README. What each test said,
and the captures and traces that they judged, are in build/kernels/VERSION.

    python -m tests.guests.matrix [--own] [--readme] [SERIES ...]

Exit status: 0 all passed; 1 something failed, or was not run that must be (see MAY_LACK).
"""

from __future__ import annotations

import argparse
import compileall
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

from tests.guests.other_bcc import ROOTS, SUITES
from tests.guests.table import Outcome, Table, readme_with, recorded, rows_of
from tracer.kernel import kprobes
from tracer.lab import go_build

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
OUTPUT = PROJECT / "build" / "kernels"
# Debian 11, 12 and 13, and what comes next.
KERNELS = ("5.10.", "6.1.", "6.12.", "7.")
# Two guests on two CPUs: while one waits for its disk or a time-out, the other runs.
AT_A_TIME = 2
GUEST_TIMEOUT_S = 3000
TESTS = (
    "tests/kernels/test_cases.py",
    "tests/test_packets.py",
    "tests/test_latency.py",
    "tests/test_real_packets.py",
    "tests/test_clsact.py",
)
DEGRADE = "tests/kernels/test_degrade.py"  # takes long, and is alike everywhere: on one kernel
OTHER_BCC = "tests/guests/other_bcc.py"
LAST = "tests/guests/locked_down.py"  # the machine must be booted anew after that
FETCH_WAITS_S = (0, 30, 120)
# What a stock kernel may lack, and up to which series. All else must run in every guest.
MAY_LACK = {
    "dropped by a rule: the kernel's reason": ("5.10.",),
    "devices by TCX": ("5.10.", "6.1."),
    "nothing left after kill -9 and a next start": ("6.12.", "7."),
    "filters by process where devices alone are watched: refused": ("7.",),
}


@dataclass
class Kernel:
    """One column: what came of the tests on a kernel."""

    version: str
    series: str | None  # None: this machine's own
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    at_first: list[str] = field(default_factory=list)  # of a first run, where there was a second
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """What the column is called: the series, since versions change by the week."""
        name = ".".join(self.version.split(".")[:2])
        return name if self.series or kprobes.available() else f"{name}, no kprobes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("series", nargs="*", default=KERNELS, metavar="SERIES")
    parser.add_argument("--own", action="store_true", help="the same on this machine's kernel")
    parser.add_argument("--readme", action="store_true", help="and write it all into the README")
    args = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    guests = [Kernel(fetched("fetch-kernel", series).strip(), series) for series in args.series]
    for suite in SUITES:
        fetched("fetch-root", suite, str(ROOTS / suite))
    go_build.binary(go_build.COREDNS)  # a guest has no network to build it with
    # Once here, rather than at every start in a guest.
    for package in ("tracer", "tests"):
        compileall.compile_dir(PROJECT / package, quiet=1)
    began = time.monotonic()
    plan = [(kernel, "tests", [*TESTS, LAST]) for kernel in guests[:-1]]
    plan.append((guests[-1], "tests", [*TESTS, DEGRADE, LAST]))
    plan.append((guests[-1], "bcc", [OTHER_BCC, "-k", SUITES[-1]]))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda job: in_guest(job[0], job[1], *job[2]), plan))
    # Emulated CPUs can be too slow for a time-out. What fails twice fails; what does once is told.
    for kernel in [kernel for kernel in guests if kernel.problems]:
        kernel.at_first, kernel.problems = kernel.problems, []
        for _, what, tests in (job for job in plan if job[0] is kernel):
            log = directory(kernel) / f"{what}.log"
            log.rename(log.with_suffix(".at-first.log"))
            in_guest(kernel, what, *tests)
    print(f"guests: {time.monotonic() - began:.0f} s", flush=True)
    own = Kernel(platform.release(), None)
    # All but the other BCC is in `make test`, too.
    more = [*TESTS, DEGRADE] if args.own or args.readme else []
    natively = pytest_command(own, "tests", *more, OTHER_BCC)
    run(own, "tests", ["env", evidence(own, "tests"), *natively], {})
    return report([*guests, own], readme=args.readme)


def report(kernels: list[Kernel], *, readme: bool) -> int:
    """Prints the table, and what is wrong; the exit status."""
    for kernel in kernels:
        kernel.problems += holes(kernel)
    table = Table([(kernel.title, kernel.outcomes) for kernel in kernels])
    print(table.text())
    for kernel in kernels:
        said = "; ".join(kernel.problems) or "all passed"
        print(f"{kernel.version}: {said} ({kernel.seconds:.0f} s; build/kernels/{kernel.version})")
        for problem in kernel.at_first:
            print(f"    at first: {problem}")
        for name, value in kernel.measured.items():
            print(f"    {name}: {value}")
    if readme:
        page = PROJECT / "README.md"
        page.write_text(readme_with(page.read_text(), table.markdown()))
    return int(any(kernel.problems for kernel in kernels))


def fetched(*command: str) -> str:
    """What a script beside this one printed. It has to succeed; a mirror may fail it for a while."""
    for wait_s in FETCH_WAITS_S:
        time.sleep(wait_s)
        last = {"SERVES": "fetched-before"} if wait_s == FETCH_WAITS_S[-1] else {}
        done = subprocess.run(
            [str(HERE / command[0]), *command[1:]],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **last},
            check=False,
        )
        if done.returncode == 0:
            return done.stdout
    sys.exit(f"{' '.join(command)}: failed (see above)")


def in_guest(kernel: Kernel, what: str, *tests: str) -> None:
    """Boots a kernel, and runs tests in it."""
    inside = shlex.join(["env", evidence(kernel, what), *pytest_command(kernel, what, *tests)])
    guest = {"SHARE": str(directory(kernel)), "TIMEOUT": str(GUEST_TIMEOUT_S)}
    run(kernel, what, [str(HERE / "boot"), kernel.version, inside], guest)


def pytest_command(kernel: Kernel, what: str, *tests: str) -> list[str]:
    junit = f"--junitxml={directory(kernel) / what}.xml"
    # What each case is, what it printed where it passed, and why it was not run.
    options = ["-v", "-rPs", "--no-header", "--color=no", "-p", "no:cacheprovider", junit]
    return [sys.executable, "-m", "pytest", *options, *tests]


def evidence(kernel: Kernel, what: str) -> str:
    """For the environment: where captures and traces are kept (see tests/kernels/test_cases.py)."""
    return f"DNSTRACE_EVIDENCE={directory(kernel) / what}"


def directory(kernel: Kernel) -> Path:
    """Where a kernel's logs and results are."""
    where = OUTPUT / kernel.version
    where.mkdir(exist_ok=True)
    return where


def run(kernel: Kernel, what: str, argv: list[str], environment: dict[str, str]) -> None:
    """Runs pytest with its output in a log, and takes in what came of each test."""
    log, junit = (directory(kernel) / f"{what}{suffix}" for suffix in (".log", ".xml"))
    junit.unlink(missing_ok=True)
    print(f"{kernel.version}: {what}, output in {log.relative_to(PROJECT)}", flush=True)
    began = time.monotonic()
    with log.open("wb") as output:
        status = subprocess.run(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=PROJECT,
            check=False,
        ).returncode
    kernel.seconds += time.monotonic() - began
    if not junit.exists():
        kernel.problems.append(f"{what} ended with status {status} before they were through")
        return
    suites = ET.parse(junit).getroot()  # noqa: S314 - our own pytest wrote it
    outcomes = rows_of(suites)
    kernel.measured |= recorded(suites)
    kernel.outcomes |= outcomes
    failed = sorted({row for (row, _), outcome in outcomes.items() if outcome.failed})
    if failed or status != 0:
        kernel.problems.append(f"failed: {', '.join(failed) or f'status {status}'}")


def holes(kernel: Kernel) -> Iterable[str]:
    """What was not run though this kernel has what it takes: then the test is at fault."""
    if kernel.series is None:
        return
    for (row, hooks), outcome in kernel.outcomes.items():
        if outcome.lacking and kernel.series not in MAY_LACK.get(row, ()):
            yield f"not run: {row} ({hooks}): {outcome.lacking}"


if __name__ == "__main__":
    sys.exit(main())
