# SPDX-License-Identifier: Apache-2.0
"""Recordings: transactions and histograms in a directory, as Parquet files that replace each other.

Lines go to a journal at once; every now and then another process makes Parquet files of it (see
parquet.py). So what was written before a `kill -9` is there after the next start, and what is
complete has its name. When the disk is full, recording stops, is tried again later, and tracing
goes on.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from tracer.continuous import parquet
from tracer.continuous.parquet import PART, journal_file, lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

JOURNAL_BYTES = 64 << 20  # after which there is another one, however new it is
_RETRY_S = 60.0
_JOURNAL = ".journal-"
_LOCK = ".lock"
_OURS = re.compile(r"(transactions|histograms|coverage)-.+\.parquet")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.-]+")
_STOPPING_S = 60.0
_TRIES = 2  # to make files of a journal


class RecorderError(Exception):
    """Recordings cannot be written there. The message says why and what to do."""


@dataclass(slots=True)
class _Journal:
    """What was written, and is not in a file yet. `counted`: transactions, as far as known."""

    path: Path
    counted: int = 0
    tries: int = 0


class Recorder:
    """Writes below `directory`, which is its own: nobody else may record there meanwhile.

    The oldest files go when there are more than `size_max` bytes, or when they are older than
    `age_max_s`. `tell(problem)` hears what is wrong, and None when it is over.
    """

    def __init__(
        self,
        directory: Path,
        node: str,
        *,
        rotate_s: float,
        size_max: int,
        age_max_s: float,
        tell: Callable[[str | None], None],
    ) -> None:
        self._directory = directory
        self._node = node
        self._rotate_s = rotate_s
        self._size_max = size_max
        self._age_max_s = age_max_s
        self._tell = tell
        self.problem: str | None = None
        self.rows = 0  # transactions that were written
        # Transactions that were counted, but are in no file and will be in none.
        self.given_up = 0
        self.taken_over = 0  # journals of the run before
        self._journal: _Journal | None = None
        self._files: dict[str, BinaryIO] = {}
        self._began_s = 0.0
        self._bytes = 0
        self._retry_s = 0.0
        self._converting: tuple[subprocess.Popen[str], _Journal] | None = None
        self._convert_s = 0.0  # not before, monotonic
        self._waiting: list[_Journal] = []
        self._closing = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecorderError(
                f"{directory}: another dnstrace records there; give another directory"
            ) from error
        except OSError as error:
            raise RecorderError(f"{directory}: {error.strerror}; give another directory") from error
        self._lock: int | None = lock
        self._take_over()

    def write(self, kind: str, rows: Iterable[Mapping[str, Any]], counted: int = 0) -> bool:
        """Adds rows (a key of COLUMNS, and what it has). Whether it did; never raises OSError.

        `counted`: how many transactions these rows tell of that no rows before did.
        """
        lines = [_line({"node": self._node, **row}) for row in rows]
        if not lines:
            return True
        if self.problem is not None and time.monotonic() < self._retry_s:
            self.given_up += counted
            return False
        try:
            journal = self._open_journal()
            file = self._file(journal, kind)
            written = file.write(b"".join(lines))
            file.flush()
        except OSError as error:
            self.given_up += counted
            self._fail(f"recordings are not written: {error.strerror} ({self._directory})")
            return False
        self._bytes += written
        self.rows += len(lines) if kind == "transactions" else 0
        journal.counted += counted
        return True

    def try_again(self) -> None:
        """Whatever failed is tried at once, and not only in a while."""
        self._retry_s = self._convert_s = 0.0

    def look(self) -> None:
        """Rotates when it is time, and looks after what is being converted; call it often."""
        self._reap()
        old = time.monotonic() - self._began_s > self._rotate_s
        if self._journal and (old or self._bytes > JOURNAL_BYTES):
            self.rotate()
        self._convert_next()

    def rotate(self) -> None:
        """What was written by now becomes files, in the background."""
        if self._journal is None:
            return
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()
        self._waiting.append(self._journal)
        self._journal = None
        self._make_room()
        self._convert_next()

    def close(self) -> None:
        """Rotates, and waits until all is converted. What fails now, the next start tries again."""
        if self._lock is None:
            return
        self._closing = True
        self.rotate()
        deadline_s = time.monotonic() + _STOPPING_S
        while (self._converting or self._waiting) and time.monotonic() < deadline_s:
            if self._converting:
                with suppress(subprocess.TimeoutExpired):
                    self._converting[0].wait(deadline_s - time.monotonic())
            self._reap()
            self._convert_next()
        if self._converting:
            self._converting[0].kill()
            self._converting[0].communicate()
            self._not_converted(self._converting[1], f"it took more than {_STOPPING_S:.0f} s")
        os.close(self._lock)
        self._lock = None

    def _open_journal(self) -> _Journal:
        if self._journal is None:
            self._journal = _Journal(self._make_journal())
            self._began_s = time.monotonic()
            self._bytes = 0
            self._works_again()
        return self._journal

    def _make_journal(self) -> Path:
        """Named after the time, to the millisecond; the next one if that is taken."""
        name = _NOT_IN_A_NAME.sub("_", self._node)[:100] or "node"
        ms = time.time_ns() // 1_000_000
        while True:
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(ms // 1000))
            path = self._directory / f"{_JOURNAL}{name}-{stamp}{ms % 1000:03d}Z"
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                ms += 1
            else:
                return path

    def _file(self, journal: _Journal, kind: str) -> BinaryIO:
        if kind not in self._files:
            self._files[kind] = journal_file(journal.path, kind).open("ab")
        return self._files[kind]

    def _take_over(self) -> None:
        """What a run before this one left: its journals are made files of, parts are removed."""
        for found in sorted(self._directory.iterdir()):
            if found.name.startswith(_JOURNAL) and found.is_dir() and not found.is_symlink():
                self._waiting.append(_Journal(found))
                self.taken_over += 1
            elif found.name.endswith(f".parquet{PART}") and found.name.startswith("."):
                stem = found.name.split("-", 1)[1].removesuffix(f".parquet{PART}")
                with suppress(OSError):  # one that is being written still is left
                    at_it = lock(self._directory / f"{_JOURNAL}{stem}")
                    try:
                        found.unlink()
                    finally:
                        if at_it is not None:
                            os.close(at_it)
        self._convert_next()

    def _convert_next(self) -> None:
        is_time = self._closing or time.monotonic() >= self._convert_s
        if self._converting or not self._waiting or not is_time:
            return
        self._make_room()
        journal = self._waiting.pop(0)
        # Nothing is imported from where we happen to be started (-P), and signals to our process
        # group are ours.
        command: list[str | Path] = [
            sys.executable, "-P", parquet.__file__, journal.path, self._directory
        ]  # fmt: skip
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._not_converted(journal, str(error.strerror))
            return
        self._converting = process, journal

    def _reap(self) -> None:
        if self._converting is None or self._converting[0].poll() is None:
            return
        process, journal = self._converting
        self._converting = None
        _, said = process.communicate()
        if process.returncode:
            why = said.strip().splitlines()[-1:] or [f"status {process.returncode}"]
            self._not_converted(journal, why[0][:300])
        else:
            self._make_room()
            if self._journal is not None:
                self._works_again()

    def _not_converted(self, journal: _Journal, why: str) -> None:
        """Tries again in a while, once; what is being written now is another matter."""
        journal.tries += 1
        self._convert_s = time.monotonic() + _RETRY_S
        if self._closing:
            self._say(f"a recording is not complete, and is left for the next start: {why}")
        elif journal.tries < _TRIES:
            self._waiting.insert(0, journal)
            self._say(f"a recording is not complete, and is tried again later: {why}")
        elif self._is_full():
            # What was to be recorded is given up, to have room for what comes.
            shutil.rmtree(journal.path, ignore_errors=True)
            self.given_up += journal.counted
            self._say(f"a recording of {journal.counted} transactions was given up: {why}")
        else:
            self._say(f"a recording is not complete, and is left for the next start: {why}")

    def _is_full(self) -> bool:
        """Whether there is less room than a journal may need."""
        try:
            return shutil.disk_usage(self._directory).free < JOURNAL_BYTES
        except OSError:
            return True

    def _say(self, problem: str) -> None:
        if self.problem is None:
            self._tell(problem)
        self.problem = problem

    def _works_again(self) -> None:
        if self.problem is not None:
            self.problem = None
            self._tell(None)

    def _fail(self, problem: str) -> None:
        """Nothing is written for a while. What was written by now becomes files, if it can."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()
        if self._journal is not None:
            self._waiting.append(self._journal)
            self._journal = None
        self._say(problem)
        self._retry_s = time.monotonic() + _RETRY_S

    def _make_room(self) -> None:
        """Removes the oldest files of ours, while there are too many or they are too old."""
        found = []
        try:
            paths = list(self._directory.iterdir())
        except OSError:
            return  # gone: whoever writes there is told
        in_use = {one.path for one in self._waiting}
        in_use |= {self._journal.path} if self._journal else set()
        in_use |= {self._converting[1].path} if self._converting else set()
        for path in paths:
            is_left = path.name.startswith(_JOURNAL) and path not in in_use
            if is_left or _OURS.fullmatch(path.name):
                with suppress(OSError):
                    found.append((path.lstat().st_mtime, _size(path), path))
        found.sort()
        size = sum(one[1] for one in found)
        oldest_s = time.time() - self._age_max_s
        for modified_s, bytes_, path in found:
            if size <= self._size_max and modified_s >= oldest_s:
                break
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            size -= bytes_


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a directory of files."""
    if path.is_dir() and not path.is_symlink():
        return sum(each.lstat().st_size for each in path.iterdir())
    return path.lstat().st_size


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a name with a lone surrogate, which no UTF-8 has
        return orjson.dumps(_clean(row), option=orjson.OPT_APPEND_NEWLINE)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value
