# SPDX-License-Identifier: Apache-2.0
"""The one exception of the lab: what failed, then the remedy, in one line."""

from __future__ import annotations

FAILED = 1
HOST_LACKS = 3


class LabError(Exception):
    """A failure that a user can cause or cure; `status` is the exit status it asks for."""

    def __init__(self, message: str, *, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status
