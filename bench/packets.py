# SPDX-License-Identifier: Apache-2.0
"""What each kind of packet costs in each program: `.venv/bin/python bench/packets.py`, as root.

The kernel's own test run shows a packet to a program again and again (BPF_PROG_TEST_RUN). From
each figure, that of a program which does nothing is taken off, so that what is left is ours. With
all of the packet's way in the caches, these are lower bounds: real traffic evicts them in between.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
from typing import TYPE_CHECKING, NamedTuple

from tracer.kernel import bpf, programs
from tracer.kernel.bpf import AttachType, ProgramType
from tracer.kernel.compile import Compilation
from tracer.kernel.limits import Limits
from tracer.kernel.ring import Ring
from tracer.kernel.session import Selection, Session
from tracer.kernel.table import Table
from tracer.record import LARGE_RECORD, MAX_HOPS, SEGMENT_RECORD, SMALL_RECORD, HopKind, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable

REPEAT = 1_000_000
ROUNDS = 5
BATCHES = 4_000  # of what changes with each run, so that it cannot be repeated a million times
RING_PAGES = 2048
L2_LEN = 14
NETNS = 4026531840
HOOKS = (HopKind.INGRESS, HopKind.EGRESS, HopKind.SEND, HopKind.RECEIVE)

CLIENT, SERVER = "10.244.2.3", "10.96.0.10"
QUESTION = b"\3www\7example\3com\5bench\5local\0\0\1\0\1"
QUERY = struct.pack("!6H", 0x25D2, 0x0100, 1, 0, 0, 0) + QUESTION
ANSWER = b"\xc0\x0c" + struct.pack("!HHIH4s", 1, 1, 30, 4, bytes((192, 0, 2, 1)))
RESPONSE = struct.pack("!6H", 0x25D2, 0x8180, 1, 1, 0, 0) + QUESTION + ANSWER


def frame(source: str, destination: str, protocol: int, transport: bytes) -> bytes:
    """Ethernet and IPv4 around the rest."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    length = 20 + len(transport)
    ipv4 = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0, 64, protocol, 0) + addresses
    return bytes(12) + b"\x08\0" + ipv4 + transport


def udp(source: str, from_port: int, destination: str, to_port: int, payload: bytes) -> bytes:
    """A datagram in its frame."""
    header = struct.pack("!HHHH", from_port, to_port, 8 + len(payload), 0)
    return frame(source, destination, socket.IPPROTO_UDP, header + payload)


TCP_HEADER = struct.pack("!HHIIBBHHH", 50000, 443, 1, 1, 0x50, 0x18, 64240, 0, 0)
TCP_FRAME = frame(CLIENT, SERVER, socket.IPPROTO_TCP, TCP_HEADER + bytes(1000))
UDP_FRAME = udp(CLIENT, 50000, SERVER, 443, bytes(1000))
QUERY_FRAME = udp(CLIENT, 50668, SERVER, 53, QUERY)
RESPONSE_FRAME = udp(SERVER, 53, CLIENT, 50668, RESPONSE)


class Rig(NamedTuple):
    """Programs that are loaded, and attached to nothing."""

    session: Session
    traced: dict[HopKind, int]
    empty: dict[HopKind, int]

    @classmethod
    def set_up(cls) -> Rig:
        slots = Limits().slots
        sizes = {"SLOTS": slots, "SMALL_PAGES": RING_PAGES, "LARGE_PAGES": 2, "SEGMENT_PAGES": 1}
        built = Compilation(sizes, kprobes=False).result()
        page = os.sysconf("SC_PAGESIZE")
        rings = (
            Ring(built.map_fds["small_ring"], RING_PAGES * page, SMALL_RECORD),
            Ring(built.map_fds["large_ring"], 2 * page, LARGE_RECORD),
        )
        programs.fill_free_slots(built, slots)
        segments = Ring(built.map_fds["segment_ring"], page, SEGMENT_RECORD)
        session = Session(built, Table(built.map_fds, slots), rings, segments, "tracepoint")
        session.select(Selection())
        traced = {
            hook: programs.load_device_program(built, hook, NETNS, L2_LEN)
            if hook in (HopKind.INGRESS, HopKind.EGRESS)
            else programs.load_socket_program(built, hook)
            for hook in HOOKS
        }
        return cls(session, traced, {hook: _empty_program(hook) for hook in HOOKS})

    def want(self, wanted: int) -> None:
        """Nothing is paused; `wanted` as in bpf/record.h, of a process that there is not."""
        settings = struct.pack("=QII", wanted, 0xFFFFFFFF, 0)
        bpf.map_update(self.session.built.map_fds["settings"], bytes(4), settings)

    def clear(self) -> None:
        """Ends what is in flight, and takes what is in the rings."""
        while self.session.table.in_flight():
            self.session.table.expire(1 << 62)
        for _ in self.session.read():
            pass

    def repeated(self, hook: HopKind, packet: bytes) -> float:
        """What the same packet costs each time, in ns."""
        rounds = []
        for _ in range(ROUNDS):
            _, traced_ns = bpf.test_run(self.traced[hook], packet, REPEAT)
            _, empty_ns = bpf.test_run(self.empty[hook], packet, REPEAT)
            rounds.append(traced_ns - empty_ns)
        return statistics.median(rounds)

    def changing(
        self, hook: HopKind, packet: bytes, repeat: int, before: Callable[[], None]
    ) -> float:
        """The same where only a few runs in a row do the same, after `before`."""
        traced_ns = empty_ns = 0
        for batch in range(BATCHES):
            before()
            traced_ns += bpf.test_run(self.traced[hook], packet, repeat)[1]
            empty_ns += bpf.test_run(self.empty[hook], packet, repeat)[1]
            if batch % 1000 == 0:
                self.clear()
        return (traced_ns - empty_ns) / BATCHES


