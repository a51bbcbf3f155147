# SPDX-License-Identifier: Apache-2.0
"""Wire bytes to names, types, rcodes and answers, in DNS's own words.

Whatever the bytes are, a value comes back: what is malformed or cut carries a `problem`. Names are
absolute, in presentation format with their case kept, and so is all data: printable ASCII only.

The same questions come again and again, so both questions and answers are remembered, in tables
that are emptied when they are full. A name of ordinary characters is read here, all others by
dnspython, which takes five times as long.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.wire

from tracer.transaction import Answer

HEADER_LEN = 12
QUESTIONS_MAX = 8192
ANSWERS_MAX = 1024
ANSWERS_LEN_MAX = 1232  # of a response that is remembered
ANSWERS_TEXT_MAX = 8 << 10  # as above
# Of one response: with names that point to names, 4 KB of a stranger's could be half a megabyte.
RECORDS_MAX = 256
TEXT_MAX = 64 << 10

_NAME_WIRE_MAX = 255
_TTL_MAX = 0x7FFF_FFFF
_POINTER = 0xC0
_OPT_START = b"\0\0\x29"  # root name, type OPT
_COUNTS = struct.Struct("!HHHH")
_TYPE_CLASS = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
# Those that presentation format writes as they are.
_PLAIN = bytes(c for c in range(0x21, 0x7F) if c not in b'"().;\\@$')
# Others have no data formats of their own. dnspython keeps a table entry for each pair of class
# and type it ever meets, which the sender must not be able to fill.
_CLASSES = {dns.rdataclass.IN, dns.rdataclass.CH, dns.rdataclass.HS}
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


class Answers(NamedTuple):
    """The records of the answer section that are whole, if not too many or too long."""

    records: tuple[Answer, ...]
    problem: str | None = None


_questions: dict[bytes, Question] = {}
_answers: dict[bytes, Answers] = {}
_NO_ANSWERS = Answers(())


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


def rcode(response: bytes, wire_len: int) -> str | None:
    """The response's code, EDNS's upper bits included where the whole response was captured."""
    if len(response) < 4:
        return None
    low = response[3] & 0xF
    if len(response) < wire_len:
        return _rcode_text(low)
    at = response.find(_OPT_START, HEADER_LEN)
    while at != -1:
        # Nearly always the upper bits are zero, and then it does not matter whether this is OPT.
        if response[at + 5 : at + 6] not in (b"", b"\0"):
            return _rcode_text(low | _upper_rcode(response) << 4)
        at = response.find(_OPT_START, at + 1)
    return _rcode_text(low)


def flags(flags16: int) -> tuple[str, ...]:
    """The header's flags that are set, in their order on the wire, without QR."""
    return _flag_names(flags16 & _FLAGS_MASK)


def answers(response: bytes, wire_len: int) -> Answers:
    """The answer section of a response, of which `wire_len` bytes were sent."""
    if len(response) >= HEADER_LEN and response[6:8] == b"\0\0":
        return _NO_ANSWERS
    if len(response) < wire_len or len(response) > ANSWERS_LEN_MAX:
        return _read_answers(response, wire_len)
    key = response[2:]
    known = _answers.get(key)
    if known is None:
        known = _read_answers(response, wire_len)
        if sum(map(_text_len, known.records)) > ANSWERS_TEXT_MAX:
            return known
        if len(_answers) >= ANSWERS_MAX:
            _answers.clear()
        _answers[key] = known
    return known


def type_named(text: str) -> str:
    """A type's mnemonic as questions and answers have it: "aaaa" is "AAAA", "TYPE1" is "A"."""
    try:
        return _type_text(dns.rdatatype.from_text(text))
    except (dns.exception.DNSException, ValueError):
        raise ValueError(f"{text!r} is not a DNS type, such as A, AAAA or TYPE65280") from None


def rcode_named(text: str) -> str:
    """A response code's mnemonic as transactions have it: "nxdomain" and "3" are "NXDOMAIN"."""
    number = text.upper().removeprefix("RCODE")
    try:
        return _rcode_text(dns.rcode.from_text(number))
    except (dns.exception.DNSException, ValueError):
        raise ValueError(f"{text!r} is not a response code, such as NXDOMAIN or SERVFAIL") from None


def _read_question(message: bytes) -> tuple[Question, int]:
    """Also says where the name ends, or 0 where that does not say what the name is."""
    if len(message) < HEADER_LEN:
        return Question(None, None, None, f"only {len(message)} bytes of a DNS header"), 0
    count = int.from_bytes(message[4:6], "big")
    if count == 0:
        return Question(None, None, None, "no question"), 0
    try:
        name, end = _name(message, HEADER_LEN, {})
    except dns.exception.DNSException as error:
        return Question(None, None, None, f"question's name: {_words(error)}"), 0
    if len(message) < end + 4:
        return Question(name, None, None, "cut off after the question's name"), 0
    type_, class_ = _TYPE_CLASS.unpack_from(message, end)
    problem = None
    if _has_pointer(message):
        problem = "question's name points into the header"
    elif count > 1:
        problem = f"{count} questions"
    return Question(name, _type_text(type_), _class_text(class_), problem), end


def _has_pointer(message: bytes) -> bool:
    """Whether the question's name, which is well-formed, goes on elsewhere."""
    at = HEADER_LEN
    while 0 < message[at] < _POINTER:
        at += message[at] + 1
    return message[at] != 0


