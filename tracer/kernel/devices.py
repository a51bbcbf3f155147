# SPDX-License-Identifier: Apache-2.0
"""Follows the network devices of every node-side namespace, and attaches to each.

Node-side is the tracer's own namespace, and any whose veth devices lead to two or more others (a
node inside a container, as kind makes them). In pods the socket hooks see enough.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tracer.kernel import netns, rcu, rtnetlink

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tracer.kernel.rtnetlink import Link

_ARPHRD_ETHER = 1
# Devices whose packets start with the IP header (include/uapi/linux/if_arp.h).
_ARPHRD_RAW_IP = {
    519: "rawip",
    65534: "none",
    768: "tunnel",
    769: "tunnel6",
    776: "sit",
    778: "ipgre",
}
_ETH_HLEN = 14
# What carries a packet on, or would show it twice: packets enter and leave through other devices.
_SKIPPED_KINDS = {"bridge", "ifb", "dummy", "nlmon", "vrf", "netkit"}
# Ports of these are one device to all above: an answer may leave by another than the query came by.
_BUNDLING_KINDS = {"bond", "team"}
_RESCAN_S = 5.0
_FORGET_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Device:
    """A device that hops are seen at. `peer_netns` is where a veth leads, if known."""

    netns: int
    ifindex: int
    name: str
    kind: str  # "veth", "vxlan", …; "" for hardware
    l2_len: int  # bytes before the network header
    peer_netns: int | None


@dataclass(slots=True)
class _Namespace:
    inode: int
    fd: int
    changes: socket.socket
    nsids: dict[int, int] = field(default_factory=dict)  # ifindex of a veth: where it leads
    peers: dict[int, int] = field(default_factory=dict)  # that number: the namespace's inode
    # ifindex: what detaches from the device, None where attaching failed
    attached: dict[int, Callable[[], None] | None] = field(default_factory=dict)


# Attaches to a device of the namespace that the thread is in; returns what detaches from it there.
Attach = Callable[[Device], Callable[[], None]]


class Devices:
    """All devices that are attached to, kept current by a thread.

    `failures` counts devices that could not be attached to, and whatever else went wrong in the
    thread; `last_failure` says why.
    """

    def __init__(self, attach: Attach, forget: Callable[[int], None] | None = None) -> None:
        """`forget` is told the inode of each namespace that nothing is attached in any more."""
        self._attach = attach
        self._forget = forget
        self._namespaces: dict[int, _Namespace] = {}
        self._known: dict[tuple[int, int], Device] = {}
        self._gone: list[tuple[float, tuple[int, int]]] = []
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._follow, name="devices", daemon=True)
        self._unreachable: set[int] = set()  # namespaces, so that each is counted once
        self._next_scan = 0.0
        self._closed = False
        self.failures = 0
        self.last_failure: str | None = None

    def start(self) -> None:
        """Attaches to everything that is there, then follows changes in the background."""
        with rcu.expedited():
            self._scan()
        self._next_scan = time.monotonic() + _RESCAN_S
        self._thread.start()

    def close(self) -> None:
        """Detaches everything."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            os.write(self._stop_write, b"x")
            self._thread.join()
        with rcu.expedited():
            for namespace in list(self._namespaces.values()):
                self._try(partial(self._drop_namespace, namespace))
        os.close(self._stop_read)
        os.close(self._stop_write)

    def find(self, netns_inode: int, ifindex: int) -> Device | None:
        """The device, also for a while after it has gone."""
        return self._known.get((netns_inode, ifindex))

    def count(self) -> int:
        """How many devices are attached to now."""
        namespaces = list(self._namespaces.values())
        return sum(detach is not None for ns in namespaces for detach in list(ns.attached.values()))

    def namespaces(self) -> list[int]:
        """Inode numbers of the node-side namespaces."""
        return list(self._namespaces)

    def _follow(self) -> None:
        try:
            while self._follow_once():
                pass
        except Exception as error:  # noqa: BLE001 - a thread's end would go unnoticed
            self._fail(f"devices are no longer followed: {error!r}")

    def _follow_once(self) -> bool:
        """Waits for changes and sees to them. False when asked to stop."""
        sockets = {ns.changes.fileno(): ns for ns in list(self._namespaces.values())}
        poll = select.poll()  # not select(), which knows no descriptors above 1023
        for fd in (self._stop_read, *sockets):
            poll.register(fd, select.POLLIN)
        wait_s = max(0.0, self._next_scan - time.monotonic())
        ready = [fd for fd, _ in poll.poll(math.ceil(wait_s * 1000))]
        if self._stop_read in ready:
            return False
        for fd in ready:
            self._try(partial(self._refresh, sockets[fd]))
        if time.monotonic() >= self._next_scan:
            self._next_scan = time.monotonic() + _RESCAN_S
            self._try(self._scan)
        return True

    def _try(self, step: Callable[[], None]) -> None:
        """What goes wrong, as when a namespace goes away under our hands, is counted."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the next change must be followed all the same
            self._fail(str(error) if isinstance(error, OSError) else repr(error))

    def _fail(self, why: str) -> None:
        self.failures += 1
        self.last_failure = why

    def _scan(self) -> None:
        """Finds node-side namespaces, new and gone, and repairs what notifications did not tell."""
        home = netns.own()
        found = netns.paths()
        for namespace in list(self._namespaces.values()):
            if namespace.inode in found:
                self._try(partial(self._refresh, namespace, found))
            else:
                self._try(partial(self._drop_namespace, namespace))
        if home not in self._namespaces:
            self._enlist(home, found, required=True)
        self._unreachable &= found.keys()
        for inode in found.keys() - self._namespaces.keys():
            try:
                self._enlist(inode, found, required=False)
            except OSError as error:
                if inode not in self._unreachable:
                    self._unreachable.add(inode)
                    self._fail(str(error))
        horizon = time.monotonic() - _FORGET_AFTER_S
        while self._gone and self._gone[0][0] < horizon:
            _, key = self._gone.pop(0)
            owner = self._namespaces.get(key[0])
            if owner is None or key[1] not in owner.attached:
                self._known.pop(key, None)

    def _enlist(self, inode: int, found: Mapping[int, str], *, required: bool) -> None:
        """Attaches to the devices of a namespace if it is node-side, or `required`."""
        fd = netns.open_namespace(inode, found[inode])
        if fd is None:
            return
        try:
            with netns.entered(fd):
                # A quick no for most pods: loopback and one more device.
                if required or netns.device_count() > 2:
                    self._add_namespace(inode, fd, found, required=required)
        finally:
            if inode not in self._namespaces:
                os.close(fd)

    def _add_namespace(
        self, inode: int, fd: int, found: Mapping[int, str], *, required: bool
    ) -> None:
        changes = rtnetlink.link_changes()
        try:
            listed = rtnetlink.links()
            if required or len(set(_peer_nsids(listed).values())) >= 2:
                self._namespaces[inode] = _Namespace(inode, fd, changes)
                self._update(self._namespaces[inode], listed, found)
        finally:
            if inode not in self._namespaces:
                changes.close()

    def _refresh(self, namespace: _Namespace, found: Mapping[int, str] | None = None) -> None:
        try:
            while namespace.changes.recv(65536):
                pass
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS: more changes than fit; the listing below has them all
            pass
        with netns.entered(namespace.fd):
            self._update(namespace, rtnetlink.links(), found)

    def _update(
        self, namespace: _Namespace, listed: list[Link], found: Mapping[int, str] | None
    ) -> None:
        """Attaches to new devices and lets go of those that went; in the namespace.

        `found`: all namespaces, when they have just been looked for.
        """
        nsids = _peer_nsids(listed)
        unknown = found is not None and not set(nsids.values()) <= namespace.peers.keys()
        if unknown or not nsids.items() <= namespace.nsids.items():
            namespace.peers = _peer_namespaces(netns.paths() if found is None else found)
        namespace.nsids = nsids
        current = set()
        for entry in listed:
            l2_len = _l2_len(entry)
            if l2_len is None:
                continue
            current.add(entry.ifindex)
            device = Device(
                namespace.inode,
                entry.ifindex,
                entry.name,
                entry.kind,
                l2_len,
                namespace.peers.get(nsids.get(entry.ifindex, -1)),
            )
            if entry.ifindex not in namespace.attached and not self._attach_to(namespace, device):
                continue
            self._known[namespace.inode, entry.ifindex] = device
        for ifindex in [i for i in namespace.attached if i not in current]:
            self._release(namespace, ifindex)

    def _attach_to(self, namespace: _Namespace, device: Device) -> bool:
        """False if the device has gone by now."""
        try:
            namespace.attached[device.ifindex] = self._attach(device)
        except OSError as error:
            if error.errno == errno.ENODEV or not _exists(device.ifindex):
                return False
            namespace.attached[device.ifindex] = None
            self._fail(f"{device.name}: {error.strerror}")
        return True

    def _release(self, namespace: _Namespace, ifindex: int) -> None:
        detach = namespace.attached.pop(ifindex)
        if detach:
            with suppress(OSError):  # the device has gone, and our filters with it
                detach()
        self._gone.append((time.monotonic(), (namespace.inode, ifindex)))

    def _drop_namespace(self, namespace: _Namespace) -> None:
        try:
            with netns.entered(namespace.fd):
                for ifindex in list(namespace.attached):
                    self._release(namespace, ifindex)
        finally:
            namespace.changes.close()
            os.close(namespace.fd)
            self._namespaces.pop(namespace.inode, None)
            if self._forget:
                self._forget(namespace.inode)


def _exists(ifindex: int) -> bool:
    """Whether this thread's namespace has the device; attaching may fail in many ways if not."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


def _l2_len(link: Link) -> int | None:
    """Bytes before the network header, or None where no hop is wanted."""
    if link.loopback or link.kind in _SKIPPED_KINDS or link.port_of in _BUNDLING_KINDS:
        return None
    if link.arphrd == _ARPHRD_ETHER:
        return _ETH_HLEN
    return 0 if link.arphrd in _ARPHRD_RAW_IP else None


def _peer_nsids(listed: list[Link]) -> dict[int, int]:
    """Each veth that leads to another namespace: its ifindex, to this namespace's number for it."""
    return {
        entry.ifindex: entry.peer_nsid
        for entry in listed
        if entry.kind == "veth" and entry.peer_nsid is not None
    }


def _peer_namespaces(found: Mapping[int, str]) -> dict[int, int]:
    """This thread's namespace's numbers for others, to their inode numbers."""
    peers = {}
    for inode, path in found.items():
        fd = netns.open_namespace(inode, path)
        if fd is None:
            continue
        try:
            number = rtnetlink.namespace_id(fd)
        finally:
            os.close(fd)
        if number is not None:
            peers[number] = inode
    return peers
