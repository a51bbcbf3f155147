# SPDX-License-Identifier: Apache-2.0
"""Where the cgroup tree is found, on a node and in a container with a cgroup namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.namespaces import new_namespace
from tracer.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHOW = """
from tracer import doctor
from tests.namespaces import new_namespace
from tracer.kernel import netns
print(netns.cgroup2_root())
print(doctor._cgroup()[1:3])
"""
# Enters the cgroup, then hides the node's mounts behind those that a container has.
IN_A_CONTAINER = """
echo 0 > "$1/cgroup.procs" && shift
exec unshare --cgroup --mount sh -c '
    for mounted in $(findmnt --noheadings --list --output TARGET --types cgroup2); do
        umount --lazy "$mounted"
    done
    mount -t cgroup2 none "$0" && exec "$@"' "$@"
"""


@pytest.fixture
def cgroup(root: None) -> Iterator[Path]:
    """A cgroup of the test's own."""
    del root
    mounted = netns.cgroup2_root()
    assert mounted is not None
    made = mounted / f"dnstrace-test-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


def test_root_of_the_node_is_the_whole_tree(cgroup: Path) -> None:
    assert netns.whole_cgroup2(cgroup.parent)
    assert not netns.whole_cgroup2(cgroup)
    assert not netns.whole_cgroup2(cgroup / "nowhere")


def test_root_of_a_container_is_found_and_noted(
    cgroup: Path, project: Path, tmp_path: Path
) -> None:
    command: list[str | Path] = [
        "sh",
        "-c",
        IN_A_CONTAINER,
        "sh",
        cgroup,
        tmp_path,
        sys.executable,
        "-c",
        SHOW,
    ]
    shown = subprocess.check_output(command, cwd=project, text=True).splitlines()
    note = f"{tmp_path}: only the cgroups of this container are known"
    assert shown == [str(tmp_path), str(("note", note))]


def test_block_that_moves_on_comes_back() -> None:
    """Also where it began in the namespace that the thread was in already."""
    home = netns.own()
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    with netns.entered(fd), new_namespace() as other:
        netns._setns(other)
        assert netns.own() != home
    os.close(fd)
    assert netns.own() == home
