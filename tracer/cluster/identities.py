# SPDX-License-Identifier: Apache-2.0
"""Who is who: from cgroup, network namespace and address to pod and service.

A process is its container's by cgroup, which holds for hostNetwork pods too; else its pod's by
network namespace, or by address where its namespace is not known. An address names a pod only
where it is that pod's alone.

What containers there are, the node tells (see local.py); what they are called, the API server or a
file, else the node's own files. Whatever is known of a pod that has gone is kept for a while.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from tracer.cluster.local_records import NOT_A_CONTAINER, LocalContainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from tracer.cluster.local import LocalContainers
    from tracer.cluster.model import Inventory, Pod
    from tracer.transaction import Client

_REWALK_S = 1.0
_GONE_S = 300.0
_GONE_MAX = 10_000
_UNNAMED_S = 3.0  # how long the name of a container may take to become known
_ROLES_MAX = 16_384
_CLIENTS_MAX = 16_384
_DNS_PORT = 53
_ROOT_CGROUP = 1
_LOOPBACK = ("127.", "::1")
_LOCAL = ("127.", "::1", "fe80:")  # addresses that every namespace may have
K = TypeVar("K")


class Who(NamedTuple):
    """Whose a process is; None is unknown, or that it is nobody's."""

    namespace: str | None = None
    pod: str | None = None
    container: str | None = None
    node: str | None = None


