# SPDX-License-Identifier: Apache-2.0
"""What the programs make of each TCP segment, at every hook; every one is let pass unchanged."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import packets as p
from tests.packets import ACK, FIN, FLOW, FLOW6, PSH, RST, SYN, Flow, dns_query, ethernet
from tests.programs import (
    CONNECTIONS,
    DEVICE_HOOKS,
    EGRESS,
    HOOKS,
    INGRESS,
    LOOPBACK,
    NODE,
    RECEIVE,
    SEGMENT_RECORDS,
    SEND,
    Programs,
    compiled_programs,
    loaded_programs,
)
from tests.test_packets import CARRIED, INNER, OUTER
from tracer.assemble import comm_text, ip_text
from tracer.connections import Connections
from tracer.kernel.bpf import BpfError
from tracer.kernel.session import Selection
from tracer.record import SEGMENT_BYTES, Counter, HopKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

QUERY, RESPONSE = 0, 1
MESSAGE = len(dns_query()).to_bytes(2) + dns_query()
SECOND = 1_000_000_000
OPTIONS = {
    "none": b"",
    "timestamps": b"\1\1\x08\x0a" + bytes(8),
    "40 bytes": b"\1" * 40,
}


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: None) -> Iterator[None]:
    del root
    with compiled_programs():
        yield


@pytest.fixture
def kernel() -> Iterator[Programs]:
    with loaded_programs() as kernel:
        yield kernel


def segment(
    payload: bytes = b"", flow: Flow = FLOW, *, back: bool = False, inner: str = "", **how: object
) -> bytes:
    """From the client to the server, or back; from the IP header on."""
    source, destination = (flow.client, flow.client_port), (flow.server, flow.server_port)
    if back:
        source, destination = destination, source
    inside = p.tcp(payload, source[1], destination[1], **how)  # type: ignore[arg-type]
    if not inner:
        return p.ip(inside, source[0], destination[0], p.TCP)
    return INNER[inner][1](inside, source[0], destination[0], p.TCP)


def show(kernel: Programs, hook: HopKind, packet: bytes) -> NDArray[np.void]:
    """Shows a packet; what came out, without payload."""
    kernel.show(hook, packet)
    found: NDArray[np.void] = kernel.segments()["segment"]
    return found


def one(batch: NDArray[np.void]) -> np.void:
    (record,) = batch
    found: np.void = record
    return found


def addresses(flow: np.void) -> tuple[str, str, int, int]:
    return (
        ip_text(flow["client_addr"].tobytes()),
        ip_text(flow["server_addr"].tobytes()),
        int(flow["client_port"]),
        int(flow["server_port"]),
    )


def bytes_of(batch: NDArray[np.void]) -> bytes:
    """What the records carry, put together by sequence number."""
    parts = sorted(
        (int(r["segment"]["seq"]), r["payload"].tobytes()[: int(r["segment"]["captured"])])
        for r in batch
    )
    for (seq, part), (following, _) in itertools.pairwise(parts):
        assert seq + len(part) == following
    return b"".join(part for _, part in parts)


def open_connection(kernel: Programs, flow: Flow = FLOW, seq: int = 99) -> int:
    """Its SYN at the client's socket; returns its number."""
    return int(one(show(kernel, SEND, segment(flow=flow, flags=SYN, seq=seq)))["connection"])


# One connection


