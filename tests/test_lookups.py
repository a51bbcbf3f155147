# SPDX-License-Identifier: Apache-2.0
"""Transactions grouped into what applications asked for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import NS_PER_MS, START_NS, WEB, wire_query, wire_response
from tests.samples import transaction as sample
from tracer.cluster.resolvconf import ResolvConf
from tracer.correlate import lookups
from tracer.correlate.chain import MEMBERS_MAX
from tracer.correlate.lookups import Lookups
from tracer.transaction import Client, Lookup, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NS_PER_S = 1_000 * NS_PER_MS
ANSWER_NS = NS_PER_MS // 2
SEARCH = ("sre.svc.cluster.local", "svc.cluster.local", "cluster.local")
POD = ResolvConf(("10.68.0.2",), SEARCH, ndots=5)
NDOTS_1 = POD._replace(ndots=1)
ROOT_FIRST = ResolvConf(("10.68.0.2",), (".", "corp"))
NO_SEARCH = ResolvConf(("10.68.0.2",))
PAIR = ("A", "AAAA")

# Building transactions for thousands of examples is what takes time, and only these bytes matter.
_QUERY = wire_query("example.com.")
_FOUND = wire_response(_QUERY, "NOERROR", "192.0.2.1")
_EMPTY = wire_response(_QUERY, "NOERROR")
_TEMPLATE = sample()


class Clock:
    """What the simulated world shares: the time, and ids that differ."""

    def __init__(self) -> None:
        self.ns = START_NS
        self.ids = itertools.count(1)


class Reported(NamedTuple):
    """A transaction, and when it is reported."""

    at_ns: int
    t: Transaction


def transaction(
    name: str,
    type_: str,
    rcode: str | None,
    start_ns: int,
    dns_id: int,
    *,
    client: Client = WEB,
    latency_ns: int = ANSWER_NS,
    flags: tuple[str, ...] = ("rd", "ra"),
    protocol: str = "udp",
) -> Transaction:
    """`rcode` is None for no answer, and "NODATA" for no answer of this type."""
    response = None
    if rcode is not None:
        response = _FOUND if rcode == "NOERROR" else _EMPTY
    return _TEMPLATE._replace(
        time_ns=start_ns,
        status="timeout" if rcode is None else "answered",
        dns_id=dns_id,
        protocol="tcp" if protocol == "tcp" else "udp",
        name=name + ".",
        type=type_,
        rcode="NOERROR" if rcode == "NODATA" else rcode,
        flags=flags,
        latency_ns=None if rcode is None else latency_ns,
        client=client,
        query=_QUERY,
        response=response,
    )


def names_of(question: str, resolver: ResolvConf) -> list[str]:
    """The names that a resolver library tries, in its order."""
    if question.endswith("."):
        return [question[:-1]]
    expanded = [f"{question}.{domain}".rstrip(".") for domain in resolver.search]
    first = question.count(".") >= resolver.ndots
    return list(dict.fromkeys([question, *expanded] if first else [*expanded, question]))


def resolve(
    clock: Clock,
    question: str,
    exists: str | None,
    resolver: ResolvConf,
    *,
    types: tuple[str, ...] = PAIR,
    client: Client = WEB,
    pause_ns: int = 20_000,
) -> Iterator[Reported]:
    """What goes over the wire when an application asks; `exists` is the only name there is."""
    now_ns = clock.ns
    for name in names_of(question, resolver):
        ended_ns = now_ns
        for type_ in types:
            rcode = "NOERROR" if name == exists else "NXDOMAIN"
            t = transaction(name, type_, rcode, now_ns, next(clock.ids), client=client)
            ended_ns = now_ns + ANSWER_NS
            yield Reported(ended_ns, t)
            now_ns += 10_000
        if name == exists:
            break
        now_ns = ended_ns + pause_ns
    clock.ns = max(clock.ns, now_ns)


def group(
    reports: Iterable[Reported], resolver: ResolvConf | None, table: Lookups | None = None
) -> list[Lookup]:
    """All lookups of these transactions, which come in the order that they are reported in."""
    table = Lookups() if table is None else table
    found = []
    for at_ns, t in sorted(reports, key=lambda reported: reported.at_ns):
        found += table.feed(t, resolver, at_ns)
    return found + table.flush()


def counted(found: list[Lookup]) -> list[tuple[str, int, int, str]]:
    return sorted((one.question, one.queries, one.wasted, one.status) for one in found)


def test_search_list_flood_is_one_lookup() -> None:
    """The flood of the field reports: four names, each for both address families."""
    (found,) = group(resolve(Clock(), "www.li-rui.top", "www.li-rui.top", POD), POD)
    step_ns = 10_000 + ANSWER_NS + 20_000
    assert found == Lookup(
        time_ns=START_NS,
        client=WEB,
        question="www.li-rui.top",
        search=SEARCH,
        ndots=5,
        queries=8,
        wasted=6,
        latency_ns=3 * step_ns + 10_000 + ANSWER_NS,
        wasted_ns=3 * step_ns,
        status="NOERROR",
        advice="ask for www.li-rui.top. (with a final dot) or set dnsConfig ndots:1;"
        " 6 of 8 queries were search-list misses",
        ids=(1, 2, 3, 4, 5, 6, 7, 8),
    )


def test_lookup_is_handed_on_as_soon_as_nothing_can_follow() -> None:
    table = Lookups()
    reports = list(resolve(Clock(), "www.li-rui.top", "www.li-rui.top", POD))
    handed_on = [len(table.feed(t, POD, at_ns)) for at_ns, t in reports]
    assert handed_on == [0, 0, 0, 0, 0, 0, 0, 1]
    assert len(table) == 0


def test_nslookup_of_the_field_report_asks_the_second_family_last() -> None:
    """A for each name, and AAAA for the one that was found: ids and times are the capture's."""
    search = ("prophet.svc.cluster.local", "svc.cluster.local", "cluster.local")
    capture = [
        ("ycwu314.top.prophet.svc.cluster.local", "A", 14770, 567_215, 46946),
        ("ycwu314.top.svc.cluster.local", "A", 49422, 568_171, 36680),
        ("ycwu314.top.cluster.local", "A", 1651, 568_910, 55443),
        ("ycwu314.top", "A", 50249, 569_494, 37613),
        ("ycwu314.top", "AAAA", 19908, 571_655, 34600),
    ]
    reports: list[Reported] = []
    for name, type_, dns_id, us, port in capture:
        rcode = "NOERROR" if name == "ycwu314.top" else "NXDOMAIN"
        start_ns = START_NS + us * 1_000
        client = WEB._replace(port=port)
        t = transaction(name, type_, rcode, start_ns, dns_id, client=client)
        reports.append(Reported(start_ns + ANSWER_NS, t))
    (found,) = group(reports, POD._replace(search=search))
    assert (found.question, found.queries, found.wasted) == ("ycwu314.top", 5, 3)
    assert found.ids == (14770, 49422, 1651, 50249, 19908)
    assert found.wasted_ns == (569_494 - 567_215) * 1_000


