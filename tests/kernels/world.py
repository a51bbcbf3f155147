# SPDX-License-Identifier: Apache-2.0
"""What the cases are made of: the lab, tools inside its pods, and independent witnesses.

A case is traffic, made once, and a check of what a tracer said of it. All cases' traffic passes
while tracers with each set of hooks run side by side, so that the same packets are judged by both,
and a slow emulated machine compiles the programs no more often than it has to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.tracing import Exchange, Trace, exchanges
from tracer.lab.lab import RunningPod, enter_node

if TYPE_CHECKING:
    from pathlib import Path

    from tracer.lab import Lab

HOOK_SETS = ("kprobe", "tracepoint")


class NotOffered(Exception):
    """This kernel lacks what a case needs. The message says what."""


@dataclass(frozen=True)
class Seen:
    """What a tracer with one set of hooks said of all traffic."""

    hooks: str
    trace: Trace

    def named(self, name: str) -> list[dict[str, Any]]:
        """The transactions of one question, which only one case asks."""
        return self.trace.named(name)

    def by_process(self, pid: int) -> list[dict[str, Any]]:
        """The transactions of one process."""
        return [t for t in self.trace.transactions if t["client"]["pid"] == pid]


Check = Callable[[Seen], None]


@dataclass(frozen=True)
class Case:
    """One row of the matrix. `traffic` raises NotOffered where the kernel lacks what it needs."""

    title: str
    traffic: Callable[[World], Check]

    @property
    def name(self) -> str:
        return self.traffic.__name__


@dataclass
class World:
    """The lab, and who watches it besides the tracers."""

    lab: Lab
    tmp: Path
    iptables: dict[str, str]  # node name: nft or legacy
    pcaps: dict[str, Path] = field(default_factory=dict)
    _read: dict[str, list[Exchange]] = field(default_factory=dict)

    def dig(self, pod: str, *arguments: str) -> int:
        """Runs one dig over UDP, which may ask several questions; returns its pid."""
        argv = ["dig", "+notcp", "+ignore", "+tries=1", "+time=4", *arguments]
        process = self.lab.popen(pod, argv, stdout=subprocess.DEVNULL)
        process.wait()
        return process.pid

    def python(self, pod: str, code: str, *arguments: str) -> tuple[int, str]:
        """Runs Python in a pod; returns its pid and what it printed."""
        argv = [sys.executable, "-I", "-S", "-c", code, *arguments]
        process = self.lab.popen(pod, argv, stdout=subprocess.PIPE, text=True)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return process.pid, said

    def popen_on_node(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a server on a node, in none of its pods; the options are Popen's."""
        return subprocess.Popen([*enter_node(node), *argv], **options)

    def cpus(self) -> set[int]:
        """The CPUs that processes may run on."""
        return os.sched_getaffinity(0)

    def node(self, node: str, command: str, stdin: str | None = None) -> str:
        """Runs a command on a node; it must succeed."""
        done = self.lab.node_exec(node, command.split(), input=stdin)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return str(done.stdout)

    def offered(self, node: str, command: str, stdin: str | None = None) -> None:
        """The same, for what a kernel may lack."""
        done = self.lab.node_exec(node, command.split(), input=stdin)
        if done.returncode != 0:
            raise NotOffered(f"{command}: {done.stderr.strip().splitlines()[0]}")

    def witnessed(self, pod: str) -> list[Exchange]:
        """What tcpdump saw at a pod's eth0, once all traffic has passed."""
        if pod not in self._read:
            self._read[pod] = exchanges(self.pcaps[pod])
        return self._read[pod]

    def arrived(self, replica: RunningPod) -> list[Exchange]:
        """What tcpdump saw a DNS server's pod asked, without what that asked others itself."""
        own = {replica.ipv4, replica.ipv6}
        return [e for e in self.witnessed(replica.full_name) if e.server in own]

    def replica(self, node: str) -> Any:
        """The DNS server's pod on a node."""
        return next(pod for pod in self.lab.dns_pods if pod.node == node)
