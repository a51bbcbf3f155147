# SPDX-License-Identifier: Apache-2.0
"""TCP segments to transactions: every query that went in comes out once, whatever else does."""

from __future__ import annotations

import itertools
from collections import Counter as Tally
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import wire_query, wire_response
from tests.segments import (
    ACK,
    BACK,
    CLIENT_NETNS,
    DROP,
    EGRESS,
    FIN,
    INGRESS,
    NODE_NETNS,
    QUERIES,
    QUERY,
    RECEIVE,
    RESPONSE,
    RESPONSES,
    RST,
    SECOND,
    SEND,
    SYN,
    WAY,
    WAY_BACK,
    Peer,
    ended,
    framed,
    run,
)
from tracer import connections as module
from tracer.connection import Losses
from tracer.connections import Connections
from tracer.passage import PLACES_MAX, SPANS_MAX, Passage, Place
from tracer.record import MAX_HOPS, QUERY_BYTES, SEGMENT_RECORD, TRANSACTION, Status
from tracer.tcp_records import _FLOWS_AT, _HOPS_AT, _QUERY_AT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.fuzz

TIMEOUT_NS = 5 * SECOND
LONG_AFTER_NS = 1_000 * SECOND
BIG = wire_query("big.example.com", "TXT", 77)
BIG_RESPONSE = wire_response(BIG) + bytes(60_000)


@pytest.fixture
def all_() -> Connections:
    return Connections(TIMEOUT_NS)


def new() -> Connections:
    return Connections(TIMEOUT_NS)


def check_empty(connections: Connections) -> None:
    """Long after everything, nothing is held, and the kernel is told to forget all."""
    connections.expire(LONG_AFTER_NS)
    connections.expire(2 * LONG_AFTER_NS)
    assert not connections._all
    assert connections._held == 0
    assert connections.waiting() == 0


# What is made of one connection


def test_query_and_response_are_one_transaction_with_every_hop(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[3])
    peer.answer(RESPONSES[3])
    (one,) = run(all_, [peer])
    assert (one.status, one.dns_id, one.query, one.response) == (
        Status.ANSWERED, 3, QUERIES[3], RESPONSES[3],
    )  # fmt: skip
    assert one.places == [*WAY, *WAY_BACK]
    assert [hop[1] for hop in one.hops] == [QUERY] * 6 + [RESPONSE] * 6
    assert one.latency_ns == one.hops[-1][0] - one.hops[0][0] == 11_000
    slot = one.slot
    assert (slot["pid"], slot["cgroup_id"], slot["netns"]) == (4242, 120, CLIENT_NETNS)
    assert (slot["server_cgroup_id"], slot["protocol"], slot["attempt"]) == (130, 6, 1)
    assert (slot["nflows"], slot["family"], slot["query_len"]) == (2, 4, len(QUERIES[3]))
    assert slot["comm"].tobytes() == b"dig".ljust(16, b"\0")
    check_empty(all_)


def test_layout_of_records_is_that_of_the_kernel() -> None:
    offsets = [TRANSACTION.fields[n][1] for n in ("flows", "hops", "query")]  # type: ignore[index]
    assert offsets == [_FLOWS_AT, _HOPS_AT, _QUERY_AT]


