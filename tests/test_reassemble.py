# SPDX-License-Identifier: Apache-2.0
"""However a stream is cut, and in whatever order it comes, the messages in it come out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import wire_query, wire_response
from tracer.reassemble import AHEAD_MAX, FAR, PIECE_COST, STRAYS_MAX, Message, Stream

pytestmark = pytest.mark.fuzz

SEQ_SPAN = 1 << 32
QUERIES = [wire_query(f"host{n}.example.com", dns_id=n) for n in range(50)]
RESPONSE = wire_response(QUERIES[0], "NOERROR", "192.0.2.1")
LONGEST = QUERIES[0] + bytes(65535 - len(QUERIES[0]))

MESSAGES = st.lists(st.binary(max_size=700) | st.sampled_from(QUERIES), max_size=12)
SEQ = st.integers(0, SEQ_SPAN - 1) | st.integers(SEQ_SPAN - 2000, SEQ_SPAN - 1)


def framed(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(2) + message for message in messages)


def joined(first_seq: int = 1000, *, is_response: bool = False) -> Stream:
    """A stream whose beginning was seen."""
    stream = Stream(is_response=is_response)
    stream.begin(stream.position(first_seq))
    return stream


def feed(stream: Stream, seq: int, data: bytes, length: int | None = None) -> list[bytes]:
    position = stream.position(seq % SEQ_SPAN)
    found = stream.feed(position, data, len(data) if length is None else length)
    return [message.data for message in found]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[bytes], int, list[tuple[int, bytes]]]:
    """Messages, where their stream begins, and pieces of it: all bytes, in any order and overlap."""
    messages = draw(MESSAGES)
    data = framed(*messages)
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=20)) | {0, len(data)})
    parts = [(a, data[a:b]) for a, b in itertools.pairwise(cuts)]
    place = st.integers(0, len(data))
    for a, b in draw(st.lists(st.tuples(place, place), max_size=8)):
        parts.append((min(a, b), data[min(a, b) : max(a, b)]))
    return messages, draw(SEQ), draw(st.permutations(parts))


@given(pieces())
def test_any_cut_order_and_overlap_gives_exactly_the_messages(
    case: tuple[list[bytes], int, list[tuple[int, bytes]]],
) -> None:
    messages, seq, parts = case
    stream = joined(seq)
    found = [m for at, data in parts for m in feed(stream, seq + at, data)]
    assert found == messages
    assert (stream.held, stream.lost, stream.is_waiting()) == (0, 0, False)


@given(pieces())
def test_positions_of_messages_are_those_of_their_bytes(
    case: tuple[list[bytes], int, list[tuple[int, bytes]]],
) -> None:
    messages, seq, parts = case
    stream = joined(seq)
    begin = stream.position(seq)
    found = [
        m for at, data in parts for m in stream.feed(stream.position((seq + at) % SEQ_SPAN), data, len(data))
    ]  # fmt: skip
    at = begin
    for message, data in zip(found, messages, strict=True):
        assert message == Message(at, at + 2 + len(data), data)
        at = message.end


@given(st.lists(st.tuples(st.integers(0, SEQ_SPAN - 1), st.binary(max_size=300)), max_size=60))
def test_random_bytes_at_random_places_end_in_the_books(parts: list[tuple[int, bytes]]) -> None:
    stream = joined()
    for seq, data in parts:
        feed(stream, seq, data)
        assert stream.held <= AHEAD_MAX + 65537 + PIECE_COST + 300
    stream.forget()
    assert stream.held == 0
    assert stream.lost >= 0


@given(st.data())
def test_missing_piece_costs_only_what_it_touches(data: st.DataObject) -> None:
    """One segment never comes: once given up, each message that begins a later one comes out."""
    missing = data.draw(st.integers(0, len(QUERIES) - 2))
    stream = joined()
    seq = 1000
    found: list[bytes] = []
    for number, query in enumerate(QUERIES):
        if number != missing:
            found += feed(stream, seq, framed(query))
        seq += len(query) + 2
    assert found == QUERIES[:missing]
    assert stream.is_waiting()
    found += [m.data for m in stream.skip()]
    assert found == QUERIES[:missing] + QUERIES[missing + 1 :]
    assert stream.lost == len(QUERIES[missing]) + 2
    assert not stream.is_waiting()


def test_length_alone_then_the_rest() -> None:
    stream = joined()
    assert feed(stream, 1000, framed(QUERIES[0])[:2]) == []
    assert feed(stream, 1002, QUERIES[0]) == [QUERIES[0]]


def test_byte_by_byte_backwards() -> None:
    stream = joined()
    data = framed(*QUERIES[:3])
    found = []
    for at in reversed(range(len(data))):
        found += feed(stream, 1000 + at, data[at : at + 1])
    assert found == QUERIES[:3]


def test_50_messages_in_one_segment() -> None:
    assert feed(joined(), 1000, framed(*QUERIES)) == QUERIES


def test_empty_message_and_the_longest() -> None:
    assert feed(joined(), 1000, framed(b"", LONGEST, b"")) == [b"", LONGEST, b""]


def test_messages_go_on_where_sequence_numbers_wrap() -> None:
    for before in range(60):
        stream = joined(SEQ_SPAN - before)
        seq, found = SEQ_SPAN - before, []
        for query in QUERIES[:4]:
            found += feed(stream, seq, framed(query))
            seq += len(query) + 2
        assert found == QUERIES[:4]


def test_stream_of_more_bytes_than_there_are_sequence_numbers() -> None:
    stream = joined(0)
    whole = framed(LONGEST)
    seq = 0
    for _ in range(SEQ_SPAN // len(whole) // 16 + 2):  # a hole each time, as large as may be
        assert feed(stream, seq, whole) == [LONGEST]
        seq += len(whole)
        jump = 15 * len(whole)
        assert feed(stream, seq + jump, whole) == []
        assert [m.data for m in stream.skip()] == [LONGEST]
        seq += jump + len(whole)
    assert seq > SEQ_SPAN
    assert feed(stream, seq, whole) == [LONGEST]


def test_stream_joined_in_the_middle_begins_with_a_message() -> None:
    stream = Stream(is_response=False)
    tail = framed(QUERIES[0])[9:]
    assert feed(stream, 77, tail) == []
    assert stream.lost == len(tail)
    assert feed(stream, 77 + len(tail), framed(QUERIES[1])) == [QUERIES[1]]
    assert stream.lost == len(tail)


def test_stream_joined_in_the_middle_of_a_client_that_sends_the_length_alone() -> None:
    stream = Stream(is_response=False)
    assert feed(stream, 77, QUERIES[0]) == []
    seq = 77 + len(QUERIES[0])
    assert feed(stream, seq, framed(QUERIES[1])[:2]) == []
    assert feed(stream, seq + 2, QUERIES[1]) == [QUERIES[1]]
    assert stream.lost == len(QUERIES[0])


def test_message_of_the_other_direction_is_no_beginning() -> None:
    stream = Stream(is_response=True)
    assert feed(stream, 1, framed(QUERIES[0])) == []
    assert feed(stream, 1 + len(QUERIES[0]) + 2, framed(RESPONSE)) == [RESPONSE]


def test_length_that_lies_swallows_what_follows_and_no_more() -> None:
    stream = joined()
    lie = b"\x01\x00" + QUERIES[0]
    assert feed(stream, 1000, lie) == []
    rest = framed(*QUERIES[1:])
    found = feed(stream, 1000 + len(lie), rest)
    swallowed = lie[2:] + rest[: 256 - len(QUERIES[0])]
    assert found[0] == swallowed
    assert stream.held < 65537


def test_bytes_beyond_the_segment_are_not_its_own() -> None:
    stream = joined()
    data = framed(QUERIES[0])
    assert feed(stream, 1000, data[:2] + bytes(4), 2) == []
    assert feed(stream, 1002, data[2:]) == [QUERIES[0]]


def test_bytes_that_were_not_captured_are_a_gap() -> None:
    stream = joined()
    first, second = framed(QUERIES[0]), framed(QUERIES[1])
    assert feed(stream, 1000, first[:10], len(first)) == []
    assert feed(stream, 1000 + len(first), second) == []
    assert [m.data for m in stream.skip()] == [QUERIES[1]]
    assert stream.lost == len(first)


def test_gap_is_given_up_when_too_much_came_behind_it() -> None:
    stream = joined()
    feed(stream, 1000, b"\xff")
    seq, sent = 1100, 0
    found: list[bytes] = []
    while not found:
        found = feed(stream, seq, framed(QUERIES[sent % 50]))
        seq += len(QUERIES[sent % 50]) + 2
        sent += 1
        assert stream.held <= AHEAD_MAX + 1000
    assert found == [QUERIES[n % 50] for n in range(sent)]
    assert stream.lost == 100


def test_pieces_of_one_byte_are_held_for_what_they_cost() -> None:
    stream = joined()
    for at in range(20_000):
        feed(stream, 2000 + 2 * at, b"x")
    assert len(stream._ahead) <= AHEAD_MAX // PIECE_COST


def test_gap_with_no_message_behind_it_is_lost_and_counted() -> None:
    stream = joined()
    feed(stream, 1100, b"x" * 50)
    feed(stream, 1200, b"x" * 50)
    assert stream.skip() == []
    assert stream.lost == 250
    assert stream.wanted is None
    assert feed(stream, 1250, framed(QUERIES[0])) == [QUERIES[0]]
    assert stream.lost == 250


def test_stray_segments_do_not_move_the_stream() -> None:
    stream = joined()
    for n in range(STRAYS_MAX):
        assert feed(stream, 1000 + (n % 2 + 1) * (SEQ_SPAN // 3), framed(QUERIES[1])) == []
    assert feed(stream, 1000, framed(QUERIES[0])) == [QUERIES[0]]
    assert stream.lost == STRAYS_MAX * (len(QUERIES[1]) + 2)


def test_stream_of_which_very_much_was_lost_goes_on() -> None:
    stream = joined()
    assert feed(stream, 1000, framed(QUERIES[0])) == [QUERIES[0]]
    seq = 1000 + 2 * FAR
    found = []
    for query in QUERIES:
        found += feed(stream, seq, framed(query))
        seq += len(query) + 2
    assert found == QUERIES[STRAYS_MAX + 1 :]


@pytest.mark.parametrize("cut", range(1, 14))
def test_too_little_to_tell_is_no_beginning(cut: int) -> None:
    stream = Stream(is_response=False)
    assert feed(stream, 1, framed(QUERIES[0])[:cut]) == []
    assert stream.wanted is None