def test_connection_at_sockets_has_its_bytes_from_the_clients(kernel: Programs) -> None:
    syn = one(show(kernel, SEND, segment(flags=SYN, seq=99)))
    assert (syn["seq"], syn["len"], syn["captured"], syn["kind"]) == (100, 0, 0, SEND)
    assert (syn["direction"], syn["tcp_flags"], syn["family"]) == (QUERY, SYN, 4)
    assert (syn["pid"], comm_text(syn["comm"].tobytes())) == (os.getpid(), _comm())
    assert addresses(syn["asked"]) == addresses(syn["flow"]) == FLOW
    answer = one(show(kernel, RECEIVE, segment(back=True, flags=SYN | ACK, seq=499)))
    assert (answer["connection"], answer["seq"]) == (syn["connection"], 500)
    assert (answer["direction"], answer["kind"]) == (RESPONSE, RECEIVE)
    kernel.show(SEND, segment(MESSAGE, seq=100))
    records = kernel.segments()
    assert bytes_of(records) == MESSAGE
    assert one(records["segment"])["pid"] == os.getpid()
    # What passes the other hooks tells when, not what.
    for hook in DEVICE_HOOKS:
        found = one(show(kernel, hook, segment(MESSAGE, seq=100)))
        assert (found["len"], found["captured"], found["netns"]) == (len(MESSAGE), 0, NODE)
        assert (found["connection"], found["ifindex"]) == (syn["connection"], LOOPBACK)
    kernel.show(RECEIVE, segment(MESSAGE, seq=100))
    assert bytes_of(kernel.segments()) == b""
    kernel.show(RECEIVE, segment(MESSAGE, seq=500, back=True))
    assert bytes_of(kernel.segments()) == MESSAGE
    assert kernel.counted() == {}


def _comm() -> str:
    with open("/proc/self/comm", encoding="utf-8") as comm:
        return comm.read().strip()


@pytest.mark.parametrize(("inner", "outer"), CARRIED)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_segments_at_a_device_are_read_through_everything(
    kernel: Programs, inner: str, outer: str, options: bytes
) -> None:
    flow = INNER[inner][0]
    for back, seq in ((False, 100), (True, 500)):
        packet = segment(MESSAGE, flow, inner=inner, seq=seq, options=options, back=back)
        kernel.run(EGRESS, OUTER[outer](packet))
        records = kernel.segments()
        assert bytes_of(records) == MESSAGE
        found = one(records["segment"])
        assert (found["direction"], found["seq"], found["len"]) == (back, seq, len(MESSAGE))
        assert addresses(found["flow"]) == flow
        assert found["family"] == flow.version


@pytest.mark.parametrize("inner", INNER)
def test_segments_at_sockets_are_read_through_everything(kernel: Programs, inner: str) -> None:
    flow = INNER[inner][0]
    kernel.show(SEND, segment(MESSAGE, flow, inner=inner, seq=100))
    assert bytes_of(kernel.segments()) == MESSAGE


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 513, 1448, 3000])
def test_long_segment_comes_in_pieces_of_256_bytes(kernel: Programs, size: int) -> None:
    data = (bytes(range(251)) * 12)[:size]
    kernel.show(SEND, segment(data, seq=2**32 - 300))
    records = kernel.segments()
    segments = records["segment"]
    assert segments["len"].sum() == size
    assert (segments["len"] == segments["captured"]).all()
    assert len(records) == -(-size // SEGMENT_BYTES)
    assert [int(seq) for seq in segments["seq"]] == [
        (2**32 - 300 + at) % 2**32 for at in range(0, size, SEGMENT_BYTES)
    ]
    whole = b"".join(r["payload"].tobytes()[: int(r["segment"]["captured"])] for r in records)
    assert whole == data
    found = one(show(kernel, INGRESS, segment(data, seq=2**32 - 300)))
    assert (found["len"], found["captured"]) == (size, 0)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("padding", [1, 6, 46, 300])
def test_what_comes_behind_the_packet_is_not_its_own(
    kernel: Programs, hook: HopKind, padding: int
) -> None:
    """Ethernet frames have at least 60 bytes, so the shortest segments are padded."""
    kernel.show(hook, segment(MESSAGE[:2]) + b"\xff" * padding)
    records = kernel.segments()
    assert bytes_of(records) == MESSAGE[:2]
    assert one(records["segment"])["len"] == 2


def test_bytes_come_from_the_best_place_that_has_them(kernel: Programs) -> None:
    """A client elsewhere: from the device until the server's socket has been seen, then from it."""
    kernel.show(INGRESS, segment(MESSAGE, seq=100))
    assert bytes_of(kernel.segments()) == MESSAGE
    kernel.show(RECEIVE, segment(MESSAGE, seq=100))
    assert bytes_of(kernel.segments()) == MESSAGE
    kernel.show(INGRESS, segment(MESSAGE, seq=200))
    assert bytes_of(kernel.segments()) == b""
    kernel.show(SEND, segment(MESSAGE, seq=500, back=True))
    assert bytes_of(kernel.segments()) == MESSAGE
    kernel.show(EGRESS, segment(MESSAGE, seq=500, back=True))
    assert bytes_of(kernel.segments()) == b""


def test_acknowledgements_alone_leave_no_record(kernel: Programs) -> None:
    open_connection(kernel)
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(flags=ACK, seq=100))) == 0
        assert len(show(kernel, hook, segment(flags=ACK, seq=500, back=True))) == 0