NOBODY = Who()


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
        local: LocalContainers | None = None,
    ) -> None:
        self._root = cgroup_root
        self._find_device = find_device
        self._local = local
        self._gone: dict[str, tuple[float, Pod]] = {}  # by full name, in the order that they went
        self._unnamed_since: dict[int, float] = {}  # cgroup ids
        self._node_names: dict[int, str] = {}
        self._gone_containers: dict[str, tuple[float, tuple[Pod, str]]] = {}
        self._container_of_id: dict[str, tuple[Pod, str]] = {}
        self.version = 0  # of the inventory
        self.inventory: Inventory
        self.learn(inventory)

    def learn(self, inventory: Inventory) -> None:
        """Takes what is known now for what was; of pods that have gone, only who they were."""
        self._remember_gone(inventory)
        self.inventory = inventory
        self.version += 1
        own = [pod for pod in inventory.pods if not pod.host_network]
        self._pod_of_netns = _unambiguous((pod.netns, pod) for pod in own if pod.netns)
        self._node_of_netns = {node.netns: node.name for node in inventory.nodes if node.netns}
        self._pod_of_ip: dict[str, tuple[str, str]] = {
            ip: (pod.namespace, pod.name)
            for ip, pod in _unambiguous((ip, pod) for pod in own for ip in pod.ips).items()
        }
        node_ips = {ip for node in inventory.nodes for ip in node.ips}
        for endpoint in inventory.endpoints:  # those of other nodes
            if endpoint.pod and endpoint.namespace and endpoint.ip not in node_ips:
                self._pod_of_ip.setdefault(endpoint.ip, (endpoint.namespace, endpoint.pod))
        self._service_of: dict[tuple[str, int], str] = {
            (ip, port): f"{service.namespace}/{service.name}"
            for service in inventory.services
            for ip in service.ips
            for port in service.ports
        }
        self._ips = node_ips | {ip for pod in inventory.pods for ip in pod.ips}
        self._is_kubernetes = bool(inventory.services)
        self._roles: dict[str, str | None] = {
            ip: "cluster" if service.dns or _DNS_PORT in service.ports else None
            for service in inventory.services
            for ip in service.ips
        }
        known = [*(pod for _, pod in self._gone.values()), *inventory.pods]
        self._pod_of_uid = {uid: pod for pod in known for uid in (pod.uid, pod.static_uid) if uid}
        now_of_id = {
            container.id: (pod, container.name)
            for pod in known
            for container in pod.containers
            if container.id
        }
        self._container_of_id = self._with_gone_containers(now_of_id)
        self._container_of_cgroup: dict[int, tuple[Pod, str]] = {}
        self._clients: dict[tuple[int, int, str], Who] = {}
        self._clients_version = -1
        self._by_containers: dict[str, Who] = {}
        self._by_containers_version = -1
        self._pod_named = {(pod.namespace, pod.name): pod for pod in inventory.pods}
        self._labels_of = {(pod.namespace, pod.name): dict(pod.labels) for pod in known}
        self._has_cgroups = any(c.cgroup for pod in inventory.pods for c in pod.containers)
        self._walk(time.monotonic())

    def name_nodes(self, names: Mapping[int, str]) -> None:
        """Says which network namespaces of this machine are which node's own."""
        if names != self._node_names:
            self._node_names = dict(names)
            self._clients.clear()

    def shared_netns(self) -> set[int]:
        """Network namespaces of nodes: processes of several pods and services are in there."""
        here = os.stat("/proc/self/ns/net").st_ino
        return {here, *self._node_of_netns, *self._node_names}

    def walk_again(self) -> bool:
        """Looks for cgroups that containers have made since; whether there is any change."""
        if not self._has_cgroups:
            return False
        before = self._container_of_cgroup
        self._walk(time.monotonic())
        return self._container_of_cgroup != before

    def client(self, cgroup_id: int, netns: int, ip: str) -> Who:
        """Whose a process is; 0 is unknown."""
        version = self._local.version if self._local else 0
        if version != self._clients_version or len(self._clients) >= _CLIENTS_MAX:
            self._clients_version = version
            self._clients.clear()
        key = (cgroup_id, netns, ip)
        known = self._clients.get(key)
        if known is None:
            found = self._by_cgroup(cgroup_id)
            if found is None:
                found = self._by_place(netns, ip)
                if found is not None and self._is_anothers(cgroup_id, found):
                    return NOBODY
            if found is None:
                return NOBODY  # who knows in a moment
            known = self._clients[key] = found
        return known

    def look(self) -> None:
        """Takes in what containers have come and gone, before anybody is named."""
        if self._local:
            self._local.poll()

    def is_settled(self, cgroup_id: int) -> bool:
        """Whether more could be known of this cgroup's processes in a moment than now."""
        if not cgroup_id or self._local is None or cgroup_id in self._container_of_cgroup:
            return True
        found = self._local.container(cgroup_id)
        if not isinstance(found, LocalContainer):
            return True
        if self._is_all(found, self._named(found)):
            self._unnamed_since.pop(cgroup_id, None)
            return True
        if len(self._unnamed_since) >= _CLIENTS_MAX:
            self._unnamed_since.clear()
        since = self._unnamed_since.setdefault(cgroup_id, time.monotonic())
        return time.monotonic() - since > _UNNAMED_S

    def service(self, ip: str, port: int) -> str | None:
        """ "namespace/name" of the service whose address it is."""
        return self._service_of.get((ip, port))

    def pod(self, ip: str) -> tuple[str | None, str | None]:
        """(namespace, name) of the pod whose address it is."""
        return self._pod_of_ip.get(ip) or (None, None)

    def server(self, cgroup_id: int, ip: str) -> tuple[str | None, str | None]:
        """(namespace, name) of the pod that answers, by the cgroup of its socket if it is known."""
        found = self._by_cgroup(cgroup_id)
        return (found.namespace, found.pod) if found else self.pod(ip)

    def role(self, ip: str) -> str | None:
        """What kind of server has the address; None of one in the cluster that is no DNS service.

        Without any knowledge of the cluster, nobody is known to be outside of it.
        """
        known = self._roles.get(ip)
        if known is not None or ip in self._roles:
            return known
        if ip.startswith(_LOOPBACK):
            role: str | None = "stub"
        elif ip.startswith("169.254."):
            role = "node-cache" if self._is_kubernetes else None
        else:
            inside = ip in self._pod_of_ip or ip in self._ips
            role = "upstream" if self._is_kubernetes and not inside else None
        if len(self._roles) >= _ROLES_MAX:
            self._roles.clear()
        self._roles[ip] = role
        return role

    def place(self, netns: int, ifindex: int) -> tuple[str | None, str | None]:
        """(name of the device, whose it is): the pod's at a veth's other end, else the node's."""
        ifname, inside = None, netns
        if ifindex:
            device = self._find_device(netns, ifindex)
            if device:
                ifname = device.name
                inside = device.peer_netns or netns
        found = self._by_netns(inside)
        if found:
            return ifname, f"{found.namespace}/{found.pod}"
        return ifname, self._node_of_netns.get(netns) or self._node_names.get(netns)

    def labels(self, namespace: str | None, pod: str | None) -> Mapping[str, str] | None:
        """A pod's labels; None of one that is not known."""
        return self._labels_of.get((namespace or "", pod or ""))

    def known_pods(self) -> set[tuple[str, str]]:
        """(namespace, name) of all pods of this machine."""
        pods = set(self._pod_named)
        for found in self._local.containers() if self._local else ():
            who = self._named(found)
            if who and who.namespace and who.pod:
                pods.add((who.namespace, who.pod))
        return pods

    def is_hosts(self, cgroup_id: int) -> bool:
        """Whether it is certain that this cgroup is no container's."""
        if cgroup_id == _ROOT_CGROUP or self._local is None:
            return False  # where containers are in v1 hierarchies, they are all in the root of v2
        return self._local.container(cgroup_id) is NOT_A_CONTAINER

    def dns_ports(self) -> tuple[int, ...]:
        """Ports that DNS services are reached at, and those that their endpoints listen on."""
        learned = {port for one in self.inventory.services if one.dns for port in one.target_ports}
        return tuple(sorted({_DNS_PORT, *learned}))

    def verdicts(
        self, pod_wanted: Callable[[Who], bool], container_wanted: Callable[[Who], bool] | None
    ) -> tuple[dict[int, bool], dict[int, bool]]:
        """What the kernel is told of network namespaces and cgroups: whether they are wanted.

        Those of whom it is not known whose they are, are in neither. Whatever is in a pod's network
        namespace is the pod's; it is not known of which container, if that matters. That a namespace
        is unwanted is told only of pods without cgroups: its number may be the next pod's already.
        """
        netns: dict[int, bool] = {}
        cgroups: dict[int, bool] = {}
        told_by_cgroup = {pod.full_name for pod, _ in self._container_of_cgroup.values()}

        def wanted(who: Who) -> bool:
            return pod_wanted(who) and (container_wanted is None or container_wanted(who))

        def place(inode: int, who: Who, *, has_cgroup: bool) -> None:
            yes = pod_wanted(who)
            if container_wanted is None if yes else not has_cgroup:
                netns[inode] = yes

        for inode, pod in self._pod_of_netns.items():
            place(inode, _who(pod, None), has_cgroup=pod.full_name in told_by_cgroup)
        for cgroup_id, (pod, container) in self._container_of_cgroup.items():
            cgroups[cgroup_id] = wanted(_who(pod, container))
        for found in self._local.containers() if self._local else ():
            who = self._named(found)
            if who is None:
                continue
            if container_wanted is None or not pod_wanted(who) or self._is_all(found, who):
                cgroups.update(dict.fromkeys(found.cgroup_ids, wanted(who)))
            if found.netns and self._by_netns(found.netns):
                place(found.netns, who, has_cgroup=bool(found.cgroup_ids))
        return netns, cgroups

    def untraceable(self, pods: Iterable[Pod]) -> list[str]:
        """Those of the pods whose queries cannot be told: no cgroup, no namespace of its own."""
        pods = list(pods)
        names = {(pod.namespace, pod.name) for pod in pods}
        seen = set()
        for found in self._local.containers() if self._local else ():
            who = self._named(found)
            if who and (who.namespace, who.pod) in names:
                seen.add((who.namespace, who.pod))
        seen |= {(pod.namespace, pod.name) for pod, _ in self._container_of_cgroup.values()}
        seen |= {(pod.namespace, pod.name) for pod in self._pod_of_netns.values()}
        return [pod.full_name for pod in pods if (pod.namespace, pod.name) not in seen]

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
        found = [
            self._root / container.cgroup
            for pod in self.inventory.pods
            if (pod.namespace, pod.name) == (client.namespace, client.pod)
            for container in pod.containers
            if container.cgroup
        ]
        if self._local and client.cgroup_id:
            found += self._local.directories(client.cgroup_id)
        return found

    def _by_cgroup(self, cgroup_id: int) -> Who | None:
        known = self._container_of_cgroup.get(cgroup_id)
        if known:
            return _who(*known)
        if not cgroup_id:
            return None
        found = self._local.container(cgroup_id) if self._local else None
        if isinstance(found, LocalContainer):
            return self._named(found)
        if self._has_cgroups and time.monotonic() - self._walked_at > _REWALK_S:
            self._walk(time.monotonic())  # perhaps a group that a container made since
            known = self._container_of_cgroup.get(cgroup_id)
        return _who(*known) if known else None

    def _named(self, found: LocalContainer) -> Who | None:
        """What a container of this machine is called; None as long as it is not known."""
        known = self._container_of_id.get(found.container_id or "")
        if known:
            return _who(*known)
        pod = self._pod_of_uid.get(found.pod_uid or "")
        if pod:
            return _who(pod, found.name)
        if found.pod is None:
            return None
        return Who(found.namespace, found.pod, found.name, self.only_node())

    @staticmethod
    def _is_all(found: LocalContainer, who: Who | None) -> bool:
        """Whether no more will be known of a container: its pod, and its own name if it has one."""
        if who is None:
            return False
        return bool(who.container or found.is_sandbox or found.container_id is None)

    def _by_place(self, netns: int, ip: str) -> Who | None:
        # Whoever else is in there, as a sandbox or a debugger is, is of the pod but no container.
        found = self._by_netns(netns)
        if found:
            return found if self._may_have(found, ip) else None
        name = self._pod_of_ip.get(ip)
        known = self._pod_named.get(name) if name else None
        if name is None or (netns and known and known.netns):
            return None  # it is in another namespace than this one
        return _who(known, None) if known else Who(*name)

    def _is_anothers(self, cgroup_id: int, who: Who) -> bool:
        """Whether a process is of another pod than the one that has its place now.

        Numbers of namespaces, and addresses, are given to others soon after a pod has gone.
        """
        here = self._local.container(cgroup_id) if self._local and cgroup_id else None
        if not isinstance(here, LocalContainer) or not here.pod_uid:
            return False
        pod = self._pod_named.get((who.namespace or "", who.pod or ""))
        if pod is None or not pod.uid:
            return False
        return here.pod_uid not in (pod.uid, pod.static_uid)

    def _may_have(self, who: Who, ip: str) -> bool:
        """Whether a process of the pod may have the address.

        If not, the number of a namespace that has gone was given to the one it is in.
        """
        pod = self._pod_named.get((who.namespace or "", who.pod or ""))
        return not pod or not pod.ips or ip in pod.ips or ip.startswith(_LOCAL)

    def _by_netns(self, netns: int) -> Who | None:
        pod = self._pod_of_netns.get(netns)
        if pod:
            return _who(pod, None)
        if (
            not self._local
            or not netns
            or netns in self._node_of_netns
            or netns in self._node_names
        ):
            return None
        found = self._local.pod_of_netns(netns)
        if found is None:
            return None
        known = self._pod_of_uid.get(found.uid)
        if known:
            who: Who | None = _who(known, None)
        elif found.name is not None:
            return Who(found.namespace, found.name, None, self.only_node())
        else:
            who = self._pods_by_containers().get(found.uid)
        pod = self._pod_named.get((who.namespace or "", who.pod or "")) if who else None
        return None if pod and pod.host_network else who

    def _pods_by_containers(self) -> dict[str, Who]:
        """Whose a pod is of which only its containers are known, by its uid in their cgroups."""
        if self._local and self._local.version != self._by_containers_version:
            self._by_containers_version = self._local.version
            self._by_containers = {
                found.pod_uid: who._replace(container=None)
                for found in self._local.containers()
                if found.pod_uid and (who := self._named(found))
            }
        return self._by_containers

    def only_node(self) -> str | None:
        names = set(self._node_names.values())
        return names.pop() if len(names) == 1 else None

    def _with_gone_containers(
        self, known: dict[str, tuple[Pod, str]]
    ) -> dict[str, tuple[Pod, str]]:
        """And those that were known lately: what a pod says of itself at its end may be less."""
        now_s = time.monotonic()
        for container_id, who in self._container_of_id.items():
            if container_id not in known:
                self._gone_containers.setdefault(container_id, (now_s, who))
        for container_id in list(self._gone_containers):
            since_s, _ = self._gone_containers[container_id]
            too_many = len(self._gone_containers) > _GONE_MAX
            if container_id in known or now_s - since_s > _GONE_S or too_many:
                del self._gone_containers[container_id]
        return {one: who for one, (_, who) in self._gone_containers.items()} | known

    def _remember_gone(self, inventory: Inventory) -> None:
        now_s = time.monotonic()
        here = {pod.uid or pod.full_name for pod in inventory.pods}
        before = getattr(self, "inventory", None)
        # What it was at the last is in `gone`, however short its life was.
        for pod in (*(before.pods if before else ()), *inventory.gone):
            key = pod.uid or pod.full_name
            if key not in here:
                since_s, _ = self._gone.get(key, (now_s, pod))
                self._gone[key] = (since_s, pod)
        for key in list(self._gone):
            since_s, _ = self._gone[key]
            if key in here or now_s - since_s > _GONE_S or len(self._gone) > _GONE_MAX:
                del self._gone[key]

    def _walk(self, now_s: float) -> None:
        """Learns the ids (inode numbers) of the containers' cgroups and of those below.

        Of those whose cgroup somebody has written down; others are found by their path.
        """
        self._walked_at = now_s
        if self._root is None or not self._has_cgroups:
            return
        found = {}
        for pod in self.inventory.pods:
            for container in pod.containers:
                if not container.cgroup:
                    continue
                for directory, _, _ in os.walk(self._root / container.cgroup):
                    with suppress(OSError):
                        found[os.stat(directory).st_ino] = (pod, container.name)
        if found != self._container_of_cgroup:
            self._clients.clear()
            self._container_of_cgroup = found


def _who(pod: Pod, container: str | None) -> Who:
    return Who(pod.namespace, pod.name, container, pod.node)


def _unambiguous(pairs: Iterable[tuple[K, Pod]]) -> dict[K, Pod]:
    """What each key stands for, without those that stand for several pods."""
    found: dict[K, Pod] = {}
    several = set()
    for key, pod in pairs:
        if found.setdefault(key, pod).full_name != pod.full_name:
            several.add(key)
    return {key: pod for key, pod in found.items() if key not in several}
