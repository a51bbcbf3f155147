# SPDX-License-Identifier: Apache-2.0
"""Compiling, apart from what the programs do."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tracer.kernel.compile import Compilation, CompileError, Target
from tracer.kernel.limits import Limits

SIZES = {"SLOTS": 8, "SMALL_PAGES": 1, "LARGE_PAGES": 1, "SEGMENT_PAGES": 1}
MACHINE = f"""
_Static_assert(PAGE_SIZE == {os.sysconf("SC_PAGESIZE")}, "page size");
_Static_assert(LINUX_VERSION_CODE >> 16 == {os.uname().release.split(".")[0]}, "kernel version");
"""


@pytest.mark.usefixtures("root")
def test_macros_are_those_of_this_machine() -> None:
    Compilation(SIZES, kprobes=False, more=MACHINE).result().close()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("other", ["arm64", "x86", "s390", "no such thing"])
def test_environment_of_who_builds_kernels_changes_nothing(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> dict[str, bytes]:
        built = Compilation(SIZES, kprobes=True, more=MACHINE).result()
        built.close()
        return dict(built.instructions)

    expected = compiled()
    monkeypatch.setenv("ARCH", other)
    monkeypatch.setenv("BCC_LINUX_VERSION_CODE", "12345")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    assert compiled() == expected


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


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_rings_are_as_large_whatever_the_size_of_pages(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGESIZE": page}.__getitem__)
    sizes = Limits().macros()
    assert sizes["SMALL_PAGES"] * page == Limits().small_ring == 8 << 20
    assert sizes["LARGE_PAGES"] * page == Limits().large_ring == 2 << 20


def test_unknown_machine_is_an_error_that_names_it() -> None:
    armv8l = Target(machine="armv8l")  # what `setarch linux32` makes of arm64
    with pytest.raises(CompileError, match=r"^the system calls of armv8l are not known"):
        Compilation(SIZES, kprobes=False, target=armv8l).result()
    riscv = Target(machine="riscv64")
    with pytest.raises(
        CompileError, match=r"riscv64 get their arguments is not known; use --hooks"
    ):
        Compilation(SIZES, kprobes=True, target=riscv).result()
