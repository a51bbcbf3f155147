# SPDX-License-Identifier: Apache-2.0
"""Puts names to transactions: from cgroup, network namespace and address to pod and service.

A process is its container's by cgroup, which holds for hostNetwork pods too; else its pod's by
network namespace. An address names a pod only where it is that pod's alone.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from tracer.cluster.model import Inventory, Pod
from tracer.transaction import Address, Client, Hop, Transaction

_REWALK_S = 1.0


class Identities:
    """Who is who, from one inventory. `cgroup_root` is where the v2 tree is mounted.

    `peer_of(netns, ifindex)` tells the namespace that a veth leads to.
    """

    def __init__(
        self,
        inventory: Inventory,
        cgroup_root: Path | None,
        peer_of: Callable[[int, int], int | None] = lambda _netns, _ifindex: None,
    ) -> None:
        self.inventory = inventory
        self._root = cgroup_root
        self._peer_of = peer_of
        self._pod_of_netns = {
            pod.netns: pod for pod in inventory.pods if pod.netns and not pod.host_network
        }
        self._node_of_netns = {node.netns: node.name for node in inventory.nodes if node.netns}
        self._pod_of_ip = {
            ip: pod for pod in inventory.pods if not pod.host_network for ip in pod.ips
        }
        self._service_of: dict[tuple[str, int], str] = {
            (ip, port): f"{service.namespace}/{service.name}"
            for service in inventory.services
            for ip in service.ips
            for port in service.ports
        }
        self._container_of_cgroup: dict[int, tuple[Pod, str]] = {}
        self._walked_at = -_REWALK_S
        self._walk(time.monotonic())

    def name(self, t: Transaction) -> Transaction:
        """The transaction with every name that is known."""
        client = t.client
        found = self._identify(client.cgroup_id, client.netns, client.ip)
        if found:
            pod, container = found
            client = client._replace(
                namespace=pod.namespace, pod=pod.name, container=container, node=pod.node
            )
        server, backend = t.server, t.backend
        service = self._service_of.get((server.ip, server.port))
        if service:
            server = server._replace(service=service)
        if backend:
            pod_behind = self._pod_of_ip.get(backend.ip)
            if pod_behind:
                backend = backend._replace(namespace=pod_behind.namespace, pod=pod_behind.name)
        make_hops = functools.partial(self._own_hops, t.make_hops, client)
        return t._replace(client=client, server=server, backend=backend, make_hops=make_hops)

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

    def _identify(
        self, cgroup_id: int | None, netns: int | None, ip: str
    ) -> tuple[Pod, str | None] | None:
        if cgroup_id is not None:
            known = self._container_of_cgroup.get(cgroup_id)
            if known:
                return known
        pod = self._pod_of_netns.get(netns) if netns is not None else self._pod_of_ip.get(ip)
        if pod:
            return pod, pod.containers[0].name if len(pod.containers) == 1 else None
        if cgroup_id is not None and time.monotonic() - self._walked_at > _REWALK_S:
            self._walk(time.monotonic())  # perhaps a group that a container made since
            return self._container_of_cgroup.get(cgroup_id)
        return None

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

    def _own_hops(self, make: Callable[[], tuple[Hop, ...]], client: Client) -> tuple[Hop, ...]:
        me = f"{client.namespace}/{client.pod}" if client.pod else None
        hops = make()
        return tuple(
            hop._replace(owner=me if me and _is_clients(hop) else self._owner(hop))
            for hop in hops
        )

    def _owner(self, hop: Hop) -> str | None:
        """Whose device or socket: the pod's at the other end of a veth, else the node's."""
        netns = hop.netns
        if netns is None:
            return None
        if hop.ifindex is not None:
            netns = self._peer_of(netns, hop.ifindex) or netns
        pod = self._pod_of_netns.get(netns)
        if pod:
            return pod.full_name
        return self._node_of_netns.get(netns)

    def resolve(self, address: Address) -> str | None:
        """ "namespace/pod" behind an address, if it is one pod's."""
        pod = self._pod_of_ip.get(address[0])
        return pod.full_name if pod else None


def _is_clients(hop: Hop) -> bool:
    """Whether a hop is at the client's own socket."""
    return hop.ifindex is None and (
        (hop.kind == "send" and hop.direction == "query")
        or (hop.kind == "receive" and hop.direction == "response")
    )