LOOKUPS: list[tuple[str, str | None, ResolvConf, tuple[str, ...], tuple[str, int, int, str]]] = [
    ("www.li-rui.top", "www.li-rui.top", POD, ("A",), ("www.li-rui.top", 4, 3, "NOERROR")),
    ("www.li-rui.top.", "www.li-rui.top", POD, PAIR, ("www.li-rui.top", 2, 0, "NOERROR")),
    ("www.li-rui.top", "www.li-rui.top", NDOTS_1, PAIR, ("www.li-rui.top", 2, 0, "NOERROR")),
    ("no.li-rui.top", None, POD, PAIR, ("no.li-rui.top", 8, 6, "NXDOMAIN")),
    ("no.li-rui.top", None, NDOTS_1, PAIR, ("no.li-rui.top", 8, 6, "NXDOMAIN")),
    ("no.li-rui.top.", None, POD, PAIR, ("no.li-rui.top", 2, 0, "NXDOMAIN")),
    ("no.li-rui.top", None, NO_SEARCH, PAIR, ("no.li-rui.top", 2, 0, "NXDOMAIN")),
    ("nosuch", None, POD, PAIR, ("nosuch", 8, 6, "NXDOMAIN")),
    ("web", "web.sre.svc.cluster.local", POD, PAIR, ("web", 2, 0, "NOERROR")),
    ("web", "web.sre.svc.cluster.local", POD, ("A",), ("web", 1, 0, "NOERROR")),
    (
        "web.sre.svc.cluster.local",
        "web.sre.svc.cluster.local",
        POD,
        PAIR,
        ("web.sre.svc.cluster.local", 8, 6, "NOERROR"),
    ),
    (
        "kubernetes.default",
        "kubernetes.default.svc.cluster.local",
        POD,
        PAIR,
        ("kubernetes.default", 4, 2, "NOERROR"),
    ),
    (
        "web.sre.svc.cluster.local",
        "web.sre.svc.cluster.local.cluster.local",
        NDOTS_1,
        PAIR,
        ("web.sre.svc.cluster.local", 8, 6, "NOERROR"),
    ),
    ("a.b.c.d.e.f", "a.b.c.d.e.f", POD, PAIR, ("a.b.c.d.e.f", 2, 0, "NOERROR")),
    ("web", "web.corp", ROOT_FIRST, PAIR, ("web", 4, 2, "NOERROR")),
    ("web", None, ROOT_FIRST, PAIR, ("web", 4, 2, "NXDOMAIN")),
]


