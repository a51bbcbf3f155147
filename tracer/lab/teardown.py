# SPDX-License-Identifier: Apache-2.0
"""Removing the lab: whatever is written down as owned, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from tracer.lab import cgroups, state
from tracer.lab.commands import netns_path, run
from tracer.lab.errors import LabError

NETNS_FILES = Path("/etc/netns")


def tear_down(lock: int) -> None:
    """Removes a lab in any state of completeness; LabError names what would not go."""
    mountinfo = Path("/proc/self/mountinfo").read_text()
    mount = cgroups.find_mount(mountinfo)
    if mount is not None:
        parent = mount / cgroups.PARENT
        if cgroups.contains_self(parent):
            raise LabError("this process is in the lab: run `dnstrace lab` outside of its pods")
        cgroups.remove(parent)
    owned = _owned()
    names = [value for kind, value in owned if kind == "netns"]
    present = [name for name in names if os.path.lexists(netns_path(name))]
    if present:
        run(
            ["ip", "-force", "-batch", "-"],
            stdin="".join(f"netns del {n}\n" for n in present),
            keep_fd=lock,
        )
    for name in names:
        link = NETNS_FILES / name
        if link.is_symlink():
            link.unlink()
    if ("directory", str(NETNS_FILES)) in owned:
        with contextlib.suppress(OSError):  # somebody else may use it by now
            NETNS_FILES.rmdir()
    cgroups.unmount(state.OWN_CGROUP_MOUNT)
    shutil.rmtree(state.RUN_DIR)


def own(names: tuple[str, ...]) -> None:
    """Writes down what is about to be made; LabError if some of it is there already."""
    _require_absent(names)
    lines = [f"netns {name}" for name in names]
    if not NETNS_FILES.exists():
        lines.append(f"directory {NETNS_FILES}")
    state.write_whole(state.OWNED, "\n".join(lines) + "\n")


def own_more(name: str) -> None:
    """The same for one more namespace of a lab that is up; once written down, it stays there."""
    _require_absent((name,))
    if ("netns", name) not in _owned():
        state.write_whole(state.OWNED, state.OWNED.read_text() + f"netns {name}\n")


def _require_absent(names: tuple[str, ...]) -> None:
    for name in names:
        for path in (netns_path(name), str(NETNS_FILES / name)):
            if os.path.lexists(path):
                raise LabError(
                    f"{path} exists and is not the lab's: `ip netns del {name}`"
                    if path.startswith("/run")
                    else f"{path} exists and is not the lab's: remove it"
                )


def _owned() -> list[tuple[str, str]]:
    try:
        lines = state.OWNED.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(kind, value) for kind, _, value in (line.partition(" ") for line in lines)]
