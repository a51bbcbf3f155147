# SPDX-License-Identifier: Apache-2.0
"""Attaches programs to kernel functions, without a name in tracefs that could be left behind.

A kprobe opened through perf_event_open(2) lives as long as its descriptor (kernel 4.17, commit
e12f03d7031a). Kernels before 5.15 attach by ioctl, later ones by a link.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from pathlib import Path

from tracer.kernel import bpf
from tracer.kernel.bpf import AttachType
from tracer.kernel.offsets import ARGUMENTS

_PMU_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")
_ARMED = Path("/sys/kernel/debug/kprobes/enabled")
_SYSCALL_NUMBERS = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
_ATTR_SIZE = 112
_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408
_libc = ctypes.CDLL(None, use_errno=True)


def obstacle() -> str | None:
    """Why kprobes cannot be used here, or None."""
    if platform.machine() not in ARGUMENTS:
        return f"how functions of {platform.machine()} get their arguments is not known"
    if not _PMU_TYPE.exists():
        return "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"
    try:
        disarmed = _ARMED.read_text().strip() == "0"
    except OSError:  # debugfs is not mounted
        return None
    return f"kprobes are disarmed ({_ARMED} is 0)" if disarmed else None


def available() -> bool:
    """Whether kprobes can be used here."""
    return obstacle() is None


def attach(program_fd: int, function: str) -> list[int]:
    """Runs the program whenever the function is entered. Returns what to close to detach.

    Raises OSError: ENOENT if the kernel has no such function to probe.
    """
    name = ctypes.create_string_buffer(function.encode())
    attr = bytearray(_ATTR_SIZE)
    struct.pack_into("=II", attr, 0, int(_PMU_TYPE.read_text()), _ATTR_SIZE)
    struct.pack_into("=QQ", attr, 56, ctypes.addressof(name), 0)
    buffer = ctypes.create_string_buffer(bytes(attr), _ATTR_SIZE)
    event = _libc.syscall(
        _SYSCALL_NUMBERS[platform.machine()], buffer, -1, 0, -1, ctypes.c_ulong(_FD_CLOEXEC)
    )
    if event < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"probing {function}: {os.strerror(number)}")
    try:
        return [bpf.link_create(program_fd, event, AttachType.PERF_EVENT), event]
    except OSError:
        pass
    try:
        fcntl.ioctl(event, _IOC_SET_BPF, program_fd)
        fcntl.ioctl(event, _IOC_ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return [event]
