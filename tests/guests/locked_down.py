# SPDX-License-Identifier: Apache-2.0
"""Kernel lockdown. Once on, it cannot be taken back, so this is for guests, and comes last."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.test_degrade import doctor, refusal


def test_lockdown_confidentiality() -> None:
    """Programs may not read kernel memory: both say so."""
    Path("/sys/kernel/security/lockdown").write_text("confidentiality")
    status, said = doctor([])
    assert status == 3
    assert "MISSING lockdown confidentiality" in said
    assert "fix: boot with lockdown=integrity" in said
    assert "lockdown is 'confidentiality'" in refusal([])
