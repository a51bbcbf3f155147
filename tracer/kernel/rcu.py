# SPDX-License-Identifier: Apache-2.0
"""Makes attaching to many devices quick.

Attaching a TCX link, and closing it, waits for an RCU grace period with the RTNL lock held (kernel
6.6, e420bed02507): some 15 ms each, twice per device, in which nobody on the node can add a pod.
An expedited grace period (Documentation/admin-guide/kernel-parameters.txt, rcupdate.rcu_expedited)
takes some 30 µs.

The knob is everybody's, so it must not stay set. If we are killed, a guard puts it back; if the
guard is killed too, as with the whole cgroup, the next start does, by a marker file that is locked
as long as we or the guard live.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_KNOB = Path("/sys/kernel/rcu_expedited")
_MARKER = Path("/run/dnstrace/rcu-expedited")  # of a directory that a pod can share with its node
# Ends when its standard input does: with us, if we are killed.
_GUARD = 'read -r _; echo 0 > "$1" && rm -f "$2"'


@contextmanager
def expedited() -> Iterator[None]:
    """Grace periods are short in the block. Where this cannot be had, they are as long as ever."""
    lock = _lock_marker()
    guard = None if lock is None else _set_knob(lock)
    try:
        yield
    finally:
        if guard is not None:
            guard.communicate()
            if guard.returncode != 0:
                _put_back()
        if lock is not None:
            os.close(lock)


def _lock_marker() -> int | None:
    """A descriptor that holds the lock; None if it is taken, or where there can be no marker."""
    while True:
        try:
            _MARKER.parent.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(_MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # whoever held it has just removed it


def _set_knob(lock: int) -> subprocess.Popen[bytes] | None:
    """Starts the guard and sets the knob. None, and no marker, if that is not possible."""
    try:
        if os.fstat(lock).st_size:  # left by one that was killed with its guard
            _KNOB.write_text("0")
        if _KNOB.read_text().strip() != "0":
            _MARKER.unlink()
            return None  # somebody else's wish, and theirs to end
        os.write(lock, b"set\n")
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "dnstrace-guard", _KNOB, _MARKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
            pass_fds=[lock],  # locked until it is done
        )
    except OSError:
        _put_back()
        return None
    with suppress(OSError):  # a read-only /sys, as in most containers
        _KNOB.write_text("1")
    return guard


def _put_back() -> None:
    """If even this is refused, the marker stays for the next start."""
    with suppress(OSError):
        if _KNOB.read_text().strip() != "0":
            _KNOB.write_text("0")
        _MARKER.unlink(missing_ok=True)