@pytest.mark.parametrize(("question", "exists", "resolver", "types", "expected"), LOOKUPS)
def test_lookup_is_what_the_application_asked_for(
    question: str,
    exists: str | None,
    resolver: ResolvConf,
    types: tuple[str, ...],
    expected: tuple[str, int, int, str],
) -> None:
    reports = resolve(Clock(), question, exists, resolver, types=types)
    assert counted(group(reports, resolver)) == [expected]


MISSES = " queries were search-list misses"
ADVICE = {
    "found elsewhere in the search list": (
        "kubernetes.default",
        "kubernetes.default.svc.cluster.local",
        POD,
        "ask for kubernetes.default.svc.cluster.local. (with a final dot); 2 of 4" + MISSES,
    ),
    "found as it is, one label": (
        "localhost",
        "localhost",
        POD,
        "ask for localhost. (with a final dot); 6 of 8" + MISSES,
    ),
    "not found, one label": (
        "nosuch",
        None,
        POD,
        "nosuch is nowhere in the search list, so check the name and the namespace; 6 of 8"
        + MISSES,
    ),
    "not found, as it is first": (
        "no.li-rui.top",
        None,
        NDOTS_1,
        "ask for no.li-rui.top. (with a final dot); 6 of 8" + MISSES,
    ),
    "nothing wasted": ("www.li-rui.top.", "www.li-rui.top", POD, None),
}


@pytest.mark.parametrize(("question", "exists", "resolver", "advice"), ADVICE.values(), ids=ADVICE)
def test_advice_says_how_to_avoid_the_waste(
    question: str, exists: str | None, resolver: ResolvConf, advice: str | None
) -> None:
    (found,) = group(resolve(Clock(), question, exists, resolver), resolver)
    assert found.advice == advice


def test_time_wasted_after_the_answer_that_there_is_counts_too() -> None:
    (found,) = group(resolve(Clock(), "no.li-rui.top", None, NDOTS_1), NDOTS_1)
    assert found.latency_ns is not None
    assert found.wasted_ns == found.latency_ns - 10_000 - ANSWER_NS


def test_case_of_the_question_is_kept() -> None:
    reports = resolve(Clock(), "WWW.li-rui.Top", "WWW.li-rui.Top", POD)
    (found,) = group(reports, POD)
    assert (found.question, found.queries) == ("WWW.li-rui.Top", 8)


def test_name_without_one_address_family_wastes_nothing() -> None:
    reports = [
        Reported(START_NS + 1, transaction("v4.example.com", "A", "NOERROR", START_NS, 1)),
        Reported(START_NS + 2, transaction("v4.example.com", "AAAA", "NODATA", START_NS, 2)),
    ]
    (found,) = group(reports, NDOTS_1)
    assert (found.queries, found.wasted, found.status, found.advice) == (2, 0, "NOERROR", None)


def test_tool_that_asks_in_full_is_not_taken_for_one_that_searches() -> None:
    """EDNS and one type: dig asks for names as they are."""
    t = transaction("web.sre.svc.cluster.local", "A", "NOERROR", START_NS, 1)
    t = t._replace(query=t.query[:10] + b"\0\1" + t.query[12:])
    (found,) = group([Reported(START_NS, t)], POD)
    assert found.question == "web.sre.svc.cluster.local"


def test_search_list_is_inferred_where_the_configuration_is_unknown() -> None:
    (found,) = group(resolve(Clock(), "www.li-rui.top", "www.li-rui.top", POD), None)
    assert (found.question, found.queries, found.wasted) == ("www.li-rui.top", 8, 6)
    assert (found.search, found.ndots) == (SEARCH, None)


