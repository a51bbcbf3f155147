# SPDX-License-Identifier: Apache-2.0
"""The header's words, and the question."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import dns.exception
import dns.flags

from tracer.decode.records import POINTER, read_name
from tracer.decode.words import class_text, opcode_text, problem_text, type_text

HEADER_LEN = 12
QUESTIONS_MAX = 8192

_TYPE_CLASS = struct.Struct("!HH")
_FLAGS = (
    ("aa", dns.flags.AA),
    ("tc", dns.flags.TC),
    ("rd", dns.flags.RD),
    ("ra", dns.flags.RA),
    ("ad", dns.flags.AD),
    ("cd", dns.flags.CD),
)
_FLAGS_MASK = functools.reduce(int.__or__, (int(bit) for _, bit in _FLAGS))


class Question(NamedTuple):
    """What a query asks for: the first question, if there are several."""

    name: str | None
    type: str | None
    class_: str | None
    problem: str | None = None


_questions: dict[bytes, Question] = {}


def question(message: bytes) -> Question:
    """The question of a query, or of a response; either may be cut after it."""
    end = message.find(b"\0", HEADER_LEN) + 5
    key = message[HEADER_LEN:end] if message.startswith(b"\0\1", 4) else b""
    known = _questions.get(key)
    if known is not None:
        return known
    found, name_end = _read_question(message)
    # Where the first zero byte ends the name, the key is the question, and nothing but it.
    if found.problem is None and name_end + 4 == end:
        if len(_questions) >= QUESTIONS_MAX:
            _questions.clear()
        _questions[key] = found
    return found


def opcode(message: bytes) -> str | None:
    """What the message is for: "QUERY", "NOTIFY", "UPDATE"; None of less than its flags."""
    return opcode_text(message[2] >> 3 & 0xF) if len(message) > 2 else None


def flags(flags16: int) -> tuple[str, ...]:
    """The header's flags that are set, in their order on the wire, without QR."""
    return _flag_names(flags16 & _FLAGS_MASK)


def _read_question(message: bytes) -> tuple[Question, int]:
    """Also says where the name ends, or 0 where that does not say what the name is."""
    if len(message) < HEADER_LEN:
        return Question(None, None, None, f"only {len(message)} bytes of a DNS header"), 0
    count = int.from_bytes(message[4:6], "big")
    if count == 0:
        return Question(None, None, None, "no question"), 0
    try:
        name, end = read_name(message, HEADER_LEN, {})
    except dns.exception.DNSException as error:
        return Question(None, None, None, f"question's name: {problem_text(error)}"), 0
    if len(message) < end + 4:
        return Question(name, None, None, "cut off after the question's name"), 0
    type_, class_ = _TYPE_CLASS.unpack_from(message, end)
    problem = None
    if _has_pointer(message):
        problem = "question's name points into the header"
    elif count > 1:
        problem = f"{count} questions"
    return Question(name, type_text(type_), class_text(class_), problem), end


def _has_pointer(message: bytes) -> bool:
    """Whether the question's name, which is well-formed, goes on elsewhere."""
    at = HEADER_LEN
    while 0 < message[at] < POINTER:
        at += message[at] + 1
    return message[at] != 0


@functools.lru_cache(maxsize=1024)
def _flag_names(bits: int) -> tuple[str, ...]:
    return tuple(name for name, bit in _FLAGS if bits & bit)
