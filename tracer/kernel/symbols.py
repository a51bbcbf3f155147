# SPDX-License-Identifier: Apache-2.0
"""Names for kernel addresses, from /proc/kallsyms, looked for only when one is asked for."""

from __future__ import annotations

import functools
from contextlib import suppress
from pathlib import Path


@functools.lru_cache(maxsize=1024)
def kernel_symbol(address: int) -> str | None:
    """The function that the address lies in, or None (also where addresses are hidden)."""
    best_at, best = 0, None
    with suppress(OSError), Path("/proc/kallsyms").open("rb") as symbols:
        for line in symbols:
            start, kind, name = line.split(maxsplit=2)
            at = int(start, 16)
            if best_at < at <= address and kind in b"tTwW":
                best_at, best = at, name
    if best is None:
        return None
    return best.split()[0].decode("ascii", "backslashreplace")
