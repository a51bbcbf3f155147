# SPDX-License-Identifier: Apache-2.0
"""What a server asked itself stands under the query that it is because of, or under none."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import NS_PER_MS, START_NS, transaction
from tracer.correlate import upstream as module
from tracer.correlate.upstream import NOT_YET, Upstream
from tracer.transaction import Client, Served, Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.fuzz

SECOND = 1_000_000_000
MEMORY_NS = 7 * SECOND
SERVER, OTHER_SERVER, APP = 500, 501, 120  # cgroups
SERVER_NETNS, NODE_NETNS, APP_NETNS = 13, 12, 11
ALL = {SERVER, OTHER_SERVER}
NAME = "slow.example.com."


def asked(
    at_ms: float,
    took_ms: float | None = 10.0,
    *,
    name: str = NAME,
    type_: str = "A",
    server: int = SERVER,
    netns: int = SERVER_NETNS,
    dns_id: int = 1,
) -> Transaction:
    """A client's query that a server had half a millisecond after it was sent."""
    start_ns = START_NS + int(at_ms * NS_PER_MS)
    served = Served(
        netns,
        server or None,
        start_ns + NS_PER_MS // 2,
        None if took_ms is None else start_ns + int((took_ms - 0.5) * NS_PER_MS),
    )
    return _made(name, type_, start_ns, took_ms, dns_id, Client("10.244.1.10", 5000, APP_NETNS, APP))._replace(served=served)  # fmt: skip


def sent(
    at_ms: float,
    took_ms: float | None = 5.0,
    *,
    name: str = NAME,
    type_: str = "A",
    server: int = SERVER,
    netns: int = SERVER_NETNS,
    dns_id: int = 100,
) -> Transaction:
    """A server's own query, to somebody whom nothing here watches."""
    client = Client("10.244.2.2", 6000, netns, server or None)
    return _made(name, type_, START_NS + int(at_ms * NS_PER_MS), took_ms, dns_id, client)


def _made(
    name: str, type_: str, start_ns: int, took_ms: float | None, dns_id: int, client: Client
) -> Transaction:
    latency_ns = None if took_ms is None else int(took_ms * NS_PER_MS)
    rcode = None if took_ms is None else "NOERROR"
    return transaction(name, type_, rcode, data=(), time_ns=start_ns, latency_ns=latency_ns, dns_id=dns_id, client=client)  # fmt: skip


def nested(
    *transactions: Transaction,
    upstream: Upstream | None = None,
    servers: Iterable[int] = ALL,
    in_flight: Iterable[Transaction] = (),
) -> dict[int, Transaction]:
    """All of these as they come out, by id: each once."""
    upstream = Upstream(MEMORY_NS) if upstream is None else upstream
    now_ns = START_NS + SECOND
    out = upstream.feed(transactions, set(servers), now_ns)
    out += upstream.resolve(now_ns)
    out += upstream.resolve(now_ns, in_flight)
    out += upstream.flush(now_ns)
    assert len(out) == len(transactions)
    return {t.dns_id or 0: t for t in out}


def ids(t: Transaction) -> list[int | None] | None:
    return None if t.upstream is None else [one.dns_id for one in t.upstream]


def test_query_of_the_server_is_under_the_one_that_it_answers() -> None:
    out = nested(sent(2), asked(0))
    assert ids(out[1]) == [100]
    assert (out[1].upstream_unsure, ids(out[100])) == (0, None)


def test_answer_from_the_cache_has_nothing_under_it() -> None:
    assert ids(nested(asked(0))[1]) == []


def test_query_that_no_hook_of_ours_saw_at_a_server_has_unknown_upstream() -> None:
    assert ids(nested(asked(0)._replace(served=None))[1]) is None


NOT_BECAUSE = {
    "before it came": sent(0.2),
    "over after its answer": sent(8, 3),
    "after its answer": sent(20),
    "of another name": sent(2, name="www.example.com."),
    "of another type": sent(2, type_="AAAA"),
    "of another server": sent(2, server=OTHER_SERVER, netns=14),
    "of another process in the same pod": sent(2, server=OTHER_SERVER),
}


@pytest.mark.parametrize("query", NOT_BECAUSE.values(), ids=NOT_BECAUSE)
def test_query_that_is_not_because_of_it_is_not_under_it(query: Transaction) -> None:
    out = nested(query, asked(0))
    assert (ids(out[1]), out[1].upstream_unsure) == ([], 0)


def test_case_of_the_name_does_not_matter() -> None:
    assert ids(nested(sent(2, name="SLOW.example.COM."), asked(0))[1]) == [100]


def test_attempts_are_all_under_it_in_order() -> None:
    out = nested(sent(6, 2, dns_id=101), sent(2, None, dns_id=100), asked(0))
    assert ids(out[1]) == [100, 101]
    unanswered, answered = out[1].upstream or ()
    assert (unanswered.status, answered.status) == ("timeout", "answered")


def test_query_that_was_never_answered_has_what_its_server_asked() -> None:
    out = nested(*(sent(1 + 2000 * n, None, dns_id=100 + n) for n in range(3)), asked(0, None))
    assert ids(out[1]) == [100, 101, 102]


def test_several_that_could_be_the_reason_are_unsure_with_each() -> None:
    out = nested(sent(3), asked(0), asked(1, 12, dns_id=2), asked(2.9, 10, dns_id=3))
    for number in (1, 2):
        assert (ids(out[number]), out[number].upstream_unsure) == ([], 1)
    # It came before that one did.
    assert (ids(out[3]), out[3].upstream_unsure) == ([], 0)


