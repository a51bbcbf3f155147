# SPDX-License-Identifier: Apache-2.0
"""One tracing session: from nothing attached, to records, to nothing attached."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tracer.kernel import bpf, host, kprobes, netns, programs
from tracer.kernel.compile import Compilation, CompileError, Object
from tracer.kernel.devices import Device, Devices
from tracer.kernel.limits import Limits, possible_cpus
from tracer.kernel.ring import Ring
from tracer.kernel.table import Table
from tracer.record import (
    LARGE_RECORD,
    SEGMENT_RECORD,
    SMALL_RECORD,
    Counter,
    HopKind,
    Verdict,
    Wanted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_SETTINGS = struct.Struct("=QIIQII")
_BATCH = 512
_FLOW_BYTES = 40


RingName = Literal["small", "large", "segments"]
HookSet = Literal["kprobe", "tracepoint"]
_HOOK_SETS: tuple[HookSet, ...] = ("kprobe", "tracepoint")


class Unsupported(Exception):
    """This host lacks something that tracing needs. The message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Whose queries the kernel lets into its table; as it is, everybody's.

    With `pods`, those whose network namespace or cgroup is wanted, and those of whom neither is
    known yet: `netns` and `cgroups` say of each that is known whether it is wanted.
    """

    ports: Collection[int] = (53,)
    pods: bool = False
    netns: Mapping[int, bool] = field(default_factory=dict)
    cgroups: Mapping[int, bool] = field(default_factory=dict)
    pid: int | None = None
    server_side: bool = False


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which transactions leave the kernel, where they are counted there; as it is, all.

    Slow is what takes `slower_ns` or longer (0: nothing). One of `share` ordinary transactions
    (0: none) and one of `notable_share` of those that are slow or failed leaves.
    """

    slower_ns: int = 0
    share: int = 1
    notable_share: int = 1

    @property
    def any(self) -> bool:
        """Whether any leaves."""
        return bool(self.share or self.notable_share)


KEEP_ALL = Keeping()


