# SPDX-License-Identifier: Apache-2.0
"""Whether continuous mode stays as it is: `python -m bench.soak`, as root.

The lab's pods ask at a steady rate while pods come and go; every while, the tracer's memory, CPU,
the entries of its tables and its losses are printed. With --restarts, it is ended and started
again under the load instead, every other time by kill -9, and what is left behind is counted.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from tracer.lab import Lab, LabError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLIENT = "sre/web-0"
_SERVICE = "10.96.0.10"
_QUESTIONS = "".join(
    f"n{n}.bench.example.com A\nn{n}.sre.svc.cluster.local AAAA\n" for n in range(500)
) + "kubernetes.default.svc.cluster.local A\n" * 500  # fmt: skip
_START_S = 60.0


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=int, default=2000, help="queries per second (default 2000)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between lines")
    parser.add_argument("--restarts", type=int, default=0, metavar="N")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        with Lab(quiet_servers=True) as lab, tempfile.TemporaryDirectory() as scratch:
            queries = Path(scratch) / "queries"
            queries.write_text(_QUESTIONS)
            if args.restarts:
                return _restart(lab, queries, args.rate, args.restarts)
            return _soak(lab, queries, args, Path(scratch) / "recordings")
    except (BenchError, LabError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _soak(lab: Lab, queries: Path, args: argparse.Namespace, recordings: Path) -> int:
    seconds = args.minutes * 60
    pods = _Pods(lab)
    print("minute  queries  RSS MiB  CPU %  in flight  series  buckets  lost  recordings MiB")
    with _tracer(lab, "--record", str(recordings), "--rotate", "1m") as run:
        load = _load(lab, queries, args.rate, seconds)
        began_s = last_s = time.monotonic()
        cpu_s = 0.0
        try:
            while time.monotonic() - began_s < seconds:
                due_s = last_s + args.every
                while time.monotonic() < due_s:
                    pods.change()
                    time.sleep(1.0)
                now = _scrape(run.url)
                used_s = now["dnstrace_cpu_seconds_total"]
                share = (used_s - cpu_s) / (time.monotonic() - last_s)
                cpu_s, last_s = used_s, time.monotonic()
                size = sum(path.stat().st_size for path in recordings.rglob("*") if path.is_file())
                print(
                    f"{(last_s - began_s) / 60:6.1f} {now['dnstrace_transactions_total']:8,.0f} "
                    f"{now['dnstrace_resident_memory_bytes'] / (1 << 20):8.1f} {share:6.2%} "
                    f"{now['entries transactions']:10,.0f} {now['entries series']:7,.0f} "
                    f"{now['entries buckets']:8,.0f} {now['lost']:5,.0f} {size / (1 << 20):15.1f}",
                    flush=True,
                )
        finally:
            load.terminate()
            said, _ = load.communicate()
        time.sleep(11)
        last = _end(run)
    sent = re.search(r"Queries sent:\s+(\d+)", said)
    print(f"dnsperf sent {sent[1] if sent else '?'}, {pods.changes} pods came or went; {last}")
    return 0


def _restart(lab: Lab, queries: Path, rate: int, times: int) -> int:
    load = _load(lab, queries, rate, 24 * 3600)
    before = _left()
    took_s: list[float] = []
    try:
        for number in range(times):
            began_s = time.monotonic()
            with _tracer(lab) as run:
                took_s.append(time.monotonic() - began_s)
                if number % 2:
                    run.process.kill()
                    run.process.wait()
                else:
                    _end(run)
    finally:
        load.terminate()
        load.communicate()
    time.sleep(2)
    after = _left()
    print(
        f"{times} starts, until it traced: {statistics.median(took_s):.1f} s in the median, "
        f"{max(took_s):.1f} s at most; left behind, before and after:"
    )
    for what, number in after.items():
        print(f"  {what}: {before[what]} {number}")
    return 0 if after == before else 1


class _Pods:
    """Pods that come, ask, and go."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._number = 0
        self._there: list[str] = []
        self.changes = 0

    def change(self) -> None:
        """One more, which asks; the oldest of three goes."""
        self._number += 1
        pod = self._lab.add_pod("soak", f"pod-{self._number}")
        self._there.append(pod.full_name)
        self._lab.run(
            pod.full_name, ["dig", "+tries=1", "+time=1", f"@{_SERVICE}", "www.example.com"]
        )
        if len(self._there) > 3:
            self._lab.remove_pod(self._there.pop(0))
            self.changes += 1
        self.changes += 1


@dataclass
class _Run:
    """The tracer, and what it has said last."""

    process: subprocess.Popen[str]
    said: deque[str]
    reader: threading.Thread
    url: str


@contextmanager
def _tracer(lab: Lab, *arguments: str) -> Iterator[_Run]:
    argv = [sys.executable, "-m", "tracer", "continuous", "--pods", str(lab.pods_file),
            "--metrics", "127.0.0.1:0", *arguments]  # fmt: skip
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        if process.stderr is None:
            raise AssertionError
        for line in process.stderr:
            said = json.loads(line)
            if said["msg"] == "tracing":
                lines: deque[str] = deque(maxlen=20)
                # Who reads no more would hold up the tracer, once the pipe is full.
                reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
                reader.start()
                yield _Run(process, lines, reader, said["metrics"])
                return
        raise BenchError("dnstrace did not start")
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _end(run: _Run) -> str:
    run.process.send_signal(signal.SIGTERM)
    status = run.process.wait(_START_S)
    run.reader.join(1.0)
    if status:
        raise BenchError(f"dnstrace failed: {''.join(run.said)}")
    return run.said[-1].rstrip()


def _load(lab: Lab, queries: Path, rate: int, seconds: float) -> subprocess.Popen[str]:
    argv = ["dnsperf", "-s", _SERVICE, "-d", str(queries), "-l", str(int(seconds)),
            "-Q", str(rate), "-c", "20"]  # fmt: skip
    process: subprocess.Popen[str] = lab.popen(
        _CLIENT, argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process


def _scrape(url: str) -> dict[str, float]:
    """Sums over labels; of tables, the entries of each; losses but for what filters left out."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own
        text = response.read().decode()
    found: dict[str, float] = {"lost": 0.0}
    for line in text.splitlines():
        match = re.fullmatch(r"(dnstrace_\w+)(\{.*\})? (\S+)", line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        found[name] = found.get(name, 0.0) + value
        if name == "dnstrace_lost_total" and "filtered" not in labels:
            found["lost"] += value
        if name == "dnstrace_table_entries":
            found["entries " + labels.split('"')[1]] = value
    return found


def _left() -> dict[str, int]:
    programs = json.loads(subprocess.check_output(["bpftool", "--json", "prog", "list"]))
    return {
        "programs": sum(str(p.get("name", "")).startswith("dnstrace") for p in programs),
        "links": len(json.loads(subprocess.check_output(["bpftool", "--json", "link", "list"]) or "[]")),
        "maps": len(json.loads(subprocess.check_output(["bpftool", "--json", "map", "list"]) or "[]")),
        "processes": len(subprocess.run(
            ["pgrep", "-f", "tracer continuous"], capture_output=True, check=False
        ).stdout.split()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
