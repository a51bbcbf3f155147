# SPDX-License-Identifier: Apache-2.0
"""How a trace ends: with all that was seen, whether somebody reads it slowly, late or not at all."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.tracing import DNSTRACE, tracing
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

PIPE_BYTES = 4096
COUNT = 3000  # what fits into the ring, and takes several batches to read


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab(quiet_servers=True)
    lab.up()
    yield lab
    lab.down()


def ask(lab: Lab, tmp_path: Path, count: int = COUNT) -> None:
    """Asks that many queries, each answered."""
    queries = tmp_path / "queries.txt"
    queries.write_text("web.bench.example.com A\n" * count)
    argv = ["dnsperf", "-s", "10.96.0.10", "-d", str(queries), "-n", "1", "-q", "20"]
    said = lab.run("sre/web-0", argv).stdout
    assert re.search(rf"Queries completed: +{count} ", said), said


def test_what_lies_in_the_ring_when_it_is_ended_is_told(lab: Lab, tmp_path: Path) -> None:
    arguments = ["--pods", str(lab.pods_file), "--namespace", "sre"]
    with tracing(*arguments, tmp_path=tmp_path) as tracer:
        tracer.process.send_signal(signal.SIGSTOP)
        ask(lab, tmp_path)
        tracer.process.send_signal(signal.SIGINT)
        tracer.process.send_signal(signal.SIGCONT)
        trace = tracer.wait(120)
    told = [t for t in trace.transactions if t["status"] == "answered"]
    assert len(told) == trace.summary["transactions"] == COUNT
    assert not any(n for what, n in trace.summary["lost"].items() if what != "filtered")


@contextmanager
def stuck_tracer(
    lab: Lab, tmp_path: Path, stderr: int, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A tracer that cannot go on, since nobody reads the pipe that its output goes to."""
    tracer = subprocess.Popen(
        [*DNSTRACE, "--json", "--pods", str(lab.pods_file), "--namespace", "sre"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        pipesize=PIPE_BYTES,
        env={**os.environ, **environment},
    )
    try:
        said = tracer.stderr or tracer.stdout
        assert said
        assert any(b"tracing" in line for line in iter(said.readline, b""))
        ask(lab, tmp_path, 1000)
        assert tracer.stdout
        assert select.select([tracer.stdout], [], [], 30)[0]
        yield tracer
    finally:
        tracer.kill()
        tracer.wait()
        for stream in filter(None, (tracer.stdout, tracer.stderr)):
            stream.close()


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def traced_into_a_pipe(
    lab: Lab, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[bytes]]:
    """Where Python buffers what is written to stdout, and where it does not."""
    environment = {"PYTHONUNBUFFERED": request.param}
    with stuck_tracer(lab, tmp_path, subprocess.PIPE, environment) as tracer:
        yield tracer


def test_reader_that_reads_nothing_holds_up_the_end_for_a_moment_only(
    traced_into_a_pipe: subprocess.Popen[bytes],
) -> None:
    tracer = traced_into_a_pipe
    tracer.send_signal(signal.SIGINT)
    assert tracer.wait(60) == 1
    assert tracer.stderr
    said = tracer.stderr.read().decode().splitlines()
    assert said == [
        "dnstrace: nobody reads the output: the rest of it, and the summary, were not written"
    ]


def test_nobody_who_reads_either_stream_holds_up_the_end(lab: Lab, tmp_path: Path) -> None:
    """Both are one pipe, as where a log's driver hangs."""
    with stuck_tracer(lab, tmp_path, subprocess.STDOUT, {}) as tracer:
        tracer.send_signal(signal.SIGINT)
        assert tracer.wait(60) == 1


def test_reader_that_is_late_but_reads_is_told_all(
    traced_into_a_pipe: subprocess.Popen[bytes],
) -> None:
    """In several batches, with an alarm between any two of them."""
    tracer = traced_into_a_pipe
    tracer.send_signal(signal.SIGINT)
    assert tracer.stdout
    descriptor = tracer.stdout.fileno()
    began_s, lines = time.monotonic(), b""
    while piece := os.read(descriptor, PIPE_BYTES):
        lines += piece
        time.sleep(0.02)  # all of it takes longer than a reader may take that does not read
    assert time.monotonic() - began_s > 5
    assert tracer.wait(60) == 0
    events = [json.loads(line) for line in lines.splitlines()]
    assert sum(event["event"] == "transaction" for event in events) == 1000
    assert events[-1]["event"] == "summary"
