# SPDX-License-Identifier: Apache-2.0
"""The running kernel's own description of its types (BTF).

The layout of kernel structs differs from kernel to kernel. Instead of the kernel's headers, which
are seldom installed, this reads /sys/kernel/btf/vmlinux (Documentation/bpf/btf.rst) and answers
where a member lies. Modules carry a BTF of their own that continues the kernel's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_MAGIC = 0xEB9F

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _VAR = 8, 9, 10, 11, 12, 13, 14
_DATASEC, _DECL_TAG, _TYPE_TAG, _ENUM64 = 15, 17, 18, 19
_TRANSPARENT = {_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG}
# Bytes that follow a type: per element of its vlen, or once.
_PER_ELEMENT = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
_ONCE = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
_MAX_DEPTH = 32  # of qualifiers and typedefs around a type, as in libbpf
_MAX_ANONYMOUS = 256  # structs and unions without a name in one struct


class BtfError(Exception):
    """This kernel's type information is missing, malformed, or lacks what was asked for."""


@dataclass(frozen=True, slots=True)
class Btf:
    """One BTF blob, with the kernel's underneath if it is a module's.

    `positions[i]` is where type number `first_id + i` starts in `data`.
    """

    data: bytes
    positions: list[int]
    first_id: int
    strings: int
    strings_base: int
    base: Btf | None = None
    _names: dict[tuple[int, str], int] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path = VMLINUX, base: Btf | None = None) -> Btf:
        """Indexes the types of `path`. Raises BtfError if there is none or it is not BTF."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BtfError(f"cannot read {path}: {error.strerror}") from error
        try:
            magic, _, _, header_len, type_off, type_len, str_off, _ = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise BtfError(f"{path} is not BTF")
            position = header_len + type_off
            positions = _index(data, position, position + type_len)
        except struct.error as error:
            raise BtfError(f"{path} is cut off") from error
        if base is None:
            return cls(data, [0, *positions], 0, header_len + str_off, 0)
        first = base.first_id + len(base.positions)
        end = base.strings_base + _string_section_len(base.data)
        return cls(data, positions, first, header_len + str_off, end, base)

    def find(self, kind: int, name: str) -> int | None:
        """The number of the type of that kind and name, or None."""
        key = (kind, name)
        if key not in self._names:
            found = self._search(kind, name)
            if found is None:
                return self.base.find(kind, name) if self.base else None
            self._names[key] = found
        return self._names[key]

    def offset(self, struct_name: str, path: str) -> int:
        """Byte offset of a member, e.g. `offset("sock", "__sk_common.skc_net.net")`.

        Members of anonymous structs and unions are found as in C. Raises BtfError.
        """
        type_id = self.find(_STRUCT, struct_name)
        if type_id is None:
            raise BtfError(f"this kernel's BTF has no struct {struct_name}")
        total = 0
        for member in path.split("."):
            found = self._member(type_id, member, set())
            if found is None:
                raise BtfError(f"this kernel's struct {struct_name} has no member {path}")
            type_id, bits = found
            total += bits // 8
        return total

    def enumerators(self, name: str) -> dict[int, str]:
        """Value to name of an enum; empty if this kernel has none of that name."""
        type_id = self.find(_ENUM, name)
        if type_id is None:
            return {}
        owner, position, info, _ = self._type(type_id)
        start = position + _TYPE.size
        pair = "=Ii" if info >> 31 else "=II"  # signed or not
        pairs = struct.iter_unpack(pair, owner.data[start : start + (info & 0xFFFF) * 8])
        return {value: owner._string(name_off) for name_off, value in pairs}

    def has_function(self, name: str) -> bool:
        """Whether the kernel has a function of that name that BTF describes."""
        return self.find(_FUNC, name) is not None

    def parameter_count(self, typedef: str) -> int:
        """How many parameters the function behind a typedef takes (0 if there is none).

        Tracepoint `x` is described as typedef `btf_trace_x` of a pointer to a function
        whose first parameter is not the tracepoint's.
        """
        type_id = self.find(_TYPEDEF, typedef)
        for _ in range(_MAX_DEPTH):
            if not type_id:
                break
            _, _, info, referred = self._type(type_id)
            kind = info >> 24 & 31
            if kind == _FUNC_PROTO:
                return int(info & 0xFFFF)
            type_id = referred if kind in _TRANSPARENT or kind == _PTR else None
        return 0

    def _type(self, type_id: int) -> tuple[Btf, int, int, int]:
        """(who has it, where, its info, its size or what it refers to) of a type."""
        if self.base and type_id < self.first_id:
            return self.base._type(type_id)
        if type_id - self.first_id >= len(self.positions):
            raise BtfError(f"malformed BTF: there is no type {type_id}")
        position = self.positions[type_id - self.first_id]
        if position == 0:  # type 0 is void
            return self, 0, 0, 0
        _, info, referred = _TYPE.unpack_from(self.data, position)
        return self, position, info, referred

    def _string(self, offset: int) -> str:
        if self.base and offset < self.strings_base:
            return self.base._string(offset)
        start = self.strings + offset - self.strings_base
        end = self.data.find(b"\0", start)
        if end < 0:
            raise BtfError(f"malformed BTF: there is no string {offset}")
        return self.data[start:end].decode("ascii", "replace")

    def _search(self, kind: int, name: str) -> int | None:
        offsets = self._string_offsets(name.encode() + b"\0")
        if self.base:
            offsets |= self.base._string_offsets(name.encode() + b"\0")
        unpack = _TYPE.unpack_from
        for number, position in enumerate(self.positions):
            if position == 0:
                continue
            name_off, info, _ = unpack(self.data, position)
            if name_off in offsets and info >> 24 & 31 == kind:
                return number + self.first_id
        return None

    def _string_offsets(self, terminated: bytes) -> set[int]:
        """Where a string stands. A module's first one has none before it, and so no zero byte."""
        offsets = set()
        if self.data.startswith(terminated, self.strings):
            offsets.add(self.strings_base)
        at = self.data.find(b"\0" + terminated, self.strings)
        while at >= 0:
            offsets.add(at + 1 - self.strings + self.strings_base)
            at = self.data.find(b"\0" + terminated, at + 1)
        return offsets

    def _member(self, type_id: int, name: str, seen: set[int]) -> tuple[int, int] | None:
        """(type, offset in bits) of a member, looked for inside anonymous ones too.

        `seen` are the types that were looked into already: none can hold itself.
        """
        type_id = self._resolve(type_id)
        if type_id in seen:
            return None
        if len(seen) > _MAX_ANONYMOUS:
            raise BtfError(f"malformed BTF: type {type_id} is nested too deeply")
        seen.add(type_id)
        owner, position, info, _ = self._type(type_id)
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return None
        bitfields = info >> 31
        for i in range(info & 0xFFFF):
            name_off, member_type, bits = _MEMBER.unpack_from(owner.data, position + 12 + i * 12)
            if bitfields:
                bits &= 0xFFFFFF
            if name_off:
                if owner._string(name_off) == name:
                    return member_type, bits
            else:
                inner = self._member(member_type, name, seen)
                if inner:
                    return inner[0], inner[1] + bits
        return None

    def _resolve(self, type_id: int) -> int:
        """The type behind typedefs and qualifiers; of an array, its element."""
        for _ in range(_MAX_DEPTH):
            owner, position, info, referred = self._type(type_id)
            kind = info >> 24 & 31
            if kind == _ARRAY:
                (referred,) = struct.unpack_from("=I", owner.data, position + 12)
            elif kind not in _TRANSPARENT:
                return type_id
            type_id = referred
        raise BtfError(f"malformed BTF: type {type_id} refers to itself")


def _index(data: bytes, position: int, end: int) -> list[int]:
    positions: list[int] = []
    append, unpack = positions.append, _TYPE.unpack_from
    per_element, once = _PER_ELEMENT, _ONCE
    while position < end:
        append(position)
        info = unpack(data, position)[1]
        kind = info >> 24 & 31
        position += 12
        if kind in per_element:
            position += per_element[kind] * (info & 0xFFFF)
        elif kind in once:
            position += once[kind]
    if position != end or end > len(data):
        raise struct.error  # the last type goes on behind the end
    return positions


def _string_section_len(data: bytes) -> int:
    return int(_HEADER.unpack_from(data)[7])
