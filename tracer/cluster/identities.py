# SPDX-License-Identifier: Apache-2.0
"""Who is who: from cgroup, network namespace and address to pod and service.

A process is its container's by cgroup, which holds for hostNetwork pods too; else its pod's by
network namespace, or by address where its namespace is not known. An address names a pod only
where it is that pod's alone.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tracer.cluster.model import Inventory, Pod
    from tracer.transaction import Client

_REWALK_S = 1.0
_LOCAL = ("127.", "::1", "fe80:")  # addresses that every namespace may have
_NOBODY = (None, None, None, None)
K = TypeVar("K")


class Device(Protocol):
    """A device, and the namespace that it leads to if it is a veth."""

    @property
    def name(self) -> str:
        """As `ip link` shows it."""

    @property
    def peer_netns(self) -> int | None:
        """Inode number."""


class Identities:
    """Who is who, from one inventory. `cgroup_root` is where the v2 tree is mounted.

    `find_device(netns, ifindex)` knows the devices that hops are seen at.
    """

    def __init__(
        self,
        inventory: Inventory,
        cgroup_root: Path | None,
        find_device: Callable[[int, int], Device | None] = lambda _netns, _ifindex: None,
    ) -> None:
        self._root = cgroup_root
        self._find_device = find_device
        self.learn(inventory)

    def learn(self, inventory: Inventory) -> None:
        """Forgets all that was known, for what is known now."""
        self.inventory = inventory
        own = [pod for pod in inventory.pods if not pod.host_network]
        self._pod_of_netns = _unambiguous((pod.netns, pod) for pod in own if pod.netns)
        self._node_of_netns = {node.netns: node.name for node in inventory.nodes if node.netns}
        self._pod_of_ip = _unambiguous((ip, pod) for pod in own for ip in pod.ips)
        self._service_of: dict[tuple[str, int], str] = {
            (ip, port): f"{service.namespace}/{service.name}"
            for service in inventory.services
            for ip in service.ips
            for port in service.ports
        }
        self._container_of_cgroup: dict[int, tuple[Pod, str]] = {}
        self._walked_at = -_REWALK_S
        self._walk(time.monotonic())

    def walk_again(self) -> None:
        """Looks for cgroups that containers have made since."""
        self._walk(time.monotonic())

    def client(
        self, cgroup_id: int, netns: int, ip: str
    ) -> tuple[str | None, str | None, str | None, str | None]:
        """(namespace, pod, container, node) of a process; 0 is unknown."""
        found = self._identify(cgroup_id, netns, ip)
        if found is None:
            return _NOBODY
        pod, container = found
        return pod.namespace, pod.name, container, pod.node

    def service(self, ip: str, port: int) -> str | None:
        """ "namespace/name" of the service whose address it is."""
        return self._service_of.get((ip, port))

    def pod(self, ip: str) -> tuple[str | None, str | None]:
        """(namespace, name) of the pod whose address it is."""
        pod = self._pod_of_ip.get(ip)
        return (pod.namespace, pod.name) if pod else (None, None)

    def place(self, netns: int, ifindex: int) -> tuple[str | None, str | None]:
        """(name of the device, whose it is): the pod's at a veth's other end, else the node's."""
        ifname, inside = None, netns
        if ifindex:
            device = self._find_device(netns, ifindex)
            if device:
                ifname = device.name
                inside = device.peer_netns or netns
        pod = self._pod_of_netns.get(inside)
        return ifname, pod.full_name if pod else self._node_of_netns.get(netns)

    def select(self, pods: Iterable[Pod]) -> tuple[set[int], set[int]]:
        """Network namespaces and cgroup ids that tell these pods' queries from all others."""
        namespaces: set[int] = set()
        cgroups: set[int] = set()
        wanted = {pod.full_name for pod in pods}
        for pod in self.inventory.pods:
            if pod.full_name in wanted and pod.netns and not pod.host_network:
                namespaces.add(pod.netns)
        for cgroup_id, (pod, _) in self._container_of_cgroup.items():
            if pod.full_name in wanted:
                cgroups.add(cgroup_id)
        return namespaces, cgroups

    def untraceable(self, pods: Iterable[Pod]) -> list[str]:
        """Those of the pods that `select` finds nothing for: their queries cannot be told."""
        return [pod.full_name for pod in pods if not any(self.select([pod]))]

    def matching(self, namespaces: Iterable[str], pod_globs: Iterable[str]) -> list[Pod]:
        """The pods in one of the namespaces (if any are given) whose name fits one of the globs."""
        wanted, globs = set(namespaces), list(pod_globs)
        return [
            pod
            for pod in self.inventory.pods
            if (not wanted or pod.namespace in wanted)
            and (
                not globs
                or any(fnmatchcase(pod.name, g) or fnmatchcase(pod.full_name, g) for g in globs)
            )
        ]

    def cgroups_of(self, client: Client) -> list[Path]:
        """Where to look for other processes of the client's container or pod."""
        if self._root is None or client.pod is None:
            return []
        return [
            self._root / container.cgroup
            for pod in self.inventory.pods
            if (pod.namespace, pod.name) == (client.namespace, client.pod)
            for container in pod.containers
            if container.cgroup
        ]

    def _identify(self, cgroup_id: int, netns: int, ip: str) -> tuple[Pod, str | None] | None:
        known = self._container_of_cgroup.get(cgroup_id)
        if known:
            return known
        if cgroup_id and time.monotonic() - self._walked_at > _REWALK_S:
            self._walk(time.monotonic())  # perhaps a group that a container made since
            known = self._container_of_cgroup.get(cgroup_id)
            if known:
                return known
        # Whoever else is in there, as a sandbox or a debugger is, is of the pod but no container.
        pod = self._pod_of_netns.get(netns)
        if pod and pod.ips and ip not in pod.ips and not ip.startswith(_LOCAL):
            return None  # the number of a namespace that has gone was given to this one
        if pod is None:
            pod = self._pod_of_ip.get(ip)
            if pod is None or (netns and pod.netns):  # it is in another namespace than this one
                return None
        return pod, None

    def _walk(self, now_s: float) -> None:
        """Learns the ids (inode numbers) of the containers' cgroups and of those below."""
        self._walked_at = now_s
        if self._root is None:
            return
        found = {}
        for pod in self.inventory.pods:
            for container in pod.containers:
                if not container.cgroup:
                    continue
                for directory, _, _ in os.walk(self._root / container.cgroup):
                    with suppress(OSError):
                        found[os.stat(directory).st_ino] = (pod, container.name)
        self._container_of_cgroup = found


def _unambiguous(pairs: Iterable[tuple[K, Pod]]) -> dict[K, Pod]:
    """What each key stands for, without those that stand for several pods."""
    found: dict[K, Pod] = {}
    several = set()
    for key, pod in pairs:
        if found.setdefault(key, pod).full_name != pod.full_name:
            several.add(key)
    return {key: pod for key, pod in found.items() if key not in several}
