# SPDX-License-Identifier: Apache-2.0
"""Type information: the same as bpftool reads in it, and nothing but BtfError for garbage."""

from __future__ import annotations

import platform
import re
import struct
import subprocess
from collections import Counter as Tally
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.kernel import offsets
from tracer.kernel.btf import VMLINUX, Btf, BtfError

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, CONST = 1, 2, 3, 4, 5, 6, 8, 10
FUNC, FUNC_PROTO, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = 12, 13, 16, 17, 18, 19
TRANSPARENT = {"TYPEDEF", "VOLATILE", "CONST", "RESTRICT", "TYPE_TAG"}


class Type(NamedTuple):
    """What bpftool says of one: `type_id` is 0 where it refers to none."""

    kind: str
    name: str
    type_id: int
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Dump:
    """`bpftool btf dump file … format raw`, read anew here, so that it can bear witness."""

    types: dict[int, Type]

    @classmethod
    def of(cls, path: Path, base: Path | None = None) -> Dump:
        command = [
            "bpftool",
            *(["-B", str(base)] if base else []),
            "btf",
            "dump",
            "file",
            str(path),
        ]
        text = subprocess.check_output([*command, "format", "raw"], text=True)
        types = {}
        for block in re.split(r"\n(?=\[)", text.strip()):
            head, *lines = block.split("\n")
            found = re.match(r"\[(\d+)\] (\w+) '(.*?)'(?:.*? type_id=(\d+))?", head)
            assert found, head
            number, kind, name, referred = found.groups()
            types[int(number)] = Type(kind, name, int(referred or 0), lines)
        return cls(types)

    def named(self, kind: str, name: str) -> int:
        """The first of that kind and name."""
        return next(n for n, t in self.types.items() if t.kind == kind and t.name == name)

    def resolve(self, number: int) -> int:
        while number and self.types[number].kind in TRANSPARENT | {"ARRAY"}:
            number = self.types[number].type_id
        return number

    def members(self, number: int) -> list[tuple[str, int, int]]:
        """(name, type, offset in bits) of each, those of anonymous members among them."""
        found = []
        for line in self.types[number].lines:
            name, type_id, bits = re.findall(r"^\t'(.*)' type_id=(\d+) bits_offset=(\d+)", line)[0]
            if name != "(anon)":
                found.append((name, int(type_id), int(bits)))
            elif self.types[int(type_id)].kind in ("STRUCT", "UNION"):
                inner = self.members(int(type_id))
                found += [(n, t, b + int(bits)) for n, t, b in inner]
        return found

    def offset(self, struct_name: str, path: str) -> int:
        number = self.named("STRUCT", struct_name)
        total = 0
        for step in path.split("."):
            number, bits = next(
                (t, b) for name, t, b in self.members(self.resolve(number)) if name == step
            )
            total += bits
        return total // 8


@dataclass(slots=True)
class Writer:
    """Makes BTF, on top of other BTF if it is a module's."""

    base: Writer | None = None
    strings: bytearray = field(init=False)
    types: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.strings = bytearray(b"" if self.base else b"\0")

    def string(self, text: str) -> int:
        if not text:
            return 0
        before = 0
        if self.base:
            before = len(self.base.strings)
            if (at := self.base.find(text)) >= 0:
                return at
        if (at := self.find(text)) < 0:
            at = len(self.strings)
            self.strings += text.encode() + b"\0"
        return before + at

    def find(self, text: str) -> int:
        return (b"\0" + self.strings).find(b"\0" + text.encode() + b"\0")

    def add(
        self, kind: int, name: str, third: int, more: bytes = b"", vlen: int = 0, flag: int = 0
    ) -> int:
        """`third`: size or type. Returns the type's number."""
        info = flag << 31 | kind << 24 | vlen
        self.types.append(struct.pack("=III", self.string(name), info, third) + more)
        return len(self.types) + (len(self.base.types) if self.base else 0)

    def integer(self, name: str = "int", size: int = 4) -> int:
        return self.add(INT, name, size, struct.pack("=I", size * 8))

    def aggregate(
        self, kind: int, name: str, size: int, *members: tuple[str, int, int], flag: int = 0
    ) -> int:
        """`members`: (name, type, offset in bits)."""
        self.string(name)
        more = b"".join(struct.pack("=III", self.string(n), t, bits) for n, t, bits in members)
        return self.add(kind, name, size, more, len(members), flag)

    def number(self, name: str) -> int:
        """Of the type that has that name."""
        name_off = struct.pack("=I", self.string(name))
        return 1 + [of_type[:4] for of_type in self.types].index(name_off)

    def bytes(self) -> bytes:
        types = b"".join(self.types)
        sections = (0, len(types), len(types), len(self.strings))
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sections) + types + bytes(self.strings)


