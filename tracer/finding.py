# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "note", "MISSING"]


class Finding(NamedTuple):
    """One row of the table. `fix` is what to do, where something is missing."""

    what: str
    state: State
    detail: str
    fix: str | None = None
