# SPDX-License-Identifier: Apache-2.0
"""All cgroups of one hierarchy, kept up to date: which there are, by id and by path.

The tree is walked once; then the kernel tells what was made and removed, as well as it can (see
cgroup_events.py). Where it cannot, or told more than was read, the tree is walked again, at most
once a second.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tracer.cluster import cgroup_handles
from tracer.cluster.cgroup_events import Event, Fanotify, Inotify, Missed, Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WALK_AGAIN_S = 1.0
_CGROUPS_MAX = 100_000  # whoever was given a cgroup may make as many below it as he likes
_WATCHES_MAX = 4096  # all of root's processes share /proc/sys/fs/inotify/max_user_watches
_WATCHES_SHARE = 4
_DEPTH_MAX = 64


class Change(NamedTuple):
    """A cgroup was made, or removed. `path` is relative to the root, and begins with "/"."""

    cgroup_id: int
    path: str
    made: bool


class CgroupTree:
    """One hierarchy. `root` is where it is mounted; ids are inode numbers, and never used twice."""

    def __init__(
        self,
        root: Path,
        *,
        watch_by: tuple[str, ...] = ("fanotify", "inotify"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root.resolve()  # as the kernel names what is below
        self.overflows = (
            0  # times that events were lost; what was made meanwhile was found by a walk
        )
        self.ignored = 0  # cgroups above the greatest number that is kept
        self._watch_by = watch_by
        self._clock = clock
        self._path_of: dict[int, str] = {}
        self._id_of: dict[str, int] = {}
        self._watcher: Watcher | None = None
        self._mount: int | None = None
        self._unplaced: list[Event] = []
        self._walk_due = False
        self._walked_at = 0.0

    @property
    def watched_by(self) -> str:
        """How changes are learned of."""
        if self._watcher is None:
            return "walking"
        return self._watcher.kind if self._watcher.complete else f"{self._watcher.kind}, walking"

    def start(self) -> list[Change]:
        """All there are. Raises OSError if there is no such directory."""
        is_cgroupfs = cgroup_handles.is_cgroupfs(self.root)
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if is_cgroupfs:
            self._mount = root
        else:
            os.close(root)
        self._watcher = self._best_watcher(is_cgroupfs=is_cgroupfs)
        return self._walk()

    def close(self) -> None:
        """Ends watching."""
        if self._watcher:
            self._watcher.close()
            self._watcher = None
        if self._mount is not None:
            os.close(self._mount)
            self._mount = None

    def poll(self) -> list[Change]:
        """What has changed since the last call."""
        changes: list[Change] = []
        if self._watcher:
            try:
                changes += self._apply(self._watcher.read())
            except Missed:
                self.overflows += 1
                self._walk_due = True
        if (
            self._walk_due or self._watcher is None or not self._watcher.complete
        ) and self._clock() - self._walked_at >= _WALK_AGAIN_S:
            changes += self._walk()
        return changes

    def path(self, cgroup_id: int) -> str | None:
        """Of a cgroup that is there, as far as is known."""
        return self._path_of.get(cgroup_id)

    def find(self, cgroup_id: int) -> list[Change]:
        """Asks the kernel for a cgroup that is not known: what is new, of this or others."""
        if self._mount is not None:
            try:
                path = cgroup_handles.path_of(self._mount, cgroup_id)
            except cgroup_handles.Gone:
                return []
            except OSError:  # no CAP_DAC_READ_SEARCH
                os.close(self._mount)
                self._mount = None
            else:
                # Above the root, where that is not the whole hierarchy's, paths are as they come.
                inside = path.removeprefix(str(self.root).rstrip("/"))
                return list(self._add(cgroup_id, inside))
        if self._clock() - self._walked_at >= _WALK_AGAIN_S:
            return self._walk()
        return []

    def _best_watcher(self, *, is_cgroupfs: bool) -> Watcher | None:
        # A mark on any other file system would tell of all that happens there.
        if is_cgroupfs and "fanotify" in self._watch_by:
            with suppress(OSError):
                return Fanotify(self.root)
        if "inotify" in self._watch_by:
            with suppress(OSError):
                return Inotify(min(_WATCHES_MAX, _watches_allowed() // _WATCHES_SHARE))
        return None

    def _apply(self, events: list[Event]) -> Iterator[Change]:
        for event in events:
            if event.made:
                path = self._path_of_event(event, {})
                # Its events begin with this watch, so what it holds by now is looked for.
                yield from self._walk_below(path) if path else ()
        # fanotify tells ids with removals. Of those that had gone before they were looked for, a
        # parent's comes after its children's, perhaps not before the next call.
        removed = [event for event in events if event.removed]
        late, self._unplaced = self._unplaced, []
        gone = {e.cgroup_id: e for e in (*late, *removed) if e.cgroup_id is not None}
        for event in late:
            yield from self._apply_removed(event, gone)
        for event in removed:
            changes = list(self._apply_removed(event, gone))
            yield from changes
            if not changes and event.cgroup_id is not None:
                self._unplaced.append(event)

    def _apply_removed(self, event: Event, gone: dict[int, Event]) -> Iterator[Change]:
        cgroup_id = event.cgroup_id
        if cgroup_id is None:
            path = self._path_of_event(event, {})
            cgroup_id = self._id_of.get(path) if path else None
            if path and cgroup_id and self._id_now(path) != cgroup_id:  # else it was made again
                yield from self._remove(cgroup_id)
        elif cgroup_id in self._path_of:
            yield from self._remove(cgroup_id)
        elif path := self._path_of_event(event, gone):
            yield Change(cgroup_id, path, made=True)
            yield Change(cgroup_id, path, made=False)

    def _path_of_event(self, event: Event, gone: dict[int, Event]) -> str | None:
        """`gone` tells of directories above that went as well, perhaps before anybody knew them."""
        names = [event.name]
        while event.parent_id not in self._path_of:
            parent = gone.get(event.parent_id)
            if parent is None or len(names) > _DEPTH_MAX:
                return None
            event = parent
            names.append(event.name)
        return "/".join((self._path_of[event.parent_id].rstrip("/"), *reversed(names)))

    def _add(self, cgroup_id: int, path: str) -> Iterator[Change]:
        if cgroup_id in self._path_of:
            return
        if len(self._path_of) >= _CGROUPS_MAX:
            self.ignored += 1
            return
        before = self._id_of.get(path)
        if before is not None:
            yield from self._remove(before)
        self._path_of[cgroup_id] = path
        self._id_of[path] = cgroup_id
        if self._watcher:
            self._watcher.watch(cgroup_id, self._full(path))
        yield Change(cgroup_id, path, made=True)

    def _remove(self, cgroup_id: int) -> Iterator[Change]:
        path = self._path_of.pop(cgroup_id, None)
        if path is not None:
            self._id_of.pop(path, None)
            yield Change(cgroup_id, path, made=False)

    def _walk(self) -> list[Change]:
        self._walk_due = False
        self._walked_at = self._clock()
        changes: list[Change] = []
        found = set()
        for cgroup_id, path in self._directories("/"):
            found.add(cgroup_id)
            changes += self._add(cgroup_id, path)
        for cgroup_id in self._path_of.keys() - found:
            if self._id_now(self._path_of[cgroup_id]) != cgroup_id:
                changes += self._remove(cgroup_id)
        return changes

    def _walk_below(self, path: str) -> Iterator[Change]:
        for cgroup_id, directory in self._directories(path):
            yield from self._add(cgroup_id, directory)

    def _directories(self, top: str) -> Iterator[tuple[int, str]]:
        """A directory and all below it, each before what it holds is looked for."""
        left = [top]
        while left:
            path = left.pop()
            try:
                yield os.stat(self._full(path)).st_ino, path
                # It is watched by now. A cgroup with none below it has two links, "." and its name.
                if self._mount is not None and os.stat(self._full(path)).st_nlink == 2:
                    continue
            except OSError:
                continue
            with suppress(OSError), os.scandir(self._full(path)) as entries:
                left += [
                    f"{path.rstrip('/')}/{entry.name}"
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False)
                ]

    def _id_now(self, path: str) -> int | None:
        try:
            return os.stat(self._full(path)).st_ino
        except OSError:
            return None

    def _full(self, path: str) -> str:
        return f"{self.root}{path}"


def _watches_allowed() -> int:
    try:
        return int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    except (OSError, ValueError):
        return _WATCHES_MAX