def test_search_list_is_inferred_beyond_the_cluster() -> None:
    search = (*SEARCH, "eu-west-1.compute.internal")
    reports = resolve(Clock(), "www.li-rui.top", "www.li-rui.top", POD._replace(search=search))
    (found,) = group(reports, None)
    assert (found.question, found.queries, found.wasted) == ("www.li-rui.top", 10, 8)
    assert found.search == search


def test_domain_is_inferred_outside_of_a_cluster() -> None:
    corp = ResolvConf((), ("corp.example.com",), ndots=3)
    (found,) = group(resolve(Clock(), "www.li-rui.top", "www.li-rui.top", corp), None)
    assert (found.question, found.queries, found.wasted) == ("www.li-rui.top", 4, 2)
    assert found.search == ("corp.example.com",)


def test_single_name_is_taken_as_it_is_where_the_configuration_is_unknown() -> None:
    reports = resolve(Clock(), "web", "web.sre.svc.cluster.local", POD)
    (found,) = group(reports, None)
    assert (found.question, found.search) == ("web.sre.svc.cluster.local", ())


def test_answer_by_tcp_belongs_to_the_truncated_one() -> None:
    cut = transaction("big.example.com", "TXT", "NOERROR", START_NS, 7, flags=("tc", "rd"))
    whole = transaction(
        "big.example.com", "TXT", "NOERROR", START_NS + NS_PER_MS, 8, protocol="tcp"
    )
    reports = [Reported(START_NS + ANSWER_NS, cut), Reported(START_NS + 2 * NS_PER_MS, whole)]
    (found,) = group(reports, NDOTS_1)
    assert (found.queries, found.wasted, found.status, found.ids) == (2, 0, "NOERROR", (7, 8))
    assert found.latency_ns == NS_PER_MS + ANSWER_NS


@pytest.mark.parametrize("later", [0, 1])
def test_both_families_asked_again_by_tcp_are_one_lookup(later: int) -> None:
    """As glibc does, over one connection and with the same ids, when either answer is truncated."""
    by_udp = [
        transaction("www.example.com", "A", "NOERROR", START_NS, 7, flags=("tc",) * (1 - later)),
        transaction("www.example.com", "AAAA", "NOERROR", START_NS, 8, flags=("tc",) * later),
    ]
    start_ns = START_NS + NS_PER_MS
    by_tcp = [
        transaction("www.example.com", type_, "NOERROR", start_ns, dns_id, protocol="tcp")
        for type_, dns_id in (("A", 7), ("AAAA", 8))
    ]
    reports = [Reported(t.time_ns + ANSWER_NS + n, t) for n, t in enumerate((*by_udp, *by_tcp))]
    (found,) = group(reports, NDOTS_1)
    assert (found.queries, found.wasted, found.status) == (4, 0, "NOERROR")


def glibc_after_a_loss(name: str, rcode: str) -> list[Reported]:
    """What glibc does when A is answered and AAAA is lost: after five seconds it sends both again
    over the same socket, one after the other. That AAAA was lost shows when it is sent again.
    """
    again_ns = START_NS + 5_003 * NS_PER_MS
    last_ns = again_ns + 180_000
    return [
        Reported(START_NS + ANSWER_NS, transaction(name, "A", rcode, START_NS, 9785)),
        Reported(
            again_ns + 100_000,
            transaction(name, "A", rcode, again_ns, 9785, latency_ns=100_000),
        ),
        Reported(last_ns, transaction(name, "AAAA", None, START_NS + 2_820_000, 59440)),
        Reported(last_ns + ANSWER_NS, transaction(name, "AAAA", rcode, last_ns, 59440)),
    ]


def test_loss_of_one_family_is_one_slow_lookup() -> None:
    (found,) = group(glibc_after_a_loss("www.li-rui.top", "NOERROR"), POD)
    assert (found.queries, found.wasted, found.status) == (4, 0, "NOERROR")
    assert found.latency_ns == 5_003 * NS_PER_MS + 180_000 + ANSWER_NS
    assert found.advice == (
        "AAAA was lost and the other address family was not, which may be conntrack's race:"
        " set the option single-request-reopen or run NodeLocal DNSCache"
    )


