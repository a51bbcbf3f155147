# SPDX-License-Identifier: Apache-2.0
"""Questions from the lab's pods, and what its servers and nodes then know of them."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from tests.tracing import let_finish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracer.lab import Lab, RunningPod

CLIENTS = ["sre/web-0", "sre/api-0", "sre/worker-0", "default/shop-0", "sre/host-agent"]
_fresh = itertools.count()


def dig(lab: Lab, pod: str, *arguments: str) -> str:
    """What dig +short says in a pod; each question is asked once."""
    argv = ["dig", "+short", "+tries=1", "+time=3", *arguments]
    result = lab.run(pod, argv)
    return str(result.stdout).strip()


def asked(lab: Lab, pod: str, *arguments: str) -> tuple[str, str]:
    """(rcode, who answered as dig sees it) of one question; "" for what there was not."""
    said = str(lab.run(pod, ["dig", "+tries=1", "+time=3", *arguments]).stdout)
    rcode = re.search(r"status: (\w+)", said)
    server = re.search(r"^;; SERVER: ([^#]+)#", said, re.MULTILINE)
    return rcode.group(1) if rcode else "", server.group(1) if server else ""


def fresh_name() -> str:
    """A name that no cache has."""
    return f"t{os.getpid()}-{next(_fresh)}.bench.example.com"


@contextmanager
def held(lab: Lab, replica: RunningPod) -> Iterator[None]:
    """What is asked in the block is received in it, and looked at when it ends."""
    procs = (lab.cgroup_mount / replica.cgroup / "cgroup.procs").read_text().split()
    assert procs
    for pid in map(int, procs):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in map(int, procs):
            os.kill(pid, signal.SIGCONT)


def log_text(lab: Lab, server: str) -> str:
    """A server's log, with all that it has answered: CoreDNS answers first, and then writes."""
    log = lab.query_log(server)
    let_finish(lab.state.process(log.stem).pid)
    return log.read_text()


class Logged(NamedTuple):
    """One query as a server's log has it."""

    ip: str
    port: int
    id: int
    protocol: str


def log_entries(lab: Lab, server: str, name: str) -> list[Logged]:
    """Each query for a name (without its final dot) in a server's log, in the order of the answers."""
    lines = log_text(lab, server).splitlines()
    found = re.compile(rf'\[INFO\] (\S+):(\d+) - (\d+) "\w+ IN {re.escape(name)}\. (udp|tcp) ')
    return [
        Logged(match[1].strip("[]"), int(match[2]), int(match[3]), match[4])
        for line in lines
        if (match := found.match(line))
    ]


def logged(lab: Lab, server: str, name: str) -> list[tuple[str, str]]:
    """(client's address, protocol) of each query for a name in a server's log."""
    return [(entry.ip, entry.protocol) for entry in log_entries(lab, server, name)]


def tracked(lab: Lab, node: str, address: str, protocol: str) -> list[str]:
    """A node's conntrack entries of what was addressed to an address."""
    family = "ipv6" if ":" in address else "ipv4"
    argv = ["conntrack", "-L", "-f", family, "-p", protocol, "-d", address]
    return str(lab.node_exec(node, argv).stdout).splitlines()


def rule_packets(lab: Lab, node: str, *, chain: str, having: str, family: int = 4) -> int:
    """How many packets the rules in a chain have counted that have a text in them."""
    tool = "iptables-save" if family == 4 else "ip6tables-save"
    saved = str(lab.node_exec(node, [tool, "--counters"]).stdout)
    rules = re.findall(r"^\[(\d+):\d+\] -A (\S+) (.*)$", saved, re.MULTILINE)
    return sum(int(count) for count, name, rule in rules if name == chain and having in rule)


def on_the_wire(pcap: Path) -> list[tuple[str, str]]:
    """(source, destination) of each UDP packet, as tcpdump writes them: address.port."""
    argv = ["tcpdump", "-nn", "-r", str(pcap), "udp"]
    shown = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return re.findall(r" IP6? (\S+) > (\S+): ", shown)
