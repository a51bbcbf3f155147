# SPDX-License-Identifier: Apache-2.0
"""The load: dnsperf in a pod, asking the DNS service what pods ask."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from tracer.lab import enter, topology

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIENT = "sre/web-0"
SERVICE_IP = topology.DNS_SERVICE.ips[0]
# Names outside that the upstream resolver knows, so that the cluster's servers come to cache them.
_OUTSIDE = ("www.example.com", "mail.example.com", "www.li-rui.top", "www.ycwu314.top")
_ANSWER_TIMEOUT_S = 2
_GRACE_S = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How dnsperf is run. Its sockets have ports from `first_port` on."""

    seconds: float
    clients: int
    threads: int
    outstanding: int
    rate: int | None = None  # queries per second at most; None: as many as are answered
    first_port: int = 20000

    def lasting(self, seconds: float) -> Settings:
        """The same for another time."""
        return replace(self, seconds=seconds)

    def options(self) -> list[str]:
        """What dnsperf is told."""
        limit = [] if self.rate is None else ["-Q", str(self.rate)]
        return [
            "-c",
            str(self.clients),
            "-T",
            str(self.threads),
            "-q",
            str(self.outstanding),
            *limit,
        ]


@dataclass(frozen=True, slots=True)
class Load:
    """What dnsperf says about one run."""

    queries_per_s: float
    sent: int
    completed: int
    lost: int
    latency_avg_us: float
    rcodes: dict[str, int]


_NUMBERS = {
    "sent": re.compile(r"Queries sent:\s+(\d+)"),
    "completed": re.compile(r"Queries completed:\s+(\d+)"),
    "lost": re.compile(r"Queries lost:\s+(\d+)"),
    "queries_per_s": re.compile(r"Queries per second:\s+([\d.]+)"),
    "latency_avg_s": re.compile(r"Average Latency \(s\):\s+([\d.]+)"),
}
_RCODES = re.compile(r"Response codes:\s+(.*)")
_RCODE = re.compile(r"(\w+) (\d+) \(")


def queries() -> str:
    """Input for dnsperf: each name in both address families, as a resolver library asks.

    One lookup in two is for a service's full name (answered at once); the other goes through
    the pod's search list (NXDOMAIN each) before it gets its answer from outside.
    """
    services = [f"{s.name}.{s.namespace}.svc.{topology.CLUSTER_DOMAIN}" for s in topology.SERVICES]
    pairs = zip(services, itertools.cycle(_OUTSIDE), strict=False)
    names = itertools.chain.from_iterable((inside, *_expanded(out)) for inside, out in pairs)
    return "".join(f"{name} {family}\n" for name in names for family in ("A", "AAAA"))


def _expanded(name: str) -> Iterator[str]:
    pod = next(pod for pod in topology.PODS if pod.full_name == CLIENT)
    lines = topology.resolv_conf(pod).splitlines()
    for domain in next(line for line in lines if line.startswith("search ")).split()[1:]:
        yield f"{name}.{domain}"
    yield name


def run(settings: Settings, queries_file: Path) -> Load:
    """Runs dnsperf in the client's pod to its end."""
    argv = [
        *enter(CLIENT), "dnsperf",
        "-s", SERVICE_IP,
        "-d", str(queries_file),
        "-l", str(settings.seconds),
        "-t", str(_ANSWER_TIMEOUT_S),
        "-x", str(settings.first_port),
        *settings.options(),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            timeout=settings.seconds + _GRACE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(
            "dnsperf does not end; is a name server stuck? see the lab's logs"
        ) from error
    if done.returncode != 0:
        raise BenchError(f"dnsperf failed: {(done.stderr or done.stdout).strip()}")
    return parse(done.stdout)


def parse(text: str) -> Load:
    """The statistics at the end of dnsperf's output."""
    found = {name: pattern.search(text) for name, pattern in _NUMBERS.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise BenchError(f"dnsperf says nothing about {', '.join(missing)}:\n{text}")
    numbers = {name: float(match[1]) for name, match in found.items() if match}
    rcodes = _RCODES.search(text)
    return Load(
        numbers["queries_per_s"],
        int(numbers["sent"]),
        int(numbers["completed"]),
        int(numbers["lost"]),
        numbers["latency_avg_s"] * 1e6,
        {name: int(n) for name, n in _RCODE.findall(rcodes[1])} if rcodes else {},
    )
