# SPDX-License-Identifier: Apache-2.0
"""What there is in a cluster, as far as DNS is concerned. Wherever it was learned from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Container:
    """`cgroup` is relative to the root of the cgroup v2 tree; "" if unknown."""

    name: str
    id: str
    cgroup: str


@dataclass(frozen=True, slots=True)
class Pod:
    """`netns` is the inode number of its network namespace: the node's, if host_network.

    `static_uid` is what the kubelet calls a static pod in its paths and cgroups, instead of `uid`;
    "" of others. `phase` is Kubernetes' ("Running"); "" if unknown. One that has finished has no
    addresses: they may be another pod's by now.
    """

    namespace: str
    name: str
    uid: str
    node: str | None
    ips: tuple[str, ...]
    host_network: bool
    netns: int | None
    labels: tuple[tuple[str, str], ...]
    containers: tuple[Container, ...]
    static_uid: str = ""
    phase: str = ""
    deleting: bool = False

    @property
    def full_name(self) -> str:
        """As kubectl and this tool write it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Service:
    """`ips` are cluster IPs, `endpoints` the addresses of the pods behind.

    Of a DNS service, `target_ports` are the ports that those listen on for DNS.
    """

    namespace: str
    name: str
    ips: tuple[str, ...]
    ports: tuple[int, ...]
    endpoints: tuple[str, ...]
    target_ports: tuple[int, ...] = ()
    dns: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who is behind a DNS service, on whatever node. No pod: an address that somebody wrote down.

    `ready` is whether the service sends queries there.
    """

    ip: str
    namespace: str | None
    pod: str | None
    node: str | None
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """A node; `netns` is known where it is a namespace of this machine."""

    name: str
    ips: tuple[str, ...]
    netns: int | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that is known at one time; `gone` are pods that were deleted lately."""

    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    nodes: tuple[Node, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    gone: tuple[Pod, ...] = ()