@dataclass(frozen=True, slots=True)
class Blob:
    """Stands for a file with these bytes."""

    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


def load(data: bytes, base: Btf | None = None) -> Btf:
    return Btf.load(Blob(data), base)  # type: ignore[arg-type]


@cache
def running_kernel() -> tuple[Btf, Dump]:
    return Btf.load(), Dump.of(VMLINUX)


# The running kernel's.


@pytest.mark.parametrize("macro", offsets._NEEDED)
def test_offset_is_what_bpftool_says(macro: str) -> None:
    btf, dump = running_kernel()
    where = offsets._NEEDED[macro]
    assert offsets.kernel_offsets(btf, kprobes=False)[macro] == dump.offset(*where)


def test_arguments_of_functions_are_where_bpftool_says() -> None:
    btf, dump = running_kernel()
    registers = offsets.ARGUMENTS[platform.machine()]
    expected = [dump.offset("pt_regs", name) for name in registers]
    if len(set(registers)) == 1:
        expected = [start + 8 * number for number, start in enumerate(expected)]
    found = offsets.kernel_offsets(btf, kprobes=True)
    assert [found[f"OFFSET_argument_{number}"] for number in range(len(expected))] == expected


def test_conntrack_is_where_bpftool_says() -> None:
    btf, dump = running_kernel()
    module = Path("/sys/kernel/btf/nf_conntrack")
    if module.exists():
        dump = Dump.of(module, VMLINUX)
    elif btf.find(STRUCT, "nf_conn") is None:
        pytest.skip("this kernel has no conntrack; load the nf_conntrack module")
    found = offsets.kernel_offsets(btf, kprobes=False)
    assert found["OFFSET_sk_buff_nfct"] == dump.offset("sk_buff", "_nfct")
    assert found["OFFSET_nf_conn_original"] == dump.offset("nf_conn", "tuplehash") + dump.offset(
        "nf_conntrack_tuple_hash", "tuple"
    )


def test_every_member_of_many_structs_is_where_bpftool_says() -> None:
    btf, dump = running_kernel()
    named = Tally(t.name for t in dump.types.values() if t.kind == "STRUCT")
    structs = sorted(name for name, count in named.items() if count == 1 and name != "(anon)")
    compared = 0
    for struct_name in structs[::40]:
        members = dump.members(dump.named("STRUCT", struct_name))
        for member, _, bits in members:
            if bits % 8 == 0:
                assert (struct_name, member, btf.offset(struct_name, member)) == (
                    struct_name,
                    member,
                    bits // 8,
                )
                compared += 1
    assert compared > 500


def test_enumerators_are_those_of_bpftool() -> None:
    btf, dump = running_kernel()
    lines = dump.types[dump.named("ENUM", "skb_drop_reason")].lines
    said = (re.findall(r"'(\w+)' val=(\d+)", line)[0] for line in lines)
    assert btf.enumerators("skb_drop_reason") == {int(value): name for name, value in said}


def test_parameters_of_a_tracepoint_are_counted() -> None:
    btf, dump = running_kernel()
    pointer = dump.types[dump.named("TYPEDEF", "btf_trace_kfree_skb")].type_id
    function = dump.types[dump.types[pointer].type_id]
    assert function.kind == "FUNC_PROTO"
    assert btf.parameter_count("btf_trace_kfree_skb") == len(function.lines)
    assert btf.parameter_count("btf_trace_that_there_is_not") == 0


def test_functions_are_found() -> None:
    btf, _ = running_kernel()
    assert btf.has_function("udp_sendmsg")
    assert not btf.has_function("sk_buff")


def test_what_is_missing_is_named() -> None:
    btf, _ = running_kernel()
    with pytest.raises(BtfError, match="no struct not_there"):
        btf.offset("not_there", "x")
    with pytest.raises(BtfError, match=r"struct sk_buff has no member sk\.not_there"):
        btf.offset("sk_buff", "sk.not_there")
    with pytest.raises(BtfError, match="cannot read"):
        Btf.load(Path("/not/there"))
    with pytest.raises(BtfError, match="is not BTF"):
        Btf.load(Path("/proc/version"))


# Made for the test.


