# SPDX-License-Identifier: Apache-2.0
"""The bpf(2) system call: maps, programs and links as file descriptors.

Only what the tracer uses. Layouts are those of `union bpf_attr` in the kernel's
include/uapi/linux/bpf.h. Programs and links vanish when their last descriptor is closed, so
nothing of ours outlives this process, however it dies.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_NAME_LEN = 16
_libc = ctypes.CDLL(None, use_errno=True)


class Command(IntEnum):
    """enum bpf_cmd."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    PROG_TEST_RUN = 10
    OBJ_GET_INFO_BY_FD = 15
    RAW_TRACEPOINT_OPEN = 17
    MAP_LOOKUP_BATCH = 24
    LINK_CREATE = 28


class ProgramType(IntEnum):
    """enum bpf_prog_type."""

    SOCKET_FILTER = 1
    KPROBE = 2
    SCHED_CLS = 3
    CGROUP_SKB = 8
    RAW_TRACEPOINT = 17
    CGROUP_SOCK_ADDR = 18


class AttachType(IntEnum):
    """enum bpf_attach_type."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    PERF_EVENT = 41
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class BpfError(OSError):
    """A bpf(2) call failed. `log` is the verifier's, if it had something to say."""

    def __init__(self, number: int, what: str, log: str = "") -> None:
        super().__init__(number, f"{what}: {os.strerror(number)}")
        self.log = log


def _bpf(command: Command, attr: bytes | bytearray, what: str) -> tuple[int, bytes]:
    number = SYSCALL_NUMBERS[platform.machine()]
    buffer = ctypes.create_string_buffer(bytes(attr), len(attr))
    result = _libc.syscall(number, int(command), buffer, len(attr))
    if result < 0:
        raise BpfError(ctypes.get_errno(), what)
    return result, buffer.raw


def _address(data: bytes) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer holding `data`, which must be kept alive, and its address."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return buffer, ctypes.addressof(buffer)


class MapShape(NamedTuple):
    """What a map is; `type_` is of enum bpf_map_type. Sizes in bytes."""

    type_: int
    key_size: int
    value_size: int
    entries_max: int
    flags: int
    name: str


def map_create(shape: MapShape) -> int:
    """An empty map's descriptor."""
    name = shape.name.encode()[: _NAME_LEN - 1]
    attr = struct.pack("=IIIIIII16s", *shape[:5], 0, 0, name)
    return _bpf(Command.MAP_CREATE, attr, f"making BPF map {shape.name}")[0]


