# SPDX-License-Identifier: Apache-2.0
"""The containers' cgroups, all below one cgroup v2 directory of the lab's own.

The v2 hierarchy is looked up in /proc/self/mountinfo, because beside v1 it is rarely at
/sys/fs/cgroup. Where there is none, one is mounted in the run directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

from tracer.lab.commands import run
from tracer.lab.errors import HOST_LACKS, LabError

PARENT = "dnstrace-lab"
_KILL_TIMEOUT_S = 10.0


def find_mount(mountinfo: str) -> Path | None:
    """Mount point of the whole cgroup v2 hierarchy in the text of a mountinfo file, or None."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if after.startswith("cgroup2 ") and fields[3] == "/" and Path(fields[4]).is_dir():
            return Path(fields[4])
    return None


def mount(own: Path) -> Path:
    """The cgroup v2 mount point; mounted at `own` if the host has none."""
    found = find_mount(Path("/proc/self/mountinfo").read_text())
    if found is not None:
        return found
    own.mkdir(parents=True, exist_ok=True)
    try:
        run(["mount", "-t", "cgroup2", "none", str(own)])
    except LabError as error:
        raise LabError(
            f"no cgroup v2 here ({error}): boot with systemd.unified_cgroup_hierarchy=1",
            status=HOST_LACKS,
        ) from error
    return own


def unmount(own: Path) -> None:
    """Undoes `mount` if it mounted anything."""
    if os.path.ismount(own):
        run(["umount", str(own)])


def make(directory: Path) -> None:
    """Raises LabError if the hierarchy is read-only, as it is inside most containers."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"cannot make cgroup {directory}: {error.strerror}; "
            "run the lab on the host or in a privileged container",
            status=HOST_LACKS,
        ) from error


def contains_self(parent: Path) -> bool:
    """Whether this very process is in a cgroup below `parent`."""
    return str(os.getpid()) in _pids(parent)


def remove(parent: Path) -> None:
    """Kills every process below `parent` and removes the cgroups; LabError if some won't go."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while parent.is_dir():
        for pid in _pids(parent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if _remove_empty(parent):
            return
        if time.monotonic() > deadline:
            raise LabError(f"cgroup {parent} stays busy: look at its cgroup.procs, then retry")
        time.sleep(0.002)


def _pids(parent: Path) -> set[str]:
    pids: set[str] = set()
    for directory, _, _ in os.walk(parent):
        try:
            pids.update(Path(directory, "cgroup.procs").read_text().split())
        except OSError:
            continue
    return pids


def _remove_empty(parent: Path) -> bool:
    """Removes what can be; whether all is gone."""
    for directory, _, _ in os.walk(parent, topdown=False):
        try:
            Path(directory).rmdir()
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
                raise
    return not parent.exists()
