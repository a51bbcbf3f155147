# SPDX-License-Identifier: Apache-2.0
"""`dnstrace doctor`: what this host offers, what is missing, and the exact fix.

Every answer comes from trying the thing itself, not from a version.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shutil
import signal
import socket
import sys
import textwrap
import time
from typing import TYPE_CHECKING

from tracer import streams, who_is_who
from tracer.finding import Finding, State
from tracer.kernel import host, kprobes, netns
from tracer.kernel.btf import VMLINUX, Btf, BtfError
from tracer.kernel.compile import Compilation, CompileError
from tracer.kernel.limits import Limits
from tracer.kernel.offsets import kernel_offsets
from tracer.kernel.session import Selection, Session, Unsupported
from tracer.selftest import EXPECTED, ask_ourselves
from tracer.show.cells import duration, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from tracer.cluster.sources import Way

_OK, _FAILED, _UNSUPPORTED = 0, 1, 3
_STATE_WIDTH, _WHAT_WIDTH = 9, 20
_WIDTH_MIN, _WIDTH_MAX = 60, 120


def main(way: Way) -> int:
    """Prints the table. 0: this host can be traced; 3: it cannot; 1: it was interrupted.

    `way`: how the cluster is reached.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return _report(way)
    except _Interrupted:
        return _FAILED


