# SPDX-License-Identifier: Apache-2.0
"""All of a response: every type's data, authority and additional sections, and EDNS."""

from __future__ import annotations

import dns.rcode
import pytest

from tracer import decode
from tracer.decode import Edns, ExtendedError, Option
from tracer.transaction import Answer

EXAMPLE = "03 777777 07 6578616d706c65 03 636f6d 00"  # www.example.com.
IN_A = "0001 0001"
FOO_COM = "03 666f6f 07 6578616d706c65 03 636f6d 00"  # foo.example.com.
FOO_ORG = "03 666f6f 07 6578616d706c65 03 6f7267 00"  # foo.example.org.


def wire(*parts: str) -> bytes:
    return bytes.fromhex("".join(parts))


def message(*records: str, counts: str, flags: str = "8180") -> bytes:
    return wire("0c28", flags, "0001", counts, EXAMPLE, IN_A, *records)


def record(type_: int, data: str, class_: int = 1) -> str:
    size = len(bytes.fromhex(data))
    return f"c00c {type_:04x} {class_:04x} 0000001e {size:04x} {data}"


def data_of(type_: int, data: str, class_: int = 1) -> str:
    whole = message(record(type_, data, class_), counts="0001 0000 0000")
    found = decode.response(whole, len(whole))
    assert found.problem is None
    return found.answers[0].data


# RFC 9460, appendix D.
SERVICE_BINDINGS = {
    "figure 2": ("0000" + FOO_COM, "0 foo.example.com."),
    "figure 3": ("0001 00", "1 ."),
    "figure 4": ("0010" + FOO_COM + "0003 0002 0035", '16 foo.example.com. port="53"'),
    "figure 5": (
        "0001" + FOO_COM + "029b 0005 68656c6c6f",
        '1 foo.example.com. key667="hello"',
    ),
    "figure 6": (
        "0001" + FOO_COM + "029b 0009 68656c6c6fd2716f6f",
        r'1 foo.example.com. key667="hello\210qoo"',
    ),
    "figure 7": (
        "0001"
        + FOO_COM
        + "0006 0020 20010db8000000000000000000000001 20010db8000000000000000000530001",
        '1 foo.example.com. ipv6hint="2001:db8::1,2001:db8::53:1"',
    ),
    "figure 8": (
        "0001" + FOO_COM + "0006 0010 20010db8012203440000 0000c0000221",
        '1 foo.example.com. ipv6hint="2001:db8:122:344::c000:221"',
    ),
    "figure 9": (
        "0010" + FOO_ORG + "0000 0004 0001 0004 0001 0009 026832 0568332d3139 0004 0004 c0000201",
        '16 foo.example.org. mandatory="alpn,ipv4hint" alpn="h2,h3-19" ipv4hint="192.0.2.1"',
    ),
    "figure 10": (
        "0010" + FOO_ORG + "0001 000c 08665c6f6f2c626172 026832",
        r'16 foo.example.org. alpn="f\\\\oo\\,bar,h2"',
    ),
    "no-default-alpn, ech, dohpath": (
        "0001 00 0001 0003 026832 0002 0000 0005 0006 0004fe0d0000 0007 0008 2f717b3f646e737d ffde 0000",
        '1 . alpn="h2" no-default-alpn ech="AAT+DQAA" dohpath="/q{?dns}" key65502',
    ),
}


@pytest.mark.parametrize(("data", "text"), SERVICE_BINDINGS.values(), ids=SERVICE_BINDINGS)
@pytest.mark.parametrize("type_", [64, 65], ids=["SVCB", "HTTPS"])
def test_service_bindings_are_those_of_rfc_9460(type_: int, data: str, text: str) -> None:
    assert data_of(type_, data) == text


TYPES = {
    "SOA": (6, "c00c 016d c010 00000001 00001c20 00000708 00015180 0000001e",
            "www.example.com. m.example.com. 1 7200 1800 86400 30"),
    "NS": (2, "026e73 c010", "ns.example.com."),
    "PTR": (12, "c00c", "www.example.com."),
    "DNAME": (39, FOO_COM, "foo.example.com."),
    "MX": (15, "000a c010", "10 example.com."),
    "SRV": (33, "0001 0002 0035 " + FOO_COM, "1 2 53 foo.example.com."),
    "CAA": (257, "80 05 6973737565 7f1b", r'128 issue "\127\027"'),
    "NAPTR": (35, "0064 000a 0175 074532552b736970 0421611b21 00", r'100 10 "u" "E2U+sip" "!a\027!" .'),
    "DS": (43, "ec45 05 01 2bb183af5f22588179a53b0a98631fad1a292118",
           "60485 5 1 2bb183af5f22588179a53b0a98631fad1a292118"),
    "DNSKEY": (48, "0101 03 0d deadbeef", "257 3 13 3q2+7w=="),
    "a class of its own": (16, "0131", '"1"'),
    "a type nobody knows (RFC 3597)": (65534, "", r"\# 0"),
}  # fmt: skip