def test_search_list_goes_on_after_the_loss_of_one_family() -> None:
    lossy = glibc_after_a_loss("www.li-rui.top.sre.svc.cluster.local", "NXDOMAIN")
    clock = Clock()
    clock.ns = lossy[-1].at_ns + 20_000
    short = POD._replace(search=SEARCH[1:])
    rest = list(resolve(clock, "www.li-rui.top", "www.li-rui.top", short))
    (found,) = group([*lossy, *rest], POD)
    assert (found.queries, found.wasted, found.status) == (10, 8, "NOERROR")


def test_loss_that_is_reported_at_once_is_of_the_same_lookup() -> None:
    """A library that asks again from another socket, under another id."""
    again_ns = START_NS + 5 * NS_PER_S
    reports = [
        Reported(START_NS + ANSWER_NS, transaction("web.example.com", "A", "NOERROR", START_NS, 1)),
        Reported(again_ns, transaction("web.example.com", "AAAA", None, START_NS + 1_000, 2)),
        Reported(
            again_ns + NS_PER_MS,
            transaction("web.example.com", "AAAA", "NOERROR", again_ns + 9_000, 3),
        ),
    ]
    (found,) = group(reports, NDOTS_1)
    assert (found.queries, found.status) == (3, "NOERROR")
    assert found.latency_ns == 5 * NS_PER_S + 9_000 + ANSWER_NS


def test_client_that_always_uses_the_same_id_has_a_lookup_each_time() -> None:
    reports = []
    for number in range(5):
        start_ns = START_NS + number * 2 * NS_PER_S
        client = WEB._replace(port=40_000 + number)
        t = transaction("web", "A", "NOERROR", start_ns, 0, client=client)
        reports.append(Reported(start_ns + ANSWER_NS, t))
    assert [one.queries for one in group(reports, NO_SEARCH)] == [1] * 5


def test_search_list_goes_on_after_a_retry() -> None:
    later_ns = START_NS + 5 * NS_PER_S
    first, *others = [f"www.li-rui.top.{domain}" for domain in SEARCH]
    clock_ns = later_ns + NS_PER_MS
    reports = [
        Reported(later_ns, transaction(first, "A", None, START_NS, 1)),
        Reported(later_ns + ANSWER_NS, transaction(first, "A", "NXDOMAIN", later_ns, 1)),
    ]
    for dns_id, name in enumerate([*others, "www.li-rui.top"], start=2):
        rcode = "NOERROR" if name == "www.li-rui.top" else "NXDOMAIN"
        t = transaction(name, "A", rcode, clock_ns, dns_id)
        reports.append(Reported(clock_ns + ANSWER_NS, t))
        clock_ns += NS_PER_MS
    (found,) = group(reports, POD)
    assert (found.queries, found.wasted, found.status) == (5, 4, "NOERROR")
    assert found.wasted_ns == 5 * NS_PER_S + 3 * NS_PER_MS


UNANSWERED = {
    "no answer at all": ([(None, "A"), (None, "AAAA")], "TIMEOUT", None),
    "one family unanswered": ([("NOERROR", "A"), (None, "AAAA")], "NOERROR", None),
    "a server's failure": ([("SERVFAIL", "A"), ("SERVFAIL", "AAAA")], "SERVFAIL", ANSWER_NS),
    "a failure and an answer": ([("SERVFAIL", "A"), ("NOERROR", "AAAA")], "NOERROR", ANSWER_NS),
    "a failure and no such name": ([("REFUSED", "A"), ("NXDOMAIN", "AAAA")], "NXDOMAIN", ANSWER_NS),
    "no data": ([("NODATA", "A"), ("NODATA", "AAAA")], "NOERROR", ANSWER_NS),
}


@pytest.mark.parametrize(("answers", "status", "latency_ns"), UNANSWERED.values(), ids=UNANSWERED)
def test_status_is_that_of_the_answer_the_application_got(
    answers: list[tuple[str | None, str]], status: str, latency_ns: int | None
) -> None:
    reports: list[Reported] = []
    for dns_id, (rcode, type_) in enumerate(answers):
        at_ns = START_NS + (5 * NS_PER_S if rcode is None else ANSWER_NS)
        t = transaction("x.example.com", type_, rcode, START_NS, dns_id)
        reports.append(Reported(at_ns, t))
    (found,) = group(reports, NDOTS_1)
    assert (found.queries, found.status, found.latency_ns) == (2, status, latency_ns)


def test_refused_and_dropped_queries_have_no_answer() -> None:
    t = transaction("x.example.com", "A", None, START_NS, 1)._replace(status="refused")
    (found,) = group([Reported(START_NS, t)], NDOTS_1)
    assert found.status == "TIMEOUT"


