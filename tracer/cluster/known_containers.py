# SPDX-License-Identifier: Apache-2.0
"""The containers and pods that are known, with their cgroups; and those that have gone lately.

Every cgroup is kept, the host's too, so that `not a container` is an answer. Nothing here asks the
machine for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracer.cluster.local_records import (
    NOT_A_CONTAINER,
    LocalContainer,
    LocalPod,
    NotAContainer,
)
from tracer.cluster.netns_owners import Claim, sole_owners
from tracer.cluster.runtimes import Names, NotKubernetes

if TYPE_CHECKING:
    from tracer.cluster.cgroup_paths import ContainerCgroup

_GONE_MAX = 10_000
_GONE_S = 600.0
_NETNS_GONE_S = 10.0  # the numbers of network namespaces are given to new ones at once


@dataclass(slots=True)
class Pod:
    """What is known of a pod; `containers` are keys."""

    namespace: str | None = None
    name: str | None = None
    host_network: bool | None = None
    containers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Container:
    """What is known of a container. `live` are the directories of its cgroups, by number.

    Or of the processes of a pod that are in none of its containers; then there is no id.
    """

    key: str
    container_id: str | None
    pod_uid: str | None
    found_at: float
    live: dict[int, str] = field(default_factory=dict)
    last_ids: tuple[int, ...] = ()
    remembered: int = 0
    names: Names | NotKubernetes | None = None
    netns: int | None = None
    gone_at: float | None = None
    looks: int = 0
    is_due: bool = False
    view: LocalContainer | None = None


class KnownContainers:
    """Cgroups are numbered by their ids; those without an id of the v2 hierarchy have numbers below 0."""

    def __init__(self) -> None:
        self.version = 0
        self.host_netns: int | None = None
        self._containers: dict[str, Container] = {}
        self._pods: dict[str, Pod] = {}
        self._key_of: dict[int, str | None] = {}
        self._gone: dict[int, float] = {}  # when, in that order
        self._pod_of_netns: dict[int, str] | None = None
        self._pod_of_netns_until = 0.0

    def __contains__(self, number: int) -> bool:
        return number in self._key_of

    def by_cgroup(self, number: int) -> LocalContainer | NotAContainer | None:
        """Whose cgroup it is."""
        if number not in self._key_of:
            return None
        key = self._key_of[number]
        return self.view(self._containers[key]) if key is not None else NOT_A_CONTAINER

    def directories(self, number: int) -> list[str]:
        """Where the cgroups of its container are, the container's own first."""
        key = self._key_of.get(number)
        return sorted(self._containers[key].live.values(), key=len) if key is not None else []

    def of(self, cgroup: ContainerCgroup) -> Container | None:
        """What is known of the container that a path told of."""
        return self._containers.get(_key(cgroup))

    def by_key(self, key: str) -> Container | None:
        """What is known of a container, unless it is forgotten by now."""
        return self._containers.get(key)

    def live(self) -> list[LocalContainer]:
        """Those that are there."""
        return [self.view(c) for c in self._containers.values() if c.live and c.container_id]

    def pod_of(self, container: Container) -> Pod | None:
        """What is known of its pod."""
        return self._pods.get(container.pod_uid) if container.pod_uid else None

    def made_by_host(self, number: int) -> None:
        """A cgroup is there, and it is no container's."""
        self._gone.pop(number, None)
        self._key_of[number] = None

    def made(
        self, number: int, cgroup: ContainerCgroup, directory: str | None, now: float
    ) -> Container:
        """A container's cgroup is there. Without a directory, nothing will tell when it goes."""
        key = _key(cgroup)
        container = self._containers.get(key)
        if container is None:
            container = Container(key, cgroup.container_id, cgroup.pod_uid, now)
            self._containers[key] = container
            self._join_pod(container)
        container.remembered += number not in self._key_of
        self._key_of[number] = key
        self._gone.pop(number, None)
        if directory is None:
            self._gone[number] = container.gone_at = now
        else:
            container.live[number] = directory
            container.gone_at = None
        self._changed(container)
        return container

    def removed(self, number: int, now: float) -> None:
        """A cgroup has gone; it is remembered for a while."""
        if number not in self._key_of:
            return
        self._gone[number] = now
        key = self._key_of[number]
        if key is None:
            return
        container = self._containers[key]
        ids = _ids(container)
        container.live.pop(number, None)
        if not _ids(container):
            container.last_ids = ids or container.last_ids
        if not container.live:
            container.gone_at = now
        self._changed(container)

    def forget(self, now: float) -> None:
        """Drops what went too long ago, and whatever is too much."""
        while self._gone:
            number, gone_at = next(iter(self._gone.items()))
            if len(self._gone) <= _GONE_MAX and now - gone_at < _GONE_S:
                return
            del self._gone[number]
            key = self._key_of.pop(number)
            if key is None:
                continue
            container = self._containers[key]
            container.remembered -= 1
            if not container.remembered:
                del self._containers[key]
                self._leave_pod(container)

    def name(self, container: Container, names: Names | NotKubernetes) -> None:
        """The runtime, or kubelet, has said what it is."""
        container.names = names
        if isinstance(names, Names):
            if container.pod_uid is None and names.uid:
                container.pod_uid = names.uid
                self._join_pod(container)
            self.name_pod(container, names.namespace, names.pod)
            pod = self.pod_of(container)
            if pod and names.host_network is not None:
                pod.host_network = names.host_network
        self._changed(container)

    def name_pod(self, container: Container, namespace: str, name: str) -> None:
        """Its pod's names are known; they are those of the pod's other containers, too."""
        pod = self.pod_of(container)
        if pod:
            pod.namespace, pod.name = namespace, name
            for key in pod.containers:
                self._changed(self._containers[key])

    def place(self, container: Container, netns: int | None) -> None:
        """It is in this network namespace."""
        if netns is not None and netns != container.netns:
            container.netns = netns
            self._changed(container)

    def view(self, container: Container) -> LocalContainer:
        """What is told of it."""
        if container.view is None:
            names = container.names if isinstance(container.names, Names) else None
            pod = self.pod_of(container)
            container.view = LocalContainer(
                cgroup_ids=_ids(container) or container.last_ids,
                container_id=container.container_id,
                pod_uid=container.pod_uid,
                namespace=pod.namespace if pod else names.namespace if names else None,
                pod=pod.name if pod else names.pod if names else None,
                name=names.container if names else None,
                is_sandbox=names.is_sandbox if names else None,
                netns=container.netns,
            )
        return container.view

    def pod_of_netns(self, inode: int, now: float) -> LocalPod | None:
        """The pod that alone has this network namespace."""
        if self._pod_of_netns is None or now >= self._pod_of_netns_until:
            self._pod_of_netns = self._owners(now)
        uid = self._pod_of_netns.get(inode)
        pod = self._pods.get(uid) if uid else None
        return LocalPod(uid, pod.namespace, pod.name, inode) if uid and pod else None

    def _owners(self, now: float) -> dict[int, str]:
        """Who has gone owns nothing while it is not known of somebody where he is: perhaps there."""
        self._pod_of_netns_until = now + _NETNS_GONE_S
        live: list[Claim] = []
        gone: list[Claim] = []
        for container in self._containers.values():
            pod = self.pod_of(container)
            if container.netns in (None, self.host_netns) or (pod and pod.host_network):
                continue
            claim = Claim(container.netns or 0, container.pod_uid)
            if container.gone_at is None:
                live.append(claim)
            elif now - container.gone_at < _NETNS_GONE_S:
                gone.append(claim)
                until = container.gone_at + _NETNS_GONE_S
                self._pod_of_netns_until = min(self._pod_of_netns_until, until)
        return sole_owners(live, () if self._is_any_unplaced() else gone)

    def _is_any_unplaced(self) -> bool:
        there = {c.pod_uid for c in self._containers.values() if c.pod_uid and c.live}
        placed = {c.pod_uid for c in self._containers.values() if c.netns is not None and c.live}
        return not there <= placed

    def _join_pod(self, container: Container) -> None:
        if container.pod_uid:
            self._pods.setdefault(container.pod_uid, Pod()).containers.add(container.key)

    def _leave_pod(self, container: Container) -> None:
        pod = self.pod_of(container)
        if pod and container.pod_uid:
            pod.containers.discard(container.key)
            if not pod.containers:
                del self._pods[container.pod_uid]

    def _changed(self, container: Container) -> None:
        container.view = None
        self._pod_of_netns = None
        self.version += 1


def _key(cgroup: ContainerCgroup) -> str:
    return cgroup.container_id or f"pod/{cgroup.pod_uid}"


def _ids(container: Container) -> tuple[int, ...]:
    return tuple(number for number in container.live if number > 0)
