# SPDX-License-Identifier: Apache-2.0
"""The programs for arm64, as far as a machine of another kind can tell.

arm64.btf.xz is what dnstrace reads of a real arm64 kernel's types; tests/guests/fetch-btf makes it.
"""

from __future__ import annotations

import gzip
import lzma
import platform
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.guests.kernel_btf import extract
from tests.test_btf import Dump
from tracer.kernel import bpf, kprobes, offsets
from tracer.kernel.btf import Btf, BtfError
from tracer.kernel.compile import Compilation, Object, Target
from tracer.kernel.offsets import kernel_offsets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = {
    "SLOTS": 8,
    "SMALL_PAGES": 1,
    "LARGE_PAGES": 2,
    "SEGMENT_PAGES": 1,
    "SERIES": 8,
    "BUCKETS": 64,
}
REGISTERS = {"x86_64": {112, 104, 96}, "aarch64": {0, 8, 16}}  # di, si, dx; x0, x1, x2
# Both lie in one block that is read at once: the second is used as a distance from the first.
FROM_TRANSPORT_HEADER = "OFFSET_sk_buff_network_header"
LDX_DW, ALU64_ADD_K, MOV64_X = 0x79, 0x07, 0xBF


class Instruction(NamedTuple):
    opcode: int
    target: int
    source: int
    offset: int
    number: int


def instructions(code: bytes) -> Iterator[Instruction]:
    for opcode, registers, offset, number in struct.iter_unpack("=BBhi", code):
        yield Instruction(opcode, registers & 15, registers >> 4, offset, number)


def read_from_context(code: bytes) -> set[int]:
    """Offsets of what a program reads through the pointer that it is given, before any branch."""
    context, found = {1}, set()
    for step in instructions(code):
        if step.opcode == LDX_DW and step.source in context:
            found.add(step.offset)
            context.discard(step.target)
        elif step.opcode == MOV64_X and step.source in context:
            context.add(step.target)
        elif step.opcode & 7 in (5, 6):  # jumps and calls
            break
        else:
            context.discard(step.target)
    return found


def numbers_in(built: Object) -> set[int]:
    """What is added to addresses, in any of the programs."""
    steps = [step for code in built.instructions.values() for step in instructions(code)]
    added = {step.number for step in steps if step.opcode == ALU64_ADD_K}
    return added | {step.offset for step in steps}


@pytest.fixture(scope="module")
def btf(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm64 kernel's types."""
    path = tmp_path_factory.mktemp("arm64") / "vmlinux"
    path.write_bytes(lzma.decompress((project / "tests/guests/arm64.btf.xz").read_bytes()))
    try:
        kernel_offsets(Btf.load(path), kprobes=True, machine="aarch64")
    except BtfError as error:
        pytest.fail(f"arm64.btf.xz lacks what is read now ({error}): run tests/guests/fetch-btf")
    return path


@pytest.fixture
def arm64(btf: Path) -> Target:
    return Target(btf, "aarch64")


def compiled(target: Target | None, *, kprobes: bool = True, more: str = "") -> Object:
    built = Compilation(SIZES, kprobes=kprobes, more=more, target=target).result()
    built.close()
    return built


def test_offsets_are_those_that_bpftool_reads(btf: Path) -> None:
    dump = Dump.of(btf)
    found = kernel_offsets(Btf.load(btf), kprobes=True, machine="aarch64")
    for macro, where in offsets._NEEDED.items():
        assert found.pop(macro) == dump.offset(*where)
    assert found.pop("OFFSET_sk_buff_nfct") == dump.offset("sk_buff", "_nfct")
    original = dump.offset("nf_conn", "tuplehash") + dump.offset("nf_conntrack_tuple_hash", "tuple")
    assert found.pop("OFFSET_nf_conn_original") == original
    assert found.pop("OFFSET_sock_cgrp_data") == dump.offset("sock", "sk_cgrp_data")
    assert found.pop("HAVE_DROP_REASON") == 1
    assert found == {
        f"OFFSET_argument_{i}": dump.offset("pt_regs", "regs") + 8 * i for i in range(3)
    }


def test_types_are_found_in_a_kernel_image_however_it_is_packed(btf: Path) -> None:
    data = btf.read_bytes()
    decoy = data[:24]  # says that more follows than there is
    empty = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 1) + b"\0"
    image = b"MZ" + bytes(62) + b"ARM\x64" + empty + data + b"\x5a" * 100 + decoy
    packed = gzip.compress(image)
    zboot = b"MZ\0\0zimg" + struct.pack("<II", 64, len(packed)) + bytes(48) + packed + b"behind"
    for form in (image, packed, lzma.compress(image), zboot):
        assert extract(form) == data
    for form in (b"", decoy, image[:5000], packed[:5000], b"MZ\0\0zimg", zboot[:5000]):
        with pytest.raises(BtfError):
            extract(form)