def map_shape(fd: int) -> MapShape:
    """What a map is (struct bpf_map_info)."""
    info = _info(fd, "map info")
    type_, _, key_size, value_size, entries_max, flags = struct.unpack_from("=6I", info)
    name = info[24 : 24 + _NAME_LEN].rstrip(b"\0").decode()
    return MapShape(type_, key_size, value_size, entries_max, flags, name)


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value of `key` (all CPUs' values for a per-CPU map), or None."""
    key_buffer, key_at = _address(key)
    value = ctypes.create_string_buffer(value_size)
    attr = struct.pack("=I4xQQQ", fd, key_at, ctypes.addressof(value), 0)
    try:
        _bpf(Command.MAP_LOOKUP_ELEM, attr, "map look-up")
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    del key_buffer
    return value.raw


def map_update(fd: int, key: bytes | None, value: bytes) -> None:
    """Sets `key`; pushes `value` where the map is a stack (key None)."""
    key_buffer, key_at = _address(key) if key is not None else (None, 0)
    value_buffer, value_at = _address(value)
    attr = struct.pack("=I4xQQQ", fd, key_at, value_at, 0)
    _bpf(Command.MAP_UPDATE_ELEM, attr, "map update")
    del key_buffer, value_buffer


def map_delete(fd: int, key: bytes) -> bool:
    """Deletes `key`. False if there was none."""
    key_buffer, key_at = _address(key)
    try:
        _bpf(Command.MAP_DELETE_ELEM, struct.pack("=I4xQQQ", fd, key_at, 0, 0), "map delete")
    except BpfError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    del key_buffer
    return True


def map_keys(fd: int, key_size: int) -> Iterator[bytes]:
    """The keys of a hash map, as far as it does not change meanwhile."""
    key: bytes | None = None
    while True:
        key_buffer, key_at = _address(key) if key is not None else (None, 0)
        following = ctypes.create_string_buffer(key_size)
        attr = struct.pack("=I4xQQQ", fd, key_at, ctypes.addressof(following), 0)
        try:
            _bpf(Command.MAP_GET_NEXT_KEY, attr, "map walk")
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        del key_buffer
        key = following.raw
        yield key


def map_items(
    fd: int, key_size: int, value_size: int, at_a_time: int = 4096
) -> tuple[bytes, bytes]:
    """All keys and all values of a hash map, one behind the other, in the same order.

    What is added meanwhile may be missing, and what is taken away may be there. Needs Linux 5.6.
    """
    keys = ctypes.create_string_buffer(key_size * at_a_time)
    values = ctypes.create_string_buffer(value_size * at_a_time)
    position = ctypes.create_string_buffer(8)
    all_keys, all_values = bytearray(), bytearray()
    position_at = 0  # the beginning
    while True:
        attr = struct.pack(
            "=QQQQIIQQ",
            position_at,
            ctypes.addressof(position),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            at_a_time,
            fd,
            0,
            0,
        )
        buffer = ctypes.create_string_buffer(attr, len(attr))
        number = SYSCALL_NUMBERS[platform.machine()]
        result = _libc.syscall(number, int(Command.MAP_LOOKUP_BATCH), buffer, len(attr))
        failure = ctypes.get_errno() if result < 0 else 0
        if failure not in (0, errno.ENOENT):
            raise BpfError(failure, "map walk")
        (count,) = struct.unpack_from("=I", buffer.raw, 32)
        all_keys += memoryview(keys)[: count * key_size]
        all_values += memoryview(values)[: count * value_size]
        if failure:
            return bytes(all_keys), bytes(all_values)
        position_at = ctypes.addressof(position)


def program_load(
    program_type: ProgramType,
    instructions: bytes,
    name: str,
    expected_attach: AttachType | None = None,
) -> int:
    """Loads a program and returns its descriptor. Raises BpfError with the verifier's log."""
    code_buffer, code_at = _address(instructions)
    licence_buffer, licence_at = _address(b"GPL\0")

    def attr(log_size: int, log_at: int) -> bytes:
        return struct.pack(
            "=IIQQIIQII16sII",
            program_type,
            len(instructions) // 8,
            code_at,
            licence_at,
            1 if log_size else 0,
            log_size,
            log_at,
            _kernel_version(),
            0,
            name.encode()[: _NAME_LEN - 1],
            0,
            expected_attach or 0,
        )

    what = f"loading BPF program {name}"
    try:
        return _bpf(Command.PROG_LOAD, attr(0, 0), what)[0]
    except BpfError as error:
        log = ctypes.create_string_buffer(1 << 24)
        try:
            return _bpf(Command.PROG_LOAD, attr(len(log), ctypes.addressof(log)), what)[0]
        except BpfError:
            text = log.value.decode(errors="replace")
            raise BpfError(error.errno or 0, what, text) from error
    finally:
        del code_buffer, licence_buffer


def _kernel_version() -> int:
    """LINUX_VERSION_CODE, which kernels before 5.0 want to see for kprobes."""
    numbers = [int("".join(filter(str.isdigit, n)) or 0) for n in platform.release().split(".")[:3]]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    return (major << 16) + (minor << 8) + min(patch, 255)


def link_create(program_fd: int, target: int, attach: AttachType, flags: int = 0) -> int:
    """Attaches a program to a cgroup (directory fd), device (ifindex) or perf event (fd)."""
    attr = struct.pack("=IIII24x", program_fd, target, attach, flags)
    return _bpf(Command.LINK_CREATE, attr, f"attaching to {attach.name}")[0]


def raw_tracepoint_open(program_fd: int, name: str) -> int:
    """Attaches a program to a raw tracepoint and returns the link's descriptor."""
    buffer, at = _address(name.encode() + b"\0")
    attr = struct.pack("=QI4x", at, program_fd)
    try:
        return _bpf(Command.RAW_TRACEPOINT_OPEN, attr, f"attaching to tracepoint {name}")[0]
    finally:
        del buffer


def test_run(program_fd: int, packet: bytes, repeat: int = 1) -> tuple[int, int]:
    """Runs a program on a packet. Returns what it returned, and ns per run."""
    buffer, at = _address(packet)
    attr = struct.pack("=IIIIQQIIIIQQ", program_fd, 0, len(packet), 0, at, 0, repeat, 0, 0, 0, 0, 0)
    _, raw = _bpf(Command.PROG_TEST_RUN, attr, "test run")
    del buffer
    (returned,) = struct.unpack_from("=I", raw, 4)
    (duration_ns,) = struct.unpack_from("=I", raw, 36)
    return returned, duration_ns


def program_stats(fd: int) -> tuple[int, int]:
    """(total run time in ns, runs) of a program; counted while kernel.bpf_stats_enabled is 1."""
    run_time_ns, runs = struct.unpack_from("=QQ", _info(fd, "program info"), 192)
    return run_time_ns, runs


def _info(fd: int, what: str) -> bytes:
    """What the kernel tells of a program or map, zeros after it."""
    info = ctypes.create_string_buffer(256)
    attr = struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))
    _bpf(Command.OBJ_GET_INFO_BY_FD, attr, what)
    return info.raw
