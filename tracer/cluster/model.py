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
    """`netns` is the inode number of its network namespace: the node's, if host_network."""

    namespace: str
    name: str
    uid: str
    node: str | None
    ips: tuple[str, ...]
    host_network: bool
    netns: int | None
    labels: tuple[tuple[str, str], ...]
    containers: tuple[Container, ...]

    @property
    def full_name(self) -> str:
        """As kubectl and this tool write it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Service:
    """`ips` are cluster IPs, `endpoints` the addresses of the pods behind."""

    namespace: str
    name: str
    ips: tuple[str, ...]
    ports: tuple[int, ...]
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A node; `netns` is known where it is a namespace of this machine."""

    name: str
    ips: tuple[str, ...]
    netns: int | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that is known at one time."""

    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    nodes: tuple[Node, ...] = ()