@pytest.mark.parametrize(("type_", "data", "text"), TYPES.values(), ids=TYPES)
def test_data_is_in_presentation_format(type_: int, data: str, text: str) -> None:
    assert data_of(type_, data) == text


def test_signature_of_a_message_is_no_malformed_record() -> None:
    data = "00 00006553f100 012c 0002 beef 0c28 0000 0000"
    assert data_of(250, data, class_=255).endswith("300 2 vu8= 3112 NOERROR 0")


NS = "c010 0002 0001 0000003c 0005 026e73 c010"
GLUE = "026e73 c010 0001 0001 0000003c 0004 c0000201"
OPT = "00 0029 04d0 00008000 0000"
A_RECORD = "c00c 0001 0001 0000001e 0004 5db8d822"
ALIAS = "c00c 0005 0001 0000001e 0002 c010"


def soa() -> str:
    """With the length that its data has."""
    data = "026e73 c010 016d c010 00000001 00001c20 00000708 00015180 0000001e"
    return f"c010 0006 0001 0000003c {len(bytes.fromhex(data)):04x} {data}"


def test_every_section_has_its_records() -> None:
    whole = message(A_RECORD, NS, GLUE, OPT, counts="0001 0001 0002")
    for _ in range(2):  # the second time from memory
        found = decode.response(whole, len(whole))
        assert found.answers == (Answer("www.example.com.", "A", 30, "93.184.216.34"),)
        assert found.authority == (Answer("example.com.", "NS", 60, "ns.example.com."),)
        assert found.additional == (Answer("ns.example.com.", "A", 60, "192.0.2.1"),)
        assert found.edns == Edns(0, 1232, True)
        assert (found.extended_error, found.negative_ttl, found.problem) == (None, None, None)


NEGATIVE = {
    "no such name": (message(soa(), counts="0000 0001 0000", flags="8183"), 30),
    "no such data": (message(soa(), counts="0000 0001 0000"), 30),
    "an alias to nothing": (message(ALIAS, soa(), counts="0001 0001 0000"), 30),
    "the record's own TTL is less": (
        message(soa().replace("0000003c", "00000007"), counts="0000 0001 0000", flags="8183"),
        7,
    ),
    "an answer": (message(A_RECORD, soa(), counts="0001 0001 0000"), None),
    "a failure": (message(soa(), counts="0000 0001 0000", flags="8182"), None),
    "an update": (message(soa(), counts="0000 0001 0000", flags="a880"), None),
    "a referral": (message(NS, counts="0000 0001 0000"), None),
    "an SOA record that is malformed": (
        message("c010 0006 0001 0000003c 0001 00", counts="0000 0001 0000", flags="8183"),
        None,
    ),
}


@pytest.mark.parametrize(("whole", "negative_ttl"), NEGATIVE.values(), ids=NEGATIVE)
def test_negative_ttl_is_that_of_rfc_2308(whole: bytes, negative_ttl: int | None) -> None:
    assert decode.response(whole, len(whole)).negative_ttl == negative_ttl


def opt(*options: str, ttl: str = "00000000", size: int = 1232) -> str:
    data = "".join(options)
    return f"00 0029 {size:04x} {ttl} {len(bytes.fromhex(data)):04x} {data}"


def with_opt(*options: str, ttl: str = "00000000") -> bytes:
    return message(opt(*options, ttl=ttl), counts="0000 0000 0001", flags="8182")


def option(code: int, data: str) -> str:
    return f"{code:04x} {len(bytes.fromhex(data)):04x} {data}"


