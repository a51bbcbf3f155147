# SPDX-License-Identifier: Apache-2.0
"""Wire bytes to names, types and answers: what is well-formed, and what is not."""

from __future__ import annotations

import pytest

from tests.samples import wire_query, wire_response
from tracer import decode
from tracer.decode import Question, Response, questions, responses
from tracer.transaction import Answer

QUERY_HEADER = "0c28 0100 0001 0000 0000 0000"
RESPONSE_HEADER = "0c28 8180 0001 0001 0000 0000"
EXAMPLE = "03 777777 07 6578616d706c65 03 636f6d 00"  # www.example.com.
IN_A = "0001 0001"


def wire(*parts: str) -> bytes:
    return bytes.fromhex("".join(parts))


QUESTIONS = {
    "case is kept": ("03 575757 07 6578616d706c65 03 436f6d 00", IN_A, "WWW.example.Com.", "A"),
    "the root": ("00", "0002 0001", ".", "NS"),
    "underscores and hyphens": ("04 5f646e73 03 612d62 00", "0021 0001", "_dns.a-b.", "SRV"),
    "an unknown type": (EXAMPLE, "ff00 0001", "www.example.com.", "TYPE65280"),
    "control bytes": ("03 001b7f 00", IN_A, r"\000\027\127.", "A"),
    "a zero byte within the only label": ("02 6100 00", IN_A, r"a\000.", "A"),
    "a dot within a label": ("03 612e62 00", IN_A, r"a\.b.", "A"),
    "quotes, backslash, semicolon": ("03 225c3b 00", IN_A, r"\"\\\;.", "A"),
    "what is not ASCII": ("02 c3a9 00", IN_A, r"\195\169.", "A"),
    "a space": ("01 20 00", IN_A, r"\032.", "A"),
    "a label of 63 bytes": ("3f" + "61" * 63 + "00", IN_A, "a" * 63 + ".", "A"),
    "a name of 255 bytes": (
        ("3f" + "ff" * 63) * 3 + "3d" + "ff" * 61 + "00",
        IN_A,
        (r"\255" * 63 + ".") * 3 + r"\255" * 61 + ".",
        "A",
    ),
}


@pytest.mark.parametrize(("name", "rest", "shown", "type_"), QUESTIONS.values(), ids=QUESTIONS)
def test_question_is_in_presentation_format(name: str, rest: str, shown: str, type_: str) -> None:
    message = wire(QUERY_HEADER, name, rest)
    for _ in range(2):  # the second time from memory
        assert decode.question(message) == Question(shown, type_, "IN")


def test_question_of_unknown_class_is_named_by_number() -> None:
    assert decode.question(wire(QUERY_HEADER, EXAMPLE, "0001 0009")).class_ == "CLASS9"


def test_question_is_found_whatever_follows_it() -> None:
    for more in ("", "00 0029 1000 00000000 0000", "ff"):
        assert decode.question(wire(QUERY_HEADER, EXAMPLE, IN_A, more)).name == "www.example.com."


MALFORMED_QUESTIONS = {
    "nothing": ("", None, None, "only 0 bytes of a DNS header"),
    "half a header": ("0c28 0100 00", None, None, "only 5 bytes of a DNS header"),
    "no question": ("0c28 0100 0000 0000 0000 0000", None, None, "no question"),
    "a header only": (
        QUERY_HEADER,
        None,
        None,
        "question's name: goes beyond the end of the message",
    ),
    "cut in the name": (
        QUERY_HEADER + "03 7777",
        None,
        None,
        "question's name: goes beyond the end of the message",
    ),
    "cut after the name": (
        QUERY_HEADER + EXAMPLE + "0001",
        "www.example.com.",
        None,
        "cut off after the question's name",
    ),
    "several questions": (
        "0c28 0100 0002 0000 0000 0000" + (EXAMPLE + IN_A) * 2,
        "www.example.com.",
        "A",
        "2 questions",
    ),
    "a label of 64 bytes": (
        QUERY_HEADER + "40" + "61" * 64 + "00" + IN_A,
        None,
        None,
        "question's name: the label type in DNS name wire format is unknown",
    ),
    "a name of 256 bytes": (
        QUERY_HEADER + ("3f" + "61" * 63) * 3 + "3e" + "61" * 62 + "00" + IN_A,
        None,
        None,
        "question's name: a DNS name is > 255 octets long",
    ),
    "a pointer to itself": (
        QUERY_HEADER + "c00c" + IN_A,
        None,
        None,
        "question's name: a DNS compression pointer points forward instead of backward",
    ),
    "a pointer forward": (
        QUERY_HEADER + "c010" + IN_A + "00",
        None,
        None,
        "question's name: a DNS compression pointer points forward instead of backward",
    ),
    "a pointer into the header": (
        QUERY_HEADER + "c005" + IN_A,
        r"\000.",
        "A",
        "question's name points into the header",
    ),
}


