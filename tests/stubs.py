# SPDX-License-Identifier: Apache-2.0
"""Resolvers on a pod's loopback that ask the cluster's DNS, as they are met outside of Kubernetes.

systemd-resolved listens on 127.0.0.53 and caches. Docker's embedded DNS is at 127.0.0.11 by name
only: rules in the container's namespace lead from port 53 to a port that dockerd opened there, one
for UDP and one for TCP; dockerd itself is in no container's cgroup. Here each is a CoreDNS.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.lab import cgroups, enter, entering, go_build, state, topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tracer.lab import Lab, RunningPod

RESOLVED_IP = "127.0.0.53"
DOCKER_IP = "127.0.0.11"
DOCKER_UDP_PORT, DOCKER_TCP_PORT = 41053, 35053
_DOCKER_CGROUP = "system.slice/docker.service"
_START_TIMEOUT_S = 20.0

_DOCKER_RULES = f"""\
*nat
:DOCKER_OUTPUT - [0:0]
:DOCKER_POSTROUTING - [0:0]
-A OUTPUT -d {DOCKER_IP}/32 -j DOCKER_OUTPUT
-A POSTROUTING -d {DOCKER_IP}/32 -j DOCKER_POSTROUTING
-A DOCKER_OUTPUT -d {DOCKER_IP}/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination {DOCKER_IP}:{DOCKER_TCP_PORT}
-A DOCKER_OUTPUT -d {DOCKER_IP}/32 -p udp -m udp --dport 53 -j DNAT --to-destination {DOCKER_IP}:{DOCKER_UDP_PORT}
-A DOCKER_POSTROUTING -s {DOCKER_IP}/32 -p tcp -m tcp --sport {DOCKER_TCP_PORT} -j SNAT --to-source :53
-A DOCKER_POSTROUTING -s {DOCKER_IP}/32 -p udp -m udp --sport {DOCKER_UDP_PORT} -j SNAT --to-source :53
COMMIT
"""
_NO_DOCKER_RULES = f"""\
*nat
-D OUTPUT -d {DOCKER_IP}/32 -j DOCKER_OUTPUT
-D POSTROUTING -d {DOCKER_IP}/32 -j DOCKER_POSTROUTING
-F DOCKER_OUTPUT
-F DOCKER_POSTROUTING
-X DOCKER_OUTPUT
-X DOCKER_POSTROUTING
COMMIT
"""


@dataclass(frozen=True)
class Stub:
    """A running one: where a pod asks it, its process, and what it was asked."""

    ip: str
    pid: int
    log: Path


@contextmanager
def systemd_resolved(lab: Lab, pod: str, tmp_path: Path) -> Iterator[Stub]:
    """On 127.0.0.53 of a pod, whose resolv.conf names it as long as the block lasts."""
    argv = enter(pod)
    with (
        _serving(argv, tmp_path, RESOLVED_IP, (topology.DNS_PORT,), "cache 30") as stub,
        _resolv_conf(lab.pod(pod), f"nameserver {RESOLVED_IP}\noptions edns0 trust-ad\n"),
    ):
        yield stub


@contextmanager
def docker_dns(lab: Lab, pod: str, tmp_path: Path) -> Iterator[Stub]:
    """At 127.0.0.11 of a pod, whose resolv.conf names it as long as the block lasts."""
    running = lab.pod(pod)
    cgroup = lab.cgroup_mount / cgroups.PARENT / _DOCKER_CGROUP
    cgroups.make(cgroup)
    name = f"docker-{running.netns_name}"
    entering.write_script(name, entering.outside_script(running.netns_name, cgroup))
    ports = (DOCKER_UDP_PORT, DOCKER_TCP_PORT)
    with ExitStack() as stack:
        argv = entering.command(name)
        stub = stack.enter_context(_serving(argv, tmp_path, DOCKER_IP, ports))
        _restore(lab, pod, _DOCKER_RULES)
        stack.callback(_restore, lab, pod, _NO_DOCKER_RULES)
        content = f"nameserver {DOCKER_IP}\noptions ndots:0\n"
        stack.enter_context(_resolv_conf(running, content))
        yield stub


def _restore(lab: Lab, pod: str, rules: str) -> None:
    lab.run(pod, ["iptables-restore", "--noflush"], input=rules, check=True)


@contextmanager
def _serving(
    prefix: Sequence[str], tmp_path: Path, ip: str, ports: Sequence[int], *plugins: str
) -> Iterator[Stub]:
    keys = " ".join(f".:{port}" for port in ports)
    lines = [f"bind {ip}", "errors", "log", *plugins, f"forward . {topology.DNS_SERVICE.ips[0]}"]
    body = "".join(f"    {line}\n" for line in lines)
    corefile, log = tmp_path / f"Corefile.{ip}", tmp_path / f"{ip}.log"
    corefile.write_text(f"{keys} {{\n{body}}}\n")
    argv = [*prefix, str(go_build.binary(go_build.COREDNS)), "-conf", str(corefile)]
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as server:
        try:
            _wait(server, log)
            yield Stub(ip, server.pid, log)
        finally:
            server.terminate()


def _wait(server: subprocess.Popen[bytes], log: Path) -> None:
    """CoreDNS tells its version once it listens everywhere."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "CoreDNS-" not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@contextmanager
def _resolv_conf(pod: RunningPod, nameserver: str) -> Iterator[None]:
    """The pod's file is written over, not replaced: it is what is mounted on /etc/resolv.conf."""
    path = state.POD_FILES / f"{pod.namespace}_{pod.name}" / "resolv.conf"
    before = path.read_text()
    search = next(line for line in before.splitlines() if line.startswith("search "))
    path.write_text(f"{search}\n{nameserver}")
    try:
        yield
    finally:
        path.write_text(before)
