# SPDX-License-Identifier: Apache-2.0
"""Runs the real `dnstrace continuous`, and reads what it serves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Run:
    """A running `dnstrace continuous`."""

    def __init__(self, *arguments: str, command: Sequence[str] = ()) -> None:
        """`command`: what it is started by."""
        start = [*command, sys.executable, "-m", "tracer", "continuous", "--metrics", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*start, "--interval", "500ms", *arguments], stderr=subprocess.PIPE, text=True
        )
        self.said: list[dict[str, Any]] = []
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(json.loads(line))
            if self.said[-1]["msg"] == "tracing":
                break
        else:
            raise AssertionError(self.said)
        self.url = str(self.said[-1]["metrics"])

    def scrape(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """The samples of each name: (labels, value)."""
        with urllib.request.urlopen(self.url, timeout=60) as response:
            text = response.read().decode()
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return found

    def counted(self) -> int:
        """Transactions, as metrics have them."""
        return int(sum(value for _, value in self.scrape().get("dnstrace_transactions_total", [])))

    def wait_for(self, number: int) -> None:
        """Until so many transactions are counted."""
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            if self.counted() >= number:
                return
            time.sleep(0.2)
        assert self.counted() == number

    def stop(self) -> dict[str, Any]:
        """Ends it as systemd does; its last words."""
        self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=120)
        self.said += map(json.loads, rest.splitlines())
        assert self.process.returncode == 0, self.said
        return self.said[-1]


@contextmanager
def running(*arguments: str, command: Sequence[str] = ()) -> Iterator[Run]:
    """One that is killed if the block does not stop it."""
    run = Run(*arguments, command=command)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
        assert run.process.stderr
        run.process.stderr.close()
