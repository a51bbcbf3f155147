# SPDX-License-Identifier: Apache-2.0
"""Whatever the bytes are, they are decoded, and what comes out can be shown and encoded."""

from __future__ import annotations

import io
import json

import dns.edns
import dns.exception
import dns.message
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.samples import transaction
from tracer import decode
from tracer.decode import records
from tracer.decode.records import read_record
from tracer.export import jsonl
from tracer.show import answer
from tracer.show.live import LiveTable
from tracer.show.path import render
from tracer.transaction import Answer

pytestmark = pytest.mark.fuzz

RESPONSE_HEADER = "0c28 8180 0001 0001 0000 0000"
EXAMPLE = "03 777777 07 6578616d706c65 03 636f6d 00"  # www.example.com.
IN_A = "0001 0001"


def wire(*parts: str) -> bytes:
    return bytes.fromhex("".join(parts))


def assert_is_decoded(message: bytes, wire_len: int) -> None:
    """Everything is printable; but for the words of people, it is ASCII as well."""
    found = decode.response(message, wire_len)
    texts: list[str | None] = [*decode.question(message), found.problem, decode.opcode(message)]
    texts.append(decode.rcode(message, wire_len))
    for record in found.answers + found.authority + found.additional:
        texts += [record.name, record.type, record.data]
    words: list[str | None] = []
    for edns in (found.edns, decode.query_edns(message)):
        for code, name, data in () if edns is None else edns.options:
            texts.append(name)
            (words if code == dns.edns.OptionType.EDE else texts).append(data)
    if found.extended_error is not None:
        texts.append(found.extended_error.name)
        words.append(found.extended_error.text)
    assert all(text.isascii() for text in texts if text is not None)
    for text in filter(None, texts + words):
        assert text.isprintable()
        text.encode()
    assert_is_shown(message, wire_len)


def assert_is_shown(message: bytes, wire_len: int) -> None:
    question = decode.question(message)
    t = transaction()._replace(
        name=question.name,
        type=question.type,
        query=message,
        response=message,
        response_len=wire_len,
    )
    line = json.loads(jsonl.transaction(t))
    assert (line["name"], line["type"]) == question[:2]
    for text in (answer.short(t), *answer.long(t)):
        assert text.isprintable()
    for shown in render(t, 80).splitlines():
        assert shown.isprintable()
        assert cell_len(shown) <= 80
    assert cell_len(LiveTable(io.StringIO(), 120).line(t)) == 120


known_types = st.sampled_from([int(type_) for type_ in dns.rdatatype.RdataType])
labels = st.binary(min_size=1, max_size=63)
names = st.lists(labels, max_size=4).map(lambda parts: [*parts, b""])


