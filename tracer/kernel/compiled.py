# SPDX-License-Identifier: Apache-2.0
"""What was compiled, kept for the next start: compiling takes most of one.

A file's name tells of everything that its content depends on: the C, what is defined for it, this
machine and BCC. So a file is never out of date, only unused, and then it goes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from tracer.kernel.bpf import MapShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DIRECTORY = Path("/var/cache/dnstrace")
_FILES_MAX = 8
_FILE_LEN_MAX = 4 << 20


class Compiled(NamedTuple):
    """Instructions of programs, in which maps stand by their position in `maps`."""

    instructions: Mapping[str, bytes]
    maps: tuple[MapShape, ...]


def name_of(texts: Iterable[str], arguments: Iterable[str], machine: str) -> str:
    """The file for what clang makes of `texts`, told `arguments`. Raises ImportError without BCC."""
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        raise ImportError("bcc")
    version = Path(found.origin).with_name("version.py")
    installed = [found.origin]
    with suppress(OSError):
        installed += [version.read_text(), str(version.stat().st_mtime_ns)]
    said = "\0".join([*texts, *arguments, machine, *installed])
    return f"{hashlib.sha256(said.encode()).hexdigest()}.json"


def find(name: str) -> Compiled | None:
    """What was kept under that name. None if nothing was, or if others could have written it."""
    try:
        where = _opened()
    except OSError:
        return None
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
        with open(file, "rb") as stream:
            kept = orjson.loads(stream.read(_FILE_LEN_MAX))
        instructions = {key: bytes.fromhex(code) for key, code in kept["instructions"].items()}
        maps = tuple(MapShape(*shape) for shape in kept["maps"])
        os.utime(name, dir_fd=where, follow_symlinks=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    finally:
        os.close(where)
    return Compiled(instructions, maps)


def keep(name: str, compiled: Compiled) -> None:
    """For the next start, unless the directory cannot be written; that costs time only."""
    content = orjson.dumps({
        "instructions": {key: code.hex() for key, code in compiled.instructions.items()},
        "maps": [list(shape) for shape in compiled.maps],
    })  # fmt: skip
    with suppress(OSError):
        with suppress(FileExistsError):
            DIRECTORY.mkdir(mode=0o700)
        where = _opened()
        try:
            _write(name, content, where)
            _drop_the_oldest(where)
        finally:
            os.close(where)


def _opened() -> int:
    """The directory, if it is ours alone. Raises OSError."""
    where = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(where)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(where)
        raise PermissionError(f"{DIRECTORY} is not ours alone")
    return where


def _write(name: str, content: bytes, where: int) -> None:
    part = f".{name}-{os.getpid()}"
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=where)
    try:
        with open(file, "wb") as stream:
            stream.write(content)
        os.rename(part, name, src_dir_fd=where, dst_dir_fd=where)
    except OSError:
        os.unlink(part, dir_fd=where)
        raise


def _drop_the_oldest(where: int) -> None:
    """Also what a run that was killed had begun."""
    found = [
        (os.stat(name, dir_fd=where, follow_symlinks=False).st_mtime, name)
        for name in os.listdir(where)
        if name.endswith(".json") or name.startswith(".")
    ]
    for _, name in sorted(found)[:-_FILES_MAX]:
        os.unlink(name, dir_fd=where)
