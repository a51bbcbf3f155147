# SPDX-License-Identifier: Apache-2.0
"""Shows a report: text, JSON, or a page."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import orjson

from tracer import streams
from tracer.report.report import make

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from tracer.filters import Filters

OK, FAILED = 0, 1


def show(args: argparse.Namespace, paths: Sequence[Path], filters: Filters) -> int:
    """Reads recordings and says what they tell. Raises RecordingError and ValueError."""
    report = make(paths, filters)
    if args.html is not None:
        from tracer.report.page import render

        try:
            _write(args.html, render(report))
        except OSError as error:
            streams.say(f"cannot write {args.html}: {error.strerror}")
            return FAILED
        streams.say(f"the report is in {args.html}")
        if not args.json:
            return OK
    with streams.writing():
        if args.json:
            from tracer.report.export import to_json

            sys.stdout.buffer.write(orjson.dumps(to_json(report), option=orjson.OPT_APPEND_NEWLINE))
            sys.stdout.buffer.flush()
        else:
            from tracer.report.text import render as text

            sys.stdout.write(text(report, _width()))
            sys.stdout.flush()
    return OK


def _width() -> int | None:
    """Of the terminal; None: it goes to somebody else."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _write(path: Path, page: str) -> None:
    """Whole, or not at all; to what is no file of its own (/dev/stdout, a pipe), as it comes."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(page, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