OPTIONS = {
    "server's name": (3, "67706e732d667261", "NSID", "gpns-fra"),
    "server's name, hostile": (3, "1b5b324a5cff", "NSID", r"\027[2J\092\255"),
    "client subnet": (8, "0001 18 00 c00002", "ECS", "192.0.2.0/24/0"),
    "client subnet, IPv6": (8, "0002 20 18 20010db8", "ECS", "2001:db8::/32/24"),
    "cookie": (10, "0102030405060708", "COOKIE", "0102030405060708"),
    "both cookies": (10, "0102030405060708 1112131415161718", "COOKIE",
                     "0102030405060708 1112131415161718"),
    "keepalive": (11, "007d", "KEEPALIVE", "12.5 s"),
    "keepalive of a client": (11, "", "KEEPALIVE", ""),
    "padding": (12, "00" * 20, "PADDING", "20 bytes"),
    "extended error": (15, "0006", "EDE", "6 DNSSEC Bogus"),
    "extended error with words": (15, "0016 6f6f7073", "EDE", "22 No Reachable Authority: oops"),
    "extended error nobody knows": (15, "ffff", "EDE", "65535"),
    "where errors are reported to": (18, "0161 00", "REPORTCHANNEL", "a."),
    "signature algorithms": (5, "080d", "DAU", "8 13"),
    "expiry": (9, "00000e10", "EXPIRE", "3600 s"),
    "closest trust point": (13, "0161 00", "CHAIN", "a."),
    "an option nobody knows": (65001, "1b00", None, "1b00"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "wired", "name", "data"), OPTIONS.values(), ids=OPTIONS)
def test_option_is_in_words(code: int, wired: str, name: str | None, data: str) -> None:
    whole = with_opt(option(code, wired))
    found = decode.response(whole, len(whole))
    assert found.edns == Edns(0, 1232, False, (Option(code, name, data),))
    assert found.problem is None


MALFORMED_OPTIONS = {
    "client subnet": (8, "0001 21 00 c000020101", "ECS"),
    "client subnet of no family": (8, "0003 18 00 c00002", "ECS"),
    "more than a client subnet": (8, "0001 18 00 c0000201", "ECS"),
    "cookie": (10, "01020304050607", "COOKIE"),
    "server's cookie": (10, "01" * 15, "COOKIE"),
    "keepalive": (11, "01", "KEEPALIVE"),
    "extended error": (15, "00", "EDE"),
    "a name with a pointer": (18, "c000", "REPORTCHANNEL"),
    "more than a name": (18, "0000", "REPORTCHANNEL"),
}


@pytest.mark.parametrize(
    ("code", "wired", "name"), MALFORMED_OPTIONS.values(), ids=MALFORMED_OPTIONS
)
def test_malformed_option_is_in_hex_and_does_not_hide_the_next(
    code: int, wired: str, name: str
) -> None:
    whole = with_opt(option(code, wired), option(3, "61"))
    found = decode.response(whole, len(whole))
    assert found.edns is not None
    hex_ = bytes.fromhex(wired).hex()
    assert found.edns.options == (Option(code, name, hex_), Option(3, "NSID", "a"))
    assert found.problem == f"malformed EDNS option {name}"
    assert found.extended_error is None


ERRORS = {
    "a code": ("0012", ExtendedError(18, "Prohibited", None)),
    "words": ("0017 74696d6564206f7574", ExtendedError(23, "Network Error", "timed out")),
    "words of any language": ("0003 c3a9", ExtendedError(3, "Stale Answer", "\u00e9")),
    "words with a zero byte": ("0000 6100", ExtendedError(0, "Other", "a")),
    "words to obey": (
        "0000 1b5b324a 0a e280ae c280",
        ExtendedError(0, "Other", r"\027[2J\010\226\128\174\194\128"),
    ),
    "what is not UTF-8": ("0000 61ff eda080", ExtendedError(0, "Other", r"a\255\237\160\128")),
    "a code nobody knows": ("beef", ExtendedError(48879, None, None)),
}


@pytest.mark.parametrize(("data", "error"), ERRORS.values(), ids=ERRORS)
def test_extended_error_is_that_of_rfc_8914(data: str, error: ExtendedError) -> None:
    whole = with_opt(option(3, "61"), option(15, data), option(15, "0001"))
    assert decode.response(whole, len(whole)).extended_error == error


EDNS = {
    "version": (with_opt(ttl="01030000"), Edns(3, 1232, False)),
    "DNSSEC OK": (with_opt(ttl="00008000"), Edns(0, 1232, True)),
    "none": (message(GLUE, counts="0000 0000 0001"), None),
    "not where it belongs": (message(opt(), counts="0001 0000 0000"), None),
    "not the root's": (message("c00c 0029 04d0 00000000 0000", counts="0000 0000 0001"), None),
}


