# SPDX-License-Identifier: Apache-2.0
"""Devices that come, change and go in namespaces of the test's own."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from tests.namespaces import new_namespace, run
from tests.programs import loaded_programs
from tracer.kernel import netns, rtnetlink
from tracer.kernel.devices import Devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tracer.kernel.devices import Device

pytestmark = pytest.mark.usefixtures("root")


@dataclass
class Attached:
    """Attaches to nothing, and tells to what it would have."""

    devices: list[Device] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)

    def __call__(self, device: Device) -> Callable[[], None]:
        self.devices.append(device)
        return lambda: self.detached.append(device.name)

    def names(self) -> list[str]:
        return [device.name for device in self.devices]


@contextmanager
def node(**paths: int) -> Iterator[int]:
    """A namespace that is the only one there is, with those in `paths`; this thread is in it."""
    with new_namespace() as own, netns.entered(own):
        inodes = {os.fstat(fd).st_ino: f"/proc/self/fd/{fd}" for fd in (own, *paths.values())}
        with mock.patch.object(netns, "paths", return_value=inodes):
            yield os.fstat(own).st_ino


def eventually(condition: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + 30
    while not (met := condition()) and time.monotonic() < give_up:
        time.sleep(0.01)
    return met


@contextmanager
def followed(attach: Callable[[Device], Callable[[], None]]) -> Iterator[Devices]:
    devices = Devices(attach)
    try:
        devices.start()
        yield devices
    finally:
        devices.close()


@pytest.fixture
def no_low_descriptors() -> Iterator[None]:
    """Every new descriptor is above 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4096, before[0]), before[1]))
    taken: list[int] = []
    while not taken or taken[-1] < 1024:
        taken.append(os.dup(0))
    yield
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_devices_are_followed_with_descriptors_above_1023(no_low_descriptors: None) -> None:
    del no_low_descriptors
    attached = Attached()
    with node(), followed(attached) as devices:
        run("ip link add veth0 type veth peer name veth1")
        assert eventually(lambda: len(attached.devices) == 2)
        assert devices.failures == 0
    assert sorted(attached.detached) == ["veth0", "veth1"]


def test_exception_while_following_is_counted_and_the_next_change_seen() -> None:
    attached = Attached()
    with node(), followed(attached) as devices:
        with mock.patch.object(rtnetlink, "links", side_effect=ValueError("odd")):
            run("ip link add veth0 type veth peer name veth1")
            assert eventually(lambda: devices.failures > 0)
            time.sleep(0.1)
        assert devices.last_failure == "ValueError('odd')"
        run("ip link add veth2 type veth peer name veth3")
        assert eventually(lambda: len(attached.devices) == 4)


def test_end_of_the_thread_is_counted() -> None:
    with node(), followed(Attached()) as devices:
        with mock.patch("select.poll", side_effect=RuntimeError("no poll")):
            run("ip link add veth0 type veth peer name veth1")
            assert eventually(lambda: not devices._thread.is_alive())
        assert devices.failures == 1
        assert "no longer followed: RuntimeError('no poll')" in (devices.last_failure or "")


def test_device_that_is_renamed_has_its_new_name() -> None:
    with node() as inode, followed(Attached()) as devices:
        run("ip link add veth0 type veth peer name veth1")
        ifindex = socket.if_nametoindex("veth0")
        assert eventually(lambda: devices.find(inode, ifindex) is not None)
        run("ip link set veth0 name cali0")
        assert eventually(lambda: name_of(devices, inode, ifindex) == "cali0")


def test_veth_whose_peer_is_moved_into_a_pod_leads_there() -> None:
    """The device is attached to before that, when it leads nowhere."""
    attached = Attached()
    with new_namespace() as pod, new_namespace() as other, node(pod=pod, other=other) as inode:
        with followed(attached) as devices:
            run("ip link add veth0 type veth peer name veth1")
            ifindex = socket.if_nametoindex("veth0")
            assert eventually(lambda: devices.find(inode, ifindex) is not None)
            assert peer_of(devices, inode, ifindex) is None
            run(f"ip link set veth1 netns /proc/{os.getpid()}/fd/{pod}")
            assert eventually(lambda: peer_of(devices, inode, ifindex) == inode_of(pod))
            with netns.entered(pod):
                run(f"ip link set veth1 netns /proc/{os.getpid()}/fd/{other}")
            run("ip link set veth0 up")  # the move itself is not told in this namespace
            assert eventually(lambda: peer_of(devices, inode, ifindex) == inode_of(other))
        assert attached.names().count("veth0") == 1


