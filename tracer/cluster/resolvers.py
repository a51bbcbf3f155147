# SPDX-License-Identifier: Apache-2.0
"""The resolv.conf that a client's resolver reads: that of its mount namespace, not the node's.

What lies there is up to the container, so it is read as host_files.py reads such things.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from tracer.cluster.host_files import read_regular
from tracer.cluster.resolvconf import ResolvConf, parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tracer.transaction import Client

_KEEP_S = 30.0
_KNOWN_MAX = 4096
_FILE_MAX = 64 << 10


class Resolvers:
    """Finds and remembers resolver configurations, by container.

    `cgroups_of(client)` names groups with other processes of the same container: the one that
    asked has often gone already.
    """

    def __init__(self, cgroups_of: Callable[[Client], list[Path]]) -> None:
        self._cgroups_of = cgroups_of
        self._known: dict[tuple[int | None, int | None], tuple[float, ResolvConf | None]] = {}

    def of(self, client: Client) -> ResolvConf | None:
        """The client's configuration, or None if no process of it can be found."""
        if client.pid is None:
            return None
        key = (client.netns, client.cgroup_id)
        now = time.monotonic()
        known = self._known.get(key)
        if known and now - known[0] < _KEEP_S:
            return known[1]
        found = self._find(client)
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[key] = (now, found)
        return found

    def _find(self, client: Client) -> ResolvConf | None:
        for pid in (client.pid, *self._others(client)):
            with suppress(OSError):
                content = _read_in_root(pid, client.netns)
                if content is not None:
                    return parse(content.decode("utf-8", "replace"))
        return None

    def _others(self, client: Client) -> list[int]:
        pids: list[int] = []
        for cgroup in self._cgroups_of(client):
            with suppress(OSError, ValueError):
                pids += map(int, (cgroup / "cgroup.procs").read_text().split()[:8])
        return pids


def _read_in_root(pid: int | None, netns: int | None) -> bytes | None:
    """The file as the process sees it; None if it is not in this network namespace.

    Raises OSError.
    """
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
    try:
        if netns is not None and os.stat("ns/net", dir_fd=process).st_ino != netns:
            return None  # the number was given to another process
        root = os.open("root", os.O_PATH | os.O_DIRECTORY, dir_fd=process)
    finally:
        os.close(process)
    try:
        return read_regular(root, "etc/resolv.conf", _FILE_MAX)
    finally:
        os.close(root)
