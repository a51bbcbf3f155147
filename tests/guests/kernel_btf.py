# SPDX-License-Identifier: Apache-2.0
"""BTF out of kernels that do not run here, and small enough to keep: what fetch-btf runs.

kernel_btf extract IMAGE OUT    the BTF of a kernel image, or of a module
kernel_btf subset BTF OUT       what dnstrace's offsets are taken from
kernel_btf compare BTF OTHER    whether the offsets are the same in both
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from tracer.kernel import offsets
from tracer.kernel.btf import Btf, BtfError

_MAGIC = struct.pack("<HB", 0xEB9F, 1)
_HEADER = struct.Struct("<HBBIIIII")
_U32, _TWO, _THREE = struct.Struct("<I"), struct.Struct("<II"), struct.Struct("<III")
_ZBOOT = b"zimg"  # at 4 of an EFI zboot image, followed by offset and size of its payload
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _FUNC_PROTO = 8, 13
_QUALIFIERS = {_TYPEDEF, 9, 10, 11, 18}  # volatile, const, restrict, type tag
_TRACEPOINT, _REASONS = "btf_trace_kfree_skb", "skb_drop_reason"
# Beside what every machine needs: conntrack's, and the registers of aarch64.
_READ = (
    *offsets._NEEDED.values(),
    ("sk_buff", "_nfct"),
    ("nf_conn", "tuplehash"),
    ("nf_conntrack_tuple_hash", "tuple"),
    ("nf_conntrack_tuple", "src.u3"),
    ("nf_conntrack_tuple", "dst.protonum"),
    ("pt_regs", "regs"),
)


def extract(image: bytes) -> bytes:
    """The largest BTF in a kernel image or module, compressed or not. Raises BtfError."""
    image = _decompressed(image)
    found = b""
    at = image.find(_MAGIC)
    while at >= 0:
        size = _btf_size(image, at)
        if size > len(found):
            found = image[at : at + size]
        at = image.find(_MAGIC, at + 1)
    if not found:
        raise BtfError("there is no BTF in it")
    return found


def _decompressed(image: bytes) -> bytes:
    if image[4:8] == _ZBOOT and len(image) >= 16:
        offset, size = struct.unpack_from("<II", image, 8)
        image = image[offset : offset + size]
    try:
        if image.startswith(b"\x1f\x8b"):
            return gzip.decompress(image)
        if image.startswith(b"\xfd7zXZ"):
            return lzma.decompress(image)
        if image.startswith(b"\x28\xb5\x2f\xfd"):
            command = ["zstd", "--decompress", "--stdout", "--quiet"]
            return subprocess.run(command, input=image, capture_output=True, check=True).stdout
    except (EOFError, OSError, lzma.LZMAError, subprocess.SubprocessError, zlib.error) as error:
        raise BtfError(f"cannot decompress it: {error}") from error
    return image


def _btf_size(image: bytes, at: int) -> int:
    """Length of the BTF that starts there; 0 if it is none."""
    if at + _HEADER.size > len(image):
        return 0
    _, _, flags, header_len, type_off, type_len, str_off, str_len = _HEADER.unpack_from(image, at)
    size = int(header_len + str_off + str_len)
    if flags or header_len != _HEADER.size or type_off or str_off != type_len or not type_len:
        return 0
    if at + size > len(image) or image[at + size - 1] != 0:
        return 0
    return size


class Subset:
    """BTF made of some types of other BTF.

    A struct keeps all its members with their names and places; what does not lie on a path that
    was asked for has the type void.
    """

    def __init__(self, source: Btf) -> None:
        self._source = source
        self._numbers: dict[int, int] = {}  # in the source: here
        self._strings = bytearray(b"\0")

    def take_member(self, struct_name: str, path: str) -> None:
        """A struct, and whatever lies on the way to one of its members."""
        number = self._find(_STRUCT, struct_name)
        for name in path.split("."):
            self._take(number)
            found = self._member(number, name)
            if found is None:
                raise BtfError(f"there is no {struct_name}.{path}")
            number = self._behind(found)

    def take(self, kind: int, name: str) -> None:
        """A type, and what it is another name of or points to."""
        number = self._find(kind, name)
        while number:
            self._take(number)
            kind, referred = self._kind(number)
            number = referred if kind in _QUALIFIERS or kind == _PTR else 0

    def data(self) -> bytes:
        """As in a file."""
        types = b"".join(map(self._written, self._numbers))
        sections = (0, len(types), len(types), len(self._strings))
        return _HEADER.pack(0xEB9F, 1, 0, _HEADER.size, *sections) + types + bytes(self._strings)

    def _find(self, kind: int, name: str) -> int:
        number = self._source.find(kind, name)
        if number is None:
            raise BtfError(f"there is no {name}")
        return number

    def _kind(self, number: int) -> tuple[int, int]:
        _, _, info, referred = self._source._type(number)
        return info >> 24 & 31, referred

    def _take(self, number: int) -> None:
        self._numbers.setdefault(number, len(self._numbers) + 1)

    def _behind(self, number: int) -> int:
        """What is behind typedefs, qualifiers and arrays; all of them, and an integer, are taken."""
        while True:
            kind, referred = self._kind(number)
            if kind == _ARRAY:
                owner, position, _, _ = self._source._type(number)
                (referred,) = _U32.unpack_from(owner.data, position + 12)
            elif kind not in _QUALIFIERS:
                if kind in (_INT, _PTR):
                    self._take(number)
                return number
            self._take(number)
            number = referred

    def _member(self, number: int, name: str) -> int | None:
        """The type of a member, which may be one of an anonymous member's. All these are taken."""
        owner, position, info, _ = self._source._type(number)
        found = None
        for i in range(info & 0xFFFF):
            name_off, member, _ = _THREE.unpack_from(owner.data, position + 12 + i * 12)
            if name_off and owner._string(name_off) == name:
                found = int(member)
            elif not name_off and self._kind(member)[0] in (_STRUCT, _UNION):
                self._take(member)
                inner = self._member(member, name)
                found = inner if found is None else found
        return found

    def _string(self, owner: Btf, offset: int) -> int:
        text = owner._string(offset).encode() + b"\0"
        at = (b"\0" + self._strings).find(b"\0" + text)
        if at < 0:
            at = len(self._strings)
            self._strings += text
        return at

    def _written(self, number: int) -> bytes:
        owner, position, info, third = self._source._type(number)
        name_off, _, _ = _THREE.unpack_from(owner.data, position)
        kind, count = info >> 24 & 31, info & 0xFFFF
        numbers = self._numbers
        if kind in _QUALIFIERS or kind in (_PTR, _FUNC_PROTO):
            third = numbers.get(third, 0)
        parts = [_THREE.pack(self._string(owner, name_off), info, third)]
        start = position + 12
        if kind == _INT:
            parts.append(owner.data[start : start + 4])
        elif kind == _ARRAY:
            element, index, length = _THREE.unpack_from(owner.data, start)
            parts.append(_THREE.pack(numbers.get(element, 0), numbers.get(index, 0), length))
        elif kind in (_STRUCT, _UNION):
            for name, member, place in _THREE.iter_unpack(owner.data[start : start + 12 * count]):
                own = self._string(owner, name)
                parts.append(_THREE.pack(own, numbers.get(member, 0), place))
        elif kind in (_ENUM, _FUNC_PROTO):
            for name, value in _TWO.iter_unpack(owner.data[start : start + 8 * count]):
                own = 0 if kind == _FUNC_PROTO else value
                parts.append(_TWO.pack(self._string(owner, name), own))
        return b"".join(parts)


