# SPDX-License-Identifier: Apache-2.0
"""Compiles bpf/ with BCC, without kernel headers, in a child process that then goes away.

LLVM takes more memory than all the rest of the tracer, and gives none of it back. So a forked
child compiles, creates the maps, and hands over the instructions and the maps' descriptors.

BCC wants a kernel source tree for a handful of definitions; it gets bpf/kernel/, which has just
these. Everything about the kernel's own structs comes from its BTF (see offsets.py). What was
compiled before is not compiled again (see code_cache.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import platform
import re
import resource
import signal
import socket
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.kernel import bpf, code_cache, host
from tracer.kernel.bpf import SYSCALL_NUMBERS, BpfError
from tracer.kernel.btf import VMLINUX, Btf, BtfError
from tracer.kernel.offsets import UnknownMachine, kernel_offsets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_BPF_PSEUDO_MAP_FD = 1
_LD_IMM64 = 0x18
_INSTRUCTION = struct.Struct("=BBhi")
_PAGE = os.sysconf("SC_PAGESIZE")
_MAX_MAPS = 64
_PR_SET_PDEATHSIG = 1
_BCC_ARCH = {"x86_64": "x86", "aarch64": "arm64"}  # what BCC calls machines other than its own
_INCLUDE = re.compile(r'^#include "(\w+\.h)"$', re.MULTILINE)

# Programs, and the macro without which each is left out.
PROGRAMS = {
    "packet": None,
    "packet_dropped": None,
    "free_one_slot": None,
    "kprobe_packet": "OFFSET_argument_0",
    "socket_address": "OFFSET_sock_cookie",
}
MAPS = (
    "slot_index",
    "free_slots",
    "slots_freed",
    "slots",
    "slot_start",
    "variant_last_ns",
    "crowded_last_ns",
    "small_ring",
    "large_ring",
    "connection_ids",
    "connections",
    "meant_by_socket",
    "segment_ring",
    "counters",
    "settings",
    "dns_ports",
    "cgroup_verdicts",
    "netns_verdicts",
    "serving_cgroups",
    "all_series",
    "series_begun",
    "buckets",
    "upstream_spans",
    "scratches",
    "forgetful",
)


class CompileError(Exception):
    """The programs could not be compiled. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """The kernel that programs are compiled for; the one that runs, unless it is said."""

    types: Path = VMLINUX
    machine: str = field(default_factory=platform.machine)


@dataclass(frozen=True, slots=True)
class Object:
    """Compiled programs, and the maps that they refer to.

    In `instructions`, a map stands as its position in MAPS; `linked` puts this process's
    descriptors in.
    """

    instructions: Mapping[str, bytes]
    map_fds: Mapping[str, int]
    drop_reasons: Mapping[int, str]  # enum skb_drop_reason of this kernel; empty before 5.17

    def linked(self, program: str, constants: Mapping[int, int] | None = None) -> bytes:
        """A program ready to load, with each 64-bit constant in `constants` replaced."""
        code = bytearray(self.instructions[program])
        position = 0
        while position < len(code):
            opcode, registers, offset, low = _INSTRUCTION.unpack_from(code, position)
            if opcode != _LD_IMM64:
                position += 8
                continue
            if registers >> 4 == _BPF_PSEUDO_MAP_FD:
                _INSTRUCTION.pack_into(
                    code, position, opcode, registers, offset, self.map_fds[MAPS[low]]
                )
            elif constants:
                (high,) = struct.unpack_from("=I", code, position + 12)
                value = constants.get(high << 32 | low & 0xFFFFFFFF)
                if value is not None:
                    struct.pack_into("=I", code, position + 4, value & 0xFFFFFFFF)
                    struct.pack_into("=I", code, position + 12, value >> 32)
            position += 16
        return bytes(code)

    def close(self) -> None:
        """Gives up the maps."""
        for fd in self.map_fds.values():
            os.close(fd)


def source_text() -> str:
    """The C of all programs as one text: BCC handles its own syntax in the main file only."""
    bpf = files("tracer") / "bpf"

    def include(match: re.Match[str]) -> str:
        name = match[1]
        return f'#line 1 "{name}"\n{bpf.joinpath(name).read_text()}'

    main = bpf.joinpath("dnstrace.bpf.c").read_text()
    return _INCLUDE.sub(include, main)


