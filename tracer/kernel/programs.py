# SPDX-License-Identifier: Apache-2.0
"""Turns the compiled object into programs for each hook, and attaches them.

One compiled program serves several hooks: constants in it are replaced before it is loaded, and
the verifier then drops what that copy does not need.
"""

from __future__ import annotations

import os
from pathlib import Path

from tracer.kernel import bpf
from tracer.kernel.bpf import AttachType, ProgramType
from tracer.kernel.compile import Object
from tracer.record import HopKind

# The marks of bpf/dnstrace.bpf.c.
_MARK_NETNS = 0x646E737472616301
_MARK_L2_HLEN = 0x646E737472616302
_MARK_HOOK = 0x646E737472616303
_MARK_VERDICT = 0x646E737472616304

_CGROUP_ALLOW = 1
_TC_CONTINUE = 0xFFFFFFFF  # TCX_NEXT, and TC_ACT_UNSPEC for clsact: ask the next program


def load_socket_program(built: Object, kind: HopKind) -> int:
    """A cgroup_skb program for what sockets send (SEND) or receive (RECEIVE)."""
    attach = _SOCKET_ATTACH[kind]
    constants = {
        _MARK_HOOK: int(kind),
        _MARK_VERDICT: _CGROUP_ALLOW,
        _MARK_L2_HLEN: 0,
        _MARK_NETNS: 0,
    }
    code = built.linked("packet", constants)
    return bpf.program_load(ProgramType.CGROUP_SKB, code, f"dnstrace_{kind.name.lower()}", attach)


def load_device_program(built: Object, kind: HopKind, netns: int, l2_len: int) -> int:
    """A TC program for what enters (INGRESS) or leaves (EGRESS) the devices of a namespace."""
    constants = {
        _MARK_HOOK: int(kind),
        _MARK_VERDICT: _TC_CONTINUE,
        _MARK_L2_HLEN: l2_len,
        _MARK_NETNS: netns,
    }
    code = built.linked("packet", constants)
    return bpf.program_load(ProgramType.SCHED_CLS, code, f"dnstrace_{kind.name.lower()}")


_SOCKET_ATTACH = {
    HopKind.SEND: AttachType.CGROUP_INET_EGRESS,
    HopKind.RECEIVE: AttachType.CGROUP_INET_INGRESS,
}
_DEVICE_ATTACH = {
    HopKind.INGRESS: AttachType.TCX_INGRESS,
    HopKind.EGRESS: AttachType.TCX_EGRESS,
}


def attach_to_cgroup(built: Object, cgroup: Path) -> list[int]:
    """Watches all sockets of the cgroup and those below. Returns what to close to detach."""
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    links = []
    try:
        for kind, attach in _SOCKET_ATTACH.items():
            program = load_socket_program(built, kind)
            try:
                links.append(bpf.link_create(program, directory, attach))
            finally:
                os.close(program)
    finally:
        os.close(directory)
    return links


def attach_to_device(programs: dict[HopKind, int], ifindex: int) -> list[int]:
    """Watches a device of this thread's network namespace by TCX links."""
    links: list[int] = []
    try:
        for kind, attach in _DEVICE_ATTACH.items():
            links.append(bpf.link_create(programs[kind], ifindex, attach))
    except OSError:
        for link in links:
            os.close(link)
        raise
    return links
