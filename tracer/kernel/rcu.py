# SPDX-License-Identifier: Apache-2.0
"""Makes attaching to many devices quick.

Attaching a TCX link, and closing it, waits for an RCU grace period with the RTNL lock held (kernel
6.6, e420bed02507): some 15 ms each, twice per device, in which nobody on the node can add a pod.
An expedited grace period (Documentation/admin-guide/kernel-parameters.txt, rcupdate.rcu_expedited)
takes some 30 µs.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_KNOB = Path("/sys/kernel/rcu_expedited")
# Puts the knob back when its standard input ends: with us, if we are killed.
_GUARD = f"read -r _; echo 0 > {_KNOB}"


@contextmanager
def expedited() -> Iterator[None]:
    """Grace periods are short in the block. Where this cannot be had, they are as long as ever."""
    try:
        if _KNOB.read_text().strip() != "0":
            yield  # somebody else's wish, and theirs to end
            return
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # a read-only /sys, as in most containers
            _KNOB.write_text("1")
        yield
    finally:
        guard.communicate()
