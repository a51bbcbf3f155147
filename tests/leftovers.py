# SPDX-License-Identifier: Apache-2.0
"""What a lab leaves on the machine, for the tests that it leaves nothing."""

import re
from pathlib import Path

from tracer.lab import cgroups, state, topology


def leftovers() -> dict[str, list[str]]:
    """What a lab leaves on the machine, by kind."""
    mount = cgroups.find_mount(Path("/proc/self/mountinfo").read_text())
    assert mount is not None
    return {
        "namespaces": ours_in("/run/netns"),
        "/etc/netns": ours_in("/etc/netns"),
        "cgroups": [str(path) for path in mount.glob(cgroups.PARENT)],
        "run directory": [str(path) for path in (state.RUN_DIR,) if path.exists()],
        "processes": lab_processes(),
        "mounts": re.findall(r"/run/\S*dnstrace-\S*", Path("/proc/self/mountinfo").read_text()),
    }


NOTHING: dict[str, list[str]] = {
    "namespaces": [],
    "/etc/netns": [],
    "cgroups": [],
    "run directory": [],
    "processes": [],
    "mounts": [],
}


def ours_in(directory: str) -> list[str]:
    return sorted(name for name in names_in(directory) if name.startswith(topology.PREFIX))


def names_in(directory: str) -> list[str]:
    path = Path(directory)
    return [entry.name for entry in path.iterdir()] if path.exists() else []


def lab_processes() -> list[str]:
    """Command lines of the living processes that name the lab's run directory."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(state.RUN_DIR) in line:
            found.append(line)
    return found