@dataclass(slots=True)
class Session:
    """Attached programs and their tables. `close` (or the process's end) takes all away.

    `notes`: what this host does not offer, and what is done without it, a line each.
    """

    built: Object
    table: Table
    rings: tuple[Ring, Ring]
    segments: Ring
    hooks: HookSet | None = None  # None: sockets are not watched
    attached_by: programs.DeviceHooks | None = None  # None: no device yet
    notes: list[str] = field(default_factory=list)
    _links: list[int] = field(default_factory=list)
    # While only some hooks are in place, a query could begin that would never be seen to end.
    _paused: bool = True
    _settings: tuple[int, int] = (0, 0)
    _keeping: Keeping = KEEP_ALL
    _ports: Collection[int] = ()
    _port_words: Collection[int] = ()  # where bits are set in the kernel's table of ports
    _device_programs: dict[tuple[int, int], dict[HopKind, int]] = field(default_factory=dict)
    devices: Devices = field(init=False)

    def __post_init__(self) -> None:
        self.devices = Devices(self._attach_device, self._forget_namespace)

    @classmethod
    def open(
        cls,
        selection: Selection,
        limits: Limits | None = None,
        hooks: HookSet | None = None,
        compilation: Compilation | None = None,
        keeping: Keeping = KEEP_ALL,
        compiled: Callable[[], None] = lambda: None,
    ) -> Session:
        """Compiles, loads and attaches. Raises Unsupported.

        `compilation` is one that was begun earlier, for the same limits and hooks; `keeping` is what
        leaves the kernel at first. `compiled` is called before anything is attached.
        """
        limits = limits or Limits()
        if not host.may_trace():
            raise Unsupported(
                "tracing needs root (or at least CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; "
                "'dnstrace doctor' says what the others are for): run 'sudo dnstrace'"
            )
        if host.locked_down():
            raise Unsupported(
                "kernel lockdown is 'confidentiality', so programs may not read kernel memory: "
                "boot with lockdown=integrity, or without"
            )
        host.raise_limits()
        obstacle = kprobes.obstacle()
        if hooks == "kprobe" and obstacle:
            raise Unsupported(f"{obstacle}; leave --hooks out, or use --hooks tracepoint")
        if compilation is None:
            with_kprobes = hooks != "tracepoint" and not obstacle
            compilation = Compilation(limits.macros(), kprobes=with_kprobes)
        try:
            built = compilation.result()
        except CompileError as error:
            raise Unsupported(str(error)) from error
        compiled()
        rings = (
            Ring(built.map_fds["small_ring"], limits.small_ring, SMALL_RECORD),
            Ring(built.map_fds["large_ring"], limits.large_ring, LARGE_RECORD),
        )
        segments = Ring(built.map_fds["segment_ring"], limits.segment_ring, SEGMENT_RECORD)
        session = cls(built, Table(built.map_fds, limits.slots), rings, segments)
        session._keeping = keeping
        try:
            session._attach(limits, hooks)
            if obstacle and hooks is None and session.hooks:
                session.notes.append(f"{obstacle}: a receive is when a packet reaches the socket")
            session.select(selection)
            session._set(paused=False)
        except BaseException:
            session.close()
            raise
        return session

    def select(self, selection: Selection) -> None:
        """Changes what is traced, while tracing.

        Without socket hooks nobody is known when a query begins, so only ports count.
        """
        if self.hooks is None:
            selection = Selection(selection.ports)
        fds = self.built.map_fds
        words = dict.fromkeys(self._port_words, 0)
        for port in selection.ports:
            words[port >> 6] = words.get(port >> 6, 0) | 1 << (port & 63)
        for word, bits in words.items():
            bpf.map_update(fds["dns_ports"], _U32.pack(word), _U64.pack(bits))
        self._ports = selection.ports
        self._port_words = words.keys()
        _replace(fds["netns_verdicts"], _verdicts(_U32, selection.netns), 4)
        _replace(fds["cgroup_verdicts"], _verdicts(_U64, selection.cgroups), 8)
        wanted = 0
        if selection.pods:
            wanted |= Wanted.PODS
        if selection.pid is not None:
            wanted |= Wanted.PID
        if selection.server_side:
            wanted |= Wanted.SERVER_SIDE
        self._settings = (wanted, selection.pid or 0)
        self._set(paused=self._paused)

    def ports(self) -> list[int]:
        """Those that count as DNS."""
        return list(self._ports)

    def refuse(self, cgroup_id: int) -> None:
        """Queries of that cgroup turned out to be unwanted; until `select` says otherwise."""
        verdict = bytes([Verdict.UNWANTED])
        bpf.map_update(self.built.map_fds["cgroup_verdicts"], _U64.pack(cgroup_id), verdict)

    def keep(self, keeping: Keeping) -> None:
        """Changes which transactions leave the kernel, where they are counted there."""
        if keeping != self._keeping:
            self._keeping = keeping
            self._set(paused=self._paused)

    def pause(self) -> None:
        """Nothing begins any more; what is in flight goes on."""
        self._set(paused=True)

    def _set(self, *, paused: bool) -> None:
        self._paused = paused
        kept = self._keeping
        settings = _SETTINGS.pack(
            *self._settings, paused, kept.slower_ns, kept.share, kept.notable_share
        )
        bpf.map_update(self.built.map_fds["settings"], _U32.pack(0), settings)

    def read(self) -> Iterator[NDArray[np.void]]:
        """What has left the kernel by now, in batches that keep this process small."""
        for ring in self.rings:
            waiting = ring.pending()
            while waiting > 0 and len(batch := ring.read(min(waiting, _BATCH))):
                waiting -= len(batch)
                yield batch

    def read_all(self) -> Iterator[tuple[RingName, NDArray[np.void]]]:
        """What has left the kernel by now, with the ring that it comes from, "small" last.

        Whatever was recorded before a record of the small ring comes before it.
        """
        small, large = self.rings
        waiting = small.pending(), large.pending(), self.segments.pending()  # in this order
        yield from _read("large", large, waiting[1])
        yield from _read("segments", self.segments, waiting[2])
        yield from _read("small", small, waiting[0])

    def forget_connections(
        self, over: Iterable[tuple[int, Iterable[tuple[bytes, bytes, int, int, int]]]]
    ) -> None:
        """Makes room for others. Each is its number and its flows, as in records."""
        fds = self.built.map_fds
        for number, flows in over:
            value = _U64.pack(number)
            keys = {_flow_key(*flow) for flow in flows}
            keys |= {_flow_key(flow[0], bytes(16), flow[2], 0, 0) for flow in flows}
            for key in keys:
                if bpf.map_lookup(fds["connection_ids"], key, 8) == value:
                    bpf.map_delete(fds["connection_ids"], key)
            bpf.map_delete(fds["connections"], value)

    def serving(self) -> set[int]:
        """Cgroups whose processes were asked something lately."""
        keys = bpf.map_keys(self.built.map_fds["serving_cgroups"], _U64.size)
        return {_U64.unpack(key)[0] for key in keys}

    def forget_unknown_connections(self, known: Container[int], before_ns: int) -> None:
        """Makes room that nobody else will: what we know of a connection may have been lost."""
        fds = self.built.map_fds
        for key in list(bpf.map_keys(fds["connection_ids"], _FLOW_BYTES)):
            value = bpf.map_lookup(fds["connection_ids"], key, _U64.size)
            if value is not None and _is_unknown(value, known, before_ns):
                bpf.map_delete(fds["connection_ids"], key)
        for key in list(bpf.map_keys(fds["connections"], _U64.size)):
            if _is_unknown(key, known, before_ns):
                bpf.map_delete(fds["connections"], key)

    def fill(self) -> float:
        """How full the fullest ring is, 0 to 1."""
        return max(ring.fill() for ring in (*self.rings, self.segments))

    def counters(self) -> dict[Counter, int]:
        """The kernel's counters, summed over CPUs."""
        cpus = possible_cpus()
        totals = {}
        for counter in Counter:
            raw = bpf.map_lookup(self.built.map_fds["counters"], _U32.pack(counter), 8 * cpus)
            totals[counter] = sum(struct.unpack(f"={cpus}Q", raw)) if raw else 0
        return totals

    def detach(self) -> None:
        """Takes every program away; what has been recorded can still be read."""
        self.devices.close()
        for link in self._links:
            os.close(link)
        self._links.clear()
        for inode, _ in list(self._device_programs):
            self._forget_namespace(inode)

    def close(self) -> None:
        """Detaches, and gives up the tables."""
        self.detach()
        self.built.close()

    def _attach(self, limits: Limits, wanted: HookSet | None) -> None:
        """Attaches all that this host offers. Raises Unsupported if that is not enough."""
        self._set(paused=True)
        try:
            programs.fill_free_slots(self.built, limits.slots)
        except OSError as error:
            raise Unsupported(f"{error.strerror}; run 'dnstrace doctor'") from error
        self._attach_to_sockets(wanted)
        self._attach_to_addresses()
        try:
            self._links += programs.attach_to_drops(self.built)
            if not self.built.drop_reasons:
                self.notes.append(
                    "drops come without a reason: this kernel tells none (before 5.17)"
                )
        except OSError as error:
            self.notes.append(f"drops are not seen: {error.strerror}")
        try:
            self.devices.start()
            refused = self.devices.last_failure
        except OSError as error:
            refused = error.strerror
        if self.devices.count() == 0 and refused:
            self.notes.append(f"no device is watched, so no hop between sockets: {refused}")
        if self.devices.count() == 0 and self.hooks is None:
            raise Unsupported(f"nothing can be watched here: {'; '.join(self.notes)}")

    def _attach_to_sockets(self, wanted: HookSet | None) -> None:
        """By the first set of hooks that can be attached, unless one is `wanted`."""
        for hooks in _HOOK_SETS if wanted is None else (wanted,):
            if hooks == "kprobe" and "kprobe_packet" not in self.built.instructions:
                continue
            try:
                if hooks == "kprobe":
                    self._links += programs.attach_to_functions(self.built)
                    self._attach_to_tcp_sockets()
                else:
                    self._links += programs.attach_to_cgroup(self.built, _cgroup_root())
            except OSError as error:
                why = error.strerror
            except _NoCgroup as error:
                why = str(error)
            else:
                self.hooks = hooks
                return
            if wanted:
                raise Unsupported(f"--hooks {wanted}: {why}; leave --hooks out")
            self.notes.append(f"no {hooks} hooks: {why}")
        self.notes.append(
            "sockets are not watched: no process, and no pod of the node's own network"
        )

    def _attach_to_tcp_sockets(self) -> None:
        """What kprobes do not see to."""
        try:
            self._links += programs.attach_to_cgroup(self.built, _cgroup_root(), udp=False)
        except OSError as error:
            why = error.strerror or str(error)
        except _NoCgroup as error:
            why = str(error)
        else:
            return
        self.notes.append(f"no process is known of DNS over TCP: {why}")

    def _attach_to_addresses(self) -> None:
        """Only matters where services are balanced at the socket, so nothing is said without it."""
        if "socket_address" in self.built.instructions and self.hooks is not None:
            with suppress(OSError, _NoCgroup):
                links, _ = programs.attach_to_addresses(self.built, _cgroup_root())
                self._links += links

    def _attach_device(self, device: Device) -> Callable[[], None]:
        key = (device.netns, device.l2_len)
        loaded = self._device_programs.setdefault(key, {})

        def load(kind: HopKind) -> None:
            loaded[kind] = programs.load_device_program(
                self.built, kind, *key, for_kprobes=self.hooks == "kprobe"
            )

        missing = {HopKind.INGRESS, HopKind.EGRESS} - loaded.keys()
        if missing:  # the verifier takes its time, so it looks at both at once
            with ThreadPoolExecutor() as pool:
                list(pool.map(load, missing))
        detach, self.attached_by = programs.attach_to_device(loaded, device.ifindex)
        return detach

    def _forget_namespace(self, inode: int) -> None:
        for key in [key for key in self._device_programs if key[0] == inode]:
            programs.close_all(self._device_programs.pop(key).values())


