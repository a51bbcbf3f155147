# SPDX-License-Identifier: Apache-2.0
"""What the machine is, and what it does beside the measurement."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from tracer.kernel import netns
from tracer.lab import cgroups
from tracer.lab.bringup import server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_QUIET_S = 0.2
_QUIET_ATTEMPTS = 50
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_FIELD_UTIME = 11  # of /proc/PID/stat, counted behind the name; cutime and cstime follow


def description(resolver: str) -> dict[str, str]:
    """Kernel, processor and versions."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    kind, binary = server_binary(resolver)
    version, pattern = ("-V", r"Version (\S+)") if kind == "unbound" else ("-version", r"-(\d\S*)")
    return {
        "kernel": platform.release(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": _memory(),
        "server": f"{kind} {_said([str(binary), version], pattern)}",
        "dnsperf": _said(["dnsperf", "-h"], r"Version (\S+)"),
        "tcpdump": _said(["tcpdump", "--version"], r"version (\S+)"),
        "python": platform.python_version(),
    }


def _memory() -> str:
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    return f"{kib / (1 << 20):.1f} GiB"


def _said(argv: list[str], pattern: str) -> str:
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    found = re.search(pattern, done.stdout)
    return found[1] if found else "of unknown version"


@dataclass(slots=True)
class Share:
    """CPU time as a share of all processors' time: `others` is what the benchmark did not cause."""

    lab: float = 0.0
    others: float = 0.0


@contextmanager
def cpu_share(own_pid: int | None) -> Iterator[Share]:
    """Measures the block; `own_pid` is a process outside of the lab that belongs to it."""
    root = netns.cgroup2_root()
    if root is None:
        raise BenchError("no cgroup v2 tree is mounted; see `dnstrace doctor`")
    share = Share()

    def now() -> tuple[float, float, float, float]:
        own = cpu_s(own_pid) if own_pid is not None else 0.0
        return time.monotonic(), _usage_s(root), _usage_s(root / cgroups.PARENT), own

    before = now()
    yield share
    elapsed, used, by_lab, by_own = (b - a for a, b in zip(before, now(), strict=True))
    capacity = elapsed * (os.cpu_count() or 1)
    share.lab = by_lab / capacity
    share.others = max(0.0, (used - by_lab - by_own) / capacity)


def wait_until_quiet(limit: float) -> None:
    """Waits while other processes take more than that share of the machine, but not for ever."""
    for _ in range(_QUIET_ATTEMPTS):
        with cpu_share(None) as share:
            time.sleep(_QUIET_S)
        if share.others <= limit:
            return


def _usage_s(cgroup: Path) -> float:
    text = (cgroup / "cpu.stat").read_text()
    return int(text.split()[1]) / 1e6


def cpu_s(pid: int) -> float:
    """Processor time of a process and of its children that have ended, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[_FIELD_UTIME : _FIELD_UTIME + 4])) / _TICKS_PER_S


def memory_kib(pid: int) -> dict[str, int]:
    """VmRSS, VmHWM and the anonymous part of a process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {name: int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM", "RssAnon")}


@contextmanager
def program_statistics() -> Iterator[None]:
    """Lets the kernel time every run of every BPF program, which costs, while the block runs."""
    before = _STATS.read_text()
    _STATS.write_text("1\n")
    try:
        yield
    finally:
        _STATS.write_text(before)


def program_runs() -> dict[str, tuple[int, int]]:
    """(run time in ns, runs) of the tracer's programs, by name, all copies together."""
    listed = subprocess.run(
        ["bpftool", "-j", "prog", "show"], stdout=subprocess.PIPE, check=True
    ).stdout
    runs: dict[str, tuple[int, int]] = {}
    for program in json.loads(listed):
        name = program.get("name", "")
        if not name.startswith("dnstrace_"):
            continue
        ns, count = runs.get(name, (0, 0))
        runs[name] = ns + program.get("run_time_ns", 0), count + program.get("run_cnt", 0)
    return runs
