# SPDX-License-Identifier: Apache-2.0
"""Compiling, apart from what the programs do."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tracer.kernel import bpf, compiled
from tracer.kernel.bpf import MapShape
from tracer.kernel.compile import MAPS, Compilation, CompileError, Object, Target
from tracer.kernel.limits import Limits

SIZES = {"SLOTS": 8, "SMALL_PAGES": 1, "LARGE_PAGES": 1, "SEGMENT_PAGES": 1}
MACHINE = f"""
_Static_assert(PAGE_SIZE == {os.sysconf("SC_PAGESIZE")}, "page size");
_Static_assert(LINUX_VERSION_CODE >> 16 == {os.uname().release.split(".")[0]}, "kernel version");
"""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is compiled is kept."""
    directory = tmp_path / "kept"
    monkeypatch.setattr(compiled, "DIRECTORY", directory)
    return directory


def shapes(built: Object) -> list[MapShape]:
    """What the kernel says of the maps, in the order of MAPS; then they are closed."""
    found = [bpf.map_shape(built.map_fds[name]) for name in MAPS]
    built.close()
    return found


@pytest.mark.usefixtures("root")
def test_macros_are_those_of_this_machine() -> None:
    Compilation(SIZES, kprobes=False, more=MACHINE).result().close()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("other", ["arm64", "x86", "s390", "no such thing"])
def test_environment_of_who_builds_kernels_changes_nothing(
    other: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def programs() -> dict[str, bytes]:
        built = Compilation(SIZES, kprobes=True, more=MACHINE).result()
        built.close()
        return dict(built.instructions)

    expected = programs()
    monkeypatch.setenv("ARCH", other)
    monkeypatch.setenv("BCC_LINUX_VERSION_CODE", "12345")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    shutil.rmtree(kept)
    assert programs() == expected


def test_killed_compiler_is_an_error_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    compilation = Compilation(SIZES, kprobes=False)
    time.sleep(0.3)  # it is at work
    os.kill(compilation._child, signal.SIGKILL)
    with pytest.raises(CompileError, match="the compiler died"):
        compilation.result()
    assert list(files.iterdir()) == []


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


@pytest.mark.usefixtures("root")
def test_what_was_compiled_is_not_compiled_again(kept: Path) -> None:
    first = Compilation(SIZES, kprobes=False).result()
    again = Compilation(SIZES, kprobes=False).result()
    assert (first.was_kept, again.was_kept) == (False, True)
    assert again.instructions == first.instructions
    assert again.drop_reasons == first.drop_reasons
    assert shapes(again) == shapes(first)
    (file,) = kept.iterdir()
    assert (kept.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    other = Compilation({**SIZES, "SLOTS": 16}, kprobes=False).result()
    assert not other.was_kept
    assert {shape.name: shape.entries_max for shape in shapes(other)}["slots"] == 16


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "not what it was", "another's", "for all to write", "a link"]
)
def test_what_cannot_be_trusted_is_compiled_again(kept: Path, damage: str) -> None:
    first = Compilation(SIZES, kprobes=False).result()
    expected = shapes(first)
    (file,) = kept.iterdir()
    content = file.read_bytes()
    if damage == "another's":
        os.chown(kept, 1, 1)
    elif damage == "for all to write":
        kept.chmod(0o777)
    elif damage == "a link":
        file.rename(kept.parent / "elsewhere")
        file.symlink_to(kept.parent / "elsewhere")
    else:
        file.write_bytes({"cut short": content[:1000], "empty": b""}.get(damage, b'{"maps": 1}'))
    again = Compilation(SIZES, kprobes=False).result()
    assert not again.was_kept
    assert (again.instructions, shapes(again)) == (first.instructions, expected)


@pytest.mark.usefixtures("root")
def test_where_nothing_can_be_kept_programs_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "DIRECTORY", tmp_path / "none" / "at" / "all")
    for _ in range(2):
        built = Compilation(SIZES, kprobes=False).result()
        assert not built.was_kept
        built.close()


def test_few_files_are_kept_and_those_used_last(kept: Path) -> None:
    shape = MapShape(1, 4, 4, 1, 0, "one")
    for number in range(20):
        compiled.keep(f"{number}.json", compiled.Compiled({"one": bytes(8)}, (shape,)))
        os.utime(kept / f"{number}.json", (number, number))
        assert compiled.find("0.json") == compiled.Compiled({"one": bytes(8)}, (shape,))
    (kept / ".begun.json-1").write_bytes(b"")
    compiled.keep("20.json", compiled.Compiled({}, ()))
    left = {path.name for path in kept.iterdir()}
    assert len(left) == 8
    assert {"0.json", "19.json", "20.json"} < left
