# SPDX-License-Identifier: Apache-2.0
"""Filters in the clsact qdisc, which kernels before 6.6 need: ours only, and gone when asked."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from tracer.kernel import bpf, clsact, netns
from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("root")

NAMESPACE = f"dnstrace-test-{os.getpid()}"
FOREIGN = "tc filter add dev a0 ingress protocol ip prio 7 u32 match u32 0 0 flowid 1:1"


@pytest.fixture
def device() -> Iterator[int]:
    """A veth in a namespace of its own, which this thread is in; its number."""
    run(f"ip netns add {NAMESPACE}")
    try:
        run(f"ip -n {NAMESPACE} link add a0 type veth peer name b0")
        fd = os.open(f"/run/netns/{NAMESPACE}", os.O_RDONLY)
        with netns.entered(fd):
            yield socket.if_nametoindex("a0")
        os.close(fd)
    finally:
        run(f"ip netns del {NAMESPACE}")


@pytest.fixture
def programs() -> Iterator[dict[HopKind, int]]:
    """Programs that let everything pass: r0 = -1; exit."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    fd = bpf.program_load(bpf.ProgramType.SCHED_CLS, code, "dnstrace_test")
    yield {HopKind.INGRESS: fd, HopKind.EGRESS: fd}
    os.close(fd)


def run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def filters() -> list[str]:
    """What both directions have, a line each."""
    shown = run("tc filter show dev a0 ingress") + run("tc filter show dev a0 egress")
    return [line for line in shown.splitlines() if "handle" in line or "fh 800::" in line]


def test_attached_and_detached_leaves_no_qdisc(device: int, programs: dict[HopKind, int]) -> None:
    """The qdisc was made for the filters, so it goes with them."""
    made = clsact.attach(programs, device)
    assert made
    assert [f"dnstrace-{clsact._token}" in line for line in filters()] == [True, True]
    clsact.detach(device, made=made)
    assert "clsact" not in run("tc qdisc show dev a0")


def test_foreign_qdisc_and_filter_stay(device: int, programs: dict[HopKind, int]) -> None:
    """Somebody else's were there first."""
    run("tc qdisc add dev a0 clsact")
    run(FOREIGN)
    made = clsact.attach(programs, device)
    assert not made
    assert len(filters()) == 3
    clsact.detach(device, made=made)
    (left,) = filters()
    assert "u32" in left


def test_foreign_filter_that_came_later_keeps_the_qdisc(
    device: int, programs: dict[HopKind, int]
) -> None:
    """The qdisc is ours, but by now somebody else uses it too."""
    made = clsact.attach(programs, device)
    run(FOREIGN)
    clsact.detach(device, made=made)
    (left,) = filters()
    assert "u32" in left


def attach_as(token: str, programs: dict[HopKind, int], ifindex: int) -> bool:
    with mock.patch.object(clsact, "_token", token):
        return clsact.attach(programs, ifindex)


def detach_as(token: str, ifindex: int, *, made: bool) -> None:
    with mock.patch.object(clsact, "_token", token):
        clsact.detach(ifindex, made=made)


def test_what_a_killed_run_left_is_replaced_and_then_gone(
    device: int, programs: dict[HopKind, int]
) -> None:
    """The next start finds filters and qdisc of ours, and its end takes both away."""
    attach_as("killed", programs, device)
    clsact._claims._held.pop(("killed", netns.own()))[0].close()
    made = clsact.attach(programs, device)
    assert made
    assert [f"dnstrace-{clsact._token}" in line for line in filters()] == [True, True]
    clsact.detach(device, made=made)
    assert "clsact" not in run("tc qdisc show dev a0")


@pytest.mark.parametrize("first_ends", [True, False])
def test_two_live_runs_leave_each_others_filters_alone(
    device: int, programs: dict[HopKind, int], first_ends: bool
) -> None:
    """Whichever ends last takes the qdisc away."""
    made = {run: attach_as(run, programs, device) for run in ("first", "second")}
    assert len(filters()) == 4
    early, late = ("first", "second") if first_ends else ("second", "first")
    detach_as(early, device, made=made[early])
    assert [f"dnstrace-{late}" in line for line in filters()] == [True, True]
    detach_as(late, device, made=made[late])
    assert "clsact" not in run("tc qdisc show dev a0")


def test_a_run_in_another_pid_namespace_lives(device: int, programs: dict[HopKind, int]) -> None:
    """What cannot be found in /proc is not dead for that."""
    made = clsact.attach(programs, device)
    other = (
        "import socket; from unittest import mock; from tracer.kernel import bpf, clsact;"
        "from tracer.record import HopKind; import struct;"
        "code = struct.pack('<BBhi', 0xB7, 0, 0, -1) + struct.pack('<BBhi', 0x95, 0, 0, 0);"
        "fd = bpf.program_load(bpf.ProgramType.SCHED_CLS, code, 'dnstrace_test');"
        "index = socket.if_nametoindex('a0');"
        "made = clsact.attach({HopKind.INGRESS: fd, HopKind.EGRESS: fd}, index);"
        "clsact.detach(index, made=made)"
    )
    isolate = ["unshare", "--pid", "--fork", "--mount-proc"]
    subprocess.run([*isolate, sys.executable, "-c", other], check=True)
    assert [f"dnstrace-{clsact._token}" in line for line in filters()] == [True, True]
    clsact.detach(device, made=made)
    assert "clsact" not in run("tc qdisc show dev a0")


def test_foreign_bpf_filter_of_our_priority_stays(
    device: int, programs: dict[HopKind, int]
) -> None:
    """The name tells them apart."""
    from pyroute2 import IPRoute

    run("tc qdisc add dev a0 clsact")
    with IPRoute() as route:
        route.tc("add-filter", "bpf", device, fd=programs[HopKind.INGRESS], name="theirs",
                 parent=0xFFFFFFF2, prio=clsact.PRIORITY, protocol=3, direct_action=True)  # fmt: skip
    made = clsact.attach(programs, device)
    clsact.detach(device, made=made)
    (left,) = filters()
    assert "theirs" in left
