# SPDX-License-Identifier: Apache-2.0
"""What /proc tells of processes: cgroups and network namespaces, and which hierarchies there are."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.cluster.cgroup_paths import ContainerCgroup, parse_cgroup_path

if TYPE_CHECKING:
    from collections.abc import Iterable

_TEXT_MAX = 64 << 10
_PIDS_MAX = 8  # of one cgroup: all are in the same namespace, but for oddities
_DIRECTORIES_MAX = 16
# Every container has a group in each of these; `name=systemd` is not everywhere.
_V1_CONTROLLERS = ("pids", "memory", "cpu", "devices", "freezer", "name=systemd")


class Processes:
    """Processes under one /proc."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc

    def container(self, pid: int) -> tuple[bool, ContainerCgroup | None]:
        """(whether it is there, whose cgroup it is in), by any hierarchy of either version."""
        found = None
        text = _read(f"{self._proc}/{pid}/cgroup")
        for line in text.splitlines():
            _, _, path = line.split(":", 2) if line.count(":") > 1 else ("", "", "")
            cgroup = parse_cgroup_path(path)
            if cgroup and _tells_more(cgroup, found):
                found = cgroup
        return bool(text), found

    def netns(self, pid: int | str) -> int | None:
        """The inode number of a process's network namespace."""
        try:
            return os.stat(f"{self._proc}/{pid}/ns/net").st_ino
        except OSError:
            return None

    def netns_of_cgroups(self, directories: Iterable[str]) -> int | None:
        """That of the first process in any of the first of them."""
        for directory in islice(directories, _DIRECTORIES_MAX):
            for pid in _read(f"{directory}/cgroup.procs").split()[:_PIDS_MAX]:
                netns = self.netns(pid) if pid != "0" else None  # 0: outside our pid namespace
                if netns is not None:
                    return netns
        return None

    def cgroup1_root(self) -> Path | None:
        """Where one of the v1 hierarchies is mounted that containers have groups in."""
        mounted = {}
        for line in _read(f"{self._proc}/self/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            fields = left.split()
            kind, _, options = right.partition(" ")
            if kind == "cgroup" and fields[3] == "/":
                for option in options.rpartition(" ")[2].split(","):
                    mounted[option] = Path(fields[4].encode().decode("unicode_escape"))
        return next((mounted[name] for name in _V1_CONTROLLERS if name in mounted), None)


def _tells_more(cgroup: ContainerCgroup, than: ContainerCgroup | None) -> bool:
    return than is None or _known(cgroup) > _known(than)


def _known(cgroup: ContainerCgroup) -> tuple[bool, bool]:
    return cgroup.pod_uid is not None, cgroup.container_id is not None


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_TEXT_MAX).decode("utf-8", "replace")
    except OSError:
        return ""
