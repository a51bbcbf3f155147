# SPDX-License-Identifier: Apache-2.0
"""Whatever strangers send: packets pass, the accounts add up, and every record becomes a line."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import packets as p
from tests.packets import FLOW, FLOW6, Flow, dns, dns_query, dns_response, ethernet
from tests.programs import HOOKS, compiled_programs, loaded_programs
from tracer.assemble import Assembler
from tracer.export import jsonl
from tracer.kernel.bpf import BpfError
from tracer.record import Counter, HopKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.programs import Record

pytestmark = pytest.mark.fuzz

FLOWS = (FLOW, FLOW._replace(server="10.96.0.11"), FLOW6)
MESSAGES = (
    dns_query(),
    dns_query(p.name_of(255)),
    dns(p.question(), p.question(type_=28)),
    dns(),
    dns_response(),
    dns_response(rcode=3),
    dns_response(p.name_of(255)),
    dns(flags=0x8181),
    p.dns_response_of(700),
)


def _packets(flow: Flow, message: bytes) -> Iterator[bytes]:
    is_response = message[2] & 0x80
    packet = (p.response_packet if is_response else p.query_packet)(message, flow)
    yield packet
    if not is_response:
        yield p.unreachable(packet, flow)


CARRIERS: tuple[Callable[[bytes], bytes], ...] = (
    ethernet,
    ethernet,
    ethernet,
    lambda packet: ethernet(packet, p.VLAN),
    lambda packet: ethernet(packet, p.QINQ, p.VLAN),
    lambda packet: ethernet(p.vxlan(packet)),
    lambda packet: ethernet(p.geneve(packet, bytes(8))),
    lambda packet: ethernet(p.ipip(packet)),
)
VALID = [
    carrier(packet)
    for flow in FLOWS
    for message in MESSAGES
    for packet in _packets(flow, message)
    for carrier in CARRIERS
]

# What can happen to a frame on its way: each takes a place in it.
MUTATIONS: tuple[Callable[[bytes, int, bytes], bytes], ...] = (
    lambda frame, at, _: frame[:at],
    lambda frame, at, some: frame[:at] + some + frame[at + len(some) :],
    lambda frame, at, some: frame[:at] + some + frame[at:],
    lambda frame, at, some: frame[:at] + frame[at + len(some) :],
    lambda frame, at, some: frame + frame[at : at + 100] + some,
)
MUTATION = st.tuples(
    st.sampled_from(MUTATIONS), st.integers(0, 200), st.binary(min_size=1, max_size=8)
)


def mutated(
    frame: bytes, mutations: list[tuple[Callable[[bytes, int, bytes], bytes], int, bytes]]
) -> bytes:
    for mutate, at, some in mutations:
        frame = mutate(frame, min(at, len(frame)), some)
    return frame


def of_type(ethertype: int, rest: bytes) -> bytes:
    return bytes(12) + struct.pack("!H", ethertype) + rest


def on_dns_port(version: int, message: bytes) -> bytes:
    return ethernet(p.query_packet(message, FLOW6 if version == 6 else FLOW))


FRAMES = st.one_of(
    st.sampled_from(VALID),
    st.builds(mutated, st.sampled_from(VALID), st.lists(MUTATION, min_size=1, max_size=4)),
    st.builds(on_dns_port, st.sampled_from((4, 6)), st.binary(max_size=300)),
    st.builds(of_type, st.sampled_from((p.IPV4, p.IPV6, p.VLAN, p.QINQ)), st.binary(max_size=300)),
    st.binary(max_size=300),
)
SHOWN = st.tuples(st.sampled_from(HOOKS), FRAMES)
READ, EXPIRE = "read", "expire"
STEP = st.one_of(SHOWN, SHOWN, SHOWN, st.sampled_from((READ, EXPIRE)))


class Nobody:
    """Knows no names."""

    def client(self, cgroup_id: int, netns: int, ip: str) -> tuple[None, None, None, None]:
        del cgroup_id, netns, ip
        return None, None, None, None

    def service(self, ip: str, port: int) -> None:
        del ip, port

    def server(self, cgroup_id: int, ip: str) -> tuple[None, None]:
        del cgroup_id, ip
        return None, None

    def role(self, ip: str) -> None:
        del ip

    def place(self, netns: int, ifindex: int) -> tuple[None, None]:
        del netns, ifindex
        return None, None


ASSEMBLER = Assembler(Nobody(), {}, lambda _: None)


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: None) -> Iterator[None]:
    del root
    with compiled_programs():
        yield


def check_lines(records: list[Record]) -> None:
    """Each record makes a line of JSON, and its hops come in the order of time."""
    for record in records:
        (transaction,) = ASSEMBLER.assemble(record.batch)
        line = orjson.loads(jsonl.transaction(transaction))
        assert line["event"] == "transaction"
        assert len(line["hops"]) == record["nhops"] > 0
        times = [hop["t_ns"] for hop in line["hops"]]
        assert times == sorted(times)
        assert times[0] == 0
        assert record["query_captured"] <= record["query_len"]
        assert record["response_captured"] <= record["response_len"]


@given(st.lists(STEP, min_size=15, max_size=60))
def test_whatever_is_sent_passes_and_is_accounted_for(
    steps: list[tuple[HopKind, bytes] | str],
) -> None:
    expired = 0
    with loaded_programs() as kernel:
        for step in [*steps, READ, EXPIRE]:
            match step:
                case "read":
                    check_lines(kernel.records())
                case "expire":
                    records = kernel.expire()
                    expired += len(records)
                    check_lines(records)
                case (HopKind() as hook, bytes() as frame):
                    try:
                        kernel.run(hook, frame)
                    except BpfError:  # the kernel itself takes it for no packet
                        continue
            kernel.check_accounts(expired)


def test_what_the_fuzzer_starts_from_is_dns() -> None:
    """Otherwise it would only ever see what is passed over."""
    with loaded_programs() as kernel:
        for hook in HOOKS:
            for frame in VALID:
                kernel.run(hook, frame)
        counted = kernel.counted()
    for counter in (Counter.STARTED, Counter.EMITTED, Counter.TABLE_FULL):
        assert counted[counter] > 0