def kernel() -> Writer:
    """Each kind of type that lies on the way to a member."""
    btf = Writer()
    integer = btf.integer()
    pointer = btf.add(PTR, "", integer)
    const = btf.add(CONST, "", integer)
    inner = btf.aggregate(STRUCT, "", 8, ("in_struct", const, 0), ("second", integer, 32))
    union = btf.aggregate(UNION, "", 8, ("in_union", integer, 0), ("", inner, 0))
    bits = btf.aggregate(
        STRUCT, "bits", 4, ("low", integer, 3 << 24), ("high", integer, 5 << 24 | 8), flag=1
    )
    alias = btf.add(TYPEDEF, "alias_t", bits)
    array = btf.add(ARRAY, "", 0, struct.pack("=III", alias, integer, 3))
    outer = btf.aggregate(
        STRUCT,
        "outer",
        40,
        ("first", integer, 0),
        ("", union, 64),
        ("named", alias, 128),
        ("several", array, 160),
        ("pointer", pointer, 256),
    )
    btf.add(ENUM, "colour", 4, struct.pack("=IiIi", btf.string("RED"), 1, btf.string("BLUE"), 7), 2)
    btf.add(ENUM64, "wide", 8, struct.pack("=III", btf.string("WIDE"), 0, 1), 1)
    btf.add(FLOAT, "double", 8)
    proto = btf.add(FUNC_PROTO, "", 0, struct.pack("=IIII", 0, integer, 0, outer), 2)
    btf.add(FUNC, "work", proto, vlen=1)
    btf.add(DECL_TAG, "tagged", outer, struct.pack("=i", 0))
    btf.add(TYPEDEF, "btf_trace_work", btf.add(PTR, "", proto))
    btf.aggregate(STRUCT, "unused", 0)
    return btf


LAST_VALUE = 0x7F7F7F7F  # not one byte of it is zero, and strings come next


def module(base: Writer) -> Writer:
    """Refers to the kernel's types and strings; its own first string has no zero byte before it."""
    btf = Writer(base)
    first = btf.aggregate(STRUCT, "own", 8, ("x", 1, 0), ("named", 1, 32))
    btf.aggregate(STRUCT, "around", 48, ("mine", first, 0), ("theirs", base.number("outer"), 64))
    values = struct.pack("=IIII", btf.string("RED"), 3, btf.string("PINK"), LAST_VALUE)
    btf.add(ENUM, "tint", 4, values, 2)
    return btf


KERNEL_MEMBERS = {
    ("outer", "first"): 0,
    ("outer", "in_union"): 8,
    ("outer", "in_struct"): 8,
    ("outer", "second"): 12,
    ("outer", "named"): 16,
    ("outer", "named.high"): 17,
    ("outer", "several.high"): 21,
    ("outer", "pointer"): 32,
    ("bits", "high"): 1,
}
MODULE_MEMBERS = {
    ("own", "named"): 4,
    ("around", "mine.named"): 4,
    ("around", "theirs"): 8,
    ("around", "theirs.second"): 20,
    ("around", "theirs.several.high"): 29,
    ("outer", "second"): 12,  # the kernel's own, through the module
}


@pytest.mark.parametrize("where", KERNEL_MEMBERS, ids=".".join)
def test_member_is_found_through_whatever_is_around_it(where: tuple[str, str]) -> None:
    assert load(kernel().bytes()).offset(*where) == KERNEL_MEMBERS[where]


@pytest.mark.parametrize("where", MODULE_MEMBERS, ids=".".join)
def test_member_is_found_in_what_continues_other_btf(where: tuple[str, str]) -> None:
    base = kernel()
    assert load(module(base).bytes(), load(base.bytes())).offset(*where) == MODULE_MEMBERS[where]


def test_bpftool_reads_the_same_in_what_the_test_made(tmp_path: Path) -> None:
    """Otherwise the two tests above would only show that writer and reader err alike."""
    base = kernel()
    vmlinux, split = tmp_path / "vmlinux", tmp_path / "module"
    vmlinux.write_bytes(base.bytes())
    split.write_bytes(module(base).bytes())
    dump = Dump.of(vmlinux)
    for where, offset in KERNEL_MEMBERS.items():
        assert dump.offset(*where) == offset
    dump = Dump({**dump.types, **Dump.of(split, vmlinux).types})
    for where, offset in MODULE_MEMBERS.items():
        assert dump.offset(*where) == offset


def test_what_is_not_a_member_is_not_found() -> None:
    btf = load(kernel().bytes())
    for path in ("in_struct.x", "pointer.in_struct", "first.x", "x", ""):
        with pytest.raises(BtfError, match=rf"struct outer has no member {path}$"):
            btf.offset("outer", path)
    with pytest.raises(BtfError, match="no struct alias_t"):
        btf.offset("alias_t", "low")


