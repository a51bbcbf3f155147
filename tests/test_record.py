# SPDX-License-Identifier: Apache-2.0
"""What is written down twice, in C and in Python, says the same: the C compiler is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tracer import record
from tracer.kernel import programs, session, table
from tracer.kernel.compile import Compilation, CompileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import IntEnum
    from struct import Struct

    import numpy as np

SIZES = {"SLOTS": 8, "SMALL_PAGES": 1, "LARGE_PAGES": 2, "SEGMENT_PAGES": 1}
HEADER_AND_NAME = 12 + 255 + 4

DTYPES = {
    "struct flow": record.FLOW,
    "struct hop": record.HOP,
    "struct transaction": record.TRANSACTION,
    "struct small_record": record.SMALL_RECORD,
    "struct large_record": record.LARGE_RECORD,
    "struct segment": record.SEGMENT,
    "struct segment_record": record.SEGMENT_RECORD,
    "struct series_key": record.SERIES_KEY,
    "struct series": record.SERIES,
    "struct bucket_key": record.BUCKET_KEY,
}
# Those that go to and fro packed by `struct`: its format, and the C members in the same order.
PACKED = {
    "struct index_key": (table._KEY, ("client_addr", "client_port", "dns_id", "variant")),
    "struct settings": (
        session._SETTINGS,
        ("wanted", "pid", "paused", "slower_ns", "share", "notable_share"),
    ),
}
ENUMS: dict[str, type[IntEnum]] = {
    "HOP": record.HopKind,
    "STATUS": record.Status,
    "COUNT": record.Counter,
    "WANT": record.Wanted,
    "VERDICT": record.Verdict,
    "STAGE": record.Stage,
    "SERIES": record.SeriesKind,
    "BACKEND": record.BackendKnown,
}
CONSTANTS = {
    "QUERY": 0,
    "RESPONSE": 1,
    "COUNTERS": len(record.Counter),
    "STAGES": len(record.Stage),
    "MAX_HOPS": record.MAX_HOPS,
    "MAX_FLOWS": record.MAX_FLOWS,
    "QUERY_BYTES": record.QUERY_BYTES,
    "RESPONSE_SMALL": record.RESPONSE_SMALL,
    "RESPONSE_LARGE": record.RESPONSE_LARGE,
    "SEGMENT_BYTES": record.SEGMENT_BYTES,
    "MARK_NETNS": programs._MARK_NETNS,
    "MARK_L2_HLEN": programs._MARK_L2_HLEN,
    "MARK_HOOK": programs._MARK_HOOK,
    "MARK_VERDICT": programs._MARK_VERDICT,
    "MARK_SKB_ARGUMENT": programs._MARK_SKB_ARGUMENT,
    "MARK_READ_TASK": programs._MARK_READ_TASK,
    "MARK_PULL": programs._MARK_PULL,
    "MARK_UDP": programs._MARK_UDP,
}


def equal(c: str, number: int) -> str:
    return f'_Static_assert({c} == {number}ULL, "{c} is not {number}");'


def members(c_type: str, where: dict[str, tuple[int, int]]) -> Iterator[str]:
    """`where`: offset and size of each member."""
    for name, (offset, size) in where.items():
        yield equal(f"__builtin_offsetof({c_type}, {name})", offset)
        yield equal(f"sizeof((({c_type} *)0)->{name})", size)


def of_dtype(c_type: str, dtype: np.dtype[np.void]) -> Iterator[str]:
    where = {}
    for name in dtype.names or ():
        of_member, offset = dtype.fields[name][:2]  # type: ignore[index]
        where[name] = (offset, of_member.itemsize)
    yield equal(f"sizeof({c_type})", dtype.itemsize)
    yield from members(c_type, where)


def of_packed(c_type: str, packing: Struct, names: tuple[str, ...]) -> Iterator[str]:
    values = packing.unpack(bytes(packing.size))
    codes = packing.format.removeprefix("=").replace("16s", "A").replace("2s", "B")
    sizes = {"A": 16, "B": 2, "I": 4, "Q": 8}
    assert len(codes) == len(values) == len(names)
    where = {}
    offset = 0
    for name, code in zip(names, codes, strict=True):
        where[name] = (offset, sizes[code])
        offset += sizes[code]
    yield equal(f"sizeof({c_type})", packing.size)
    yield from members(c_type, where)


def assertions() -> list[str]:
    """All that must hold."""
    lines = [equal(name, number) for name, number in CONSTANTS.items()]
    for c_type, dtype in DTYPES.items():
        lines += of_dtype(c_type, dtype)
    for c_type, (packing, names) in PACKED.items():
        lines += of_packed(c_type, packing, names)
    for prefix, enum in ENUMS.items():
        lines += (equal(f"{prefix}_{member.name}", member) for member in enum)
    return lines


def compile_with(lines: list[str]) -> None:
    """Raises CompileError if one of the assertions fails."""
    Compilation(SIZES, kprobes=False, more="\n".join(["", *lines, ""])).result().close()


def test_python_and_c_agree_on_every_member_and_number() -> None:
    compile_with(assertions())


@pytest.mark.parametrize(
    "wrong",
    [
        equal("sizeof(struct transaction)", record.TRANSACTION.itemsize + 8),
        equal("__builtin_offsetof(struct hop, kind)", 21),
        equal("COUNT_EMITTED", 2),
    ],
)
def test_what_they_do_not_agree_on_is_found(wrong: str) -> None:
    """Otherwise the test above would prove nothing."""
    with pytest.raises(
        CompileError, match=wrong.split('"')[1].replace("(", r"\(").replace(")", r"\)")
    ):
        compile_with([*assertions(), wrong])


@pytest.mark.parametrize("c_type", DTYPES)
def test_no_byte_is_left_over_where_c_could_have_another_member(c_type: str) -> None:
    dtype = DTYPES[c_type]
    sizes = [dtype.fields[name][0].itemsize for name in dtype.names or ()]  # type: ignore[index]
    assert sum(sizes) == dtype.itemsize


def test_record_has_room_for_the_longest_question() -> None:
    assert record.QUERY_BYTES >= HEADER_AND_NAME
