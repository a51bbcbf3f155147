# SPDX-License-Identifier: Apache-2.0
"""What a host that offers less gets: as much as can be had, and a word on what is missing.

Each test takes something away for one process only, in namespaces or capabilities of its own.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tracing import DNSTRACE, Trace, our_links, soon_gone, tracing
from tracer.kernel import kprobes, netns

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("root")

HAVE_KPROBES = kprobes.available()
HOOKS = "kprobe" if HAVE_KPROBES else "tracepoint"
# As on a kernel whose functions are called otherwise, or were inlined.
WITHOUT_SYMBOL = """
import sys
from tracer.kernel import programs
programs._PROBED = (*programs._PROBED[:2], ("no_such_function", *programs._PROBED[2][1:]))
from tracer.cli import main
sys.exit(main())
"""


def without(*capabilities: str) -> list[str]:
    """A command line's start: as root, but for these."""
    return ["setpriv", f"--bounding-set={','.join(f'-{name}' for name in capabilities)}"]


def hidden(mounts: str, *command: str) -> list[str]:
    """A command line's start: `mounts` is shell that changes this process's mounts only."""
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]


NO_CGROUP2 = "for at in $(findmnt -rno TARGET -t cgroup2); do umount -l $at || exit; done"
NO_BTF = "mount -t tmpfs none /sys/kernel/btf"


