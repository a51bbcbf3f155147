# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of this machine: finding them, and entering them for a moment."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.kernel import rtnetlink

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def own() -> int:
    """The inode number of this thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def paths() -> dict[int, str]:
    """Inode number to a path that opens it: named namespaces, and those of all processes.

    A namespace that is held by nothing but a socket or a descriptor is not found.
    """
    found: dict[int, str] = {}
    with suppress(OSError):
        for name in sorted(os.listdir("/run/netns")):
            path = f"/run/netns/{name}"
            with suppress(OSError):
                found.setdefault(os.stat(path).st_ino, path)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        path = f"/proc/{pid}/ns/net"
        with suppress(OSError):  # the process has gone, or is a kernel thread
            target = os.readlink(path)
            found.setdefault(int(target[5:-1]), path)
    return found


def open_namespace(inode: int, path: str) -> int | None:
    """A descriptor of the namespace, or None if the path leads elsewhere by now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_ino == inode:
        return fd
    os.close(fd)
    return None


@contextmanager
def entered(fd: int) -> Iterator[None]:
    """Runs the block in another network namespace; only this thread is moved, and moved back.

    To be where one is already takes no privilege.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _move(fd)
        try:
            yield
        finally:
            _move(home)
    finally:
        os.close(home)


def _move(fd: int) -> None:
    if os.fstat(fd).st_ino != own():
        _setns(fd)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"entering a network namespace: {os.strerror(number)}")


def device_count() -> int:
    """How many devices this thread's namespace has."""
    return len(socket.if_nameindex())


def addresses() -> dict[int, set[str]]:
    """Addresses of the namespaces that nodes may have as their own, by inode number.

    Those of most pods are left out: nodes have more devices than loopback and one more.
    """
    found: dict[int, set[str]] = {}
    home = own()
    for inode, path in paths().items():
        fd = open_namespace(inode, path)
        if fd is None:
            continue
        try:
            with entered(fd):
                if inode == home or device_count() > 2:
                    found[inode] = rtnetlink.addresses()
        except OSError:
            continue  # it is going, or out of reach
        finally:
            os.close(fd)
    return found


def cgroup2_root() -> Path | None:
    """Where the cgroup v2 tree is mounted (/proc/self/mountinfo), or None.

    In a cgroup namespace, that may be a part of it only: see `whole_cgroup2`.
    """
    part = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if right.startswith("cgroup2 "):
            path = Path(fields[4].encode().decode("unicode_escape"))
            if whole_cgroup2(path):
                return path
            if fields[3] == "/":
                part = part or path
    return part


def cgroup2_fix() -> str:
    """The commands that mount the cgroup v2 tree here, where it is not."""
    # Beside v1 hierarchies, the directory is a tmpfs; else it is sysfs's own mount point.
    at = Path("/sys/fs/cgroup")
    if not os.path.ismount(at):
        return f"mount -t cgroup2 none {at}"
    return f"mkdir -p {at}/unified && mount -t cgroup2 none {at}/unified"


def whole_cgroup2(path: Path) -> bool:
    """Whether a cgroup is the root of all, rather than that of a cgroup namespace."""
    try:
        return os.stat(path).st_ino == 1
    except OSError:
        return False
