# SPDX-License-Identifier: Apache-2.0
"""The standard streams: perhaps closed, perhaps full, perhaps a terminal that obeys what it reads."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Level = Literal["info", "warning", "error"]

_PATIENCE_S = 2.0  # with a reader of stderr, when we are asked to end
_LOOKS = 4  # at whether it reads, meanwhile
_hurried = False
_say: Callable[[Level, str], None] | None = None


class OutputError(Exception):
    """stdout does not take what is written to it. The message is one line."""


def settle() -> None:
    """Makes stdout write all or fail, and gives closed descriptors to /dev/null, lest what is opened
    next take their numbers.

    A closed stderr is no reason not to trace. Raises OutputError where it is stdout.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - stays open until the end
    if sys.stdout is None:
        raise OutputError("cannot write output: stdout is closed")
    if isinstance(sys.stdout.buffer, io.RawIOBase):
        # PYTHONUNBUFFERED: what a full pipe or a signal leaves of a write would be lost. We flush.
        sys.stdout = open(  # noqa: SIM115 - stays open until the end
            sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors,
            closefd=False,
        )  # fmt: skip


@contextmanager
def writing() -> Iterator[None]:
    """Around what writes to stdout. Raises OutputError, and BrokenPipeError as it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write output: {error.strerror}") from error


def discard(stream: TextIO) -> None:
    """What the stream still holds, and all that is written to it later, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say_by(how: Callable[[Level, str], None]) -> None:
    """Has `say` and `fail` tell in another form from now on: there is no person at a terminal."""
    global _say  # noqa: PLW0603 - the process has one stderr
    _say = how


def fail(message: str) -> None:
    """One line on why we end."""
    say(message, "error")


def say(message: str, level: Level = "warning") -> None:
    """One line for the person at the terminal."""
    if _say is not None:
        _say(level, message)
        return
    if not message.isprintable():
        from tracer.show import cells  # which loads rich, and hardly any message needs it

        message = cells.printable(message)
    tell(f"dnstrace: {message}")


def hurry() -> None:
    """We are asked to end: from now on, who does not read stderr is not waited for."""
    global _hurried  # noqa: PLW0603 - the process has one stderr
    _hurried = True


def takes(stream: TextIO, patience_s: float = 0.0) -> bool:
    """Whether a stream takes what is written to it, now or soon."""
    try:
        return bool(select.select([], [stream], [], patience_s)[1])
    except (OSError, ValueError):  # it is no file, or a closed one: writing will tell
        return True


def tell(text: str) -> None:
    """Lines for the person at the terminal, as they are. If nobody can read them, so be it."""
    looks = 0
    while not takes(sys.stderr, _PATIENCE_S / _LOOKS):
        looks += _hurried  # before, it may take as long as it likes
        if looks == _LOOKS:
            discard(sys.stderr)
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
