# SPDX-License-Identifier: Apache-2.0
"""Containers and pods as the node itself tells of them: no API server is asked.

The kernel gives a cgroup's path, the path gives pod and container ids (cgroup_paths.py), and files of
kubelet and the container runtime give names to these (runtimes.py). Everything happens in `poll`, which
costs one or two system calls as long as nothing has changed. A container that is found is looked at
again a few times: its names may not be written yet, and its first process is in the runtime's network
namespace before it is in its own. One that has gone is remembered, because what it did last is
often told later.
"""

from __future__ import annotations

import heapq
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.cluster.cgroup_paths import parse_cgroup_path
from tracer.cluster.cgroups import CgroupTree, Change
from tracer.cluster.host_files import HostFiles
from tracer.cluster.known_containers import Container, KnownContainers
from tracer.cluster.local_records import (
    NOT_A_CONTAINER,
    LocalContainer,
    LocalPod,
    NotAContainer,
)
from tracer.cluster.processes import Processes
from tracer.cluster.runtimes import Names, NotKubernetes, Runtimes

if TYPE_CHECKING:
    from collections.abc import Callable

_UNKNOWN_MAX = 4096
_UNKNOWN_S = 1.0
_LOOKS_S = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # from one look to the next
_LOOK_LATER_S = 30.0
_LOOKS_AT_ONCE = 100
_SETTLED_S = 2.0  # after that, a container's first process is where it belongs
_ONLY_SEEN = -(1 << 64)  # below it are numbers for cgroups that only a process told of


