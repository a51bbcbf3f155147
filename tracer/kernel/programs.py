# SPDX-License-Identifier: Apache-2.0
"""Turns the compiled object into programs for each hook, and attaches them.

One compiled program serves several hooks: constants in it are replaced before it is loaded, and
the verifier then drops what that copy does not need.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from tracer.kernel import bpf, clsact, kprobes
from tracer.kernel.bpf import AttachType, ProgramType
from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from tracer.kernel.compile import Object

# The marks of bpf/marks.h.
_MARK_NETNS = 0x646E737472616301
_MARK_L2_HLEN = 0x646E737472616302
_MARK_HOOK = 0x646E737472616303
_MARK_VERDICT = 0x646E737472616304
_MARK_SKB_ARGUMENT = 0x646E737472616305
_MARK_READ_TASK = 0x646E737472616306
_MARK_PULL = 0x646E737472616307
_MARK_UDP = 0x646E737472616308
_MARK_FAMILY = 0x646E737472616309
_MARK_CONNECTS = 0x646E73747261630A

_CGROUP_ALLOW = 1
_TC_CONTINUE = 0xFFFFFFFF  # TCX_NEXT, and TC_ACT_UNSPEC for clsact: ask the next program


def load_device_program(
    built: Object, kind: HopKind, netns: int, l2_len: int, *, for_kprobes: bool = False
) -> int:
    """A TC program for what enters (INGRESS) or leaves (EGRESS) the devices of a namespace.

    `for_kprobes`: it sees to it that kprobes can read the packet further on.
    """
    constants = {
        _MARK_HOOK: int(kind),
        _MARK_VERDICT: _TC_CONTINUE,
        _MARK_L2_HLEN: l2_len,
        _MARK_NETNS: netns,
        _MARK_PULL: int(for_kprobes),
        _MARK_UDP: 1,
    }
    code = built.linked("packet", constants)
    return bpf.program_load(ProgramType.SCHED_CLS, code, f"dnstrace_{kind.name.lower()}")


_DEVICE_ATTACH = {
    HopKind.INGRESS: AttachType.TCX_INGRESS,
    HopKind.EGRESS: AttachType.TCX_EGRESS,
}


def fill_free_slots(built: Object, slots: int) -> None:
    """Makes all slots free: by a program, since as many system calls would take a while."""
    code = built.linked("free_one_slot")
    # A type that can be run on a packet, and asks for no right to network devices.
    program = bpf.program_load(ProgramType.SOCKET_FILTER, code, "dnstrace_free")
    try:
        bpf.test_run(program, bytes(64), slots)
    finally:
        os.close(program)


_CGROUP_ATTACH = {
    HopKind.SEND: AttachType.CGROUP_INET_EGRESS,
    HopKind.RECEIVE: AttachType.CGROUP_INET_INGRESS,
}
# Kernel function, what its being called means, and which argument is the packet.
_PROBED = (
    ("ip_send_skb", HopKind.SEND, 1),
    ("ip6_send_skb", HopKind.SEND, 0),
    ("skb_consume_udp", HopKind.RECEIVE, 1),
)


def load_socket_program(built: Object, kind: HopKind, *, udp: bool = True) -> int:
    """A cgroup_skb program for what sockets send (SEND) or are given (RECEIVE).

    Without `udp`, it sees to TCP alone. Where the kernel has no helpers that tell such a program of
    the process, it reads the task.
    """
    constants = {
        _MARK_HOOK: int(kind),
        _MARK_VERDICT: _CGROUP_ALLOW,
        _MARK_L2_HLEN: 0,
        _MARK_NETNS: 0,
        _MARK_UDP: int(udp),
        _MARK_PULL: 0,
        _MARK_READ_TASK: int(not _tells_of_processes()),
    }
    code = built.linked("packet", constants)
    return bpf.program_load(
        ProgramType.CGROUP_SKB, code, f"dnstrace_{kind.name.lower()}", _CGROUP_ATTACH[kind]
    )


# Calls bpf_get_current_pid_tgid and bpf_get_current_cgroup_id, and returns 1.
_ASKS_WHO = b"".join(
    struct.pack("=BBhi", *instruction)
    for instruction in ((0x85, 0, 0, 14), (0x85, 0, 0, 80), (0xB7, 0, 0, 1), (0x95, 0, 0, 0))
)


@functools.cache
def _tells_of_processes() -> bool:
    """Whether cgroup_skb programs may ask who sends: from 6.10 on, by a program that does little else.

    Asking with the whole program takes the verifier seconds on small machines.
    """
    attach = AttachType.CGROUP_INET_EGRESS
    try:
        program = bpf.program_load(ProgramType.CGROUP_SKB, _ASKS_WHO, "dnstrace_who", attach)
    except bpf.BpfError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    os.close(program)
    return True


def attach_to_cgroup(built: Object, cgroup: Path, *, udp: bool = True) -> list[int]:
    """Watches all sockets of the cgroup and those below. Returns what to close to detach.

    The receive is then when the packet reaches the socket, before its buffer is known to have room.
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    links: list[int] = []

    def attach(kind: HopKind) -> None:
        program = load_socket_program(built, kind, udp=udp)
        try:
            links.append(bpf.link_create(program, directory, _CGROUP_ATTACH[kind]))
        finally:
            os.close(program)

    try:
        with ThreadPoolExecutor() as pool:  # the verifier can look at both at once
            list(pool.map(attach, _CGROUP_ATTACH))
    except OSError:
        close_all(links)
        raise
    finally:
        os.close(directory)
    return links


