# SPDX-License-Identifier: Apache-2.0
"""From a cgroup's id to its path, without a walk: cgroupfs takes ids as file handles.

A handle of type FILEID_KERNFS (include/linux/exportfs.h) is the 64-bit id alone (kernel 5.5). Opening
one takes CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FILEID_KERNFS = 0xFE
_CGROUP_MAGIC, _CGROUP2_MAGIC = 0x27E0EB, 0x63677270  # include/uapi/linux/magic.h
_STATFS_SIZE = 256  # more than any architecture's; the type is its first member, a long
_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_uint64),
    )


class Gone(Exception):
    """No cgroup has this id (any more)."""


def is_cgroupfs(path: Path) -> bool:
    """Whether it is in a cgroup hierarchy, of either version."""
    found = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.statfs(os.fsencode(path), found) != 0:
        return False
    return ctypes.c_long.from_buffer(found).value in (_CGROUP_MAGIC, _CGROUP2_MAGIC)


def path_of(mount: int, cgroup_id: int) -> str:
    """The absolute path, given a descriptor of any directory of the same mount.

    Raises Gone, or OSError where handles cannot be opened.
    """
    handle = _FileHandle(8, FILEID_KERNFS, cgroup_id)
    fd = _libc.open_by_handle_at(mount, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        if number in (errno.ESTALE, errno.ENOENT):
            raise Gone
        raise OSError(number, os.strerror(number))
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