def subset(source: Btf) -> bytes:
    """What offsets are taken from, and no more."""
    small = Subset(source)
    for struct_name, path in _READ:
        small.take_member(struct_name, path)
    small.take(_TYPEDEF, _TRACEPOINT)
    small.take(_ENUM, _REASONS)
    return small.data()


def compare(source: Btf, other: Btf) -> None:
    """Raises BtfError if they say different things."""
    for struct_name, path in _READ:
        here, there = source.offset(struct_name, path), other.offset(struct_name, path)
        if here != there:
            raise BtfError(f"{struct_name}.{path} is at {here}, but at {there} in the other")
    if source.parameter_count(_TRACEPOINT) != other.parameter_count(_TRACEPOINT):
        raise BtfError(f"{_TRACEPOINT} is not the same in the other")
    if source.enumerators(_REASONS) != other.enumerators(_REASONS):
        raise BtfError(f"{_REASONS} is not the same in the other")


def main() -> int:
    """Runs the command line; the exit status."""
    try:
        match sys.argv[1:]:
            case ["extract", image, out]:
                Path(out).write_bytes(extract(Path(image).read_bytes()))
            case ["subset", source, out]:
                Path(out).write_bytes(subset(Btf.load(Path(source))))
            case ["compare", source, other]:
                compare(Btf.load(Path(source)), Btf.load(Path(other)))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (BtfError, OSError) as error:
        print(f"kernel_btf: {sys.argv[2]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