def _read_answers(response: bytes, wire_len: int) -> Answers:
    if len(response) < HEADER_LEN:
        return Answers((), f"only {len(response)} bytes of a DNS header")
    questions, count, _, _ = _COUNTS.unpack_from(response, 4)
    records: list[Answer] = []
    names: dict[int, str] = {}
    problem = None
    text_left = TEXT_MAX
    at = HEADER_LEN
    try:
        for _ in range(questions):
            _, at = _name(response, at, names)
            at += 4
        for number in range(1, count + 1):
            record, at, whole = _read_record(response, at, names)
            text_left -= _text_len(record)
            if number > RECORDS_MAX or text_left < 0:
                return Answers(tuple(records), f"too much: only {number - 1} of {count} answers")
            records.append(record)
            if not whole and problem is None:
                problem = f"answer {number}: malformed {record.type} data"
    except (dns.exception.DNSException, struct.error) as error:
        if len(response) < wire_len:
            problem = f"cut off after {len(response)} of {wire_len} bytes"
        else:
            problem = f"answer {len(records) + 1} of {count}: {_words(error)}"
    return Answers(tuple(records), problem)


def _text_len(record: Answer) -> int:
    return len(record.name) + len(record.data)


def _read_record(response: bytes, at: int, names: dict[int, str]) -> tuple[Answer, int, bool]:
    """The record, where the next begins, and whether its data is what its type says."""
    name, at = _name(response, at, names)
    type_, class_, ttl, data_len = _RECORD.unpack_from(response, at)
    at += _RECORD.size
    end = at + data_len
    if end > len(response):
        raise dns.exception.FormError
    data, whole = _data(response, at, end, type_, class_)
    if ttl > _TTL_MAX:  # RFC 2181, section 8
        ttl = 0
    return Answer(name, _type_text(type_), ttl, data), end, whole


def _data(response: bytes, at: int, end: int, type_: int, class_: int) -> tuple[str, bool]:
    whole = True
    if class_ in _CLASSES and not _type_text(type_).startswith("TYPE"):
        try:
            parser = dns.wire.Parser(response, at)
            with parser.restrict_to(end - at):
                rdata = dns.rdata.from_wire_parser(
                    dns.rdataclass.RdataClass(class_), dns.rdatatype.RdataType(type_), parser
                )
            return _printable(rdata.to_text()), True
        except Exception:  # noqa: BLE001 - whatever a type's own code makes of hostile data
            whole = False
    return f"\\# {end - at} {response[at:end].hex()}".rstrip(), whole


def _name(message: bytes, start: int, names: dict[int, str]) -> tuple[str, int]:
    """The name that begins at `start`, and where it ends. `names` are those read before."""
    size = len(message)
    labels = []
    at = start
    length = message[at] if at < size else _POINTER
    if length >= _POINTER and at + 1 < size:
        known = names.get((length & 0x3F) << 8 | message[at + 1])
        if known is not None:
            return known, at + 2
    while 0 < length < 64 and at + 1 + length < size:
        at += 1 + length
        labels.append(message[at - length : at])
        length = message[at]
    at += 1
    if length or at - start > _NAME_WIRE_MAX or b"".join(labels).translate(None, _PLAIN):
        parser = dns.wire.Parser(message, start)
        text = dns.name.from_wire_parser(parser).to_text()
        at = parser.current
    else:
        text = b".".join(labels).decode("ascii") + "."
    names[start] = text
    return text, at


def _upper_rcode(response: bytes) -> int:
    """The eight bits of the first OPT record; 0 where there is none, or something is malformed."""
    questions, *sections = _COUNTS.unpack_from(response, 4)
    names: dict[int, str] = {}
    at = HEADER_LEN
    try:
        for _ in range(questions):
            _, at = _name(response, at, names)
            at += 4
        for _ in range(sum(sections)):
            _, at = _name(response, at, names)
            type_, _, ttl, data_len = _RECORD.unpack_from(response, at)
            if type_ == dns.rdatatype.OPT:
                return int(ttl) >> 24
            at += _RECORD.size + data_len
    except (dns.exception.DNSException, struct.error):
        pass
    return 0


def _printable(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if " " <= c <= "~" else "".join(f"\\{b:03d}" for b in c.encode("utf-8", "surrogatepass"))
        for c in text
    )


def _words(error: Exception) -> str:
    """dnspython's own description of what is malformed."""
    if type(error) in (dns.exception.FormError, struct.error):
        return "goes beyond the end of the message"
    words = " ".join(str(error).split()).rstrip(".")
    return words[:1].lower() + words[1:] if not words.startswith("DNS") else words


@functools.lru_cache(maxsize=1024)
def _type_text(type_: int) -> str:
    return dns.rdatatype.to_text(dns.rdatatype.RdataType(type_))


@functools.lru_cache(maxsize=1024)
def _class_text(class_: int) -> str:
    return dns.rdataclass.to_text(dns.rdataclass.RdataClass(class_))


@functools.lru_cache(maxsize=1024)
def _rcode_text(value: int) -> str:
    text = dns.rcode.to_text(dns.rcode.Rcode(value))
    return f"RCODE{value}" if text.isdigit() else text


@functools.lru_cache(maxsize=1024)
def _flag_names(bits: int) -> tuple[str, ...]:
    return tuple(name for name, bit in _FLAGS if bits & bit)