def wire_name(parts: list[bytes]) -> bytes:
    return b"".join(bytes([len(part)]) + part for part in parts)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Messages with a sound frame and anything in it."""
    counts = draw(st.tuples(*[st.integers(0, 3)] * 4))
    message = draw(st.binary(min_size=4, max_size=4))
    message += b"".join(count.to_bytes(2, "big") for count in counts)
    message += wire_name(draw(names)) + draw(st.binary(min_size=4, max_size=4))
    for _ in range(draw(st.integers(0, 4))):
        owner = draw(st.one_of(st.just(b"\xc0\x0c"), names.map(wire_name), st.binary(max_size=3)))
        data = draw(st.binary(max_size=40))
        message += owner + draw(known_types).to_bytes(2, "big") + draw(st.binary(max_size=2))
        message += draw(st.binary(min_size=4, max_size=4)) + len(data).to_bytes(2, "big") + data
    return message


raw_names = st.one_of(names.map(wire_name), st.just(b"\xc0\x0c"), st.binary(max_size=3))
numbers = st.integers(0, 0xFFFF)
strings = st.binary(max_size=30).map(lambda text: bytes([len(text)]) + text)


def two(number: int) -> bytes:
    return number.to_bytes(2, "big")


def sized(code: int, value: bytes, lie: int) -> bytes:
    """A code, how long its value is said to be, and the value."""
    return two(code) + two(max(len(value) + lie, 0)) + value


# Mostly the truth.
lies = st.sampled_from([0] * 12 + [1, -1, 300])
small = st.integers(0, 12) | numbers
params = st.lists(st.builds(sized, small, st.binary(max_size=20) | strings, lies), max_size=4)
options = st.lists(st.builds(sized, st.integers(0, 26) | numbers, st.binary(max_size=40), lies))
data_of_types = st.one_of(
    st.tuples(st.sampled_from([2, 5, 12, 39]), raw_names),
    st.tuples(
        st.just(6),
        st.builds(
            lambda *parts: b"".join(parts),
            raw_names,
            raw_names,
            st.binary(min_size=19, max_size=21),
        ),
    ),
    st.tuples(st.just(15), st.builds(lambda n, name: two(n) + name, numbers, raw_names)),
    st.tuples(st.just(16), st.lists(strings, max_size=4).map(b"".join)),
    st.tuples(
        st.just(33),
        st.builds(lambda data, name: data + name, st.binary(min_size=6, max_size=6), raw_names),
    ),
    st.tuples(
        st.just(35),
        st.builds(
            lambda a, b, c, name: bytes(4) + a + b + c + name, strings, strings, strings, raw_names
        ),
    ),
    st.tuples(st.sampled_from([43, 48, 46, 47, 50]), st.binary(max_size=60)),
    st.tuples(
        st.sampled_from([64, 65]),
        st.builds(
            lambda n, name, given: two(n) + name + b"".join(given), numbers, raw_names, params
        ),
    ),
    st.tuples(
        st.just(257),
        st.builds(lambda tag, value: b"\0" + tag + value, strings, st.binary(max_size=30)),
    ),
    st.tuples(known_types | numbers, st.binary(max_size=40)),
)


@st.composite
def responses_of_types(draw: st.DrawFn) -> bytes:
    """Responses whose data is nearly what their types ask for, with EDNS."""
    sections = draw(st.lists(st.lists(data_of_types, max_size=3), min_size=3, max_size=3))
    body = wire_name(draw(names)) + draw(
        st.sampled_from([b"\0\1\0\1", b"\0\x06\0\1", b"\0\xff\0\1"])
    )
    counts = [1]
    for section in sections:
        counts.append(max(len(section) + draw(lies), 0))
        for type_, data in section:
            class_ = draw(st.sampled_from([1, 1, 1, 3, 255, 254, 9]))
            body += (
                draw(raw_names) + two(type_) + two(class_) + draw(st.binary(min_size=4, max_size=4))
            )
            body += two(max(len(data) + draw(lies), 0)) + data
    for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
        data = b"".join(draw(options))
        body += b"\0\0\x29" + draw(st.binary(min_size=6, max_size=6))
        body += two(max(len(data) + draw(lies), 0)) + data
        counts[3] += 1
    header = draw(st.binary(min_size=2, max_size=2)) + draw(
        st.sampled_from([b"\x81\x80", b"\x81\x83", b"\x83\x82", b"\xa8\0"])
    )
    return header + b"".join(map(two, counts)) + body


@given(responses_of_types(), st.integers(0, 40), st.integers(0, 400))
def test_any_data_that_is_nearly_of_its_type_is_decoded(
    message: bytes, more: int, cut: int
) -> None:
    assert_is_decoded(message, len(message))
    assert_is_decoded(message, len(message) + more)
    assert_is_decoded(message[: -cut or None], len(message))


usual_types = st.sampled_from([1, 2, 5, 6, 12, 28])


@given(usual_types, data_of_types.map(lambda of: of[1]) | raw_names | st.binary(max_size=40))
def test_data_that_is_read_without_dnspython_is_what_it_reads(type_: int, data: bytes) -> None:
    message = wire(RESPONSE_HEADER, EXAMPLE, IN_A)
    at = len(message)
    message += b"\xc0\x10" + two(type_) + b"\0\1\0\0\0\x1e" + two(len(data)) + data
    found, end, whole = read_record(message, at, {})
    theirs = records._data(message, end - len(data), end, type_, 1)
    assert (found.data, whole) == theirs


@given(st.binary(max_size=80))
def test_any_words_of_an_extended_error_are_shown(words: bytes) -> None:
    data = sized(15, b"\0\x16" + words, 0)
    opt = b"\0\0\x29\x04\xd0\0\0\0\0" + two(len(data)) + data
    message = wire("0c28 8182 0001 0000 0000 0001", EXAMPLE, IN_A) + opt
    assert_is_decoded(message, len(message))
    assert decode.response(message, len(message)).problem is None


@given(st.binary(max_size=600), st.integers(0, 700))
def test_any_bytes_are_decoded_to_printable_ascii(message: bytes, wire_len: int) -> None:
    assert_is_decoded(message, wire_len)


@given(messages(), st.integers(0, 40))
def test_any_message_is_decoded_to_printable_ascii(message: bytes, more: int) -> None:
    assert_is_decoded(message, len(message) + more)


@given(known_types, st.binary(max_size=100))
def test_any_data_of_any_type_is_decoded_to_printable_ascii(type_: int, data: bytes) -> None:
    fixed = type_.to_bytes(2, "big") + b"\0\1\0\0\0\x1e" + len(data).to_bytes(2, "big")
    message = wire(RESPONSE_HEADER, EXAMPLE, IN_A, "c00c") + fixed + data
    assert_is_decoded(message, len(message))
    assert len(decode.response(message, len(message)).answers) == 1


@given(messages())
def test_question_is_what_dnspython_reads(message: bytes) -> None:
    message = message[:4] + b"\0\1" + bytes(6) + message[12:]
    ours = decode.question(message)
    try:
        theirs = dns.message.from_wire(message, ignore_trailing=True, question_only=True)
    except dns.exception.DNSException:
        assert ours.problem is not None or message[2] & 0x78  # an opcode that forbids it
        return
    asked = theirs.question[0]
    assert ours.name == asked.name.to_text()
    assert ours.type == dns.rdatatype.to_text(asked.rdtype)


texts = st.text(alphabet="abcXYZ-_09", min_size=1, max_size=20)
owners = st.lists(texts, min_size=1, max_size=5).map(lambda parts: ".".join(parts) + ".")


@given(
    owners,
    st.lists(
        st.one_of(
            st.tuples(st.just("A"), st.ip_addresses(v=4).map(str)),
            st.tuples(st.just("AAAA"), st.ip_addresses(v=6).map(str)),
            st.tuples(st.just("CNAME"), owners),
            st.tuples(st.just("SRV"), owners.map(lambda name: f"1 2 53 {name}")),
            st.tuples(st.just("TXT"), texts.map(lambda text: f'"{text}"')),
        ),
        max_size=6,
    ),
    st.integers(0, 2**31 - 1),
)
def test_answers_are_what_dnspython_wrote(
    owner: str, records: list[tuple[str, str]], ttl: int
) -> None:
    message = dns.message.make_response(dns.message.make_query(owner, "A"))
    expected = []
    for type_, data in records:
        rrset = dns.rrset.from_text(owner, ttl, "IN", type_, data)
        message.answer.append(rrset)
        expected.append(Answer(owner, type_, ttl, rrset[0].to_text()))
    written = message.to_wire()
    assert [
        (answer.name.lower(), *answer[1:3], answer.data.lower())
        for answer in decode.response(written, len(written)).answers
    ] == [(owner.lower(), *answer[1:3], answer.data.lower()) for answer in expected]