def test_namespace_that_is_found_late_is_known_by_the_next_scan() -> None:
    """As when a pod's namespace has a veth before it has a process."""
    with new_namespace() as pod, node() as inode:
        run("ip link add veth0 type veth peer name veth1")
        run(f"ip link set veth1 netns /proc/{os.getpid()}/fd/{pod}")
        ifindex = socket.if_nametoindex("veth0")
        devices = Devices(Attached())
        devices._scan()
        assert peer_of(devices, inode, ifindex) is None
        found = {**netns.paths(), inode_of(pod): f"/proc/self/fd/{pod}"}
        with mock.patch.object(netns, "paths", return_value=found):
            devices._scan()
        assert peer_of(devices, inode, ifindex) == inode_of(pod)
        devices.close()


def test_scan_finds_devices_that_nobody_told_of() -> None:
    attached = Attached()
    with node() as inode:
        devices = Devices(attached)
        devices._scan()
        run("ip link add veth0 type veth peer name veth1")
        devices._namespaces[inode].changes.recv(65536)
        devices._scan()
        assert sorted(attached.names()) == ["veth0", "veth1"]
        run("ip link del veth0")
        devices._scan()
        assert sorted(attached.detached) == ["veth0", "veth1"]
        devices.close()


def test_device_that_has_gone_before_it_is_attached_to_is_no_failure() -> None:
    with node() as inode:
        run("ip link add veth0 type veth peer name veth1")
        devices = Devices(mock.Mock(side_effect=OSError(errno.ENODEV, "No such device")))
        devices._scan()
        assert (devices.failures, devices.count()) == (0, 0)
        assert devices._namespaces[inode].attached == {}
        devices.close()


def test_device_that_cannot_be_attached_to_is_counted_once() -> None:
    with node():
        run("ip tuntap add tun0 mode tun")
        devices = Devices(mock.Mock(side_effect=OSError(errno.EPERM, "Not permitted")))
        devices._scan()
        devices._scan()
        assert (devices.failures, devices.last_failure) == (1, "tun0: Not permitted")
        devices.close()


def test_namespace_that_cannot_be_entered_is_counted_once_and_leaks_nothing() -> None:
    """The others are followed all the same."""
    entered = netns.entered
    with new_namespace() as pod, node(pod=pod) as inode:

        def refusing(fd: int) -> AbstractContextManager[None]:
            if inode_of(fd) == inode_of(pod):
                raise OSError(errno.EPERM, "Not permitted")
            return entered(fd)

        devices = Devices(Attached())
        with mock.patch.object(netns, "entered", refusing):
            devices._scan()
            before = os.listdir("/proc/self/fd")
            devices._scan()
            assert os.listdir("/proc/self/fd") == before
        assert devices.failures == 1
        assert devices.namespaces() == [inode]
        devices.close()


def test_programs_of_a_namespace_that_has_gone_are_closed() -> None:
    """The programs are real, and so is the attaching."""
    with loaded_programs() as programs, new_namespace() as gone, node() as home:
        session = programs.session
        devices = Devices(session._attach_device, session._forget_namespace)
        with netns.entered(gone):
            run("ip link add veth0 type veth peer name veth1")
            run("ip tuntap add tun0 mode tun")
        before = len(os.listdir("/proc/self/fd"))
        found = {**netns.paths(), inode_of(gone): f"/proc/self/fd/{gone}"}
        with mock.patch.object(netns, "paths", return_value=found), netns.entered(gone):
            devices._scan()
        keys = {(inode_of(gone), 14), (inode_of(gone), 0)}
        assert (set(session._device_programs), devices.failures) == (keys, 0)
        assert devices.count() == 3
        devices._scan()
        assert devices.namespaces() == [home]
        assert session._device_programs == {}
        assert devices.failures == 0
        devices.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2  # its pipe


def name_of(devices: Devices, inode: int, ifindex: int) -> str | None:
    device = devices.find(inode, ifindex)
    return device.name if device else None


def peer_of(devices: Devices, inode: int, ifindex: int) -> int | None:
    device = devices.find(inode, ifindex)
    return device.peer_netns if device else None


def inode_of(fd: int) -> int:
    return os.fstat(fd).st_ino