def test_two_servers_that_are_asked_the_same_keep_their_own() -> None:
    out = nested(
        sent(2, dns_id=100),
        sent(2, dns_id=101, server=OTHER_SERVER, netns=14),
        asked(0, dns_id=1),
        asked(0, dns_id=2, server=OTHER_SERVER, netns=14),
    )
    assert (ids(out[1]), ids(out[2])) == ([100], [101])


def test_servers_in_a_chain_are_under_one_another() -> None:
    """A node's cache asks a replica, which asks outside."""
    middle = asked(2, 6, dns_id=50)._replace(
        client=Client("169.254.20.10", 7000, NODE_NETNS, OTHER_SERVER)
    )
    out = nested(
        sent(3, 2, dns_id=100),
        middle,
        asked(0, dns_id=1, server=OTHER_SERVER, netns=NODE_NETNS),
        upstream=Upstream(MEMORY_NS, [NODE_NETNS]),
    )
    assert ids(out[1]) == [50]
    assert ids((out[1].upstream or ())[0]) == [100]


def test_network_namespace_tells_where_no_cgroup_does_unless_it_is_shared() -> None:
    with_netns = [sent(2, server=0), asked(0, server=0)]
    assert ids(nested(*with_netns)[1]) == [100]
    shared = nested(*with_netns, upstream=Upstream(MEMORY_NS, [SERVER_NETNS]))
    assert ids(shared[1]) is None


def test_who_has_not_been_asked_anything_is_no_server() -> None:
    assert ids(nested(sent(2), asked(0), servers=())[1]) == []


def test_query_still_in_flight_is_under_the_one_that_waits_for_it() -> None:
    """The server gave up before its own query did."""
    out = nested(asked(0, 2000), in_flight=[sent(2, None)])
    (query,) = out[1].upstream or ()
    assert (query.dns_id, query.problem) == (100, NOT_YET)


def test_other_cause_still_in_flight_makes_it_unsure() -> None:
    out = nested(sent(3), asked(0), in_flight=[asked(1, None, dns_id=2)])
    assert (ids(out[1]), out[1].upstream_unsure) == ([], 1)


def test_answer_without_a_question_is_no_cause() -> None:
    assert ids(nested(asked(0)._replace(name=None, type=None))[1]) is None


def test_too_many_are_forgotten_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_MAX", 10)
    monkeypatch.setattr(module, "ASKED_MAX", 10)
    upstream = Upstream(MEMORY_NS)
    now_ns = START_NS + SECOND
    for n in range(100):
        upstream.feed([sent(2, dns_id=n), asked(0, dns_id=1000 + n)], ALL, now_ns)
        upstream.resolve(now_ns)
    assert upstream.evicted == 90
    for table in (upstream._sent, upstream._answered, upstream._unanswered):
        assert len(table._by_age) <= 10
        assert sum(map(len, table._by_key.values())) == len(table._by_age)
    upstream.resolve(now_ns + 2 * MEMORY_NS)
    assert not upstream._sent._by_age
    assert upstream.evicted == 90


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Transaction], dict[int, int]]:
    """What clients asked, and what two servers sent because of it: id to the id of its cause.

    A server may ask several times, or answer from its cache; ids are counted.
    """
    transactions: list[Transaction] = []
    because: dict[int, int] = {}
    for number in range(1, draw(st.integers(1, 8)) + 1):
        server, netns = draw(st.sampled_from([(SERVER, SERVER_NETNS), (OTHER_SERVER, 14)]))
        name = draw(st.sampled_from(["a.example.", "b.example."]))
        at = draw(st.floats(0, 60))
        own = draw(st.lists(st.tuples(st.floats(0.1, 4), st.floats(0.1, 4)), max_size=3))
        took = 1.0 + sum(wait + long for wait, long in own) + draw(st.floats(0.6, 3))
        transactions.append(asked(at, took, name=name, server=server, netns=netns, dns_id=number))
        now = at + 0.6
        for wait, long in own:
            now += wait
            dns_id = 100 * number + len(because)
            transactions.append(
                sent(now, long, name=name, server=server, netns=netns, dns_id=dns_id)
            )
            because[dns_id] = number
            now += long
    return transactions, because


@given(histories(), st.integers(0, 1000))
def test_nothing_is_under_a_query_that_is_not_its_cause(
    history: tuple[list[Transaction], dict[int, int]], seed: int
) -> None:
    """Whatever the order of the records: right, or counted as unsure with each that could be."""
    transactions, because = history
    by_end = sorted(transactions, key=lambda t: t.time_ns + (t.latency_ns or 0))
    shuffled = list(transactions)
    random.Random(seed).shuffle(shuffled)  # noqa: S311
    told = []
    for order in (by_end, shuffled):
        out = nested(*order)
        assert set(out) == {t.dns_id for t in transactions}
        told.append({number: (ids(t), t.upstream_unsure) for number, t in out.items()})
    assert told[0] == told[1]
    placed: list[int | None] = []
    for number, (under, _) in told[0].items():
        if number >= 100:
            assert under is None
            continue
        assert under is not None
        placed += under
        assert all(because[one or 0] == number for one in under)
    assert len(placed) == len(set(placed))
    for dns_id in because.keys() - set(placed):
        unsure = [n for n, (_, count) in told[0].items() if count]
        assert because[dns_id] in unsure
        assert len(unsure) >= 2