@pytest.mark.parametrize(("whole", "edns"), EDNS.values(), ids=EDNS)
def test_edns_is_that_of_rfc_6891(whole: bytes, edns: Edns | None) -> None:
    assert decode.response(whole, len(whole)).edns == edns


def test_extended_rcode_comes_with_its_version() -> None:
    whole = with_opt(ttl="01000000")
    assert decode.rcode(whole, len(whole)) == dns.rcode.Rcode(16 + 2).name  # BADTIME
    whole = message(opt(ttl="01000000"), counts="0000 0000 0001")
    assert decode.rcode(whole, len(whole)) == "BADVERS"


PROBLEMS = {
    "two OPT records": (
        message(OPT, OPT, counts="0000 0000 0002"),
        "more than one OPT record",
    ),
    "options that end too late": (
        message("00 0029 04d0 00000000 0005 0003 0002 61", counts="0000 0000 0001"),
        "EDNS options go beyond the end of their record",
    ),
    "half an option": (
        message("00 0029 04d0 00000000 0003 000300", counts="0000 0000 0001"),
        "EDNS options go beyond the end of their record",
    ),
    "an OPT record that ends too late": (
        message("00 0029 04d0 00000000 0005 0003", counts="0000 0000 0001"),
        "additional record 1 of 1: goes beyond the end of the message",
    ),
    "half an OPT record": (
        message("00 0029 04", counts="0000 0000 0001"),
        "additional record 1 of 1: goes beyond the end of the message",
    ),
    "fewer records than it says": (
        message(A_RECORD, NS, counts="0001 0002 0000"),
        "authority record 2 of 2: goes beyond the end of the message",
    ),
    "more than it says": (
        message(A_RECORD, NS, counts="0001 0000 0000"),
        "17 bytes after the last record",
    ),
    "malformed data": (
        message("c00c 0001 0001 0000001e 0003 5db8d8", counts="0000 0000 0001"),
        "additional record 1: malformed A data",
    ),
    "a name that goes beyond its record": (
        message("c00c 0005 0001 0000001e 0001 c010", counts="0001 0000 0000"),
        "answer 1: malformed CNAME data",
    ),
    "a name that ends before its record": (
        message("c00c 0005 0001 0000001e 0003 c01000", counts="0001 0000 0000"),
        "answer 1: malformed CNAME data",
    ),
    "a loop in an alias": (
        message("c00c 0005 0001 0000001e 0004 0161 c02d", counts="0001 0000 0000"),
        "answer 1: malformed CNAME data",
    ),
}


@pytest.mark.parametrize(("whole", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_is_said(whole: bytes, problem: str) -> None:
    for _ in range(2):
        assert decode.response(whole, len(whole)).problem == problem


def test_cut_response_has_the_sections_that_are_whole() -> None:
    whole = message(A_RECORD, NS, GLUE, OPT, counts="0001 0001 0002")
    found = decode.response(whole[:-5], len(whole))
    assert (len(found.answers), len(found.authority), len(found.additional)) == (1, 1, 1)
    assert found.edns is None
    assert found.problem == f"cut off after {len(whole) - 5} of {len(whole)} bytes"


OPCODES = {
    "0100": "QUERY",
    "2400": "NOTIFY",
    "2800": "UPDATE",
    "1000": "STATUS",
    "7800": "OPCODE15",
}


@pytest.mark.parametrize(("flags", "opcode"), OPCODES.items())
def test_opcode_is_named(flags: str, opcode: str) -> None:
    assert decode.opcode(message(counts="0000 0000 0000", flags=flags)) == opcode
    assert decode.opcode(wire("0c28")) is None


def test_edns_of_a_query_is_known_unless_it_is_cut_off() -> None:
    query = message(opt(option(8, "0001 18 00 c00002")), counts="0000 0000 0001", flags="0120")
    subnet = Option(8, "ECS", "192.0.2.0/24/0")
    for _ in range(2):
        assert decode.query_edns(query) == Edns(0, 1232, False, (subnet,))
    for end in range(len(query)):
        assert decode.query_edns(query[:end]) is None
    assert decode.query_edns(message(counts="0000 0000 0000", flags="0120")) is None