class Compilation:
    """A compilation under way in a child process. `sizes` are those of maps (see bpf/maps.h).

    `more` is C that is compiled along, such as assertions. `afresh`: it is compiled even if it was
    before. Start it before anything else is imported or any thread runs: the child is a fork.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        kprobes: bool,
        more: str = "",
        target: Target | None = None,
        afresh: bool = False,
    ) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._child = os.fork()
        if self._child == 0:
            self._channel.close()
            # Nobody wants the result of a parent that was killed.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _compile_in_child(
                theirs, sizes, more, target or Target(), kprobes=kprobes, afresh=afresh
            )
        theirs.close()
        self._result: Object | None = None

    def abandon(self) -> None:
        """Ends it, unless it has ended already: nobody wants the result."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0
            self._channel.close()

    def result(self) -> Object:
        """Waits for it; always the same. Raises CompileError."""
        if self._result:
            return self._result
        with self._channel:
            payload, fds = _receive(self._channel)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        if not payload:
            raise CompileError(f"the compiler died (status {status}); is there memory left?")
        answer = pickle.loads(payload)  # noqa: S301 - our own child wrote it
        if isinstance(answer, str):
            raise CompileError(answer)
        instructions, drop_reasons = answer
        self._result = Object(instructions, dict(zip(MAPS, fds, strict=True)), drop_reasons)
        return self._result


def _compile_in_child(
    channel: socket.socket,
    sizes: Mapping[str, int],
    more: str,
    target: Target,
    *,
    kprobes: bool,
    afresh: bool,
) -> None:
    """Never returns. LLVM writes its complaints to stderr, which are sent along."""
    answer: str | tuple[Mapping[str, bytes], dict[int, str]]
    fds: list[int] = []
    with tempfile.TemporaryFile() as complaints:
        os.dup2(complaints.fileno(), 1)
        os.dup2(complaints.fileno(), 2)
        try:
            _require_known(target.machine)
            btf = Btf.load(target.types)
            flags = _prepare_environment(target.machine)
            offsets = kernel_offsets(btf, kprobes=kprobes, machine=target.machine)
            macros = {**offsets, **sizes, **_kernel_macros()}
            text = source_text() + more
            instructions, fds = _code_for(text, macros, flags, target.machine, afresh=afresh)
            reasons = btf.enumerators("skb_drop_reason").items()
            answer = (instructions, {n: r.removeprefix("SKB_DROP_REASON_") for n, r in reasons})
        except UnknownMachine as error:
            answer = str(error)
        except BtfError as error:
            answer = (
                f"{error}; dnstrace needs a kernel built with CONFIG_DEBUG_INFO_BTF "
                "(stock kernels of Debian 11, Ubuntu 20.10, RHEL 8.2 and later have it)"
            )
        except ImportError:
            answer = "Python cannot import bcc: install it with 'apt-get install python3-bpfcc'"
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip()
            answer = f"BCC cannot compile the programs: {error}\n{said}".strip() + _locked(said)
        payload = pickle.dumps(answer)
        channel.sendall(struct.pack("=I", len(payload)) + payload)
        socket.send_fds(channel, [b"f"], fds)
    os._exit(0)


