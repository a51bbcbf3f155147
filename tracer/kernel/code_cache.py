# SPDX-License-Identifier: Apache-2.0
"""What was compiled, kept for the next start: compiling takes most of one.

A file's name tells of everything that its content depends on, so a file is never out of date, only
unused, and then it goes. Whatever cannot be read, written or trusted costs time alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from tracer.kernel.bpf import MapShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DIRECTORY = Path("/var/cache/dnstrace")
DIRECTORY_VARIABLE = "DNSTRACE_CACHE"  # of the environment: another directory, or "" for none
_FORM = "1"  # of files
_FILES_MAX = 8
_FILE_LEN_MAX = 4 << 20
_PART_S = 600.0  # what takes longer to be written was never finished
_LIBRARIES = Path("/etc/ld.so.cache")  # is written whenever a shared library is installed


class Code(NamedTuple):
    """Instructions of programs, in which maps stand by their position in `maps`."""

    instructions: Mapping[str, bytes]
    maps: tuple[MapShape, ...]


def name_of(inputs: Iterable[str]) -> str:
    """The file for what BCC makes of `inputs`. Raises ImportError without BCC."""
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        raise ImportError("bcc")
    version = Path(found.origin).with_name("version.py")
    compiler = [found.origin]
    with suppress(OSError):
        compiler += [version.read_text(), str(version.stat().st_mtime_ns)]
    with suppress(OSError):
        compiler.append(str(_LIBRARIES.stat().st_mtime_ns))
    said = orjson.dumps([_FORM, MapShape._fields, compiler, list(inputs)])
    return f"{hashlib.sha256(said).hexdigest()}.json"


def find(name: str) -> Code | None:
    """What was kept under that name. None if nothing was, or if others could have written it."""
    try:
        where = _opened()
    except OSError:
        return None
    try:
        content = _read(name, where)
        kept = orjson.loads(content)
        instructions = {key: bytes.fromhex(code) for key, code in kept["instructions"].items()}
        maps = tuple(MapShape(*shape) for shape in kept["maps"])
        with suppress(OSError):  # nothing may be written there
            os.utime(name, dir_fd=where, follow_symlinks=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    finally:
        os.close(where)
    return Code(instructions, maps)


def keep(name: str, code: Code) -> None:
    """For the next start."""
    content = orjson.dumps({
        "instructions": {key: each.hex() for key, each in code.instructions.items()},
        "maps": [list(shape) for shape in code.maps],
    })  # fmt: skip
    with suppress(OSError):
        with suppress(FileExistsError):
            _directory().mkdir(mode=0o700)
        where = _opened()
        try:
            _write(name, _digest(content) + b"\n" + content, where)
            _drop_the_oldest(where, name)
        finally:
            os.close(where)


def _directory() -> Path:
    """Raises OSError if nothing is to be kept."""
    elsewhere = os.environ.get(DIRECTORY_VARIABLE)
    if elsewhere is None:
        return DIRECTORY
    if not elsewhere:
        raise FileNotFoundError(f"{DIRECTORY_VARIABLE} is empty")
    return Path(elsewhere)


def _opened() -> int:
    """The directory, if it is ours alone. Raises OSError."""
    where = os.open(_directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not _is_ours(os.fstat(where)):
        os.close(where)
        raise PermissionError(f"{_directory()} is not ours alone")
    return where


def _is_ours(found: os.stat_result) -> bool:
    """Whether nobody else could have written there."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(name: str, where: int) -> bytes:
    """What was written under that name. Raises OSError and ValueError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=where), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode) or not _is_ours(found):
            raise PermissionError(f"{name} is not ours alone")
        digest, _, content = stream.read(_FILE_LEN_MAX).partition(b"\n")
    if digest != _digest(content):
        raise ValueError(f"{name} is damaged")
    return content


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _write(name: str, content: bytes, where: int) -> None:
    part = f".{os.urandom(8).hex()}.part"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=where)
    try:
        with open(file, "wb") as stream:
            stream.write(content)
        os.rename(part, name, src_dir_fd=where, dst_dir_fd=where)
    except OSError:
        os.unlink(part, dir_fd=where)
        raise


def _drop_the_oldest(where: int, newest: str) -> None:
    """Also parts of a run that was killed. What is not a file of ours stays."""
    found = []
    for name in os.listdir(where):
        with suppress(OSError):
            status = os.stat(name, dir_fd=where, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                continue
            if name.endswith(".json") and name != newest:
                found.append((status.st_mtime, name))
            elif name.endswith(".part") and abs(time.time() - status.st_mtime) > _PART_S:
                os.unlink(name, dir_fd=where)
    for _, name in sorted(found)[: -(_FILES_MAX - 1)]:
        with suppress(OSError):
            os.unlink(name, dir_fd=where)
