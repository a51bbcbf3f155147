# SPDX-License-Identifier: Apache-2.0
"""What can watch the load: nothing, empty programs, tcpdump, the tracer.

Each is a context: on entry it watches, on exit it has stopped and its figures are complete. No
process of these outlives its context, nor the benchmark.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from bench import empty, load, machine
from bench.errors import BenchError
from tracer.lab import Lab, enter_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 30.0
_SETTLE_S = 0.3
_CLIENTS_NODE = "node1"
_ARMED = "tracing "
_ARMED_IN_LOG = '"msg":"tracing"'
_TRANSACTION = b'{"event":"transaction"'
_SUMMARY = b'{"event":"summary"'
_LOST_IN_WORDS = {
    "ring_full": "transactions? lost",
    "table_full": "quer(?:y|ies) not followed",
    "undecodable": "DNS messages? not readable",
    "filtered": "quer(?:y|ies) left out",
    "preempted": "packets? not looked at",
}


@dataclass(slots=True)
class Figures:
    """What a variant tells about one run. None, or missing: it does not say."""

    pid: int | None = None
    armed_s: float | None = None  # from its start to when it watched
    devices: int | None = None
    cpu_s: float | None = None  # from when it watched to its end
    idle_kib: dict[str, int] = field(default_factory=dict)  # memory before the load
    memory_kib: dict[str, int] = field(default_factory=dict)  # and after it
    transactions: int | None = None
    of_client: int | None = None  # those that dnsperf's pod began
    lost: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, int] = field(default_factory=dict)
    output_bytes: int | None = None
    packets: dict[str, int] = field(default_factory=dict)  # tcpdump's count


Watch: TypeAlias = "Callable[[Lab, Path], AbstractContextManager[Figures]]"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of watching; `watch` is given the lab, and a directory for files."""

    name: str
    what: str
    watch: Watch


@contextmanager
def untraced(_lab: Lab, _scratch: Path) -> Iterator[Figures]:
    """Nothing watches."""
    yield Figures()


@contextmanager
def empty_programs(_lab: Lab, _scratch: Path) -> Iterator[Figures]:
    """Programs that return at once, on all hooks of the tracer."""
    began = time.monotonic()
    with empty.attached() as devices:
        yield Figures(armed_s=time.monotonic() - began, devices=devices.count())


@contextmanager
def tcpdump(_lab: Lab, scratch: Path) -> Iterator[Figures]:
    """tcpdump writes the DNS packets of the client's node to a file."""
    capture = scratch / "tcpdump.pcap"
    argv = [
        *enter_node(_CLIENTS_NODE),
        "tcpdump", "-i", "any", "-n", "-Z", "root", "-w", str(capture), "port", "53",
    ]  # fmt: skip
    began = time.monotonic()
    with _process(argv, stdout=subprocess.DEVNULL) as process:
        words = _Words(process)
        words.until("listening on")
        figures = Figures(pid=process.pid, armed_s=time.monotonic() - began)
        spent_before_s = machine.cpu_s(process.pid)
        yield figures
        figures.memory_kib = machine.memory_kib(process.pid)
        figures.cpu_s = _stop(process, signal.SIGINT) - spent_before_s
        for count, what in re.findall(r"(\d+) packets? (\w+)", words.rest()):
            figures.packets[what] = int(count)
    figures.output_bytes = capture.stat().st_size
    capture.unlink()