# Where it is attached: the family of the addresses, and whether they are for a whole connection.
_ADDRESS_ATTACH = {
    AttachType.CGROUP_INET4_CONNECT: (4, True),
    AttachType.CGROUP_INET6_CONNECT: (6, True),
    AttachType.CGROUP_UDP4_SENDMSG: (4, False),
    AttachType.CGROUP_UDP6_SENDMSG: (6, False),
}
_BPF_F_PREORDER = 1 << 6  # before all programs of cgroups below, and of others here


def attach_to_addresses(built: Object, cgroup: Path) -> tuple[list[int], bool]:
    """Watches for whom sockets are told to send to, in the cgroup and those below.

    Returns what to close to detach, and whether this is told before any other program can put in
    another address (kernel 6.16 or later). Raises OSError.
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    links: list[int] = []
    first = True
    try:
        for attach, (family, connects) in _ADDRESS_ATTACH.items():
            constants = {_MARK_FAMILY: family, _MARK_CONNECTS: int(connects)}
            code = built.linked("socket_address", constants)
            program = bpf.program_load(ProgramType.CGROUP_SOCK_ADDR, code, "dnstrace_meant", attach)
            try:
                links.append(bpf.link_create(program, directory, attach, _BPF_F_PREORDER))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                links.append(bpf.link_create(program, directory, attach))
                first = False
            finally:
                os.close(program)
    except OSError:
        close_all(links)
        raise
    finally:
        os.close(directory)
    return links, first


def attach_to_functions(built: Object) -> list[int]:
    """Watches all sockets by kprobes. Returns what to close to detach.

    The receive is then when the process takes the packet.
    """
    links: list[int] = []
    try:
        for function, kind, argument in _PROBED:
            constants = {
                _MARK_HOOK: int(kind),
                _MARK_SKB_ARGUMENT: argument,
                _MARK_READ_TASK: 0,
            }
            code = built.linked("kprobe_packet", constants)
            name = f"dnstrace_{kind.name.lower()}"
            program = bpf.program_load(ProgramType.KPROBE, code, name)
            try:
                links += kprobes.attach(program, function)
            finally:
                os.close(program)
    except OSError:
        close_all(links)
        raise
    return links


def attach_to_drops(built: Object) -> list[int]:
    """Watches for packets that the kernel gives up. Returns what to close to detach."""
    code = built.linked("packet_dropped")
    program = bpf.program_load(ProgramType.RAW_TRACEPOINT, code, "dnstrace_drop")
    try:
        return [bpf.raw_tracepoint_open(program, "kfree_skb")]
    finally:
        os.close(program)


def close_all(descriptors: Iterable[int]) -> None:
    """Closes each."""
    for descriptor in descriptors:
        os.close(descriptor)


DeviceHooks = Literal["TCX links", "clsact filters"]


def attach_to_device(
    programs: Mapping[HopKind, int], ifindex: int
) -> tuple[Callable[[], None], DeviceHooks]:
    """Watches a device of this thread's network namespace: by TCX links, else by filters.

    Returns what detaches it again, to be called in that namespace, and which it was. Raises OSError.
    """
    try:
        links = _attach_links(programs, ifindex)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        made = clsact.attach(programs, ifindex)  # TCX came with 6.6 (e420bed02507)
        return functools.partial(clsact.detach, ifindex, made=made), "clsact filters"
    return functools.partial(close_all, links), "TCX links"


def _attach_links(programs: Mapping[HopKind, int], ifindex: int) -> list[int]:
    links: list[int] = []
    try:
        for kind, attach in _DEVICE_ATTACH.items():
            links.append(bpf.link_create(programs[kind], ifindex, attach))
    except OSError:
        close_all(links)
        raise
    return links