def _locked(said: str) -> str:
    """What may be the reason, before 5.11, that maps are refused."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or os.strerror(errno.EPERM) not in said:
        return ""
    return (
        f"\n(locked memory is limited to {locked >> 10} KiB, and before 5.11 maps count as such: "
        "give CAP_SYS_RESOURCE, or LimitMEMLOCK=infinity)"
    )


def _require_known(machine: str) -> None:
    if machine not in SYSCALL_NUMBERS:
        known = ", ".join(sorted(SYSCALL_NUMBERS))
        raise UnknownMachine(f"the system calls of {machine} are not known (known: {known})")


def _prepare_environment(machine: str) -> list[str]:
    """Says to BCC where headers are and what to compile for. Returns what clang is told besides."""
    os.environ["BCC_KERNEL_SOURCE"] = str(files("tracer") / "bpf" / "kernel")
    # Whoever builds kernels may have these, for other purposes.
    for name in ("ARCH", "BCC_LINUX_VERSION_CODE"):
        os.environ.pop(name, None)
    if machine == platform.machine():
        return []
    os.environ["ARCH"] = _BCC_ARCH.get(machine, machine)
    return ["-fcf-protection=none"]  # BCC for x86 asks for it, whatever the target


def _code_for(
    text: str, macros: Mapping[str, int], flags: Iterable[str], machine: str, *, afresh: bool
) -> tuple[Mapping[str, bytes], list[int]]:
    """Programs, and maps in the order of MAPS."""
    # Without debugging information (-g0) it takes a fifth less.
    arguments = ["-Wno-unknown-warning-option", "-g0", *flags]
    arguments += [f"-D{name}={value}" for name, value in macros.items()]
    name = code_cache.name_of([*MAPS, *PROGRAMS, machine, *arguments, *_headers(), text])
    kept = None if afresh else code_cache.find(name)
    if kept is not None and len(kept.maps) == len(MAPS):
        host.raise_limits()
        with suppress(BpfError, struct.error, TypeError, AttributeError):  # BCC says more
            return kept.instructions, _made(kept.maps)
    code, fds = _compile(text, arguments, macros)
    code_cache.keep(name, code_cache.Code(code, tuple(map(bpf.map_shape, fds))))
    return code, fds


def _made(shapes: Iterable[bpf.MapShape]) -> list[int]:
    """Empty maps. Raises BpfError; then there is none."""
    fds: list[int] = []
    try:
        for shape in shapes:
            fds.append(bpf.map_create(shape))  # noqa: PERF401 - those until then are closed
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _headers() -> Iterator[str]:
    """What the text includes besides: the definitions that stand for a kernel source tree."""
    tree = Path(str(files("tracer") / "bpf" / "kernel"))
    for path in sorted(tree.rglob("*.h")):
        yield str(path.relative_to(tree))
        yield path.read_text()


def _compile(
    text: str, arguments: list[str], macros: Collection[str]
) -> tuple[dict[str, bytes], list[int]]:
    from bcc import BPF
    from bcc.libbcc import lib

    module = BPF(text=text.encode(), cflags=arguments)
    fds = [lib.bpf_table_fd(module.module, name.encode()) for name in MAPS]
    numbers = {fd: number for number, fd in enumerate(fds)}
    instructions = {
        name: _numbered(module.dump_func(name.encode()), numbers)
        for name, macro in PROGRAMS.items()
        if macro is None or macro in macros
    }
    return instructions, fds


def _numbered(code: bytes, numbers: Mapping[int, int]) -> bytes:
    """The instructions with each map's descriptor replaced by its number."""
    result = bytearray(code)
    position = 0
    while position < len(result):
        opcode, registers, offset, fd = _INSTRUCTION.unpack_from(result, position)
        if opcode == _LD_IMM64:
            if registers >> 4 == _BPF_PSEUDO_MAP_FD:
                _INSTRUCTION.pack_into(result, position, opcode, registers, offset, numbers[fd])
            position += 8
        position += 8
    return bytes(result)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The child's answer and descriptors; empty if it died first."""
    with channel.makefile("rb", buffering=0) as stream:
        head = stream.read(4)
        if not head or len(head) < 4:
            return b"", []
        (size,) = struct.unpack("=I", head)
        payload = b""
        while len(payload) < size:
            part = stream.read(size - len(payload))
            if not part:
                return b"", []
            payload += part
    _, fds, _, _ = socket.recv_fds(channel, 1, _MAX_MAPS)
    return payload, fds


def _kernel_macros() -> dict[str, int]:
    """What a kernel's headers would tell of this machine."""
    release = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    major, minor, patch = (int(part or 0) for part in release.groups()) if release else (0, 0, 0)
    return {
        "LINUX_VERSION_CODE": (major << 16) + (minor << 8) + min(patch, 255),
        "PAGE_SIZE": _PAGE,
    }