def _empty_program(hook: HopKind) -> int:
    """Says what lets a packet pass, and no more."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    attach = {
        HopKind.SEND: AttachType.CGROUP_INET_EGRESS,
        HopKind.RECEIVE: AttachType.CGROUP_INET_INGRESS,
    }.get(hook)
    kind = ProgramType.CGROUP_SKB if attach is not None else ProgramType.SCHED_CLS
    return bpf.program_load(kind, code, "empty", attach)


def measure(rig: Rig) -> dict[str, dict[HopKind, float]]:
    """ns of each kind of packet, at each hook where it comes by."""

    def asked() -> None:
        rig.session.table.expire(1 << 62)
        bpf.test_run(rig.traced[HopKind.SEND], QUERY_FRAME)

    def unasked() -> None:
        rig.session.table.expire(1 << 62)

    costs: dict[str, dict[HopKind, float]] = {}
    rig.want(0)
    for what, packet in (("TCP, not DNS", TCP_FRAME), ("UDP, not DNS", UDP_FRAME)):
        costs[what] = {hook: rig.repeated(hook, packet) for hook in HOOKS}
    rig.want(Wanted.PID)
    costs["DNS query, kept out by a filter"] = {h: rig.repeated(h, QUERY_FRAME) for h in HOOKS}
    costs["DNS response that fits no query"] = {h: rig.repeated(h, RESPONSE_FRAME) for h in HOOKS}
    rig.want(0)
    on_the_way = (HopKind.INGRESS, HopKind.EGRESS, HopKind.RECEIVE)
    costs["DNS query in flight, a hop more"] = {
        hook: rig.changing(hook, QUERY_FRAME, MAX_HOPS - 1, asked) for hook in on_the_way
    }
    asked()
    costs["DNS query in flight, no room for a hop"] = {
        hook: rig.repeated(hook, QUERY_FRAME) for hook in on_the_way
    }
    costs["DNS query, a transaction begins *"] = {
        hook: rig.changing(hook, QUERY_FRAME, 1, unasked) for hook in HOOKS
    }
    costs["DNS response, one ends, record and all *"] = {
        HopKind.RECEIVE: rig.changing(HopKind.RECEIVE, RESPONSE_FRAME, 1, asked)
    }
    costs["DNS query asked again, record and all"] = {
        HopKind.SEND: rig.changing(HopKind.SEND, QUERY_FRAME, 16, asked)
    }
    return costs


def main() -> None:
    rig = Rig.set_up()
    costs = measure(rig)
    width = max(map(len, costs))
    print(f"{'ns a packet':{width}}", *(f"{hook.name.lower():>8}" for hook in HOOKS))
    for what, at in costs.items():
        cells = (f"{at[hook]:8.0f}" if hook in at else f"{'':8}" for hook in HOOKS)
        print(f"{what:{width}}", *cells)
    print(f"Medians of {ROUNDS} times {REPEAT:,} runs, else means of {BATCHES:,} times a few.")
    print("* once after other work: with what it costs to fetch code and tables into the caches")


if __name__ == "__main__":
    main()
