# SPDX-License-Identifier: Apache-2.0
"""One line of JSON on stderr for each thing that happens: for journald and log collectors."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson

from tracer.export.jsonl import rfc3339

if TYPE_CHECKING:
    from tracer.streams import Level


def log(level: Level, message: str, **more: str | float | None) -> None:
    """Tells of it. Nobody reading must not end tracing."""
    told = {"time": rfc3339(time.time_ns()), "level": level, "msg": message, **more}
    # Paths may have bytes that are no text: Python's lone surrogates, which JSON has not.
    clean = {
        key: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for key, value in told.items()
    }
    with suppress(AttributeError, OSError, ValueError):  # there may be no stderr
        sys.stderr.buffer.write(orjson.dumps(clean, option=orjson.OPT_APPEND_NEWLINE))
        sys.stderr.buffer.flush()
