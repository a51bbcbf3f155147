# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of a test's own, with nothing in them but what the test puts there."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tracer.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_NAMESPACE = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def new_namespace() -> Iterator[int]:
    """A descriptor of a new one, which is gone with it."""
    home = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns.entered(home):  # and back to it, whatever happens
            if _libc.unshare(_CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"making a network namespace: {os.strerror(number)}")
            made = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(home)
    try:
        yield made
    finally:
        os.close(made)


def run(command: str) -> str:
    """What a command says that runs in the namespace that this thread is in."""
    return subprocess.check_output(command.split(), text=True)