def test_same_question_again_is_another_lookup() -> None:
    clock = Clock()
    reports: list[Reported] = []
    for _ in range(3):
        reports += resolve(clock, "www.li-rui.top", "www.li-rui.top", POD)
    assert counted(group(reports, POD)) == [("www.li-rui.top", 8, 6, "NOERROR")] * 3


def test_same_question_at_the_same_time_is_never_counted_as_one() -> None:
    reports: list[Reported] = []
    for _ in range(5):
        clock = Clock()
        reports += resolve(clock, "www.li-rui.top", "www.li-rui.top", POD)
    found = group(reports, POD)
    assert sum(one.queries for one in found) == 40
    assert all(one.queries <= 8 for one in found)


def test_lost_queries_at_the_same_time_are_no_retries() -> None:
    reports = [
        Reported(
            START_NS + 5 * NS_PER_S + n, transaction("web", "SRV", None, START_NS + n * 1_000, n)
        )
        for n in range(4)
    ]
    assert [one.queries for one in group(reports, NO_SEARCH)] == [1, 1, 1, 1]


def test_processes_are_kept_apart() -> None:
    reports: list[Reported] = []
    for pid in range(4):
        reports += resolve(Clock(), "nosuch", None, POD, client=WEB._replace(pid=pid))
    assert counted(group(reports, POD)) == [("nosuch", 8, 6, "NXDOMAIN")] * 4


def test_clients_without_a_process_are_kept_apart_by_address() -> None:
    reports: list[Reported] = []
    for number in range(4):
        client = Client(f"10.244.2.{number}", 5000)
        reports += resolve(Clock(), "nosuch", None, POD, client=client)
    assert counted(group(reports, POD)) == [("nosuch", 8, 6, "NXDOMAIN")] * 4


def test_late_query_is_another_lookup() -> None:
    clock = Clock()
    reports = list(resolve(clock, "nosuch", None, POD, types=("A",), pause_ns=1_100 * NS_PER_MS))
    assert [one.queries for one in group(reports, POD)] == [1, 1, 1, 1]


def test_gap_can_be_chosen() -> None:
    table = Lookups(gap_ns=2 * NS_PER_S)
    reports = resolve(Clock(), "nosuch", None, POD, types=("A",), pause_ns=1_100 * NS_PER_MS)
    assert [one.queries for one in group(reports, POD, table)] == [4]


def test_lookup_without_an_end_is_handed_on_after_the_gap() -> None:
    table = Lookups()
    t = transaction("no.example.com", "SRV", "NXDOMAIN", START_NS, 1)
    assert table.feed(t, POD, START_NS + ANSWER_NS) == []
    assert table.expire(START_NS + 900 * NS_PER_MS) == []
    assert [one.queries for one in table.expire(START_NS + 1_200 * NS_PER_MS)] == [1]
    assert table.flush() == []


def test_missing_family_is_waited_for_as_long_as_a_retry_takes() -> None:
    table = Lookups()
    t = transaction("web.example.com", "A", "NOERROR", START_NS, 1)
    assert table.feed(t, NDOTS_1, START_NS + ANSWER_NS) == []
    assert table.expire(START_NS + 5_900 * NS_PER_MS) == []
    assert [one.queries for one in table.expire(START_NS + 6_200 * NS_PER_MS)] == [1]


def test_client_that_never_asks_for_the_other_family_is_not_waited_for() -> None:
    table = Lookups()
    at_once = 0
    for number in range(100):
        t = transaction(f"n{number}.example.com", "A", "NOERROR", START_NS, number)
        at_once += len(table.feed(t, NDOTS_1, START_NS + ANSWER_NS))
    assert at_once == 100 - 63


def test_table_is_bounded_and_evictions_are_counted() -> None:
    table = Lookups(open_max=10)
    found = []
    for number in range(25):
        t = transaction(f"n{number}.example.com", "A", None, START_NS, number)
        found += table.feed(t, POD, START_NS)
    assert (len(table), len(found), table.evicted) == (10, 15, 15)
    assert len(table.flush()) == 10


def test_clients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "CLIENTS_MAX", 5)
    table = Lookups()
    for pid in range(20):
        client = WEB._replace(pid=pid)
        table.feed(transaction("nosuch", "A", None, START_NS, 1, client=client), POD, START_NS)
    assert len(table._askers) == 5
    assert len(table.expire(START_NS + 60 * NS_PER_S)) == 20


