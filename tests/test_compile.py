# SPDX-License-Identifier: Apache-2.0
"""Compiling, apart from what the programs do."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tracer.kernel import bpf, code_cache
from tracer.kernel import compile as compile_
from tracer.kernel.bpf import MapShape
from tracer.kernel.compile import MAPS, Compilation, CompileError, Object, Target
from tracer.kernel.limits import Limits

SIZES = {"SLOTS": 8, "SMALL_PAGES": 1, "LARGE_PAGES": 1, "SEGMENT_PAGES": 1}
MACHINE = f"""
_Static_assert(PAGE_SIZE == {os.sysconf("SC_PAGESIZE")}, "page size");
_Static_assert(LINUX_VERSION_CODE >> 16 == {os.uname().release.split(".")[0]}, "kernel version");
"""


@pytest.fixture(scope="module")
def first(root: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Object, Path]:
    """What is compiled for SIZES, and the file that keeps it."""
    del root
    directory = tmp_path_factory.mktemp("first") / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(code_cache.DIRECTORY_VARIABLE, str(directory))
        made = built()
    (file,) = directory.iterdir()
    return made, file


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is compiled is kept."""
    directory = tmp_path / "kept"
    monkeypatch.setenv(code_cache.DIRECTORY_VARIABLE, str(directory))
    return directory


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


def put(first: tuple[Object, Path], kept: Path) -> Path:
    """Keeps it there, too: that file."""
    kept.mkdir(mode=0o700)
    file = kept / first[1].name
    shutil.copy(first[1], file)
    return file


def built(sizes: dict[str, int] = SIZES, *, afresh: bool = False) -> Object:
    """Its maps are closed."""
    made = Compilation(sizes, kprobes=False, afresh=afresh).result()
    made.close()
    return made