def test_end_is_told_once_and_where_the_bytes_come_from(kernel: Programs) -> None:
    open_connection(kernel)
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(flags=FIN | ACK, seq=100))) == (hook == SEND)
        back = segment(flags=FIN | ACK, seq=500, back=True)
        assert len(show(kernel, hook, back)) == (hook == RECEIVE)
        for flags in (RST, RST | ACK):
            found = one(show(kernel, hook, segment(flags=flags, seq=500, back=True)))
            assert found["tcp_flags"] == flags
    found = one(show(kernel, EGRESS, segment(MESSAGE, flags=FIN | PSH | ACK, seq=100)))
    assert found["tcp_flags"] == FIN | PSH | ACK


# What is no connection of ours


@pytest.mark.parametrize("hook", HOOKS)
def test_other_ports_leave_nothing(kernel: Programs, hook: HopKind) -> None:
    for flow in (FLOW._replace(server_port=80), FLOW6._replace(server_port=443)):
        for flags in (SYN, ACK, FIN, RST):
            assert len(show(kernel, hook, segment(MESSAGE, flow, flags=flags))) == 0
    assert kernel.connections() == (set(), {})


def test_ports_that_are_configured_are_dns(kernel: Programs) -> None:
    kernel.session.select(Selection(ports=(5353,)))
    assert len(show(kernel, SEND, segment(MESSAGE))) == 0
    assert len(show(kernel, SEND, segment(MESSAGE, FLOW._replace(server_port=5353)))) == 1


def test_answer_of_which_no_query_was_seen_begins_nothing(kernel: Programs) -> None:
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(MESSAGE, back=True))) == 0
    assert kernel.connections() == (set(), {})


@pytest.mark.parametrize("hook", HOOKS)
def test_header_that_lies_about_its_length(kernel: Programs, hook: HopKind) -> None:
    for words in range(5):
        assert len(show(kernel, hook, segment(MESSAGE, data_offset=words))) == 0
    for words in range(5, 16):
        kernel.show(hook, segment(MESSAGE, data_offset=words))
        assert bytes_of(kernel.segments()) == MESSAGE[4 * (words - 5) :]
    short = segment(b"xyz", data_offset=15)
    assert len(show(kernel, hook, short)) == 0
    assert one(show(kernel, hook, segment(b"xyz", data_offset=15, flags=SYN)))["len"] == 0


@pytest.mark.parametrize("hook", HOOKS)
def test_segment_cut_off_anywhere_has_what_is_left(kernel: Programs, hook: HopKind) -> None:
    whole = segment(MESSAGE)
    for cut in range(20, len(whole)):
        kernel.run(hook, ethernet(whole[:cut]))
        records = kernel.segments()
        assert bytes_of(records) == whole[40:cut]
        if cut <= 40:
            assert len(records) == 0