def test_endless_retries_do_not_grow_one_lookup() -> None:
    reports = [
        Reported(START_NS + n * NS_PER_S, transaction("x", "SRV", None, START_NS + n * NS_PER_S, 1))
        for n in range(MEMBERS_MAX + 1)
    ]
    assert [one.queries for one in group(reports, NO_SEARCH)] == [MEMBERS_MAX, 1]


def test_query_without_a_question_is_no_lookup() -> None:
    t = transaction("x", "A", None, START_NS, 1)._replace(name=None, type=None)
    assert group([Reported(START_NS, t)], POD) == []


questions = st.sampled_from(
    ["www.li-rui.top", "www", "api.sre", "db.sre.svc.cluster.local", "x.example.com.", "nosuch"]
)


class Wanted(NamedTuple):
    """A simulated lookup."""

    question: str
    found_at: int  # which of its names exists; beyond the last: none
    delay_us: int
    pid: int
    types: tuple[str, ...]


wanted = st.builds(
    Wanted,
    questions,
    st.integers(0, 4),
    st.integers(0, 5_000),
    st.integers(1, 3),
    st.sampled_from([PAIR, ("A",), ("AAAA",)]),
)


def simulate(one: Wanted, resolver: ResolvConf) -> list[Reported]:
    clock = Clock()
    clock.ns += one.delay_us * 1_000
    names = names_of(one.question, resolver)
    exists = names[one.found_at] if one.found_at < len(names) else None
    client = WEB._replace(pid=one.pid)
    return list(resolve(clock, one.question, exists, resolver, types=one.types, client=client))


@pytest.mark.fuzz
@given(st.lists(wanted, max_size=8), st.sampled_from([POD, NDOTS_1, None]))
def test_every_transaction_is_in_exactly_one_lookup(
    several: list[Wanted], resolver: ResolvConf | None
) -> None:
    reports = [report for one in several for report in simulate(one, resolver or POD)]
    table = Lookups()
    found = group(reports, resolver, table)
    assert sum(one.queries for one in found) == len(reports)
    assert sorted(dns_id for one in found for dns_id in one.ids) == sorted(
        report.t.dns_id or 0 for report in reports
    )
    assert (len(table), table.evicted, table._due) == (0, 0, {})
    for one in found:
        assert 0 <= one.wasted < one.queries == len(one.ids)
        assert (one.advice is None) == (one.wasted == 0)  # nothing is lost here
        assert one.latency_ns is None or 0 <= one.wasted_ns <= one.latency_ns


@pytest.mark.fuzz
@given(
    st.lists(wanted, max_size=6, unique_by=lambda one: one.question),
    st.sampled_from([POD, NDOTS_1]),
)
def test_different_questions_at_the_same_time_are_told_apart(
    several: list[Wanted], resolver: ResolvConf
) -> None:
    one_process = [one._replace(pid=1) for one in several]
    apart = [counted(group(simulate(one, resolver), resolver))[0] for one in one_process]
    reports = [report for one in one_process for report in simulate(one, resolver)]
    assert counted(group(reports, resolver)) == sorted(apart)


@pytest.mark.fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["www", "www.sre", "www.sre.svc.cluster.local", "sre", "."]),
            st.sampled_from(["A", "AAAA", "SRV"]),
            st.sampled_from(["NOERROR", "NODATA", "NXDOMAIN", "SERVFAIL", None]),
            st.integers(0, 8_000),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=30,
    ),
    st.sampled_from([POD, NDOTS_1, NO_SEARCH, None]),
    st.integers(1, 5),
)
def test_any_transactions_are_each_in_one_lookup(
    drawn: list[tuple[str, str, str | None, int, int, bool]],
    resolver: ResolvConf | None,
    open_max: int,
) -> None:
    reports: list[Reported] = []
    for name, type_, rcode, ms, dns_id, truncated in drawn:
        start_ns = START_NS + ms * NS_PER_MS
        flags = ("tc",) if truncated else ()
        t = transaction(name.removesuffix("."), type_, rcode, start_ns, dns_id, flags=flags)
        reports.append(Reported(start_ns + (5 * NS_PER_S if rcode is None else ANSWER_NS), t))
    found = group(reports, resolver, Lookups(open_max=open_max))
    assert sum(one.queries for one in found) == len(reports)
    assert all(one.wasted_ns >= 0 for one in found)