@pytest.mark.parametrize(
    ("message", "name", "type_", "problem"), MALFORMED_QUESTIONS.values(), ids=MALFORMED_QUESTIONS
)
def test_malformed_question_carries_its_problem(
    message: str, name: str | None, type_: str | None, problem: str
) -> None:
    for _ in range(2):
        found = decode.question(wire(message))
        assert (found.name, found.type, found.problem) == (name, type_, problem)


def test_question_of_ordinary_name_is_not_that_of_one_with_a_pointer() -> None:
    """Both have their first zero byte at the same place."""
    assert decode.question(wire("0061 0100 0001 0000 0000 0000", "c000", IN_A)).problem
    assert decode.question(wire(QUERY_HEADER, "00", "00 0001 0001")).name == "."


RCODES = {
    "NOERROR": ("8180", ""),
    "NXDOMAIN": ("8183", ""),
    "RCODE12": ("818c", ""),
    "BADVERS": ("8180", "00 0029 1000 01000000 0000"),
    "BADCOOKIE": ("8187", "00 0029 1000 01000000 0000"),
    "RCODE4095": ("818f", "00 0029 1000 ff000000 0000"),
    "SERVFAIL": ("8182", "00 0029 1000 00ff8000 0000"),
}


@pytest.mark.parametrize(("rcode", "parts"), RCODES.items(), ids=RCODES)
def test_rcode_has_the_upper_bits_of_edns(rcode: str, parts: tuple[str, str]) -> None:
    flags, opt = parts
    additional = "0001" if opt else "0000"
    message = wire("0c28", flags, "0001 0000 0000", additional, EXAMPLE, IN_A, opt)
    assert decode.rcode(message, len(message)) == rcode


def test_rcode_of_cut_response_is_that_of_its_header() -> None:
    message = wire("0c28 8180 0001 0000 0000 0001", EXAMPLE, IN_A, "00 0029 1000 01000000 0000")
    assert decode.rcode(message, len(message) + 1) == "NOERROR"


def test_rcode_takes_nothing_for_edns_that_only_looks_like_it() -> None:
    looks_like_it = "c00c 0010 0001 0000001e 000b 0a 000029100001000000ff"
    message = wire("0c28 8180 0001 0001 0000 0000", EXAMPLE, IN_A, looks_like_it)
    assert decode.rcode(message, len(message)) == "NOERROR"


def test_rcode_of_less_than_a_header_is_unknown() -> None:
    assert decode.rcode(b"\x0c\x28\x81", 3) is None


def test_flags_are_in_wire_order_without_the_response_bit() -> None:
    assert decode.flags(0x8180) == ("rd", "ra")
    assert decode.flags(0x87B3) == ("aa", "tc", "rd", "ra", "ad", "cd")
    assert decode.flags(0) == ()


A_RECORD = "c00c 0001 0001 0000001e 0004 5db8d822"
ANSWERS = {
    "one address": (A_RECORD, [Answer("www.example.com.", "A", 30, "93.184.216.34")]),
    "an IPv6 address": (
        "c00c 001c 0001 00000000 0010 20010db8000000000000000000000010",
        [Answer("www.example.com.", "AAAA", 0, "2001:db8::10")],
    ),
    "an alias within the message": (
        "c00c 0005 0001 0000001e 0006 0361 2e62 c010",
        [Answer("www.example.com.", "CNAME", 30, r"a\.b.example.com.")],
    ),
    "strings": (
        "c00c 0010 0001 0000001e 0008 0361223b 03 c3a907",
        [Answer("www.example.com.", "TXT", 30, r'"a\";" "\195\169\007"')],
    ),
    "an unknown type": (
        "c00c ff00 0001 0000001e 0002 beef",
        [Answer("www.example.com.", "TYPE65280", 30, r"\# 2 beef")],
    ),
    "an unknown class": (
        "c00c 0001 0009 0000001e 0004 5db8d822",
        [Answer("www.example.com.", "A", 30, r"\# 4 5db8d822")],
    ),
    "a TTL with its highest bit set": (
        "c00c 0001 0001 80000000 0004 5db8d822",
        [Answer("www.example.com.", "A", 0, "93.184.216.34")],
    ),
}