@pytest.mark.parametrize("length", [0, 1, 20, 39, 40, 41, 100, 65535])
def test_length_of_the_packet_that_lies(kernel: Programs, length: int) -> None:
    """0 is what the kernel writes where it does not fit; more than there is, is as much as there is."""
    packet = p.ipv4(
        p.tcp(MESSAGE, FLOW.client_port, 53), FLOW.client, FLOW.server, p.TCP, length=length
    )
    kernel.show(EGRESS, packet)
    records = kernel.segments()
    if length > 40:
        assert bytes_of(records) == MESSAGE[: length - 40]
    elif length <= 20:
        assert bytes_of(records) == MESSAGE
    else:
        assert len(records) == 0


def test_later_fragment_leaves_nothing(kernel: Programs) -> None:
    inside = p.tcp(MESSAGE, FLOW.client_port, 53)
    kernel.show(EGRESS, p.ipv4(inside, FLOW.client, FLOW.server, p.TCP, fragment=100))
    assert len(kernel.segments()) == 0


# Errors about it


@pytest.mark.parametrize("flow", [FLOW, FLOW6], ids=["IPv4", "IPv6"])
def test_unreachable_is_told_of_the_connection_that_it_is_about(
    kernel: Programs, flow: Flow
) -> None:
    number = open_connection(kernel, flow)
    syn = segment(flow=flow, flags=SYN, seq=99)
    head = 40 if flow.version == 6 else 20
    for quoted in (len(syn), head + 8):
        found = one(show(kernel, EGRESS, p.unreachable(syn, flow, quoted)))
        assert (found["unreachable"], found["connection"]) == (1, number)
        assert (found["direction"], found["len"], found["tcp_flags"]) == (QUERY, 0, 0)
        assert addresses(found["flow"]) == flow
    for hook in (SEND, RECEIVE):
        assert len(show(kernel, hook, p.unreachable(syn, flow))) == 0


def test_unreachable_about_nothing_of_ours_leaves_nothing(kernel: Programs) -> None:
    open_connection(kernel)
    other = FLOW._replace(client_port=1)
    answer = segment(flags=SYN | ACK, back=True)
    kernel.session.select(Selection(pid=1))
    for packet in (p.unreachable(segment(flow=other, flags=SYN), other), p.unreachable(answer)):
        for hook in HOOKS:
            assert len(show(kernel, hook, packet)) == 0
    assert len(kernel.connections()[0]) == 1


# Whose it is


def test_connection_of_another_process_leaves_nothing_and_is_counted_once(
    kernel: Programs,
) -> None:
    kernel.session.select(Selection(pid=os.getpid() + 1))
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(flags=SYN, seq=99))) == 0
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(MESSAGE, seq=100))) == 0
        assert len(show(kernel, hook, segment(MESSAGE, seq=500, back=True))) == 0
        assert len(show(kernel, hook, segment(flags=FIN | ACK, seq=120))) == 0
    assert kernel.counted() == {Counter.FILTERED: 1}
    assert kernel.connections() == (set(), {})
    kernel.session.select(Selection(pid=os.getpid()))
    assert len(show(kernel, SEND, segment(flags=SYN, seq=99))) == 1


def test_connection_of_another_pod_leaves_nothing(kernel: Programs) -> None:
    here = os.stat("/proc/self/ns/net").st_ino
    kernel.session.select(Selection(pods=True, netns={here: False}))
    assert len(show(kernel, SEND, segment(flags=SYN, seq=99))) == 0
    assert kernel.counted() == {Counter.FILTERED: 1}
    kernel.session.select(Selection(pods=True, netns={here: True}))
    assert len(show(kernel, SEND, segment(MESSAGE, seq=100))) == 1
    # It was found, so it needs no more judging.
    kernel.session.select(Selection(pods=True, netns={here: False}))
    assert len(show(kernel, EGRESS, segment(MESSAGE, seq=100))) == 1


def test_connection_that_begins_at_a_device_is_kept_if_all_are_wanted(kernel: Programs) -> None:
    kernel.session.select(Selection(pods=True))
    assert len(show(kernel, INGRESS, segment(flags=SYN))) == 0
    kernel.session.select(Selection(pods=True, server_side=True))
    assert len(show(kernel, INGRESS, segment(flags=SYN))) == 1


