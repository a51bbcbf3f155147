# SPDX-License-Identifier: Apache-2.0
"""Reading what others write, below a directory that stands for their root.

A node's root is mounted somewhere else inside a pod, and its links are absolute; a container's root
holds whatever the container put there: a FIFO that nobody writes to, a device, a link out of it. So
every path is resolved as if the root were `/`, and nothing is opened before it is known to be a file.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# include/uapi/linux/openat2.h; the number is the same on all architectures.
_SYS_OPENAT2 = 437
_OPEN_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def read_regular(root: int, path: str, size_max: int) -> bytes | None:
    """The first bytes of a file; None if it is no regular one. Raises OSError."""
    place = _open(root, path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with open(os.open(f"/proc/self/fd/{place}", flags), "rb") as file:
            return file.read(size_max)
    finally:
        os.close(place)


class HostFiles:
    """The files of a node. What is not there, or may not be read, is None."""

    def __init__(self, root: Path) -> None:
        try:
            self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._root = -1  # as after `close`: no path below it can be opened

    def close(self) -> None:
        """Nothing can be read from now on."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def read(self, path: str, size_max: int) -> bytes | None:
        """A whole file; None also if it is larger than that."""
        try:
            content = read_regular(self._root, path, size_max + 1)
        except OSError:
            return None
        return content if content is not None and len(content) <= size_max else None

    def names(self, path: str, count_max: int) -> list[str] | None:
        """What a directory holds."""
        try:
            fd = _open(self._root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) == count_max:
                        break
            return found
        except OSError:
            return None
        finally:
            os.close(fd)

    def changed_ns(self, path: str) -> int | None:
        """When a directory's entries changed last."""
        try:
            fd = _open(self._root, path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)


def _open(root: int, path: str, flags: int) -> int:
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    made = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(root),
        os.fsencode(path),
        how,
        ctypes.c_size_t(len(how)),
    )
    if made < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(made)