class LocalContainers:
    """All containers of this node, by cgroup, process and network namespace.

    `cgroup_root` is where the v2 hierarchy is mounted, if it is; a v1 hierarchy is found in `proc`.
    `host_root` is where the node's files are seen, which a pod may have mounted elsewhere.
    """

    def __init__(
        self,
        cgroup_root: Path | None,
        host_root: Path = Path("/"),
        proc: Path = Path("/proc"),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._known = KnownContainers()
        self._processes = Processes(proc)
        self._files = HostFiles(host_root)
        self._runtimes = Runtimes(self._files, clock)
        v1_root = self._processes.cgroup1_root()
        self._v2 = CgroupTree(cgroup_root, clock=clock) if cgroup_root else None
        self._v1 = CgroupTree(v1_root, clock=clock) if v1_root else None
        self._unknown: dict[int, float] = {}
        self._only_seen = _ONLY_SEEN
        self._due: list[tuple[float, str]] = []

    @property
    def version(self) -> int:
        """Another number whenever anything about containers has changed."""
        return self._known.version

    def start(self) -> None:
        """Finds what is there. A hierarchy that cannot be read is done without."""
        self._known.host_netns = self._processes.netns(1)
        now = self._clock()
        for tree in self._trees():
            try:
                # They have been there before.
                self._absorb(tree, tree.start(), now - _SETTLED_S)
            except OSError:
                self._without(tree)
        while self._due and self._due[0][0] <= now:
            self._look_again(now)

    def close(self) -> None:
        """Ends watching."""
        for tree in self._trees():
            tree.close()
        self._files.close()

    def poll(self) -> bool:
        """Takes in what happened since; whether anything about containers has changed."""
        now = self._clock()
        before = self.version
        self._absorb_all(now)
        self._look_again(now)
        self._known.forget(now)
        return self.version != before

    def container(self, cgroup_id: int) -> LocalContainer | NotAContainer | None:
        """Whose cgroup it is; None if it was gone before anybody knew it."""
        if cgroup_id not in self._known:
            self._find(cgroup_id)
        return self._known.by_cgroup(cgroup_id)

    def by_pid(self, pid: int) -> LocalContainer | NotAContainer | None:
        """Whose process it is; None if it has gone, or is out of sight."""
        there, cgroup = self._processes.container(pid)
        if cgroup is None:
            return NOT_A_CONTAINER if there else None
        now = self._clock()
        container = self._known.of(cgroup)
        if container is None:
            self._absorb_all(now)
            container = self._known.of(cgroup)
        if container is None:
            # No hierarchy that can be read has it: it is remembered as those that have gone are.
            self._only_seen -= 1
            container = self._known.made(self._only_seen, cgroup, None, now)
            self._look_soon(container, now)
        if not container.live:
            container.gone_at = now  # not yet, as this process tells
            self._known.place(container, self._processes.netns(pid))
        if not container.looks:
            self._look(container)
        return self._known.view(container)

    def pod_of_netns(self, inode: int) -> LocalPod | None:
        """The pod that alone has this network namespace."""
        return self._known.pod_of_netns(inode, self._clock())

    def containers(self) -> list[LocalContainer]:
        """Those that are there."""
        return self._known.live()

    def directories(self, cgroup_id: int) -> list[Path]:
        """The cgroups of its container that are there, the container's own first."""
        return [Path(path) for path in self._known.directories(cgroup_id)]

    def watched_by(self) -> dict[str, str]:
        """How changes are learned of, by hierarchy."""
        return {str(tree.root): tree.watched_by for tree in self._trees()}

    def overflows(self) -> int:
        """How often more happened than was told. Who was gone before the walk after it is unknown."""
        return sum(tree.overflows for tree in self._trees())

    def _trees(self) -> list[CgroupTree]:
        return [tree for tree in (self._v2, self._v1) if tree]

    def _without(self, tree: CgroupTree) -> None:
        tree.close()
        if tree is self._v2:
            self._v2 = None
        else:
            self._v1 = None

    def _find(self, cgroup_id: int) -> None:
        now = self._clock()
        known_unknown = now - self._unknown.get(cgroup_id, -_UNKNOWN_S) < _UNKNOWN_S
        if self._v2 is None or not cgroup_id or known_unknown:
            return
        self._absorb_all(now)
        if cgroup_id not in self._known:
            self._absorb(self._v2, self._v2.find(cgroup_id), now)
        if cgroup_id not in self._known:
            if len(self._unknown) >= _UNKNOWN_MAX:
                self._unknown.clear()
            self._unknown[cgroup_id] = now

    def _absorb_all(self, now: float) -> None:
        for tree in self._trees():
            self._absorb(tree, tree.poll(), now)

    def _absorb(self, tree: CgroupTree, changes: list[Change], now: float) -> None:
        sign = 1 if tree is self._v2 else -1  # ids of the v1 hierarchy are nothing to the kernel
        for change in changes:
            number = sign * change.cgroup_id
            if change.made:
                cgroup = parse_cgroup_path(change.path)
                if cgroup is None:
                    self._known.made_by_host(number)
                else:
                    directory = f"{tree.root}{change.path}"
                    self._look_soon(self._known.made(number, cgroup, directory, now), now)
            else:
                self._known.removed(number, now)

    def _look_soon(self, container: Container, now: float) -> None:
        if not container.is_due and not container.looks:
            container.is_due = True
            heapq.heappush(self._due, (now + _LOOKS_S[0], container.key))

    def _look_again(self, now: float) -> None:
        for _ in range(_LOOKS_AT_ONCE):
            if not self._due or self._due[0][0] > now:
                return
            _, key = heapq.heappop(self._due)
            container = self._known.by_key(key)
            if container is None:
                continue
            self._look(container)
            container.looks += 1
            container.is_due = self._is_worth_a_look(container, now)
            if container.is_due:
                tried = container.looks < len(_LOOKS_S)
                wait_s = _LOOKS_S[container.looks] if tried else _LOOK_LATER_S
                heapq.heappush(self._due, (now + wait_s, key))

    def _is_worth_a_look(self, container: Container, now: float) -> bool:
        pod = self._known.pod_of(container)
        if container.container_id is None:
            named = pod is None or pod.name is not None
        else:
            named = container.names is not None
        if container.gone_at is not None or pod is None:
            return not named and container.looks < len(_LOOKS_S)
        placed = container.netns is not None or container.container_id is None
        return not named or not placed or now - container.found_at < _SETTLED_S

    def _look(self, container: Container) -> None:
        if container.names is None and container.container_id:
            found = self._runtimes.container(container.container_id)
            if isinstance(found, NotKubernetes) or (found and _is_of(found, container.pod_uid)):
                self._known.name(container, found)
        pod = self._known.pod_of(container)
        if pod and container.pod_uid and pod.name is None:
            known = self._runtimes.pod(container.pod_uid)
            if known:
                self._known.name_pod(container, *known)
        if container.live and container.container_id:
            # The container's own cgroup has the shortest path; those below may be elsewhere.
            nearest = sorted(container.live.values(), key=len)
            self._known.place(container, self._processes.netns_of_cgroups(nearest))


def _is_of(names: Names, uid: str | None) -> bool:
    """Whether the kernel says so, too."""
    return not uid or not names.uid or names.uid.replace("_", "-") == uid.replace("_", "-")