def test_nothing_begins_during_a_pause_and_what_is_there_goes_on(kernel: Programs) -> None:
    open_connection(kernel)
    kernel.session.pause()
    other = FLOW._replace(client_port=1)
    for hook in HOOKS:
        assert len(show(kernel, hook, segment(flow=other, flags=SYN))) == 0
        assert len(show(kernel, hook, segment(MESSAGE, seq=100))) == 1
    assert kernel.counted() == {}


def test_process_is_told_by_its_syn_only(kernel: Programs) -> None:
    """What comes later may leave in anybody's context: the cgroup is the socket's then."""
    found = one(show(kernel, SEND, segment(MESSAGE, seq=100)))
    assert (found["pid"], comm_text(found["comm"].tobytes())) == (0, "")


# What has the same addresses


def test_port_used_again_is_another_connection(kernel: Programs) -> None:
    first = open_connection(kernel, seq=99)
    assert open_connection(kernel, seq=99) == first  # sent once more
    second = open_connection(kernel, seq=7_000_000)
    assert second != first
    found = one(show(kernel, EGRESS, segment(MESSAGE, seq=7_000_001)))
    assert found["connection"] == second


def test_port_used_for_two_servers_at_once(kernel: Programs) -> None:
    flows = [FLOW, FLOW._replace(server="10.96.0.11")]
    numbers = [
        open_connection(kernel, flow, seq) for flow, seq in zip(flows, (99, 777), strict=True)
    ]
    assert numbers[0] != numbers[1]
    for hook in HOOKS:
        for flow, number, seq in zip(flows, numbers, (100, 778), strict=True):
            assert one(show(kernel, hook, segment(MESSAGE, flow, seq=seq)))["connection"] == number


def test_connection_is_known_by_its_client_where_nat_changed_its_server(kernel: Programs) -> None:
    """No conntrack entry tells, so the client's last connection is it, if the bytes fit."""
    number = open_connection(kernel)
    other = FLOW._replace(server="10.244.0.3", server_port=53)
    syn = one(show(kernel, EGRESS, segment(flow=other, flags=SYN, seq=99)))
    assert (syn["connection"], addresses(syn["asked"]), addresses(syn["flow"])) == (
        number, FLOW, other,
    )  # fmt: skip
    found = one(show(kernel, INGRESS, segment(MESSAGE, other, back=True, seq=500)))
    assert found["connection"] == number
    third = FLOW._replace(server="10.244.0.4")
    assert one(show(kernel, EGRESS, segment(MESSAGE, third, seq=100)))["connection"] == number
    far = FLOW._replace(server="10.244.0.5")
    for seq in (100 + (1 << 24), 2**31):
        assert one(show(kernel, EGRESS, segment(MESSAGE, far, seq=seq)))["connection"] != number
        kernel.forget_connections()
        number = open_connection(kernel)
    begun = FLOW._replace(server="10.244.0.6")
    assert one(show(kernel, EGRESS, segment(flow=begun, flags=SYN, seq=98)))["connection"] != number


# When there is no room


def test_table_full_is_counted_and_takes_others_once_there_is_room(kernel: Programs) -> None:
    for number in range(CONNECTIONS + 3):
        show(kernel, SEND, segment(flow=FLOW._replace(client_port=1000 + number), flags=SYN))
    assert kernel.counted() == {Counter.CONNECTIONS_FULL: 3}
    numbers, ids = kernel.connections()
    assert len(numbers) == CONNECTIONS
    assert set(ids.values()) == numbers
    kernel.forget_connections()
    open_connection(kernel)


