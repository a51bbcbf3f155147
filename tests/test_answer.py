# SPDX-License-Identifier: Apache-2.0
"""What an answer says, in a few words."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rrset
import pytest
from rich.cells import cell_len

from tests.samples import transaction, wire_query
from tracer.show import answer
from tracer.show.live import LiveTable
from tracer.show.path import render

if TYPE_CHECKING:
    from tracer.transaction import Transaction

NAME = "www.example.com."
SOA = "example.com. 60 SOA ns.example.com. m.example.com. 1 7200 1800 86400 30"


def answered(
    answers: tuple[str, ...] = (),
    authority: tuple[str, ...] = (),
    *,
    type_: str = "A",
    rcode: str = "NOERROR",
    truncated: bool = False,
    options: tuple[dns.edns.Option, ...] = (),
) -> Transaction:
    """Records are "name ttl type data"."""
    message = dns.message.make_response(dns.message.make_query(NAME, type_, id=3112))
    message.set_rcode(dns.rcode.from_text(rcode))
    for section, records in ((message.answer, answers), (message.authority, authority)):
        for record in records:
            owner, ttl, of_type, data = record.split(" ", 3)
            section.append(dns.rrset.from_text(owner, int(ttl), "IN", of_type, data))
    if truncated:
        message.flags |= dns.flags.TC
    if options:
        message.use_edns(options=list(options))
    wire = message.to_wire()
    return transaction(NAME, rcode=rcode)._replace(
        type=type_,
        query=wire_query(NAME, type_),
        response=wire,
        response_len=len(wire),
        rcode=rcode,
        flags=("tc", "rd") if truncated else ("rd",),
    )


def error(code: int, text: str | None = None) -> dns.edns.Option:
    return dns.edns.EDEOption(dns.edns.EDECode.make(code), text)


CHAIN = (
    "a.b. 20 A 192.0.2.1",
    "a.b. 20 A 192.0.2.2",
    "cdn.example.net. 300 CNAME a.b.",
    "www.example.com. 30 CNAME cdn.example.net.",
)
SHOWN = {
    "an address": (
        answered((f"{NAME} 30 A 192.0.2.1",)),
        "192.0.2.1",
        ["answer: 192.0.2.1; TTL 30 s"],
    ),
    "aliases, in any order": (
        answered(CHAIN),
        "→ cdn.example.net. → a.b. → 192.0.2.1 +1",
        [
            "answer: www.example.com. → cdn.example.net. → a.b. → 192.0.2.1, 192.0.2.2; TTL 20 s",
        ],
    ),
    "an alias to nothing": (
        answered((f"{NAME} 30 CNAME a.b.",), (SOA,)),
        "→ a.b.; SOA 30 s",
        [
            "answer: www.example.com. → a.b. → nothing; TTL 30 s",
            "that there is none may be remembered for 30 s (SOA of example.com.)",
        ],
    ),
    "aliases in a circle": (
        answered((f"{NAME} 30 CNAME a.b.", f"a.b. 30 CNAME {NAME}")),
        "→ a.b. → www.example.com.",
        ["answer: www.example.com. → a.b. → www.example.com. → nothing; TTL 30 s"],
    ),
    "an alias that was asked for": (
        answered((f"{NAME} 30 CNAME a.b.",), type_="CNAME"),
        "a.b.",
        ["answer: a.b.; TTL 30 s"],
    ),
    "an alias of somebody else's": (
        answered(("x. 30 CNAME a.b.",)),
        "CNAME a.b.",
        ["answer: CNAME a.b.; TTL 30 s"],
    ),
    "everything there is": (
        answered((f"{NAME} 30 A 192.0.2.1", f"{NAME} 30 MX 10 a.b."), type_="ANY"),
        "A 192.0.2.1 +1",
        ["answer: A 192.0.2.1, MX 10 a.b.; TTL 30 s"],
    ),
    "many": (
        answered(tuple(f"{NAME} 30 A 192.0.2.{n}" for n in range(10))),
        "192.0.2.0 +9",
        [
            "answer: " + ", ".join(f"192.0.2.{n}" for n in range(8)) + ", +2 records; TTL 30 s",
        ],
    ),
    "no such name": (
        answered((), (SOA,), rcode="NXDOMAIN"),
        "SOA 30 s",
        ["that there is none may be remembered for 30 s (SOA of example.com.)"],
    ),
    "a referral": (
        answered((), ("com. 60 NS a.gtld-servers.net.", "com. 60 NS b.gtld-servers.net.")),
        "NS a.gtld-servers.net. +1",
        ["no answer, but whom to ask: a.gtld-servers.net. +1"],
    ),
    "truncated": (
        answered(truncated=True),
        "truncated",
        ["truncated: the client has to ask again, by TCP"],
    ),
    "truncated, with an answer": (
        answered((f"{NAME} 30 A 192.0.2.1",), truncated=True),
        "192.0.2.1; truncated",
        ["answer: 192.0.2.1; TTL 30 s", "truncated: the client has to ask again, by TCP"],
    ),
    "an extended error": (
        answered(rcode="SERVFAIL", options=(error(22, "delegation lost"),)),
        "No Reachable Authority: delegation lost",
        ["extended error 22, No Reachable Authority: delegation lost"],
    ),
    "an extended error without words": (
        answered(rcode="SERVFAIL", options=(error(6),)),
        "DNSSEC Bogus",
        ["extended error 6, DNSSEC Bogus"],
    ),
    "an extended error without a name": (
        answered(rcode="SERVFAIL", options=(error(4000),)),
        "extended error 4000",
        ["extended error 4000"],
    ),
    "an answer with an extended error": (
        answered((f"{NAME} 30 A 192.0.2.1",), options=(error(3),)),
        "192.0.2.1; Stale Answer",
        ["answer: 192.0.2.1; TTL 30 s", "extended error 3, Stale Answer"],
    ),
    "words of any language": (
        answered(rcode="SERVFAIL", options=(error(0, "\u4e2d\x1b[2J"),)),
        "Other: \u4e2d\\027[2J",
        ["extended error 0, Other: \\u4e2d\\027[2J"],
    ),
    "who answered, and for whom": (
        answered(
            options=(
                dns.edns.GenericOption(dns.edns.OptionType.NSID, b"fra-1"),
                dns.edns.ECSOption("192.0.2.0", 24, 16),
            )
        ),
        "",
        ["the server calls itself fra-1", "for clients in 192.0.2.0/24/16"],
    ),
    "no response": (transaction(rcode=None), "", []),
}  # fmt: skip


@pytest.mark.parametrize(("t", "short", "long"), SHOWN.values(), ids=SHOWN)
def test_answer_is_said_in_a_few_words(t: Transaction, short: str, long: list[str]) -> None:
    for _ in range(2):  # the second time from memory
        assert answer.short(t) == short
    assert list(answer.long(t)) == long


LONG = {
    "several": (
        [f'"{letter * 200}"' for letter in "abc"],
        f'answer: "{"a" * 200}", +2 records; TTL 30 s',
    ),
    "one": (
        [" ".join([f'"{"a" * 250}"'] * 16)],
        f'answer: "{"a" * 239}… +3,807 bytes; TTL 30 s',
    ),
    "one long one of two": (
        [f'"{"a" * 250}" "a"', '"b"'],
        f'answer: "{"a" * 239}… +16 bytes, +1 record; TTL 30 s',
    ),
}


@pytest.mark.parametrize(("data", "said"), LONG.values(), ids=LONG)
def test_long_answer_is_cut_with_how_much_more_there_is(data: list[str], said: str) -> None:
    records = tuple(f"{NAME} 30 TXT {text}" for text in data)
    assert list(answer.long(answered(records, type_="TXT"))) == [said]


def test_cut_response_is_said_to_be_cut() -> None:
    whole = answered((f"{NAME} 30 A 192.0.2.1",))
    assert whole.response is not None
    problem = f"cut off after 40 of {len(whole.response)} bytes"
    assert answer.short(whole) == "192.0.2.1"
    cut = whole._replace(response=whole.response[:40])
    assert answer.short(cut) == problem
    assert list(answer.long(cut)) == [f"the response is not whole, or not sound: {problem}"]


@pytest.mark.parametrize("opcode", ["NOTIFY", "UPDATE"])
def test_what_is_no_query_is_said_to_be_something_else(opcode: str) -> None:
    message = dns.message.from_wire(wire_query("example.com.", "SOA"))
    message.set_opcode(dns.opcode.from_text(opcode))
    query = message.to_wire()
    for t in (transaction(rcode=None), answered()):
        assert answer.short(t._replace(query=query)) == opcode
        assert f"  UDP {opcode}, id 3112, " in render(t._replace(query=query), 80)
    assert answer.short(answered()) == ""


def test_aliases_are_followed_whatever_the_case() -> None:
    assert answer.short(answered(CHAIN)._replace(name="WWW.Example.COM.")) == answer.short(
        answered(CHAIN)
    )


def test_different_questions_have_different_answers_from_the_same_bytes() -> None:
    t = answered(CHAIN)
    assert answer.short(t) != answer.short(t._replace(name="cdn.example.net."))
    assert answer.short(t) != answer.short(t._replace(type="CNAME"))


@pytest.mark.parametrize("width", [120, 200, 300])
def test_live_table_has_a_column_for_it_where_there_is_room(width: int) -> None:
    table = LiveTable(io.StringIO(), width)
    at = table.header().index("ANSWER")
    for t, short, _ in SHOWN.values():
        line = table.line(t)
        assert cell_len(line) == width
        if len(short) <= width - at and short.isascii():
            assert line[at:].rstrip() == short
    assert "ANSWER" not in LiveTable(io.StringIO(), 80).header()


def test_pipe_has_the_whole_answer_as_the_last_column() -> None:
    table = LiveTable(io.StringIO())
    at = table.header().index("ANSWER")
    for t, short, _ in SHOWN.values():
        assert table.line(t)[at:] == short


def test_path_ends_with_what_was_answered() -> None:
    for t, _, long in SHOWN.values():
        shown = " ".join(render(t, 80).split())
        for words in long:
            assert words in shown