class _NoCgroup(Exception):
    """There is no cgroup v2 tree to attach to."""


def _cgroup_root() -> Path:
    root = netns.cgroup2_root()
    if root is None:
        raise _NoCgroup(f"no cgroup v2 tree is mounted (to mount it: {netns.cgroup2_fix()})")
    return root


def _is_unknown(value: bytes, known: Container[int], before_ns: int) -> bool:
    """Whether that connection, whose number is when it began, is nobody's."""
    (number,) = _U64.unpack(value)
    return number < before_ns and number not in known


def _read(name: RingName, ring: Ring, waiting: int) -> Iterator[tuple[RingName, NDArray[np.void]]]:
    while waiting > 0 and len(batch := ring.read(min(waiting, _BATCH))):
        waiting -= len(batch)
        yield name, batch


def _flow_key(client: bytes, server: bytes, client_port: int, server_port: int, _: int) -> bytes:
    """struct flow."""
    return struct.pack("=16s16s2s2sI", client, server, client_port.to_bytes(2), server_port.to_bytes(2), 0)  # fmt: skip


def _verdicts(packing: struct.Struct, wanted: Mapping[int, bool]) -> dict[bytes, bytes]:
    return {
        packing.pack(key): bytes([Verdict.WANTED if yes else Verdict.UNWANTED])
        for key, yes in wanted.items()
    }


def _replace(fd: int, wanted: Mapping[bytes, bytes], key_size: int) -> None:
    """Makes a hash map hold just this, adding before taking away."""
    present = set(bpf.map_keys(fd, key_size))
    for key, value in wanted.items():
        if key not in present or bpf.map_lookup(fd, key, len(value)) != value:
            bpf.map_update(fd, key, value)
    for key in present - wanted.keys():
        bpf.map_delete(fd, key)
