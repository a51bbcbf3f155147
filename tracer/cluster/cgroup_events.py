# SPDX-License-Identifier: Apache-2.0
"""Cgroups as they are made and removed.

fanotify tells of a whole hierarchy with one mark, and of each cgroup that is removed it tells the id,
so that even one that has gone before anybody looked is known. For cgroupfs that takes CAP_SYS_ADMIN and
Linux 6.6, which gave such file systems an fsid. Else inotify watches one directory each, and what has
gone when its event is read stays unknown.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tracer.cluster.cgroup_handles import FILEID_KERNFS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READ_SIZE = 64 << 10
_READS_MAX = 64  # in one go, however many more there are
_libc = ctypes.CDLL(None, use_errno=True)

# include/uapi/linux/fanotify.h
_FAN_CLOEXEC, _FAN_NONBLOCK = 0x1, 0x2
_FAN_REPORT_FID, _FAN_REPORT_DIR_FID, _FAN_REPORT_NAME = 0x200, 0x400, 0x800
_FAN_REPORT_TARGET_FID = 0x1000
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_CREATE, _FAN_DELETE, _FAN_Q_OVERFLOW, _FAN_ONDIR = 0x100, 0x200, 0x4000, 0x40000000
_FAN_EVENT_INFO_TYPE_FID, _FAN_EVENT_INFO_TYPE_DFID_NAME = 1, 2
_FAN_EVENT = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
# info_type, pad, len; fsid; handle_bytes, handle_type, and the id if the type is FILEID_KERNFS
_FAN_INFO = struct.Struct("=BBHQIiQ")
_AT_FDCWD = -100

# include/uapi/linux/inotify.h
_IN_CREATE, _IN_DELETE, _IN_IGNORED, _IN_Q_OVERFLOW = 0x100, 0x200, 0x8000, 0x4000
_IN_ISDIR, _IN_ONLYDIR = 0x40000000, 0x01000000
_IN_EVENT = struct.Struct("=iIII")  # wd, mask, cookie, len


class Event(NamedTuple):
    """Something happened to a directory. `cgroup_id` is None if only its name is known."""

    parent_id: int
    name: str
    cgroup_id: int | None
    made: bool
    removed: bool


class Missed(Exception):
    """More happened than the kernel keeps: only looking at everything again helps."""


class Watcher(Protocol):
    """Where events come from."""

    @property
    def kind(self) -> str:
        """The kernel's name for it."""

    @property
    def complete(self) -> bool:
        """Whether all is watched that was asked for."""

    def watch(self, cgroup_id: int, path: str) -> None:
        """Asks for the events of a directory's children."""

    def read(self) -> list[Event]:
        """Those since the last call. Raises Missed."""

    def close(self) -> None:
        """Ends watching."""


class Fanotify:
    """Watches a hierarchy as a whole. Raises OSError where the kernel, or who we are, prevents it."""

    kind = "fanotify"
    complete = True

    def __init__(self, root: Path) -> None:
        report = _FAN_REPORT_FID | _FAN_REPORT_DIR_FID | _FAN_REPORT_NAME | _FAN_REPORT_TARGET_FID
        self._fd = _checked(
            _libc.fanotify_init(
                ctypes.c_uint(_FAN_CLOEXEC | _FAN_NONBLOCK | report), ctypes.c_uint(os.O_RDONLY)
            )
        )
        try:
            _checked(
                _libc.fanotify_mark(
                    self._fd,
                    ctypes.c_uint(_FAN_MARK_ADD | _FAN_MARK_FILESYSTEM),
                    ctypes.c_uint64(_FAN_CREATE | _FAN_DELETE | _FAN_ONDIR),
                    _AT_FDCWD,
                    os.fsencode(root),
                )
            )
        except OSError:
            self.close()
            raise

    def watch(self, cgroup_id: int, path: str) -> None:
        """It is watched already."""

    def read(self) -> list[Event]:
        """Those since the last call. Raises Missed."""
        found = []
        missed = False
        for buffer in _buffers(self._fd):
            at = 0
            while at < len(buffer):
                length, _, _, head, mask, _, _ = _FAN_EVENT.unpack_from(buffer, at)
                missed |= bool(mask & _FAN_Q_OVERFLOW)
                event = _fanotify_event(mask, buffer[at + head : at + length])
                if event:
                    found.append(event)
                at += length
        if missed:
            raise Missed
        return found

    def close(self) -> None:
        """Ends watching."""
        os.close(self._fd)


def _fanotify_event(mask: int, records: bytes) -> Event | None:
    parent_id = cgroup_id = None
    name = ""
    at = 0
    while at + _FAN_INFO.size <= len(records):
        kind, _, length, _, size, handle_type, number = _FAN_INFO.unpack_from(records, at)
        if size == 8 and handle_type == FILEID_KERNFS:
            if kind == _FAN_EVENT_INFO_TYPE_DFID_NAME:
                parent_id = number
                name = os.fsdecode(records[at + _FAN_INFO.size : at + length].partition(b"\0")[0])
            elif kind == _FAN_EVENT_INFO_TYPE_FID:
                cgroup_id = number
        at += max(length, 4)
    if parent_id is None or not name or not mask & _FAN_ONDIR:
        return None
    return Event(parent_id, name, cgroup_id, bool(mask & _FAN_CREATE), bool(mask & _FAN_DELETE))


class Inotify:
    """Watches directory by directory, up to `watches_max`. Raises OSError if there is none to be had."""

    kind = "inotify"

    def __init__(self, watches_max: int) -> None:
        self._left = watches_max
        self._watched: dict[int, int] = {}
        self.complete = True
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, cgroup_id: int, path: str) -> None:
        """Asks for the events of a directory's children."""
        if self._left <= 0:
            self.complete = False
            return
        mask = ctypes.c_uint32(_IN_CREATE | _IN_DELETE | _IN_ONLYDIR)
        wd = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if wd >= 0:
            self._left -= wd not in self._watched
            self._watched[wd] = cgroup_id
        elif os.path.isdir(path):  # the user's watches are used up
            self.complete = False

    def read(self) -> list[Event]:
        """Those since the last call. Raises Missed."""
        found = []
        missed = False
        for buffer in _buffers(self._fd):
            at = 0
            while at < len(buffer):
                wd, mask, _, length = _IN_EVENT.unpack_from(buffer, at)
                at += _IN_EVENT.size
                name = os.fsdecode(buffer[at : at + length].partition(b"\0")[0])
                at += length
                missed |= bool(mask & _IN_Q_OVERFLOW)
                if mask & _IN_IGNORED:
                    self._left += self._watched.pop(wd, None) is not None
                elif mask & _IN_ISDIR and wd in self._watched:
                    made, removed = bool(mask & _IN_CREATE), bool(mask & _IN_DELETE)
                    found.append(Event(self._watched[wd], name, None, made, removed))
        if missed:
            raise Missed
        return found

    def close(self) -> None:
        """Ends watching."""
        os.close(self._fd)


def _buffers(fd: int) -> Iterator[bytes]:
    for _ in range(_READS_MAX):
        try:
            buffer = os.read(fd, _READ_SIZE)
        except BlockingIOError:
            return
        yield buffer


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
