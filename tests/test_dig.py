# SPDX-License-Identifier: Apache-2.0
"""What is read out of a response, against what dig makes of the same bytes."""

from __future__ import annotations

import re
import socket
import subprocess
import threading

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from tracer import decode

NAME = "www.example.com."
RECORDS = {
    "A": "192.0.2.1",
    "AAAA": "2001:db8::1:0:0:1",
    "AFSDB": "1 afs.example.com.",
    "CAA": '0 issue "letsencrypt.org; x=y"',
    "CDS": "60485 5 1 2BB183AF5F22588179A53B0A98631FAD1A292118",
    "CNAME": r"a\.b.\007.example.com.",
    "DNAME": "example.net.",
    "DNSKEY": "257 3 13 mdsswUyr3DPW132mOi8V9xESWE8jTo0dxCjjnopKl+GqJxpVXckHAeF+KkxLbxILfDLUT0rAK9iUzy1L53eKGQ==",
    "DS": "60485 5 1 2BB183AF5F22588179A53B0A98631FAD1A292118",
    "HINFO": '"a b" "Linux"',
    "HTTPS": "1 . alpn=h2,h3 no-default-alpn port=8443 ipv4hint=192.0.2.1 ipv6hint=2001:db8::1",
    "MX": "10 mail.example.com.",
    "NAPTR": r'100 10 "u" "E2U+sip" "!^.*$!sip:info@example.com!" .',
    "NS": "ns.example.com.",
    "NSEC": "a.example.com. A MX RRSIG NSEC TYPE1234",
    "NSEC3PARAM": "1 0 12 AABBCCDD",
    "PTR": "host.example.com.",
    "RP": "mail.example.com. text.example.com.",
    "RRSIG": "A 5 3 86400 20030322173103 20030220173103 2642 example.com. oJB1W6WNGv+ldvQ3WDG0MQkg5IEhjRip8WTr",
    "SOA": "ns.example.com. a\\.b.example.com. 2024010101 7200 1800 86400 30",
    "SRV": "1 2 53 ns.example.com.",
    "SSHFP": "2 1 123456789ABCDEF67890123456789ABCDEF67890",
    "SVCB": r'16 foo.example.org. mandatory=alpn,ipv4hint alpn=h2,h3-19 ipv4hint=192.0.2.1 key667="a\210b"',
    "TLSA": "3 1 1 0B9FA5A59EED715C26C1020C711B4F6EC42D58B0015E14337A39DAD301C5AFC3",
    "TXT": r'"v=spf1 -all" "\"\\;\007\195\169 "',
    "TYPE65280": r"\# 3 1b5b4a",
    "URI": '10 1 "ftp://ftp1.example.com/public"',
}  # fmt: skip
OPTIONS = [
    dns.edns.GenericOption(dns.edns.OptionType.NSID, b"fra-1"),
    dns.edns.ECSOption("192.0.2.0", 24, 16),
    dns.edns.GenericOption(dns.edns.OptionType.KEEPALIVE, b"\0\x7d"),
    dns.edns.GenericOption(dns.edns.OptionType.PADDING, bytes(20)),
    dns.edns.EDEOption(dns.edns.EDECode.NO_REACHABLE_AUTHORITY, "delegation lost"),
]


def dig(response: bytes, *arguments: str) -> str:
    """What dig prints of a response; its own query is answered with that."""

    def serve() -> None:
        query, client = server.recvfrom(4096)
        server.sendto(query[:2] + response[2:], client)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        port = str(server.getsockname()[1])
        try:
            return subprocess.run(
                ["dig", "-p", port, "@127.0.0.1", "+tries=1", "+ignore", *arguments, NAME, "A"],
                check=True,
                capture_output=True,
                text=True,
                timeout=30,
            ).stdout
        finally:
            thread.join()


def written(message: dns.message.Message) -> bytes:
    message.flags |= dns.flags.RA
    return message.to_wire(max_size=65535)


def response() -> dns.message.Message:
    return dns.message.make_response(dns.message.make_query(NAME, "A"))


def same(text: str) -> str:
    """What neither quotes nor the spaces within base64 and hex make different."""
    return re.sub(r'["\s]', "", text).lower()


@pytest.mark.parametrize(("type_", "data"), RECORDS.items(), ids=RECORDS)
def test_record_is_what_dig_says(type_: str, data: str) -> None:
    message = response()
    message.answer.append(dns.rrset.from_text(NAME, 30, "IN", type_, data))
    wire = written(message)
    found = decode.response(wire, len(wire))
    assert found.problem is None
    (record,) = found.answers
    said = dig(wire, "+noall", "+answer", "+nomultiline").splitlines()[-1]
    assert same(f"{record.name} {record.ttl} IN {record.type} {record.data}") == same(said)


def test_sections_are_those_that_dig_says() -> None:
    message = response()
    sections = (message.answer, message.authority, message.additional)
    for section, type_ in zip(sections, ("A", "SOA", "AAAA"), strict=True):
        section.append(dns.rrset.from_text(NAME, 30, "IN", type_, RECORDS[type_]))
    wire = written(message)
    found = decode.response(wire, len(wire))
    for name, records in (
        ("answer", found.answers),
        ("authority", found.authority),
        ("additional", found.additional),
    ):
        said = dig(wire, "+noall", f"+{name}").splitlines()[-1]
        assert same(said) == same(
            "".join(f"{r.name} {r.ttl} IN {r.type} {r.data}" for r in records)
        )


def test_edns_is_what_dig_says() -> None:
    message = response()
    message.use_edns(edns=0, ednsflags=dns.flags.DO, payload=1232, options=OPTIONS)
    message.set_rcode(dns.rcode.BADCOOKIE)
    wire = written(message)
    said = dig(wire)
    found = decode.response(wire, len(wire))
    assert found.edns is not None
    version, size, do, options = found.edns
    flags = " do" if do else ""
    nsid, subnet, keepalive, padding, _ = (data for _, _, data in options)
    assert found.extended_error is not None
    code, name, text = found.extended_error
    assert f"; EDNS: version: {version}, flags:{flags}; udp: {size}" in said
    assert f"status: {decode.rcode(wire, len(wire))}" in said
    assert f'("{nsid}")' in said
    assert f"; CLIENT-SUBNET: {subnet}" in said
    assert f"; TCP KEEPALIVE: {keepalive.replace(' s', ' secs')}" in said
    assert f"; PAD: ({padding})" in said
    assert f"; EDE: {code} ({name}): ({text})" in said
    assert found.problem is None


def test_names_of_extended_errors_are_those_that_dig_knows() -> None:
    for code in range(25):  # RFC 8914
        message = response()
        message.use_edns(options=[dns.edns.EDEOption(dns.edns.EDECode(code))])
        wire = written(message)
        error = decode.response(wire, len(wire)).extended_error
        assert error is not None
        said = re.search(r"EDE: \d+ \((.*)\)", dig(wire))
        assert said is not None
        if code not in (0, 19):  # dig calls the first "Other Error", as the RFC's list
            assert said[1].lower() == str(error.name).lower()