def test_length_alone_and_byte_by_byte(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    data = framed(QUERIES[0])
    peer.segment(QUERY, data[:2])
    peer.segment(QUERY, data[2:])
    for byte in framed(QUERIES[1]):
        peer.segment(QUERY, bytes([byte]))
    peer.answer(RESPONSES[0])
    for byte in framed(RESPONSES[1]):
        peer.segment(RESPONSE, bytes([byte]))
    made = run(all_, [peer])
    assert [one.response for one in made] == RESPONSES[:2]
    for one in made:
        assert one.places == [*WAY, *WAY_BACK]
    check_empty(all_)


def test_50_queries_in_one_segment_and_answers_in_any_order(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(*QUERIES[:50])
    for number in reversed(range(25)):
        peer.answer(RESPONSES[number])
    peer.answer(*RESPONSES[25:50])
    made = run(all_, [peer])
    assert [one.dns_id for one in made] == [*reversed(range(25)), *range(25, 50)]
    assert all(one.places == [*WAY, *WAY_BACK] for one in made)
    assert all(one.response == RESPONSES[one.dns_id] for one in made)
    assert all_.lost == Losses()
    check_empty(all_)


def test_big_answer_in_many_segments_passes_when_its_last_byte_does(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(BIG)
    data = framed(BIG_RESPONSE)
    for at in range(0, len(data), 1448):
        peer.segment(RESPONSE, data[at : at + 1448])
    (one,) = run(all_, [peer])
    assert one.response == BIG_RESPONSE
    assert one.places == [*WAY, *WAY_BACK]
    assert one.hops[-1][0] == peer.t_ns - 1000
    assert all_._held == 0
    check_empty(all_)


def test_same_id_and_question_twice_is_answered_in_order(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[1], QUERIES[1])
    peer.answer(RESPONSES[1])
    peer.answer(RESPONSES[1])
    first, second = run(all_, [peer])
    assert first.latency_ns is not None
    assert second.latency_ns is not None
    assert second.latency_ns > first.latency_ns


def test_same_id_and_other_question_is_told_apart(all_: Connections) -> None:
    one, other = (wire_query(name, dns_id=9) for name in ("one.example.com", "other.example.com"))
    peer = Peer()
    peer.open()
    peer.ask(one, other)
    peer.answer(wire_response(other), wire_response(one))
    assert [made.query for made in run(all_, [peer])] == [other, one]


def test_response_without_its_question_fits_the_oldest_of_its_id(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[1])
    bare = QUERIES[1][:2] + b"\x81\x81" + bytes(8)
    peer.answer(bare)
    assert [one.response for one in run(all_, [peer])] == [bare]


def test_response_to_nothing_is_counted(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[1])
    peer.answer(RESPONSES[2], RESPONSES[1], RESPONSES[1])
    assert len(run(all_, [peer])) == 1
    assert all_.lost.unmatched_responses == 2


def test_what_is_no_dns_message_is_counted(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(b"", b"x" * 11, RESPONSES[0], QUERIES[0])
    peer.answer(QUERIES[0], RESPONSES[0])
    assert len(run(all_, [peer])) == 1
    assert all_.lost.undecodable == 4


def test_long_query_is_kept_as_far_as_records_have_room(all_: Connections) -> None:
    long = QUERIES[0] + bytes(5000)
    peer = Peer()
    peer.open()
    peer.ask(long)
    peer.answer(RESPONSES[0])
    (one,) = run(all_, [peer])
    assert one.query == long[:QUERY_BYTES]
    assert one.slot["query_len"] == len(long)


# What is lost on the way


def test_query_sent_again_passes_each_hop_once_and_when_it_first_did(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    data = framed(QUERIES[0])
    peer.segment(QUERY, data, offset=0, hops=slice(0, 3))
    peer.at((DROP, 5, NODE_NETNS), QUERY, data, offset=0, drop_reason=8, drop_location=0x42)
    dropped_ns = peer.t_ns
    peer.t_ns += 200_000_000
    peer.segment(QUERY, data, offset=0)
    peer.answer(RESPONSES[0])
    (one,) = run(all_, [peer])
    assert one.places == [*WAY[:3], (DROP, 5, NODE_NETNS), *WAY[3:], *WAY_BACK]
    times = [hop[0] for hop in one.hops]
    assert times == sorted(times)
    assert times[4] > dropped_ns + 200_000_000
    assert one.latency_ns is not None
    assert one.latency_ns > 200_000_000
    assert one.slot["drop_location"] == 0x42


@pytest.mark.parametrize("lost", range(5))
def test_answer_arrives_when_the_last_of_its_segments_does(all_: Connections, lost: int) -> None:
    """One segment of five is lost between the nodes: all hops behind wait for it."""
    peer = Peer()
    peer.open()
    peer.ask(BIG)
    data = framed(BIG_RESPONSE[:5000])
    parts = [(at, data[at : at + 1001]) for at in range(0, len(data), 1001)]
    for number, (at, part) in enumerate(parts):
        if number == lost:
            peer.segment(RESPONSE, part, offset=at, hops=slice(0, 3))
            peer.at((DROP, 6, NODE_NETNS), RESPONSE, part, offset=at)
        else:
            peer.segment(RESPONSE, part, offset=at)
    peer.t_ns += 300_000_000
    sent_again_ns = peer.t_ns
    peer.segment(RESPONSE, parts[lost][1], offset=parts[lost][0])
    (one,) = run(all_, [peer])
    assert len(one.response) == 5000
    assert set(one.places) == {*WAY, *WAY_BACK, (DROP, 6, NODE_NETNS)}
    behind = [hop for hop in one.hops if hop[2:] in WAY_BACK[3:]]
    assert len(behind) == 3
    assert all(hop[0] > sent_again_ns for hop in behind)
    assert all(hop[0] < sent_again_ns for hop in one.hops if hop[2:] in WAY_BACK[:3])
    assert one.places[-1] == WAY_BACK[-1]
    assert one.latency_ns == one.hops[-1][0] - one.hops[0][0]


def test_drop_of_what_came_twice_is_no_hop(all_: Connections) -> None:
    """The server has the query; what the client sends once more, it drops as old."""
    peer = Peer()
    peer.open()
    data = framed(QUERIES[0])
    peer.segment(QUERY, data, offset=0)
    peer.segment(QUERY, data, offset=0)
    peer.at((DROP, 0, 0), QUERY, data, offset=0, drop_reason=50)
    assert run(all_, [peer]) == []
    (one,) = ended(all_.expire(peer.t_ns + TIMEOUT_NS + SECOND))
    assert (one.status, one.places) == (Status.TIMEOUT, list(WAY))


def test_query_dropped_for_good_ends_with_the_drop(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    data = framed(QUERIES[0])
    for _ in range(3):
        peer.segment(QUERY, data, offset=0, hops=slice(0, 3))
        peer.at((DROP, 5, NODE_NETNS), QUERY, data, offset=0)
        peer.t_ns += SECOND
    run(all_, [peer])
    (one,) = ended(all_.expire(peer.t_ns + TIMEOUT_NS + SECOND))
    assert one.status == Status.TIMEOUT
    assert one.places == [*WAY[:3], (DROP, 5, NODE_NETNS)]


def test_query_without_an_answer_times_out_once(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[0])
    assert run(all_, [peer]) == []
    assert all_.waiting() == 1
    assert len(all_.expire(peer.t_ns + TIMEOUT_NS - SECOND)) == 0
    (one,) = ended(all_.expire(peer.t_ns + TIMEOUT_NS + SECOND))
    assert (one.status, one.latency_ns, one.response) == (Status.TIMEOUT, None, b"")
    assert all_.waiting() == 0
    assert len(all_.flush()) == 0


def test_answer_whose_last_hop_never_comes_is_answered_all_the_same(all_: Connections) -> None:
    peer = Peer(carrier=(SEND, SEND))
    peer.open()
    peer.ask(QUERIES[0])
    peer.segment(RESPONSE, framed(RESPONSES[0]), hops=slice(0, 4))
    assert run(all_, [peer]) == []
    (one,) = ended(all_.expire(peer.t_ns + SECOND))
    assert (one.status, one.latency_ns) == (Status.ANSWERED, None)
    assert one.places == [*WAY, *WAY_BACK[:4]]


@pytest.mark.parametrize("lossy", [False, True])
def test_what_is_missing_is_given_up_soon_only_where_records_were_lost(
    all_: Connections, lossy: bool
) -> None:
    """The network may lose the same bytes again and again."""
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[0], QUERIES[1])
    first, second = framed(RESPONSES[0]), framed(RESPONSES[1])
    peer.segment(RESPONSE, second, offset=len(first))
    assert run(all_, [peer]) == []
    peer.t_ns += 3 * SECOND
    if lossy:
        all_.records_lost(peer.t_ns)
    made = ended(all_.expire(peer.t_ns))
    assert [one.dns_id for one in made] == [1] * lossy
    peer.segment(RESPONSE, first, offset=0)
    assert sorted(one.dns_id for one in run(all_, [peer])) == ([] if lossy else [0, 1])


def test_records_that_were_lost_cost_their_own_messages_only(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    for number in range(10):
        peer.ask(QUERIES[number])
        peer.answer(RESPONSES[number])
    batch = peer.take()
    seq = batch["segment"]["seq"]
    size = len(framed(QUERIES[0]))
    lost_from, lost_to = 1000 + 3 * size, 1000 + 4 * size
    kept = batch[(batch["segment"]["direction"] == 1) | (seq < lost_from) | (seq >= lost_to)]
    made = ended(all_.feed(kept))
    assert [one.dns_id for one in made] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert all_.lost == Losses(unmatched_responses=1, bytes=size)
    assert {one.status for one in made} == {Status.ANSWERED}
    check_empty(all_)


def test_connection_joined_in_the_middle(all_: Connections) -> None:
    """It was there before us: no SYN, and we come in the middle of a query."""
    peer = Peer()
    peer.segment(QUERY, framed(QUERIES[0])[20:])
    peer.answer(RESPONSES[0])
    peer.ask(QUERIES[1])
    peer.answer(RESPONSES[1])
    (one,) = run(all_, [peer])
    assert one.query == QUERIES[1]
    assert all_.lost.unmatched_responses == 1
    assert all_.lost.bytes == len(framed(QUERIES[0])) - 20


# How connections end


def test_refused_connection_is_a_transaction_without_a_question(all_: Connections) -> None:
    peer = Peer()
    peer.segment(QUERY, flags=SYN)
    peer.segment(RESPONSE, flags=RST | ACK)
    peer.at((DROP, 0, CLIENT_NETNS), RESPONSE, flags=RST | ACK)
    assert run(all_, [peer]) == []
    (one,) = ended(all_.expire(peer.t_ns + SECOND))
    assert (one.status, one.query, one.dns_id) == (Status.REFUSED, b"", 0)
    assert one.problem == "the TCP connection was refused, so nothing was asked"
    assert one.places == [*WAY, *WAY_BACK]
    assert one.latency_ns is not None
    assert len(all_.expire(peer.t_ns + 10 * SECOND)) == 0
    check_empty(all_)


def test_connection_refused_by_icmp(all_: Connections) -> None:
    peer = Peer()
    peer.segment(QUERY, flags=SYN, hops=slice(0, 3))
    peer.at((EGRESS, 5, NODE_NETNS), QUERY, unreachable=1, flags=0)
    run(all_, [peer])
    (one,) = ended(all_.expire(peer.t_ns + SECOND))
    assert (one.status, one.places[-1]) == (Status.REFUSED, (EGRESS, 5, NODE_NETNS))


def test_connection_never_opened_is_told_once_with_its_drop(all_: Connections) -> None:
    peer = Peer()
    for _ in range(4):
        peer.segment(QUERY, flags=SYN, hops=slice(0, 3))
        peer.at((DROP, 5, NODE_NETNS), QUERY, flags=SYN, drop_reason=8, drop_location=0x42)
        peer.t_ns += SECOND
    run(all_, [peer])
    assert all_.waiting() == 1
    (one,) = ended(all_.expire(SECOND + TIMEOUT_NS + SECOND))
    assert (one.status, one.places) == (Status.TIMEOUT, [*WAY[:3], (DROP, 5, NODE_NETNS)])
    assert one.slot["drop_location"] == 0x42
    assert one.problem == "the TCP connection was never opened, so nothing was asked"
    assert one.slot["start_ns"] == SECOND
    assert all_.waiting() == 0
    for later_s in (7, 15, 31, 63):  # it goes on trying, which is not told again
        peer.t_ns = later_s * SECOND
        assert len(all_.expire(peer.t_ns)) == 0
        assert all_.over == []
        peer.segment(QUERY, flags=SYN, hops=slice(0, 3))
        run(all_, [peer])
    assert len(all_.flush()) == 0
    check_empty(all_)


def test_connection_that_still_waits_at_the_end_is_told(all_: Connections) -> None:
    peer = Peer()
    peer.segment(QUERY, flags=SYN)
    run(all_, [peer])
    assert all_.waiting() == 1
    (one,) = ended(all_.flush())
    assert one.status == Status.TIMEOUT
    assert all_.waiting() == 0


def test_connection_that_is_opened_and_closed_is_nothing(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.segment(QUERY, flags=FIN | ACK)
    peer.segment(RESPONSE, flags=FIN | ACK)
    assert run(all_, [peer]) == []
    check_empty(all_)
    assert all_.lost == Losses()


def test_reset_in_the_middle_of_an_answer_ends_the_query(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(BIG)
    peer.segment(RESPONSE, framed(BIG_RESPONSE)[:3000])
    peer.segment(RESPONSE, flags=RST | ACK)
    assert run(all_, [peer]) == []
    (one,) = ended(all_.expire(peer.t_ns + SECOND))
    assert (one.status, one.problem) == (
        Status.TIMEOUT, "the TCP connection ended before the answer",
    )  # fmt: skip
    check_empty(all_)
    assert all_.lost.bytes == 3000


def test_client_that_closes_its_half_still_gets_its_answer(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[0])
    peer.segment(QUERY, flags=FIN | ACK)
    assert run(all_, [peer]) == []
    peer.t_ns += 3 * SECOND
    assert len(all_.expire(peer.t_ns)) == 0
    peer.answer(RESPONSES[0])
    (one,) = run(all_, [peer])
    assert one.status == Status.ANSWERED
    check_empty(all_)


def test_server_that_closes_ends_its_queries_unless_bytes_are_missing(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(*QUERIES[:2])
    data = framed(RESPONSES[0])
    peer.segment(RESPONSE, data, offset=0, hops=slice(0, 3))  # lost behind
    peer.segment(RESPONSE, flags=FIN | ACK, offset=len(data))
    assert run(all_, [peer]) == []
    assert len(all_.expire(peer.t_ns + 300_000_000)) == 0
    assert len(all_.expire(peer.t_ns + 600_000_000)) == 0
    peer.t_ns += 700_000_000
    peer.segment(RESPONSE, data, offset=0)
    assert [one.dns_id for one in run(all_, [peer])] == [0]
    assert len(all_.expire(peer.t_ns)) == 0
    (one,) = ended(all_.expire(peer.t_ns + 300_000_000))
    assert (one.dns_id, one.status) == (1, Status.TIMEOUT)


def test_connection_that_ends_is_forgotten_with_all_its_flows(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[0])
    peer.answer(RESPONSES[0])
    peer.segment(QUERY, flags=FIN | ACK)
    run(all_, [peer])
    all_.expire(peer.t_ns + 100)
    assert all_.over == []
    all_.expire(peer.t_ns + 3 * SECOND)
    (over,) = all_.over
    assert over[0] == 1
    assert {flow[1][-1] for flow in over[1]} == {2, 3}


def test_connection_that_does_nothing_is_forgotten_in_the_end(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(QUERIES[0])
    peer.answer(RESPONSES[0])
    run(all_, [peer])
    all_.expire(peer.t_ns + module.IDLE_NS - SECOND)
    assert all_.over == []
    all_.expire(peer.t_ns + module.IDLE_NS + SECOND)
    assert [number for number, _ in all_.over] == [1]


def test_same_port_for_two_servers_at_once(all_: Connections) -> None:
    peers = [Peer(number=n, port=40000, t_ns=SECOND + n) for n in (1, 2)]
    for peer in peers:
        peer.open()
        peer.ask(QUERIES[peer.number])
        peer.answer(RESPONSES[peer.number])
    assert sorted(one.dns_id for one in run(all_, peers)) == [1, 2]


# What others do to us


def test_queries_beyond_the_table_are_counted_and_the_others_stay(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPEN_MAX", 10)
    peer = Peer()
    peer.open()
    peer.ask(*QUERIES[:15])
    run(all_, [peer])
    assert (all_.waiting(), all_.lost.cut_short) == (10, 5)
    peer.answer(*RESPONSES[:15])
    assert [one.dns_id for one in run(all_, [peer])] == list(range(10))
    assert all_.lost.unmatched_responses == 5
    peer.ask(QUERIES[20])
    peer.answer(RESPONSES[20])
    assert [one.dns_id for one in run(all_, [peer])] == [20]


def test_queries_of_all_connections_are_bounded(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALL_OPEN_MAX", 30)
    for number in range(4):
        peer = Peer(number=number + 1)
        peer.open()
        peer.ask(*QUERIES[:10])
        run(all_, [peer])
    assert (all_.waiting(), all_.lost.cut_short) == (30, 10)
    all_.expire(LONG_AFTER_NS)
    assert all_._waiting == 0


def test_connections_beyond_the_table_push_out_the_oldest(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 4)
    made = []
    for number in range(10):
        peer = Peer(number=number + 1, carrier=(SEND, SEND), t_ns=(number + 1) * SECOND)
        peer.open()
        peer.ask(QUERIES[0], QUERIES[1])
        peer.segment(RESPONSE, framed(RESPONSES[0]), hops=slice(0, 2))  # answered, not there yet
        made += run(all_, [peer])
    assert len(all_._all) == 4
    assert [(one.dns_id, one.status) for one in made] == [(0, Status.ANSWERED)] * 6
    assert all_.lost.cut_short == 6
    assert [number for number, _ in all_.over] == [1, 2, 3, 4, 5, 6]
    assert all_.waiting() == 4
    check_empty(all_)


def test_flood_of_connections_that_never_open_is_counted(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 50)
    for number in range(300):
        peer = Peer(number=number + 1)
        peer.segment(QUERY, flags=SYN, hops=slice(0, 1))
        run(all_, [peer])
    told = len(all_.expire(LONG_AFTER_NS))
    assert (told, all_.lost.cut_short) == (50, 250)


def test_bytes_held_are_bounded_over_all_connections(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says that a long message comes, and sends most of it."""
    monkeypatch.setattr(module, "HELD_MAX", 1 << 20)
    for number in range(40):
        peer = Peer(number=number + 1, t_ns=SECOND * (number + 1))
        peer.open()
        peer.segment(QUERY, b"\xff\xff" + bytes(60_000))
        run(all_, [peer])
        assert all_._held <= 1 << 20
    assert sum(c.held for c in all_._all.values()) == all_._held
    assert all_.lost.bytes > 0
    check_empty(all_)
    assert all_.lost.bytes == 40 * 60_002


def test_times_of_single_bytes_are_bounded(
    all_: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_MAX", 100_000)
    peer = Peer()
    peer.open()
    peer.segment(QUERY, b"\xff\xff")
    for _ in range(3000):
        peer.segment(QUERY, b"x")
    run(all_, [peer])
    assert all_._held <= 100_000
    check_empty(all_)


def test_hops_beyond_a_record_are_counted(all_: Connections) -> None:
    way = tuple((INGRESS, n, NODE_NETNS) for n in range(2, 15))
    back = tuple((BACK[kind], n, netns) for kind, n, netns in reversed(way))
    peer = Peer(way=((WAY[0], *way), (*back, WAY_BACK[-1])))
    peer.open()
    peer.ask(QUERIES[0])
    peer.answer(RESPONSES[0])
    (one,) = run(all_, [peer])
    assert len(one.hops) == MAX_HOPS
    assert all_.lost.hops == 28 - MAX_HOPS
    assert one.latency_ns == 27_000


def test_hooks_without_end_are_bounded(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    for n in range(1000):
        peer.at((INGRESS, n, NODE_NETNS), QUERY, b"xx", flags=ACK)
    run(all_, [peer])
    (connection,) = all_._all.values()
    assert len(connection.places) <= module.PLACES_MAX
    assert len(connection.sides[QUERY].passage._spans) <= PLACES_MAX
    assert all_.lost.hops > 0


def test_server_cgroup_and_addresses_that_are_learned_late(all_: Connections) -> None:
    """The connection was first seen at a device, where no process is known."""
    peer = Peer(way=(WAY[1:], WAY_BACK), carrier=(EGRESS, RECEIVE))
    peer.open()
    batch = peer.take()
    for name in ("client_netns", "pid", "cgroup_id"):
        batch["segment"][name] = 0
    batch["segment"]["comm"] = bytes(16)
    all_.feed(batch)
    peer.ask(QUERIES[0])
    peer.answer(RESPONSES[0])
    (one,) = run(all_, [peer])
    assert (one.slot["netns"], one.slot["pid"]) == (CLIENT_NETNS, 4242)


@pytest.mark.parametrize("hooks", ["devices", "server"])
def test_where_the_client_is_elsewhere(all_: Connections, hooks: str) -> None:
    """Bytes come from the server's socket, or from a device."""
    if hooks == "devices":
        way, back, carrier = WAY[2:4], WAY_BACK[2:4], (INGRESS, INGRESS)
    else:
        way, back, carrier = WAY[4:], WAY_BACK[:2], (RECEIVE, SEND)
    peer = Peer(way=(way, back), carrier=carrier)
    peer.open()
    for number in range(5):
        peer.ask(QUERIES[number])
        peer.answer(RESPONSES[number])
    made = run(all_, [peer])
    assert [one.dns_id for one in made] == list(range(5))
    assert all(one.places == [*way, *back] for one in made)
    assert {one.latency_ns for one in made} == {None}


def test_peek_shows_what_waits_and_changes_nothing(all_: Connections) -> None:
    peer = Peer()
    peer.open()
    peer.ask(*QUERIES[:3])
    peer.answer(RESPONSES[1])
    run(all_, [peer])
    for _ in range(2):
        assert [one.dns_id for one in ended(all_.peek())] == [0, 2]
        assert {one.status for one in ended(all_.peek())} == {Status.OPEN}
    assert all_.waiting() == 2


# Whatever happens


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[int], list[int], list[Peer]]:
    """Queries, which of them are answered, over a few connections cut anyhow, in any order."""
    asked: list[int] = []
    answered: list[int] = []
    peers = []
    for number in range(draw(st.integers(1, 3))):
        peer = Peer(
            number=number + 1,
            port=40000 + draw(st.integers(0, 1)),
            first_seq=(draw(st.integers(2**32 - 3000, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))),
            t_ns=SECOND + draw(st.integers(0, 100_000)),
        )
        peer.open()
        queries = draw(st.lists(st.integers(0, 59), max_size=12))
        answers = draw(st.permutations(sorted(set(queries))))
        answers = answers[: draw(st.integers(0, len(answers)))]
        asked += queries
        answered += answers
        for direction, data in (
            (QUERY, framed(*(QUERIES[n] for n in queries))),
            (RESPONSE, framed(*(RESPONSES[n] for n in answers))),
        ):
            cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=8)) | {0, len(data)})
            parts = [(a, b) for a, b in itertools.pairwise(cuts)]
            parts += draw(st.lists(st.sampled_from(parts or [(0, 0)]), max_size=3))
            for a, b in draw(st.permutations(parts)):
                peer.segment(direction, data[a:b], offset=a, step_ns=draw(st.integers(0, 500)))
        peers.append(peer)
    return asked, answered, peers


@given(conversations())
def test_every_query_comes_out_exactly_once(
    case: tuple[list[int], list[int], list[Peer]],
) -> None:
    asked, answered, peers = case
    all_ = new()
    made = run(all_, peers)
    late = ended(all_.expire(LONG_AFTER_NS))
    assert Tally(one.dns_id for one in made if one.status == Status.ANSWERED) == Tally(answered)
    assert Tally(one.dns_id for one in (*made, *late)) == Tally(asked)
    for one in (*made, *late):
        assert one.query == QUERIES[one.dns_id]
        times = [hop[0] for hop in one.hops]
        assert times == sorted(times)
        asked_at = [hop[2:] for hop in one.hops if hop[1] == QUERY]
        assert asked_at == list(WAY)
        if one.response:
            assert one.response == RESPONSES[one.dns_id]
            assert [hop[2:] for hop in one.hops if hop[1] == RESPONSE] == list(WAY_BACK)
            assert one.latency_ns == times[-1] - times[0]
    assert all_.lost == Losses()
    check_empty(all_)


@given(conversations(), st.randoms(use_true_random=False))
def test_with_records_lost_every_query_is_answered_or_times_out_or_is_lost_bytes(
    case: tuple[list[int], list[int], list[Peer]], random: object
) -> None:
    asked, _, peers = case
    all_ = new()
    made = []
    for peer in peers:
        batch = peer.take()
        keep = [random.random() > 0.1 for _ in batch]  # type: ignore[attr-defined]
        made += ended(all_.feed(batch[keep]))
    made += ended(all_.expire(10 * SECOND))
    made += ended(all_.expire(LONG_AFTER_NS))
    unsaid = Tally(one.dns_id for one in made if one.query)
    # What looks like a message in bytes that are left of another would be one too many.
    assert not unsaid - Tally(asked)
    for one in made:
        times = [hop[0] for hop in one.hops]
        assert times == sorted(times)
    check_empty(all_)


SEGMENT = st.fixed_dictionaries(
    {
        "connection": st.integers(1, 3),
        "kind": st.integers(1, 5),
        "direction": st.integers(0, 1),
        "tcp_flags": st.sampled_from([0, ACK, SYN, SYN | ACK, FIN, RST, 255]),
        "seq": st.integers(0, 300) | st.integers(0, 2**32 - 1),
        "len": st.integers(0, 300) | st.integers(0, 2**32 - 1),
        "captured": st.integers(0, 256),
        "unreachable": st.integers(0, 1) | st.just(0),
        "ifindex": st.integers(0, 3),
        "netns": st.integers(0, 2),
    }
)


@given(
    st.lists(
        st.tuples(
            SEGMENT,
            st.binary(max_size=256)
            | st.sampled_from([framed(m) for m in (*QUERIES[:3], *RESPONSES[:3])]),
        ),
        max_size=80,
    )
)
def test_whatever_comes_nothing_breaks_and_all_is_given_back(
    segments: list[tuple[dict[str, int], bytes]],
) -> None:
    all_ = new()
    batch = np.zeros(len(segments), SEGMENT_RECORD)
    for number, (fields, payload) in enumerate(segments):
        record = batch[number]
        record["segment"]["t_ns"] = SECOND + number
        for name, value in fields.items():
            record["segment"][name] = value
        record["payload"] = payload.ljust(256, b"\0")
    waited = 0
    for part in np.array_split(batch, 4):
        all_.feed(part)
        for one in ended(all_.peek()):
            assert one.slot["nhops"] <= MAX_HOPS
        waited = all_.waiting()
    assert sum(c.held for c in all_._all.values()) == all_._held
    assert len(all_.flush()) >= waited
    check_empty(all_)
    assert all_.lost.bytes >= 0


# When messages passed


def place(number: int = 0, kind: int = INGRESS) -> Place:
    return Place(kind, number, NODE_NETNS, 0, (bytes(16), bytes(16), 1, 53, 0))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.integers(0, 400), max_size=12),
    st.data(),
)
def test_message_passes_when_the_last_of_its_bytes_first_does(
    sizes: list[int], cuts: list[int], data: st.DataObject
) -> None:
    """Against the time of each single byte."""
    total = sum(sizes)
    bounds = sorted({0, total, *(c for c in cuts if c < total)})
    parts = [(a, b) for a, b in itertools.pairwise(bounds)]
    parts += data.draw(st.lists(st.sampled_from(parts), max_size=5))
    order = data.draw(st.permutations(parts))
    passage = Passage()
    first: dict[int, int] = {}
    known_after = data.draw(st.integers(0, len(order)))
    journeys = []

    def tell() -> Iterator[None]:
        at = 0
        for size in sizes:
            journeys.append(passage.complete(at, at + size))
            at += size
            yield

    for t_ns, (start, end) in enumerate(order, start=1):
        if t_ns - 1 == known_after:
            list(tell())
        passage.segment(place(), start, end, t_ns)
        for position in range(start, end):
            first.setdefault(position, t_ns)
    if not journeys:
        list(tell())
    for journey in journeys:
        expected = max(first[p] for p in range(journey.start, journey.end))
        assert journey.passed == {place(): expected}
        passage.remove(journey)
    assert passage.spans == 0
    assert passage._journeys == []


def test_times_at_one_hook_are_bounded() -> None:
    passage = Passage()
    for at in range(5000):
        passage.segment(place(), at, at + 1, at)
        assert passage.spans <= SPANS_MAX
    assert passage.lost > 0


def test_message_that_is_dropped_in_part_has_the_drop_as_a_hop() -> None:
    passage = Passage()
    passage.segment(place(kind=DROP), 100, 200, 7)
    journey = passage.complete(0, 1000)
    assert journey.passed == {place(kind=DROP): 7}
    assert passage.spans == 0
    later = passage.complete(1000, 2000)
    passage.segment(place(kind=DROP), 1500, 1600, 9)
    assert later.passed == {place(kind=DROP): 9}


def test_segment_over_two_messages_is_a_hop_of_both() -> None:
    passage = Passage()
    first, second = passage.complete(0, 10), passage.complete(10, 20)
    assert passage.segment(place(), 0, 15, 1) == [first]
    assert passage.segment(place(), 15, 20, 2) == [second]
    assert (first.passed, second.passed) == ({place(): 1}, {place(): 2})
    assert passage.spans == 0
