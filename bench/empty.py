# SPDX-License-Identifier: Apache-2.0
"""Programs that do nothing, on the very hooks of the tracer: the least that watching can cost.

They go through the tracer's own attaching, so that hooks, devices and namespaces are the same.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from bench.errors import BenchError
from tracer.kernel import kprobes, netns, programs
from tracer.kernel.compile import Object
from tracer.kernel.devices import Device, Devices
from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LD_IMM64 = 0x18
_MOV64_IMM = 0xB7
_EXIT = 0x95


def _instruction(opcode: int, immediate: int = 0) -> bytes:
    """One instruction on r0."""
    return struct.pack("=BBhi", opcode, 0, 0, immediate)


def _returning(mark: int) -> bytes:
    """`r0 = mark; exit`: the loader puts the hook's own verdict in the mark's place."""
    low, high = struct.unpack("=ii", struct.pack("=Q", mark))
    return _instruction(_LD_IMM64, low) + _instruction(0, high) + _instruction(_EXIT)


_ZERO = _instruction(_MOV64_IMM) + _instruction(_EXIT)
NOTHING = Object(
    {
        "packet": _returning(programs._MARK_VERDICT),  # noqa: SLF001 - the loader knows this one
        "packet_dropped": _ZERO,
        "kprobe_packet": _ZERO,
    },
    {},
    {},
)


@contextmanager
def attached() -> Iterator[Devices]:
    """Empty programs wherever the tracer would have its own; gives the devices."""
    with ExitStack() as stack:
        if kprobes.available():
            sockets = programs.attach_to_functions(NOTHING)
        else:
            root = netns.cgroup2_root()
            if root is None:
                raise BenchError("no cgroup v2 tree is mounted; see `dnstrace doctor`")
            sockets = programs.attach_to_cgroup(NOTHING, root)
        stack.callback(programs.close_all, sockets)
        stack.callback(programs.close_all, programs.attach_to_drops(NOTHING))
        loaded: dict[tuple[int, int], dict[HopKind, int]] = {}

        def unload() -> None:
            for by_kind in loaded.values():
                programs.close_all(by_kind.values())

        def attach(device: Device) -> Callable[[], None]:
            key = (device.netns, device.l2_len)
            if key not in loaded:
                loaded[key] = {
                    kind: programs.load_device_program(NOTHING, kind, *key)
                    for kind in (HopKind.INGRESS, HopKind.EGRESS)
                }
            return programs.attach_to_device(loaded[key], device.ifindex)[0]

        stack.callback(unload)
        devices = Devices(attach)
        stack.callback(devices.close)
        devices.start()
        if devices.failures:
            raise BenchError(f"empty programs cannot be attached: {devices.last_failure}")
        yield devices
