# SPDX-License-Identifier: Apache-2.0
"""The knob of grace periods is set in the block, and never stays set, whoever is killed."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tracer.kernel import rcu

if TYPE_CHECKING:
    from collections.abc import Iterator

# Says the guard's process id, and then waits in the block for its end.
IN_THE_BLOCK = """
import sys, pathlib
from tracer.kernel import rcu
rcu._KNOB, rcu._MARKER = map(pathlib.Path, sys.argv[1:])
with rcu.expedited():
    tasks = pathlib.Path("/proc/thread-self/children").read_text()
    print(tasks, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the knob, which others on this machine may set at any time."""
    knob = tmp_path / "knob"
    knob.write_text("0")
    monkeypatch.setattr(rcu, "_KNOB", knob)
    monkeypatch.setattr(rcu, "_MARKER", tmp_path / "marker")
    return knob


@pytest.fixture
def real_knob(root: None) -> Iterator[Path]:
    del root
    yield rcu._KNOB
    rcu._KNOB.write_text("0")


def is_set(knob: Path) -> bool:
    return knob.read_text().strip() == "1"


def kill_in_the_block(*, with_guard: bool) -> None:
    """SIGKILL, as by `systemctl kill -s KILL` or a container's end."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_THE_BLOCK, rcu._KNOB, rcu._MARKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        (guard,) = map(int, process.stdout.readline().split())
        watched = os.pidfd_open(guard)
        if with_guard:
            process.send_signal(signal.SIGSTOP)
            os.kill(guard, signal.SIGKILL)
        process.kill()
    with open(watched) as ended:
        assert select.select([ended], [], [], 10)[0]


def test_knob_is_set_in_the_block_only(knob: Path) -> None:
    with rcu.expedited():
        assert is_set(knob)
        assert rcu._MARKER.exists()
    assert not is_set(knob)
    assert not rcu._MARKER.exists()


def test_knob_that_is_set_already_stays(knob: Path) -> None:
    knob.write_text("1")
    with rcu.expedited():
        assert is_set(knob)
    assert is_set(knob)
    assert not rcu._MARKER.exists()


@pytest.mark.parametrize("before", ["0", "1"])
def test_exception_in_the_block_comes_out(knob: Path, before: str) -> None:
    knob.write_text(before)
    with pytest.raises(OSError, match="No such device"), rcu.expedited():
        raise OSError(errno.ENODEV, "No such device")
    assert knob.read_text().strip() == before


def test_block_runs_where_there_is_no_knob(knob: Path) -> None:
    knob.unlink()
    with rcu.expedited():
        pass
    assert not knob.exists()


def test_block_runs_where_there_can_be_no_marker(
    knob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The knob is left alone, as nobody could put it back for sure."""
    monkeypatch.setattr(rcu, "_MARKER", knob / "marker")
    with rcu.expedited():
        assert not is_set(knob)


def test_second_instance_does_without_and_leaves_the_knob_to_the_first(knob: Path) -> None:
    with rcu.expedited():
        with rcu.expedited():
            assert is_set(knob)
        assert is_set(knob)
        assert rcu._MARKER.exists()
    assert not is_set(knob)


def test_guard_puts_the_knob_back_when_we_are_killed(knob: Path) -> None:
    kill_in_the_block(with_guard=False)
    assert not is_set(knob)
    assert not rcu._MARKER.exists()


def test_next_start_puts_the_knob_back_when_all_are_killed(knob: Path) -> None:
    kill_in_the_block(with_guard=True)
    assert is_set(knob)
    with rcu.expedited():
        assert is_set(knob)
    assert not is_set(knob)
    assert not rcu._MARKER.exists()


def test_guard_that_is_killed_alone_is_not_needed(knob: Path) -> None:
    with rcu.expedited():
        (guard,) = map(int, Path("/proc/thread-self/children").read_text().split())
        os.kill(guard, signal.SIGKILL)
    assert not is_set(knob)
    assert not rcu._MARKER.exists()


def test_real_knob_is_0_after_all_were_killed(real_knob: Path) -> None:
    kill_in_the_block(with_guard=True)
    with rcu.expedited():
        pass
    assert not is_set(real_knob)