@pytest.mark.usefixtures("root")
def test_what_was_compiled_is_not_compiled_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Compilation(SIZES, kprobes=False).result()
    expected = infos(first)
    (file,) = kept.iterdir()
    assert (kept.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    monkeypatch.setattr(compile_, "_compile", None)
    again = Compilation(SIZES, kprobes=False).result()
    assert again.instructions == first.instructions
    assert again.drop_reasons == first.drop_reasons
    assert infos(again) == expected
    # Others are compiled; and so are these, for whoever asks for it.
    for others in ({"sizes": {**SIZES, "SLOTS": 16}}, {"afresh": True}):
        with pytest.raises(CompileError, match="cannot compile"):
            built(**others)


def infos(of: Object) -> list[bytes]:
    """All that the kernel says of the maps but their numbers, in the order of MAPS; closes them."""
    found = [bpf._info(of.map_fds[name], "map info") for name in MAPS]
    of.close()
    return [info[:4] + info[8:] for info in found]


INPUTS = ["x86_64", "-DSLOTS=8", "int x;"]


@pytest.mark.parametrize(
    "change", ["an input", "their order", "where one ends", "BCC", "a library", "the form"]
)
def test_name_tells_of_everything_that_matters(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bcc").mkdir()
    for name in ("bcc/__init__.py", "bcc/version.py", "libraries"):
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    monkeypatch.setattr(code_cache, "_LIBRARIES", tmp_path / "libraries")
    before = code_cache.name_of(INPUTS)
    assert code_cache.name_of(INPUTS) == before
    inputs = list(INPUTS)
    if change == "an input":
        inputs[1] = "-DSLOTS=9"
    elif change == "their order":
        inputs.reverse()
    elif change == "where one ends":
        inputs = ["x86_64-DSLOTS=8", "", "int x;"]
    elif change == "the form":
        monkeypatch.setattr(code_cache, "_FORM", "0")
    else:
        os.utime(tmp_path / {"BCC": "bcc/version.py", "a library": "libraries"}[change], (1, 1))
    assert code_cache.name_of(inputs) != before


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", ["MAPS", "PROGRAMS", "_headers", "source_text"])
def test_name_depends_on_what_is_compiled_and_how_it_is_kept(
    name: str, kept: Path, first: tuple[Object, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = put(first, kept)
    own = getattr(compile_, name)
    if name == "MAPS":
        changed: object = (own[1], own[0], *own[2:])
    elif name == "PROGRAMS":
        changed = dict(reversed(own.items()))
    elif name == "_headers":
        changed = [*own(), "another.h", ""].copy
    else:
        changed = f"{own()}\n".__str__
    monkeypatch.setattr(compile_, name, changed)
    built()
    assert len(set(kept.iterdir()) - {before}) == 1


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "damage",
    ["cut short", "empty", "zeros", "a bit", "another's directory", "a directory for all",
     "another's file", "a file for all", "a link", "a pipe"],
)  # fmt: skip
def test_what_cannot_be_trusted_is_compiled_again(
    kept: Path, first: tuple[Object, Path], damage: str
) -> None:
    file = put(first, kept)
    content = file.read_bytes()
    if damage == "another's directory":
        os.chown(kept, 1, 1)
    elif damage == "a directory for all":
        kept.chmod(0o777)
    elif damage == "another's file":
        os.chown(file, 1, 1)
    elif damage == "a file for all":
        file.chmod(0o666)
    elif damage == "a link":
        file.rename(kept.parent / "elsewhere")
        file.symlink_to(kept.parent / "elsewhere")
    elif damage == "a pipe":
        file.unlink()
        os.mkfifo(file, 0o600)
    elif damage == "a bit":
        file.write_bytes(content.replace(b"5", b"4", 1))
    else:
        file.write_bytes({"cut short": content[:-9], "empty": b"", "zeros": bytes(99)}[damage])
    assert code_cache.find(file.name) is None
    assert built().instructions == first[0].instructions
    if "directory" not in damage:  # then it is good again
        assert code_cache.find(file.name) is not None


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "change", [{"type_": 999}, {"type_": "hash"}, {"entries_max": 1 << 40}, {"name": 7}, None],
    ids=str,
)  # fmt: skip
def test_maps_that_cannot_be_made_are_left_to_the_compiler(
    kept: Path, first: tuple[Object, Path], change: dict[str, Any] | None
) -> None:
    file = put(first, kept)
    found = code_cache.find(file.name)
    assert found is not None
    strange = [found.maps[-1]._replace(**change)] if change else []
    code_cache.keep(file.name, found._replace(maps=(*found.maps[:-1], *strange)))
    assert built().instructions == first[0].instructions
    assert code_cache.find(file.name) == found


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("where", ["none/at/all", "", "a file"])
def test_where_nothing_can_be_kept_programs_are_compiled(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(code_cache.DIRECTORY_VARIABLE, str(tmp_path / where) if where else "")
    assert built().instructions
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.usefixtures("root")
def test_what_cannot_be_written_can_be_read(kept: Path) -> None:
    kept.mkdir(mode=0o700)
    code_cache.keep("x.json", code_cache.Code({"one": bytes(8)}, (SHAPE,)))
    read_only = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    told = "from tracer.kernel import code_cache; print(code_cache.find('x.json').maps[0].name)"
    said = subprocess.check_output(
        ["unshare", "--mount", "sh", "-ec", read_only, "sh", kept, sys.executable, "-c", told],
        text=True,
    )
    assert said == "one\n"


SHAPE = MapShape(1, 4, 4, 1, 0, "one")


def test_few_files_are_kept_and_those_used_last(kept: Path) -> None:
    for number in range(20):
        code_cache.keep(f"{number}.json", code_cache.Code({"one": bytes(8)}, (SHAPE,)))
        os.utime(kept / f"{number}.json", (number, number))
        assert code_cache.find("0.json") == code_cache.Code({"one": bytes(8)}, (SHAPE,))
    (kept / ".old.part").touch()
    os.utime(kept / ".old.part", (1, 1))
    (kept / ".new.part").touch()
    (kept / "directory.json").mkdir()
    code_cache.keep("20.json", code_cache.Code({}, ()))
    left = {path.name for path in kept.iterdir()}
    assert left == {
        "directory.json", ".new.part", "0.json", "20.json", *(f"{n}.json" for n in range(14, 20)),
    }  # fmt: skip


def test_what_was_just_written_stays_whatever_the_clock_said(kept: Path) -> None:
    for number in range(8):
        code_cache.keep(f"{number}.json", code_cache.Code({}, ()))
        os.utime(kept / f"{number}.json", (1 << 33, 1 << 33))
    code_cache.keep("new.json", code_cache.Code({}, ()))
    assert code_cache.find("new.json") == code_cache.Code({}, ())
    assert len(list(kept.iterdir())) == 8