def test_enums_and_functions_are_read_on_both_levels() -> None:
    base = kernel()
    btf = load(base.bytes())
    split = load(module(base).bytes(), btf)
    assert btf.enumerators("colour") == split.enumerators("colour") == {1: "RED", 7: "BLUE"}
    assert split.enumerators("tint") == {3: "RED", LAST_VALUE: "PINK"}
    assert btf.enumerators("tint") == {}
    assert btf.has_function("work")
    assert split.has_function("work")
    assert btf.parameter_count("btf_trace_work") == split.parameter_count("btf_trace_work") == 2
    assert btf.parameter_count("alias_t") == 0


# Malformed.


def ask_everything(btf: Btf) -> None:
    """Raises BtfError for what cannot be answered, once all has been asked."""
    errors = []
    for where in {**KERNEL_MEMBERS, **MODULE_MEMBERS}:
        try:
            btf.offset(*where)
        except BtfError as error:
            errors.append(error)
    for question in (
        lambda: btf.enumerators("colour"),
        lambda: btf.enumerators("tint"),
        lambda: btf.parameter_count("btf_trace_work"),
        lambda: btf.has_function("work"),
    ):
        try:
            question()
        except BtfError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def circles() -> dict[str, Writer]:
    """Types that refer to themselves, or to none."""
    found = {}
    for name, kind in (("typedef", TYPEDEF), ("const", CONST), ("tag", TYPE_TAG)):
        btf = found[f"{name} of itself"] = Writer()
        btf.add(kind, "outer", 1)
        btf.aggregate(STRUCT, "outer", 8, ("named", 1, 0))
    btf = found["array of itself"] = Writer()
    btf.add(ARRAY, "", 0, struct.pack("=III", 1, 1, 3))
    btf.aggregate(STRUCT, "outer", 8, ("named", 1, 0))
    btf = found["anonymous member of itself"] = Writer()
    btf.aggregate(STRUCT, "outer", 8, *[("", 1, 0)] * 1000)
    btf = found["anonymous members of one another"] = Writer()
    for _ in range(30):
        btf.aggregate(UNION, "", 8, *[("", other, 0) for other in range(1, 40)])
    btf.aggregate(STRUCT, "outer", 8, ("", 1, 0))
    btf = found["anonymous members a thousand deep"] = Writer()
    btf.aggregate(STRUCT, "outer", 8, ("", 2, 0))
    for number in range(2, 2000):
        btf.aggregate(STRUCT, "", 8, ("", number + 1, 0))
    btf = found["type that there is not"] = Writer()
    btf.aggregate(STRUCT, "outer", 8, ("named", 1 << 31, 0))
    btf = found["string that there is not"] = Writer()
    btf.types.append(struct.pack("=III", btf.string("outer"), STRUCT << 24 | 1, 8))
    btf.types[-1] += struct.pack("=III", 1 << 31, 0, 0)
    return found


CIRCLES = circles()


@pytest.mark.parametrize("what", CIRCLES)
def test_malformed_types_are_an_error_and_no_endless_loop(what: str) -> None:
    btf = load(CIRCLES[what].bytes())
    for path in ("named.high", "in_struct"):
        with pytest.raises(BtfError, match=r"malformed BTF|struct outer has no member"):
            btf.offset("outer", path)


def test_typedef_of_a_pointer_to_itself_has_no_parameters() -> None:
    btf = Writer()
    btf.add(TYPEDEF, "btf_trace_work", btf.add(PTR, "", 2))
    assert load(btf.bytes()).parameter_count("btf_trace_work") == 0


def test_btf_cut_off_anywhere_is_an_error() -> None:
    whole = kernel().bytes()
    types_end = len(whole) - len(kernel().strings)
    for size in range(types_end):
        with pytest.raises(BtfError, match="is cut off"):
            load(whole[:size])
    for size in range(types_end, len(whole)):
        with pytest.raises(BtfError):
            ask_everything(load(whole[:size]))


@pytest.mark.fuzz
@given(
    st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=4)), max_size=6),
    st.booleans(),
)
def test_mutated_btf_is_answered_or_an_error(changes: list[tuple[int, bytes]], split: bool) -> None:
    base = kernel()
    data = module(base).bytes() if split else base.bytes()
    for place, some in changes:
        at = place % len(data)
        data = data[:at] + some + data[at + len(some) :]
    try:
        ask_everything(load(data, load(base.bytes()) if split else None))
    except BtfError as error:
        assert str(error)  # noqa: PT017 - no error is right as well


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_arbitrary_types_are_answered_or_an_error(types: bytes) -> None:
    strings = kernel().strings
    sections = (0, len(types), len(types), len(strings))
    data = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sections) + types + bytes(strings)
    try:
        ask_everything(load(data))
    except BtfError as error:
        assert str(error)  # noqa: PT017 - no error is right as well
