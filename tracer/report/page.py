# SPDX-License-Identifier: Apache-2.0
"""A report as one page that needs no network: page.html with the report's JSON in it."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

import orjson

from tracer.report.export import to_json
from tracer.report.words import STAGES, completeness, marks, notes, outcome, precision

if TYPE_CHECKING:
    from tracer.report.figures import Report

_MARK = "REPORT_AS_JSON"
# Nothing in it may end the element that it is in, or begin another one.
_UNSAFE = re.compile("[<>&\u2028\u2029]")


def render(report: Report) -> str:
    """The page. Whatever names hold stays text: scripts put it in as such."""
    said = {
        "stage_words": STAGES,
        "notes": list(notes(report)),
        "precision": [*precision(report), *marks(report)],
        "outcomes": list(map(outcome, report.failures)),
        "completeness": list(completeness(report.coverage)),
    }
    data = orjson.dumps({**to_json(report), **said}).decode()
    data = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", data)
    before, _, after = (
        files("tracer.report").joinpath("page.html").read_text("utf-8").partition(_MARK)
    )
    return before + data + after
