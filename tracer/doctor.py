# SPDX-License-Identifier: Apache-2.0
"""`dnstrace doctor`: what this host offers, what is missing, and the exact fix.

Every answer comes from trying the thing itself, not from a version.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tracer import streams
from tracer.kernel import kprobes, netns
from tracer.kernel.btf import VMLINUX, Btf, BtfError
from tracer.kernel.compile import Compilation, CompileError
from tracer.kernel.offsets import kernel_offsets
from tracer.kernel.session import Limits, Selection, Session, Unsupported
from tracer.show.cells import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_OK, _UNSUPPORTED = 0, 3
State = Literal["ok", "note", "MISSING"]
# include/uapi/linux/capability.h
_CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}


class Finding(NamedTuple):
    """One line of the report. `fix` is what to do, where something is missing."""

    what: str
    state: State
    detail: str
    fix: str | None = None


def main() -> int:
    """Prints the report. 0: this host can be traced; 3: it cannot."""
    able = True
    for finding in examine():
        able = able and finding.state != "MISSING"
        mark = "ok" if finding.state == "ok" else finding.state
        lines = [f"{mark:<8}{finding.what:<19} {finding.detail}"]
        if finding.fix:
            lines.append(f"{'':<28}fix: {finding.fix}")
        _write(*lines)
    _write("", f"This host {'can be traced.' if able else 'cannot be traced yet: see MISSING.'}")
    return _OK if able else _UNSUPPORTED


def _write(*lines: str) -> None:
    with streams.writing():
        # Devices, for one, are called what whoever made them likes.
        sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
        sys.stdout.flush()


def examine() -> Iterator[Finding]:
    """Looks at one thing after the other; stops where the rest would only repeat the reason."""
    yield Finding("kernel", "ok", f"{platform.release()} on {platform.machine()}")
    privileges = _privileges()
    yield privileges
    types = _kernel_types()
    yield types
    yield from _optional()
    if types.state == "MISSING":
        return
    compiled = _compiler()
    yield compiled
    if compiled.state == "MISSING" or privileges.state == "MISSING":
        return
    yield _attaching()


def _privileges() -> Finding:
    held = _effective_capabilities()
    missing = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    if os.geteuid() == 0 and not {"CAP_NET_ADMIN", "CAP_SYS_ADMIN"} & set(missing):
        detail = "root" + (f", without {', '.join(missing)}" if missing else "")
        return Finding("privileges", "note" if missing else "ok", detail)
    return Finding("privileges", "MISSING", f"without {', '.join(missing)}", "sudo dnstrace doctor")


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _kernel_types() -> Finding:
    try:
        offsets = kernel_offsets(Btf.load(), kprobes=kprobes.available())
    except BtfError as error:
        return Finding(
            "kernel types (BTF)",
            "MISSING",
            str(error),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF (stock kernels of Debian 11, "
            "Ubuntu 20.10, RHEL 8.2 and later have it)",
        )
    conntrack = "" if "OFFSET_nf_conn_original" in offsets else ", conntrack's not (not loaded)"
    return Finding("kernel types (BTF)", "ok", f"{VMLINUX}, no kernel headers needed{conntrack}")


def _optional() -> Iterator[Finding]:
    if kprobes.available():
        yield Finding("kprobes", "ok", "a receive is when the process takes the answer")
    else:
        yield Finding(
            "kprobes",
            "note",
            "none: sockets are watched by cgroup programs; a receive is when the answer is queued",
            "boot a kernel with CONFIG_KPROBE_EVENTS (any stock distribution kernel)",
        )
    root = netns.cgroup2_root()
    if root and not netns.whole_cgroup2(root):
        yield Finding("cgroup v2", "note", f"{root}: only the cgroups of this container are traced")
    elif root:
        yield Finding("cgroup v2", "ok", str(root))
    else:
        yield Finding(
            "cgroup v2",
            "note" if kprobes.available() else "MISSING",
            "not mounted: containers are told by network namespace only",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    lockdown = Path("/sys/kernel/security/lockdown")
    if lockdown.exists() and "[confidentiality]" in lockdown.read_text():
        yield Finding(
            "lockdown",
            "MISSING",
            "confidentiality: programs may not read kernel memory",
            "boot with lockdown=integrity, or without",
        )


def _compiler() -> Finding:
    started = time.monotonic()
    sizes = {"SLOTS": Limits().slots, "SMALL_PAGES": 1, "LARGE_PAGES": 1}
    try:
        Compilation(sizes, kprobes=kprobes.available()).result().close()
    except CompileError as error:
        fix = "apt-get install python3-bpfcc" if "import bcc" in str(error) else None
        return Finding("compiler (BCC)", "MISSING", str(error), fix)
    return Finding(
        "compiler (BCC)", "ok", f"programs compile in {time.monotonic() - started:.1f} s"
    )


def _attaching() -> Finding:
    started = time.monotonic()
    try:
        session = Session.open(Selection(only_selected=True))
    except Unsupported as error:
        return Finding("attaching", "MISSING", str(error))
    try:
        detail = (
            f"{session.hooks} hooks, {session.devices.count()} devices in "
            f"{len(session.devices.namespaces())} network namespaces, armed in "
            f"{time.monotonic() - started:.1f} s"
        )
        if session.devices.failures:
            return Finding(
                "attaching",
                "note",
                f"{detail}; {session.devices.failures} devices failed "
                f"({session.devices.last_failure})",
            )
        return Finding("attaching", "ok", detail)
    finally:
        session.close()