def test_connection_without_room_for_its_addresses_leaves_nothing(kernel: Programs) -> None:
    """Four sets of addresses for each, as a rule: here, the first has them all."""
    open_connection(kernel)
    for number in range(CONNECTIONS * 5):
        other = FLOW._replace(server=f"10.1.0.{number + 1}")
        show(kernel, EGRESS, segment(MESSAGE, other, seq=100))
    assert len(kernel.connections()[1]) >= CONNECTIONS * 4
    other = FLOW._replace(client="10.9.9.9")
    assert len(show(kernel, SEND, segment(flow=other, flags=SYN))) == 0
    assert kernel.counted()[Counter.CONNECTIONS_FULL] == 1
    assert len(kernel.connections()[0]) == 1


def test_full_ring_is_counted_and_flows_again_once_read(kernel: Programs) -> None:
    open_connection(kernel)
    data = bytes(1000)
    for number in range(SEGMENT_RECORDS // 4 + 3):
        kernel.show(SEND, segment(data, seq=100 + 1000 * number))
    found = kernel.segments()["segment"]
    assert len(found) == SEGMENT_RECORDS
    lost = kernel.counted()[Counter.SEGMENTS_LOST]
    assert lost > 0
    kernel.show(SEND, segment(MESSAGE, seq=100))
    assert bytes_of(kernel.segments()) == MESSAGE
    assert kernel.counted() == {Counter.SEGMENTS_LOST: lost}


# All the way


def test_nothing_is_left_of_connections_that_are_over(kernel: Programs) -> None:
    """With NAT, a port used again, one that never ended, and all of it twice."""
    connections = Connections(5 * SECOND)
    for seq in (99, 5_000_000):
        for port in range(3):
            flow = FLOW._replace(client_port=2000 + port)
            behind = flow._replace(server="10.244.0.3")
            for hook, seen in ((SEND, flow), (EGRESS, flow), (INGRESS, behind), (RECEIVE, behind)):
                kernel.show(hook, segment(flow=seen, flags=SYN, seq=seq))
            for hook, seen in ((SEND, flow), (EGRESS, behind)):
                kernel.show(hook, segment(MESSAGE, seen, seq=seq + 1))
                if port:
                    kernel.show(hook, segment(flow=seen, flags=FIN, seq=seq + 1 + len(MESSAGE)))
    connections.feed(kernel.segments())
    assert len(kernel.connections()[0]) == 6
    for later in range(3):
        connections.expire(2**62 + later * 2**60)
    kernel.session.forget_connections(connections.over)
    assert kernel.connections() == (set(), {})


def test_connections_that_user_space_never_heard_of_are_taken_away(kernel: Programs) -> None:
    kept = open_connection(kernel)
    for port in range(5):
        open_connection(kernel, FLOW._replace(client_port=3000 + port))
    kernel.session.forget_unknown_connections({kept}, 2**63)
    numbers, ids = kernel.connections()
    assert numbers == set(ids.values()) == {kept}


# Whatever comes


@pytest.mark.fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from(HOOKS),
            st.sampled_from([segment(MESSAGE), segment(flags=SYN), segment(MESSAGE, back=True), segment(MESSAGE, FLOW6)]),
            st.sampled_from(list(OUTER.values())),
            st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=4)), max_size=3),
            st.integers(0, 300),
        ),
        max_size=20,
    )
)  # fmt: skip
def test_whatever_is_sent_passes_and_can_be_put_together(
    frames: list[tuple[HopKind, bytes, object, list[tuple[int, bytes]], int]],
) -> None:
    with loaded_programs() as kernel:
        connections = Connections(5 * SECOND)
        for hook, packet, outer, changes, cut in frames:
            frame = outer(packet)  # type: ignore[operator]
            for at, some in changes:
                frame = frame[:at] + some + frame[at + len(some) :]
            try:
                kernel.run(hook, frame[: len(frame) - cut] if cut < 40 else frame)
            except BpfError:
                continue
        records = kernel.segments()
        found = records["segment"]
        assert (found["captured"] <= np.minimum(found["len"], SEGMENT_BYTES)).all()
        connections.feed(records)
        connections.flush()
        for later in range(3):
            connections.expire(2**62 + later * 2**60)
        kernel.session.forget_connections(connections.over)
        assert kernel.connections() == (set(), {})
        kernel.records()
