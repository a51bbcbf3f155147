# SPDX-License-Identifier: Apache-2.0
"""One line of JSON on stderr for each thing that happens: for journald and log collectors."""

from __future__ import annotations

import sys
import time
from typing import Literal

import orjson

from tracer.export.jsonl import rfc3339

Level = Literal["info", "warning", "error"]


def log(level: Level, message: str, **more: str | float | None) -> None:
    """Tells of it. Nobody reading must not end tracing."""
    line = orjson.dumps(
        {"time": rfc3339(time.time_ns()), "level": level, "msg": message, **more},
        option=orjson.OPT_APPEND_NEWLINE,
    )
    try:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
    except (OSError, ValueError):
        pass
