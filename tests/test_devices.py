# SPDX-License-Identifier: Apache-2.0
"""Devices that come, change and go in namespaces of the test's own."""

from __future__ import annotations

import os
import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from tests.namespaces import new_namespace, run
from tracer.kernel import netns, rtnetlink
from tracer.kernel.devices import Devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    give_up = time.monotonic() + 5
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
