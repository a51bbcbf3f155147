# SPDX-License-Identifier: Apache-2.0
"""Compiling, apart from what the programs do."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tracer.kernel.compile import Compilation, CompileError

SIZES = {"SLOTS": 8, "SMALL_PAGES": 1, "LARGE_PAGES": 1}
MACHINE = f"""
_Static_assert(PAGE_SIZE == {os.sysconf("SC_PAGESIZE")}, "page size");
_Static_assert(LINUX_VERSION_CODE >> 16 == {os.uname().release.split(".")[0]}, "kernel version");
"""


@pytest.mark.usefixtures("root")
def test_macros_are_those_of_this_machine() -> None:
    Compilation(SIZES, kprobes=False, more=MACHINE).result().close()


def test_killed_compiler_is_an_error_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compilation = Compilation(SIZES, kprobes=False)
    time.sleep(0.3)  # it is at work
    os.kill(compilation._child, signal.SIGKILL)
    with pytest.raises(CompileError, match="the compiler died"):
        compilation.result()
    assert list(tmp_path.iterdir()) == []