class _Interrupted(Exception):
    """By a signal; what is attached must go first."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise _Interrupted


def _report(way: Way) -> int:
    states: set[State] = set()
    width = min(max(shutil.get_terminal_size().columns, _WIDTH_MIN), _WIDTH_MAX)
    _write(f"{'STATE':<{_STATE_WIDTH}}{'WHAT':<{_WHAT_WIDTH}}FOUND")
    for finding in itertools.chain(examine(), who_is_who.examine(way)):
        states.add(finding.state)
        _write(*_rows(finding, width))
    if "MISSING" in states:
        _write("", "This host cannot be traced yet: see MISSING.")
        return _UNSUPPORTED
    _write("", f"This host can be traced{', apart from the notes' if 'note' in states else ''}.")
    return _OK


def _rows(finding: Finding, width: int) -> list[str]:
    """Printable, and not wider than `width`, unless a word is."""
    indent = " " * (_STATE_WIDTH + _WHAT_WIDTH)
    begin = f"{finding.state:<{_STATE_WIDTH}}{finding.what:<{_WHAT_WIDTH}}"
    rows = _wrapped(finding.detail, width, begin, indent)
    if finding.fix:
        rows += _wrapped(finding.fix, width, f"{indent}fix: ", f"{indent}     ")
    return rows


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    lines = [printable(line) for line in text.splitlines()]
    return textwrap.wrap(
        "\n".join(lines),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _write(*lines: str) -> None:
    with streams.writing():
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()


def examine() -> Iterator[Finding]:
    """Looks at one thing after the other; stops where the rest would only repeat the reason."""
    yield Finding("kernel", "ok", f"{platform.release()} on {platform.machine()}")
    privileges = _privileges()
    yield privileges
    yield from _confinement()
    lockdown = _lockdown()
    yield lockdown
    types = _kernel_types()
    yield types
    yield _kprobes()
    yield _cgroup()
    if "MISSING" in (types.state, privileges.state, lockdown.state):
        return
    compilation = Compilation(Limits().macros(), kprobes=kprobes.available(), afresh=True)
    try:
        compiler = _compiler(compilation)
        yield compiler
        if compiler.state != "MISSING":
            yield from _tracing(compilation)
    finally:
        compilation.abandon()


def _privileges() -> Finding:
    missing = host.missing_capabilities()
    if not missing:
        return Finding("privileges", "ok", "all that is needed")
    names = f"without {', '.join(missing)}"
    if not host.may_trace():
        return Finding("privileges", "MISSING", names, "sudo dnstrace doctor")
    without = "; ".join(f"without {name}: {host.CAPABILITIES[name].lost}" for name in missing)
    return Finding("privileges", "note", without, f"give it {', '.join(missing)}")


def _confinement() -> Iterator[Finding]:
    for found in host.confinement():
        yield Finding("container", "note", found.what, found.fix)


def _lockdown() -> Finding:
    if host.locked_down():
        return Finding(
            "lockdown",
            "MISSING",
            "confidentiality: programs may not read kernel memory",
            "boot with lockdown=integrity, or without",
        )
    return Finding("lockdown", "ok", "programs may read kernel memory")


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


def _kprobes() -> Finding:
    obstacle = kprobes.obstacle()
    if obstacle is None:
        return Finding("kprobes", "ok", "a receive is when the process takes the answer")
    fix = "echo 1 > /sys/kernel/debug/kprobes/enabled"
    if "disarmed" not in obstacle:
        fix = "none is needed; any stock distribution kernel has kprobes"
    return Finding(
        "kprobes",
        "note",
        f"{obstacle}: cgroup programs watch the sockets instead; a receive is when a packet reaches "
        "the socket, not when the process takes it",
        fix,
    )


def _cgroup() -> Finding:
    root = netns.cgroup2_root()
    if root and not netns.whole_cgroup2(root):
        return Finding("cgroup v2", "note", f"{root}: only the cgroups of this container are known")
    if root:
        return Finding("cgroup v2", "ok", str(root))
    instead = "" if kprobes.available() else ", and sockets are not watched"
    return Finding(
        "cgroup v2",
        "note",
        f"not mounted: containers are told by network namespace only{instead}",
        netns.cgroup2_fix(),
    )


def _compiler(compilation: Compilation) -> Finding:
    started = time.monotonic()
    try:
        compilation.result()
    except CompileError as error:
        fix = "apt-get install python3-bpfcc" if "import bcc" in str(error) else None
        return Finding("compiler (BCC)", "MISSING", str(error), fix)
    try:
        version = f"{importlib.metadata.version('bcc')}: "
    except importlib.metadata.PackageNotFoundError:
        version = ""
    seconds = time.monotonic() - started
    return Finding("compiler (BCC)", "ok", f"{version}programs compile in {seconds:.1f} s")


def _tracing(compilation: Compilation) -> Iterator[Finding]:
    """Attaches everything for a moment, and traces a query of its own."""
    started = time.monotonic()
    try:
        session = Session.open(Selection(pid=0), compilation=compilation)
    except Unsupported as error:
        yield Finding("attaching", "MISSING", str(error))
        return
    try:
        yield _attached(session, time.monotonic() - started)
        for note in session.notes:
            if note.partition(":")[0] != kprobes.obstacle():  # which has its own row
                yield Finding("attaching", "note", note)
        yield from _self_test(session)
    finally:
        session.close()


def _attached(session: Session, seconds: float) -> Finding:
    devices = session.devices
    by = f" ({session.attached_by})" if session.attached_by else ""
    detail = (
        f"sockets by {session.hooks or 'no'} hooks; devices{by}: {devices.count()}, network "
        f"namespaces: {len(devices.namespaces())}; armed in {seconds:.1f} s"
    )
    if session.hooks is None or devices.count() == 0:
        return Finding("attaching", "note", detail)
    if devices.failures:
        failed = f"; {devices.failures} devices failed ({devices.last_failure})"
        return Finding("attaching", "note", detail + failed)
    return Finding("attaching", "ok", detail)


def _self_test(session: Session) -> Iterator[Finding]:
    what = "a query of its own"
    if session.hooks is None:
        yield Finding(what, "note", "not tried: no socket is watched")
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        version = "IPv6" if family == socket.AF_INET6 else "IPv4"
        try:
            seen = ask_ourselves(session, family)
        except OSError as error:
            why = f"{version}: could not be asked over the loopback: {error.strerror or error}"
            yield Finding(what, "note", why, "ip link set lo up")
            continue
        hops = ", ".join(hop.name.lower() for hop in seen.hops) if seen else "nothing"
        if seen and seen.hops == EXPECTED and seen.pid:
            took = duration(seen.latency_ns)
            yield Finding(what, "ok", f"{version}: seen at {hops}; answered in {took}")
            continue
        other = "tracepoint" if session.hooks == "kprobe" else "kprobe"
        yield Finding(
            what,
            "MISSING",
            f"{version}: seen at {hops}, not at {', '.join(h.name.lower() for h in EXPECTED)}: "
            f"{session.hooks} hooks are attached, but not all of them are run",
            f"use --hooks {other}",
        )
