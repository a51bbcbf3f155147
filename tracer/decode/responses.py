# SPDX-License-Identifier: Apache-2.0
"""Whole responses: their records, section by section, and what EDNS adds."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import dns.exception
import dns.rdatatype

from tracer.decode.edns import OPT_START, read_opt
from tracer.decode.questions import HEADER_LEN
from tracer.decode.records import RECORD, read_name, read_record
from tracer.decode.words import problem_text, rcode_text

if TYPE_CHECKING:
    from tracer.decode.edns import Edns, ExtendedError, Opt
    from tracer.transaction import Answer

RESPONSES_MAX = 1024
REMEMBERED_LEN_MAX = 1232
REMEMBERED_TEXT_MAX = 8 << 10
QUERIES_MAX = 1024
# Of one response: with names that point to names, 4 KB of a stranger's could be half a megabyte.
RECORDS_MAX = 256
TEXT_MAX = 64 << 10

_COUNTS = struct.Struct("!HHHH")
_SECTIONS = ("answer", "authority record", "additional record")
_NO_RECORDS = bytes(6)
_NXDOMAIN = 3
_ALIASES = {"CNAME", "DNAME", "RRSIG"}  # what comes with an alias, and is no answer itself


class Response(NamedTuple):
    """The records that are whole, if not too many or too long; of EDNS all but the rcode.

    `negative_ttl` is how long, in seconds, it may be remembered that there is no such name, or no
    such data (RFC 2308).
    """

    answers: tuple[Answer, ...] = ()
    authority: tuple[Answer, ...] = ()
    additional: tuple[Answer, ...] = ()
    edns: Edns | None = None
    extended_error: ExtendedError | None = None
    negative_ttl: int | None = None
    problem: str | None = None


_responses: dict[bytes, Response] = {}
_queries: dict[bytes, Edns | None] = {}
_EMPTY = Response()


def response(message: bytes, wire_len: int) -> Response:
    """All of a response, of which `wire_len` bytes were sent."""
    if message[6:12] == _NO_RECORDS:
        return _EMPTY
    if len(message) < wire_len or len(message) > REMEMBERED_LEN_MAX:
        return _Reader(message, wire_len).read()
    key = message[2:]
    known = _responses.get(key)
    if known is None:
        reader = _Reader(message, wire_len)
        known = reader.read()
        if TEXT_MAX - reader.text_left > REMEMBERED_TEXT_MAX:
            return known
        if len(_responses) >= RESPONSES_MAX:
            _responses.clear()
        _responses[key] = known
    return known


def query_edns(query: bytes) -> Edns | None:
    """What a query says of EDNS; None where that is nothing, or cut off."""
    if query[10:12] in (b"", b"\0\0"):
        return None
    key = query[2:]
    if key not in _queries:
        if len(_queries) >= QUERIES_MAX:
            _queries.clear()
        _queries[key] = _Reader(query, len(query)).read().edns
    return _queries[key]


def rcode(message: bytes, wire_len: int) -> str | None:
    """The response's code, EDNS's upper bits included where the whole response was captured."""
    if len(message) < 4:
        return None
    low = message[3] & 0xF
    if len(message) < wire_len:
        return rcode_text(low)
    at = message.find(OPT_START, HEADER_LEN)
    while at != -1:
        # Nearly always the upper bits are zero, and then it does not matter whether this is OPT.
        if message[at + 5 : at + 6] not in (b"", b"\0"):
            return rcode_text(low | _upper_rcode(message) << 4)
        at = message.find(OPT_START, at + 1)
    return rcode_text(low)


def _upper_rcode(message: bytes) -> int:
    """The eight bits of the first OPT record; 0 where there is none, or something is malformed."""
    questions, *sections = _COUNTS.unpack_from(message, 4)
    names: dict[int, str] = {}
    at = HEADER_LEN
    try:
        for _ in range(questions):
            _, at = read_name(message, at, names)
            at += 4
        for _ in range(sum(sections)):
            _, at = read_name(message, at, names)
            type_, _, ttl, data_len = RECORD.unpack_from(message, at)
            if type_ == dns.rdatatype.OPT:
                return int(ttl) >> 24
            at += RECORD.size + data_len
    except (dns.exception.DNSException, struct.error):
        pass
    return 0


class _TooMuch(Exception):
    """More than is kept of one response."""


class _Reader:
    """Reads one message, from its header to its end or to what cannot be read."""

    def __init__(self, message: bytes, wire_len: int) -> None:
        self.text_left = TEXT_MAX
        self._message = message
        self._wire_len = wire_len
        self._names: dict[int, str] = {}
        self._sections: tuple[list[Answer], ...] = ([], [], [])
        self._records_left = RECORDS_MAX
        self._opt: Opt | None = None
        self._problem: str | None = None
        self._at = HEADER_LEN

    def read(self) -> Response:
        message = self._message
        if len(message) < HEADER_LEN:
            return Response(problem=f"only {len(message)} bytes of a DNS header")
        questions, *counts = _COUNTS.unpack_from(message, 4)
        where = "question"
        try:
            for _ in range(questions):
                _, self._at = read_name(message, self._at, self._names)
                self._at += 4
            for section, count in enumerate(counts):
                for number in range(1, count + 1):
                    where = f"{_SECTIONS[section]} {number} of {count}"
                    self._read_record(section, number)
            if self._at != len(message) == self._wire_len:
                self._tell(f"{len(message) - self._at} bytes after the last record")
        except _TooMuch:
            self._problem = f"too much: only {number - 1} of {count} {_SECTIONS[section]}s"
        except (dns.exception.DNSException, struct.error) as error:
            if len(message) < self._wire_len:
                self._problem = f"cut off after {len(message)} of {self._wire_len} bytes"
            else:
                self._problem = f"{where}: {problem_text(error)}"
        answers, authority, additional = map(tuple, self._sections)
        edns, extended_error, problem = self._opt or (None, None, None)
        return Response(
            answers,
            authority,
            additional,
            edns,
            extended_error,
            _negative_ttl(message[2] >> 3 & 0xF, message[3] & 0xF, answers, authority),
            self._problem or problem,
        )

    def _read_record(self, section: int, number: int) -> None:
        message, at = self._message, self._at
        if section == 2 and message.startswith(OPT_START, at):
            if self._opt is None:
                self._opt, self._at = read_opt(message, at)
                return
            self._tell("more than one OPT record")
        record, end, whole = read_record(message, at, self._names)
        self.text_left -= len(record.name) + len(record.data)
        self._records_left -= 1
        if self._records_left < 0 or self.text_left < 0:
            raise _TooMuch
        self._sections[section].append(record)
        self._at = end
        if not whole:
            self._tell(f"{_SECTIONS[section]} {number}: malformed {record.type} data")

    def _tell(self, problem: str) -> None:
        self._problem = self._problem or problem


def _negative_ttl(
    opcode: int, rcode: int, answers: tuple[Answer, ...], authority: tuple[Answer, ...]
) -> int | None:
    """RFC 2308, section 5: the lesser of the SOA record's own TTL and its last number."""
    if opcode or not authority or rcode not in (0, _NXDOMAIN):
        return None
    if answers and rcode == 0 and not all(record.type in _ALIASES for record in answers):
        return None
    for record in authority:
        if record.type == "SOA" and not record.data.startswith("\\#"):
            return min(record.ttl, int(record.data.rpartition(" ")[2]))
    return None