def tracer(*arguments: str) -> Watch:
    """dnstrace with these arguments, its stdout in a file."""

    @contextmanager
    def watch(lab: Lab, scratch: Path) -> Iterator[Figures]:
        argv = [sys.executable, "-m", "tracer", *arguments, "--pods", str(lab.pods_file)]
        shown = scratch / "dnstrace.out"
        began = time.monotonic()
        with shown.open("wb") as stdout, _process(argv, stdout=stdout) as process:
            words = _Words(process)
            words.until(_ARMED_IN_LOG if "continuous" in arguments else _ARMED)
            figures = Figures(pid=process.pid, armed_s=time.monotonic() - began)
            time.sleep(_SETTLE_S)
            figures.idle_kib = machine.memory_kib(process.pid)
            spent_before_s = machine.cpu_s(process.pid)
            yield figures
            time.sleep(_SETTLE_S)
            if process.poll() is not None:
                raise BenchError(f"dnstrace ended by itself: {words.rest().strip()}")
            figures.memory_kib = machine.memory_kib(process.pid)
            spent_s = _stop(process, signal.SIGINT)
            figures.cpu_s = spent_s - spent_before_s
            if process.returncode != 0:
                raise BenchError(f"dnstrace failed: {words.rest().strip()}")
            if "continuous" in arguments:
                _take_log(figures, words.rest())
            elif "--json" in arguments:
                _take_json(figures, shown, lab.pod(load.CLIENT).ipv4)
            else:
                _take_words(figures, words.rest())
        figures.output_bytes = shown.stat().st_size
        shown.unlink()

    return watch


def _take_json(figures: Figures, shown: Path, client: str) -> None:
    """The summary, and how many transactions the client's address began."""
    begins = f'"client":{{"ip":"{client}"'.encode()
    figures.of_client = 0
    with shown.open("rb") as lines:
        for line in lines:
            if line.startswith(_TRANSACTION):
                figures.of_client += begins in line
            elif line.startswith(_SUMMARY):
                summary: dict[str, Any] = json.loads(line)
                figures.transactions = summary["transactions"]
                figures.lost = summary["lost"]
                figures.unmatched = summary["unmatched"]


def _take_words(figures: Figures, said: str) -> None:
    """The same from the summary for people, which is silent about what there was none of."""
    said = " ".join(said.split())

    def count(words: str) -> int:
        found = re.search(rf"([\d,]+) {words}", said)
        return int(found[1].replace(",", "")) if found else 0

    figures.transactions = count("transactions? in ")
    figures.lost = {name: count(words) for name, words in _LOST_IN_WORDS.items()}


def _take_log(figures: Figures, said: str) -> None:
    """The same from the last line of the log, which is silent about what there was none of."""
    last: dict[str, Any] = json.loads(said.splitlines()[-1])
    figures.transactions = last["transactions"]
    figures.lost = {name: last.get(f"lost_{name}", 0) for name in _LOST_IN_WORDS}


class _Words:
    """What a process says on stderr."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stderr is None:
            raise AssertionError
        self._stream: IO[bytes] = process.stderr
        self._said = b""

    def until(self, wanted: str) -> None:
        """Waits until it says that."""
        end = time.monotonic() + _START_TIMEOUT_S
        while wanted.encode() not in self._said:
            wait = end - time.monotonic()
            ready = wait > 0 and select.select([self._stream], [], [], wait)[0]
            part = os.read(self._stream.fileno(), 65536) if ready else b""
            if not part:
                raise BenchError(f"did not start: {self._said.decode(errors='replace').strip()}")
            self._said += part

    def rest(self) -> str:
        """All that it has said; it must have ended."""
        self._said += self._stream.read()
        return self._said.decode(errors="replace")


@contextmanager
def _process(argv: Sequence[str], stdout: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that only we end: Ctrl-C does not reach it, and our own end, however, kills it."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _stop(process: subprocess.Popen[bytes], number: signal.Signals) -> float:
    """Asks a process to end, and waits for it. The processor time of all its life."""
    process.send_signal(number)
    end = time.monotonic() + _STOP_TIMEOUT_S
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            raise BenchError(f"{process.args!r} does not end")
        time.sleep(0.01)


FILTERED = tracer("--json", "--rcode", "SERVFAIL")
VARIANTS = (
    Variant("untraced", "nothing watches", untraced),
    Variant("empty", "programs that return at once, on the tracer's own hooks", empty_programs),
    Variant("tcpdump", f"tcpdump -i any -w FILE port 53 on {_CLIENTS_NODE}", tcpdump),
    Variant("live", "dnstrace > FILE", tracer()),
    Variant("json", "dnstrace --json > FILE", tracer("--json")),
    Variant("continuous", "dnstrace continuous", tracer("continuous")),
    # Not --failed: NXDOMAIN is a failure, and more than a third of what pods ask.
    Variant("filtered", "dnstrace --json --rcode SERVFAIL: all traced, none shown", FILTERED),
)