def test_arguments_are_in_the_first_of_an_array_of_64_bit_registers(btf: Path) -> None:
    dump = Dump.of(btf)
    members = {name: number for name, number, _ in dump.members(dump.named("STRUCT", "pt_regs"))}
    registers = dump.types[members["regs"]]
    assert registers.kind == "ARRAY"
    assert dump.types[dump.resolve(registers.type_id)].name == "long long unsigned int"
    found = kernel_offsets(Btf.load(btf), kprobes=True, machine="aarch64")
    assert {value for macro, value in found.items() if "argument" in macro} == REGISTERS["aarch64"]


def test_conntrack_tuple_lies_as_the_programs_have_it(btf: Path) -> None:
    dump = Dump.of(btf)
    assert dump.offset("nf_conntrack_tuple", "src.u3") == 0
    assert dump.offset("nf_conntrack_tuple", "src.u") == 16
    assert dump.offset("nf_conntrack_tuple", "dst.u3") == 20
    assert dump.offset("nf_conntrack_tuple", "dst.u") == 36
    assert dump.offset("nf_conntrack_tuple", "dst.protonum") == 38


@pytest.mark.usefixtures("root")
def test_registers_read_are_those_of_the_machine(arm64: Target) -> None:
    code = compiled(arm64).instructions["kprobe_packet"]
    assert read_from_context(code) == REGISTERS["aarch64"]


@pytest.mark.usefixtures("root")
def test_registers_read_are_those_of_this_machine() -> None:
    """Which shows, on x86-64, that the test above sees a difference."""
    code = compiled(None).instructions["kprobe_packet"]
    assert read_from_context(code) == REGISTERS[platform.machine()]


@pytest.mark.usefixtures("root")
def test_every_offset_is_in_the_instructions(arm64: Target) -> None:
    found = kernel_offsets(Btf.load(arm64.types), kprobes=True, machine="aarch64")
    del found["HAVE_DROP_REASON"]
    found[FROM_TRANSPORT_HEADER] -= found["OFFSET_sk_buff_transport_header"]
    assert set(found.values()) <= numbers_in(compiled(arm64))


@pytest.mark.usefixtures("root")
def test_no_offset_is_known_in_another_way(arm64: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Macros that no kernel has show up in their places, the registers' too."""
    genuine = kernel_offsets(Btf.load(arm64.types), kprobes=True, machine="aarch64")
    marks = {macro: 0x5008 + 8 * i for i, macro in enumerate(genuine) if "OFFSET" in macro}
    marks[FROM_TRANSPORT_HEADER] = marks["OFFSET_sk_buff_transport_header"] + 4
    monkeypatch.setattr("tracer.kernel.compile.kernel_offsets", lambda *_, **__: genuine | marks)
    built = compiled(arm64)
    assert set(marks.values()) - {marks[FROM_TRANSPORT_HEADER]} <= numbers_in(built)
    registers = {marks[f"OFFSET_argument_{i}"] for i in range(3)}
    assert read_from_context(built.instructions["kprobe_packet"]) == registers


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("with_kprobes", [True, False])
def test_bcc_takes_it_for_arm64(arm64: Target, *, with_kprobes: bool) -> None:
    checks = """
#ifndef bpf_target_arm64
#error another machine
#endif
"""
    built = compiled(arm64, kprobes=with_kprobes, more=checks)
    assert ("kprobe_packet" in built.instructions) == with_kprobes
    assert built.drop_reasons[2] == "NOT_SPECIFIED"


def test_sources_name_no_register_of_any_machine(project: Path) -> None:
    registers = r"\b(PT_REGS_\w+|pt_regs|(ctx|regs)->(di|si|dx|cx|r8|r9|rdi|rsi|rdx|regs))\b"
    for path in (project / "bpf").glob("*.[ch]"):
        assert not re.search(registers, path.read_text()), path


def test_system_calls_are_those_of_the_generic_table() -> None:
    """include/uapi/asm-generic/unistd.h, which arm64 uses."""
    assert bpf.SYSCALL_NUMBERS["aarch64"] == 280
    assert kprobes._SYSCALL_NUMBERS["aarch64"] == 241
