# SPDX-License-Identifier: Apache-2.0
"""The BPF programs, loaded but attached to nothing: packets are put in, records come out.

The tables are small, so that a test can fill them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections import Counter as Tally
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from tests.packets import ethernet
from tracer.assemble import ip_text
from tracer.kernel import bpf, host, programs
from tracer.kernel.compile import Compilation
from tracer.kernel.ring import Ring
from tracer.kernel.session import KEEP_ALL, Selection, Session
from tracer.kernel.table import Table
from tracer.record import (
    BUCKET_KEY,
    LARGE_RECORD,
    SEGMENT_RECORD,
    SERIES_KEY,
    SMALL_RECORD,
    Counter,
    HopKind,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SLOTS = 8  # as many as an eviction looks at, so that it finds the oldest of all
CONNECTIONS = 8
BUCKETS = 512
SMALL_PAGES, LARGE_PAGES, SEGMENT_PAGES = 8, 16, 16
PAGE = os.sysconf("SC_PAGESIZE")
# A record's frame has a header of 8 bytes, and a ring is full one byte early.
SMALL_RECORDS = (SMALL_PAGES * PAGE - 1) // (SMALL_RECORD.itemsize + 8)
SEGMENT_RECORDS = (SEGMENT_PAGES * PAGE - 1) // (SEGMENT_RECORD.itemsize + 8)
LARGE_RECORDS = (LARGE_PAGES * PAGE - 1) // (LARGE_RECORD.itemsize + 8)

SEND, INGRESS, EGRESS, RECEIVE = HopKind.SEND, HopKind.INGRESS, HopKind.EGRESS, HopKind.RECEIVE
HOOKS = (SEND, INGRESS, EGRESS, RECEIVE)
DEVICE_HOOKS = (INGRESS, EGRESS)
# Inode numbers of network namespaces. Frames shown to a device come in by the loopback.
NODE, OTHER_NODE = 4026532177, 4026532178
LOOPBACK = 1

_TC_ACT_UNSPEC = 0xFFFFFFFF
_CGROUP_ALLOW = 1
_FAR_FUTURE_NS = 1 << 62
_INDEX_KEY = struct.Struct("=16s2s2sI")


class _Command(IntEnum):
    """What only tests ask of bpf(2)."""

    MAP_LOOKUP_AND_DELETE_ELEM = 21


@dataclass(frozen=True, slots=True)
class Record:
    """A transaction that has left the table, by a ring or because its time was up."""

    batch: NDArray[np.void]  # just this one, as it came

    @property
    def transaction(self) -> np.void:
        row: np.void = self.batch[0]
        names = row.dtype.names or ()
        return row["transaction"] if "transaction" in names else row

    @property
    def response(self) -> bytes:
        """As far as it was captured."""
        if "response" not in (self.batch.dtype.names or ()):
            return b""
        captured = self["response_captured"]
        assert captured <= self.batch.dtype["response"].itemsize
        return bytes(self.batch[0]["response"].tobytes()[:captured])

    @property
    def query(self) -> bytes:
        """As far as it was captured."""
        return bytes(self.transaction["query"].tobytes()[: self["query_captured"]])

    @property
    def status(self) -> Status:
        return Status(self["status"])

    @property
    def hops(self) -> list[tuple[HopKind, int, int]]:
        """(kind, 1 for a response, number of the flow) of each."""
        return [
            (HopKind(int(hop["kind"])), int(hop["direction"]), int(hop["flow"]))
            for hop in self.transaction["hops"][: self["nhops"]]
        ]

    @property
    def flows(self) -> list[tuple[str, str, int, int]]:
        """(client, server, client's port, server's port) of each."""
        return [
            (
                ip_text(flow["client_addr"].tobytes()),
                ip_text(flow["server_addr"].tobytes()),
                int(flow["client_port"]),
                int(flow["server_port"]),
            )
            for flow in self.transaction["flows"][: self["nflows"]]
        ]

    def numbers(self) -> dict[str, int]:
        """All numbers in the transaction itself."""
        names = self.transaction.dtype.names or ()
        return {n: self[n] for n in names if isinstance(self.transaction[n], np.unsignedinteger)}

    def __getitem__(self, name: str) -> int:
        """A number in the transaction."""
        return int(self.transaction[name])


@dataclass(slots=True)
class Programs:
    """Loaded programs and their tables."""

    session: Session
    _loaded: dict[tuple[HopKind, int, int], int] = field(default_factory=dict)
    _counted_before: dict[Counter, int] = field(default_factory=dict)

    def close(self) -> None:
        for program in self._loaded.values():
            os.close(program)
        self._loaded.clear()
        self.session.close()

    def program(self, hook: HopKind, netns: int = NODE, l2_len: int = 14) -> int:
        """A descriptor of the program; each is loaded once."""
        built = self.session.built
        if hook not in DEVICE_HOOKS:
            key = (hook, 0, 0)
            if key not in self._loaded:
                self._loaded[key] = programs.load_socket_program(built, hook)
        else:
            key = (hook, netns, l2_len)
            if key not in self._loaded:
                self._loaded[key] = programs.load_device_program(built, *key)
        return self._loaded[key]

    def run(
        self, hook: HopKind, frame: bytes, netns: int = NODE, *, l2_len: int = 14, times: int = 1
    ) -> None:
        """Shows a frame to a hook, some `times` on end. Whatever the frame is, it must be let pass.

        Raises BpfError for what the kernel itself takes for no packet.
        """
        verdict, _ = bpf.test_run(self.program(hook, netns, l2_len), frame, times)
        assert verdict == (_TC_ACT_UNSPEC if hook in DEVICE_HOOKS else _CGROUP_ALLOW)

    def show(self, hook: HopKind, packet: bytes, netns: int = NODE, *, times: int = 1) -> None:
        """The same for what begins with its IP header."""
        self.run(hook, ethernet(packet), netns, times=times)

    def records(self) -> list[Record]:
        """What has come out since the last call, small records before large ones."""
        return [
            Record(batch[i : i + 1]) for batch in self.session.read() for i in range(len(batch))
        ]

    def segments(self) -> NDArray[np.void]:
        """The segments that have come out since the last call."""
        return np.concatenate(
            [
                np.zeros(0, SEGMENT_RECORD),
                *(b for ring, b in self.session.read_all() if ring == "segments"),
            ]
        )

    def connections(self) -> tuple[set[int], dict[tuple[str, str, int, int], int]]:
        """The numbers of those in the table, and the number by each flow."""
        fds = self.session.built.map_fds
        numbers = {int.from_bytes(k, "little") for k in bpf.map_keys(fds["connections"], 8)}
        ids = {}
        for key in bpf.map_keys(fds["connection_ids"], 40):
            client, server, ports = key[:16], key[16:32], struct.unpack("!HH4x", key[32:])
            value = bpf.map_lookup(fds["connection_ids"], key, 8)
            assert value is not None
            ids[ip_text(client), ip_text(server), *ports] = int.from_bytes(value, "little")
        return numbers, ids

    def forget_connections(self) -> None:
        """Empties the tables of connections, and of who was asked."""
        fds = self.session.built.map_fds
        for name, size in (("connections", 8), ("connection_ids", 40), ("serving_cgroups", 8)):
            for key in list(bpf.map_keys(fds[name], size)):
                bpf.map_delete(fds[name], key)

    def record(self) -> Record:
        """The only one that has come out."""
        (record,) = self.records()
        return record

    def expire(self, before_ns: int = _FAR_FUTURE_NS) -> list[Record]:
        """Ends what is in flight, oldest first."""
        batch = self.session.table.expire(before_ns)
        return [Record(batch[i : i + 1]) for i in range(len(batch))]

    def in_flight(self) -> int:
        return self.session.table.in_flight()

    def counted(self) -> dict[Counter, int]:
        """By how much each counter has moved since `reset`; not those that have not."""
        before = self._counted_before
        moved = {c: n - before.get(c, 0) for c, n in self.session.counters().items()}
        return {counter: number for counter, number in moved.items() if number}

    def index(self) -> set[tuple[str, int, int, int]]:
        """(client, client's port, id, variant) of each key in the index."""
        keys = bpf.map_keys(self.session.built.map_fds["slot_index"], _INDEX_KEY.size)
        return {
            (ip_text(address), int.from_bytes(port), int.from_bytes(dns_id), variant)
            for address, port, dns_id, variant in map(_INDEX_KEY.unpack, keys)
        }

    def reset(self) -> None:
        """Nothing in flight, nothing in the rings, everything wanted, DNS on port 53."""
        self.session._set(paused=False)
        self.session.select(Selection())
        while self.in_flight():
            self.expire()
        self.records()
        self.segments()
        self.forget_connections()
        self.session.keep(KEEP_ALL)
        for name, size in (
            ("all_series", SERIES_KEY.itemsize),
            ("buckets", BUCKET_KEY.itemsize),
            ("series_begun", 8),
        ):
            for key in list(bpf.map_keys(self.session.built.map_fds[name], size)):
                bpf.map_delete(self.session.built.map_fds[name], key)
        for memory in ("variant_last_ns", "crowded_last_ns"):
            bpf.map_update(self.session.built.map_fds[memory], bytes(4), bytes(8))
        self._counted_before = self.session.counters()

    def check_accounts(self, expired: int = 0) -> None:
        """Whatever began is in exactly one place. `expired`: how many `expire` has ended."""
        counted = self.counted()
        ended = (
            Counter.EMITTED,
            Counter.RING_FULL,
            Counter.TABLE_FULL,
            Counter.NOT_KEPT,
            Counter.SKIPPED,
        )
        accounted = sum(counted.get(counter, 0) for counter in ended) + expired + self.in_flight()
        assert counted.get(Counter.STARTED, 0) == accounted

    def check_nothing_leaked(self) -> None:
        """With nothing in flight, the index must be empty, and each slot free, once."""
        while self.in_flight():
            self.expire()
        assert self.session.table.leaked == 0
        assert self.index() == set()
        free = list(self._pop_free_slots())
        for number in free:
            bpf.map_update(
                self.session.built.map_fds["free_slots"], None, struct.pack("=I", number)
            )
        assert Tally(free) == Tally(range(SLOTS))

    def _pop_free_slots(self) -> Iterator[int]:
        value, at = bpf._address(bytes(4))
        attr = struct.pack("=I4xQQQ", self.session.built.map_fds["free_slots"], 0, at, 0)
        with contextlib.suppress(bpf.BpfError):  # there are no more
            while True:
                bpf._bpf(_Command.MAP_LOOKUP_AND_DELETE_ELEM, attr, "pop")  # type: ignore[arg-type]
                yield struct.unpack("=I", value.raw)[0]


@functools.cache
def _built(series: int) -> Programs:
    host.raise_limits()
    sizes = {
        "SLOTS": SLOTS,
        "SMALL_PAGES": SMALL_PAGES,
        "LARGE_PAGES": LARGE_PAGES,
        "SEGMENT_PAGES": SEGMENT_PAGES,
        "CONNECTIONS": CONNECTIONS,
    }
    if series:
        sizes |= {"SERIES": series, "BUCKETS": BUCKETS}
    built = Compilation(sizes, kprobes=False).result()
    rings = (
        Ring(built.map_fds["small_ring"], SMALL_PAGES * PAGE, SMALL_RECORD),
        Ring(built.map_fds["large_ring"], LARGE_PAGES * PAGE, LARGE_RECORD),
    )
    programs.fill_free_slots(built, SLOTS)
    segments = Ring(built.map_fds["segment_ring"], SEGMENT_PAGES * PAGE, SEGMENT_RECORD)
    return Programs(Session(built, Table(built.map_fds, SLOTS), rings, segments, "tracepoint"))


_loaded: set[int] = set()


def _unload() -> None:
    for series in _loaded:
        _built(series).close()
    _loaded.clear()
    _built.cache_clear()


@contextlib.contextmanager
def compiled_programs(series: int = 0) -> Iterator[None]:
    """Around all the tests of a module: compiles once, and leaves nothing loaded behind.

    With room for so many `series`, the kernel counts transactions as well.
    """
    _built(series)
    _loaded.add(series)
    try:
        yield
    finally:
        _unload()


@contextlib.contextmanager
def loaded_programs(series: int = 0) -> Iterator[Programs]:
    """The programs, in a block of `compiled_programs`; their tables are empty on both ends."""
    kernel = _built(series)
    _loaded.add(series)
    try:
        kernel.reset()
        yield kernel
        kernel.check_nothing_leaked()
    except BaseException:
        _unload()  # what one test leaves in the tables must not fail the next
        raise