def doctor(prefix: Sequence[str], command: Sequence[str] = DNSTRACE) -> tuple[int, str]:
    """Exit status and what it said, rows unwrapped."""
    done = subprocess.run(
        [*prefix, *command, "doctor"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    print(done.stdout)
    return done.returncode, " ".join(done.stdout.split())


def refusal(prefix: Sequence[str], *arguments: str) -> str:
    """What the tracer says that cannot trace; one line on stderr, and status 3."""
    done = subprocess.run(
        [*prefix, *DNSTRACE, "--duration", "1s", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


def ask_and_answer() -> tuple[int, int]:
    """A query over the loopback to a server of our own; its port and ours."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("127.0.0.1", PORT))
        client.sendto(
            struct.pack("!6H", 5, 0x100, 1, 0, 0, 0) + b"\1a\0\0\1\0\1", ("127.0.0.1", PORT)
        )
        request, address = server.recvfrom(512)
        server.sendto(request[:2] + b"\x81\x83" + request[4:], address)
        client.recv(512)
        return PORT, client.getsockname()[1]


PORT = 15353  # below those that the kernel gives to others


def traced(command: list[str], tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], Trace]:
    """The one transaction that a tracer saw which was started so."""
    with tracing(
        "--no-kubernetes", "--port", str(PORT), *arguments, tmp_path=tmp_path, command=command
    ) as tracer:
        ask_and_answer()
        trace = tracer.stop()
    (t,) = trace.transactions
    assert (t["status"], t["rcode"]) == ("answered", "NXDOMAIN")
    return t, trace


def test_unprivileged() -> None:
    """Both say what is needed."""
    nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    status, said = doctor(nobody)
    assert status == 3
    assert "MISSING privileges without CAP_NET_ADMIN" in said
    assert "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN" in refusal(nobody)


def test_least_capabilities(tmp_path: Path) -> None:
    """Those that the message names are enough for this network namespace."""
    least = ["setpriv", "--bounding-set=-all,+bpf,+perfmon,+net_admin", "--inh-caps=-all"]
    t, trace = traced([*least, *DNSTRACE], tmp_path)
    assert t["client"]["pid"] == os.getpid()
    assert "in 1 network namespace" in trace.stderr


def test_hidden_kernel_symbols(tmp_path: Path) -> None:
    """kernel.kptr_restrict and the like take only the names of functions that drop packets."""
    symbols = "mount --bind /dev/null /proc/kallsyms"
    t, _ = traced(
        hidden(
            symbols,
            *DNSTRACE,
        ),
        tmp_path,
        "--hooks",
        "tracepoint",
    )
    assert t["client"]["pid"] == os.getpid()


def test_doctor_tells_half_blind_hooks() -> None:
    """A hook that is attached but never run, as where a function was inlined."""
    half = """
import sys
from tracer.kernel import programs
from tracer.record import HopKind
programs._PROBED = (("ip_mc_output", *programs._PROBED[0][1:]), *programs._PROBED[1:])
programs._CGROUP_ATTACH = {HopKind.RECEIVE: programs._CGROUP_ATTACH[HopKind.RECEIVE]}
from tracer.cli import main
sys.exit(main())
"""
    status, said = doctor([], [sys.executable, "-c", half])
    assert status == 3
    assert "IPv4: seen at receive, receive, not at send" in said


def test_doctor_that_is_terminated_leaves_nothing() -> None:
    """As by a supervisor's time-out, while everything is attached."""
    with subprocess.Popen([*DNSTRACE, "doctor"], stdout=subprocess.PIPE, text=True) as asked:
        assert asked.stdout
        for line in asked.stdout:
            if "attaching" in line:
                break
        asked.terminate()
        asked.stdout.read()
    assert asked.returncode in (0, 1)
    assert soon_gone(our_links)


def test_filters_that_devices_alone_cannot_serve() -> None:
    """Without socket hooks no process is known: said, not silently nothing."""
    if HAVE_KPROBES:
        pytest.skip("not offered by this kernel: it has kprobes, so sockets are always watched")
    assert "need socket hooks" in refusal(hidden(NO_CGROUP2), "--comm", "dig")


def test_no_kernel_types() -> None:
    """Without BTF nothing can be traced."""
    status, said = doctor(hidden(NO_BTF))
    assert status == 3
    assert "MISSING kernel types (BTF)" in said
    assert "fix: boot a kernel with CONFIG_DEBUG_INFO_BTF" in said
    assert "CONFIG_DEBUG_INFO_BTF" in refusal(hidden(NO_BTF))


def test_no_cgroup_v2() -> None:
    """Kprobes do without; otherwise no socket is watched, and devices alone are traced."""
    status, said = doctor(hidden(NO_CGROUP2))
    assert status == 0
    assert "note cgroup v2 not mounted: containers are told by network namespace only" in said
    assert f"sockets by {'kprobe' if HAVE_KPROBES else 'no'} hooks" in said
    if not HAVE_KPROBES:
        assert "no cgroup v2 tree is mounted" in refusal(
            hidden(NO_CGROUP2), "--hooks", "tracepoint"
        )


def test_no_right_to_devices(tmp_path: Path) -> None:
    """Without CAP_NET_ADMIN, sockets alone are watched, where that is allowed."""
    if not HAVE_KPROBES:
        assert "nothing can be watched here" in refusal(without("net_admin", "sys_admin"))
        return
    # A namespace with a device in it; a guest has none.
    veth = "ip link set lo up && ip link add a0 type veth peer name b0"
    elsewhere = ["unshare", "--net", "sh", "-c", f'{veth} && exec "$@"', "sh"]
    t, trace = traced([*elsewhere, *without("net_admin"), *DNSTRACE], tmp_path)
    assert [hop["kind"] for hop in t["hops"]] == ["send", "receive", "send", "receive"]
    # CAP_SYS_ADMIN is enough for TCX links, but not for filters.
    assert ("no device is watched" in trace.stderr) != ("TCX links" in trace.stderr)


def test_missing_symbol(tmp_path: Path) -> None:
    """Where a function cannot be probed, the other set of hooks serves, and nothing half stays."""
    if not HAVE_KPROBES:
        pytest.skip("not offered by this kernel: no kprobes (CONFIG_KPROBE_EVENTS)")
    t, trace = traced([sys.executable, "-c", WITHOUT_SYMBOL], tmp_path)
    assert t["client"]["pid"] == os.getpid()
    assert "no kprobe hooks: probing no_such_function" in trace.stderr
    assert "tracepoint hooks" in trace.stderr


def test_kprobes_disarmed(tmp_path: Path) -> None:
    """They could be attached, but would not fire."""
    if not HAVE_KPROBES:
        pytest.skip("not offered by this kernel: no kprobes (CONFIG_KPROBE_EVENTS)")
    knob = Path("/sys/kernel/debug/kprobes/enabled")
    knob.write_text("0")
    try:
        t, trace = traced(DNSTRACE, tmp_path)
        assert t["client"]["pid"] == os.getpid()
        assert "kprobes are disarmed" in trace.stderr
        assert "kprobes are disarmed" in refusal([], "--hooks", "kprobe")
    finally:
        knob.write_text("1")


def test_in_a_container_of_its_own() -> None:
    """What is not seen from there, and what to give the pod."""
    root = netns.cgroup2_root()
    assert root
    cgroup = root / f"dnstrace-test-{os.getpid()}"
    cgroup.mkdir()
    enter = ["sh", "-c", f'echo 0 > {cgroup}/cgroup.procs && exec "$@"', "sh"]
    isolate = ["unshare", "--net", "--cgroup", "--pid", "--fork", "--mount-proc"]
    remount = f"{NO_CGROUP2}; mount -t cgroup2 none {root} && ip link set lo up"
    try:
        status, said = doctor([*enter, *isolate, *hidden(remount)])
    finally:
        remove(cgroup)
    assert "hostPID: true" in said
    assert "only the cgroups of this container are known" in said
    assert said.count("seen at send, receive, send, receive") == 2
    assert status == 0


def remove(cgroup: Path) -> None:
    """A process is in its cgroup until it is wholly gone, a little after whoever waits is told."""
    deadline_s = time.monotonic() + 60
    while True:
        try:
            cgroup.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
        else:
            return