@pytest.mark.parametrize(("record", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_answers_are_in_presentation_format(record: str, expected: list[Answer]) -> None:
    message = wire(RESPONSE_HEADER, EXAMPLE, IN_A, record)
    for _ in range(2):
        assert decode.response(message, len(message)) == Response(tuple(expected))


def test_ttl_is_that_of_each_response() -> None:
    query = wire_query("www.example.com.")
    for ttl_s in (30, 29, 30):
        response = wire_response(query, "NOERROR", "192.0.2.1", ttl_s=ttl_s)
        assert decode.response(response, len(response)).answers[0].ttl == ttl_s


def test_response_without_answers_has_none_and_no_problem() -> None:
    response = wire_response(wire_query("www.example.com."), "NXDOMAIN")
    assert decode.response(response, len(response)) == Response(())


def test_cut_response_has_the_answers_that_are_whole() -> None:
    whole = wire("0c28 8180 0001 0002 0000 0000", EXAMPLE, IN_A, A_RECORD, A_RECORD)
    found = decode.response(whole[:-1], len(whole))
    assert found.answers == (Answer("www.example.com.", "A", 30, "93.184.216.34"),)
    assert found.problem == "cut off after 64 of 65 bytes"


def test_response_that_lies_about_its_answers_has_those_that_are_there() -> None:
    message = wire("0c28 8180 0001 0003 0000 0000", EXAMPLE, IN_A, A_RECORD)
    found = decode.response(message, len(message))
    assert len(found.answers) == 1
    assert found.problem == "answer 2 of 3: goes beyond the end of the message"


def test_answer_with_malformed_data_does_not_hide_the_next() -> None:
    short = "c00c 0001 0001 0000001e 0003 5db8d8"
    message = wire("0c28 8180 0001 0002 0000 0000", EXAMPLE, IN_A, short, A_RECORD)
    found = decode.response(message, len(message))
    assert [record.data for record in found.answers] == [r"\# 3 5db8d8", "93.184.216.34"]
    assert found.problem == "answer 1: malformed A data"


def test_compression_loop_ends() -> None:
    message = wire(RESPONSE_HEADER, EXAMPLE, IN_A, "c023 c021", "0001 0001 0000001e 0000")
    problem = "answer 1 of 1: a DNS compression pointer points forward instead of backward"
    assert decode.response(message, len(message)) == Response(problem=problem)


def test_of_very_many_answers_the_first_are_kept() -> None:
    records = "c00c 0001 0001 0000001e 0000" * 300
    response = wire("0c28 8180 0001 012c 0000 0000", EXAMPLE, IN_A, records)
    decoded = decode.response(response, len(response))
    assert len(decoded.answers) == 256
    assert decoded.problem == "too much: only 256 of 300 answers"


def test_names_that_point_to_a_long_name_do_not_multiply_it() -> None:
    label = "3f" + "07" * 63  # 252 characters in presentation format
    name = label * 3 + "3d" + "07" * 61 + "00"
    for count in (80, 250):  # remembered, and not
        records = "c00c 0001 0001 0000001e 0004 00000000" * count
        response = wire(f"0c28 8180 0001 {count:04x} 0000 0000", name, IN_A, records)
        decoded = decode.response(response, len(response))
        assert len(decoded.answers) == 64
        assert decoded.problem == f"too much: only 64 of {count} answers"
        assert sum(len(r.name) + len(r.data) for r in decoded.answers) <= 64 << 10
    assert not any(key.endswith(response[2:]) for key in responses._responses)


def test_memory_is_bounded_however_many_names_are_asked_for() -> None:
    for number in range(questions.QUESTIONS_MAX + 10):
        decode.question(wire(QUERY_HEADER, "04", f"{number:08x}", "00", IN_A))
    assert len(questions._questions) <= questions.QUESTIONS_MAX
