# SPDX-License-Identifier: Apache-2.0
"""What is on this machine of the lab: the run directory, its lock, and what is written there.

`owned` names the namespaces before they are made, so that a lab that died half-way can be
removed to the last piece. `lab.json` is written last: where it is, the lab is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.lab import shape
from tracer.lab.topology import Node, Pod

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_DIR = Path("/run/dnstrace-lab")
OWNED = RUN_DIR / "owned"
STATE = RUN_DIR / "lab.json"
PODS_FILE = RUN_DIR / "pods.json"
LOGS = RUN_DIR / "log"
POD_FILES = RUN_DIR / "pods"
SERVER_FILES = RUN_DIR / "servers"
OVERLAYS = RUN_DIR / "overlay"
ENTER = RUN_DIR / "enter"
OWN_CGROUP_MOUNT = RUN_DIR / "cgroup"


@dataclass(frozen=True)
class Options:
    """How the lab was brought up; the same options mean the same lab."""

    overlay: bool = False
    resolver: str = "auto"
    quiet_servers: bool = False
    iptables: str = "auto"
    api: bool = False
    node_local: str = "no"
    dns_port: int = 53


@dataclass(frozen=True)
class Process:
    """A process of the lab. `start` is its start time in clock ticks since boot."""

    name: str
    pid: int
    start: int

    def alive(self) -> bool:
        return start_time(self.pid) == self.start


@dataclass(frozen=True)
class State:
    """A complete lab. `boot` tells it from what an earlier boot left behind.

    `api_port` is the API server's on 127.0.0.1, None without one; its processes are among
    `processes` unless it was stopped. `added` are the pods that started since.
    """

    options: Options
    boot: str
    cgroup_mount: str
    served_by: str
    processes: tuple[Process, ...]
    api_port: int | None = None
    added: tuple[Pod, ...] = ()

    @property
    def pods(self) -> tuple[Pod, ...]:
        return (*shape.of(self.options).pods, *self.added)

    def process(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name)

    def alive(self) -> bool:
        return self.boot == boot_id() and all(process.alive() for process in self.processes)

    def api_alive(self) -> bool:
        """Whether the API server runs; it may have been stopped, or have ended by itself."""
        return any(
            process.name == "kube-apiserver" and process.alive() for process in self.processes
        )

    def whole(self) -> bool:
        """Whether it also has the API server that it was brought up with."""
        return self.alive() and self.options.api == self.api_alive()


def start_time(pid: int) -> int | None:
    """Start time in clock ticks since boot; None if there is no such process, or only its end."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def load() -> State | None:
    """The complete lab on this machine, dead or alive; None if there is none."""
    try:
        data = json.loads(STATE.read_text())
        return State(
            Options(**data["options"]),
            data["boot"],
            data["cgroup_mount"],
            data["served_by"],
            tuple(Process(**process) for process in data["processes"]),
            data["api_port"],
            tuple(_pod(pod) for pod in data["added"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _pod(data: dict[str, Any]) -> Pod:
    labels = tuple((name, value) for name, value in data["more_labels"])
    return Pod(**{**data, "node": Node(**data["node"]), "more_labels": labels})


def save(state: State) -> None:
    write_whole(STATE, json.dumps(asdict(state), indent=1))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that no reader ever sees half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


@contextmanager
def locked() -> Iterator[int]:
    """Holds the lab's lock, and gives its file descriptor.

    The run directory itself is locked, and made for it. Whoever holds the lock may remove the
    directory, so a lock got on one that is no longer there does not count.
    """
    while True:
        RUN_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            fd = os.open(RUN_DIR, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_current(fd):
                yield fd
                return
        finally:
            os.close(fd)


def _is_current(fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), RUN_DIR.stat())
    except FileNotFoundError:
        return False
