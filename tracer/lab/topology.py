# SPDX-License-Identifier: Apache-2.0
"""What the cluster consists of: nodes, pods and services, with every name and address fixed.

Nothing here touches the machine. Names, uids and container ids are the same on every run, so
that expected values can be written down.

The networks are those of kind: nodes in 172.18.0.0/16, pods in 10.244.0.0/16 with one /24 per
node, services in 10.96.0.0/16; the same again in IPv6.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from functools import cached_property

PREFIX = "dnstrace-"
FABRIC = PREFIX + "fabric"
UPSTREAM = PREFIX + "upstream"
UPSTREAM_IPS = ("172.18.0.53", "fd00:172:18::53")
OUTSIDE_GATEWAY = ("172.18.0.1", "fd00:172:18::1")
POD_NETWORKS = ("10.244.0.0/16", "fd00:10:244::/56")
SERVICE_NETWORKS = ("10.96.0.0/16", "fd00:10:96::/96")
CLUSTER_DOMAIN = "cluster.local"
DNS_PORT = 53
DNS_APP = "kube-dns"
NODE_LOCAL_APP = "node-local-dns"


@dataclass(frozen=True)
class Node:
    """One node; `cgroup_driver` is kubelet's way of naming cgroups, systemd or cgroupfs."""

    name: str
    number: int
    cgroup_driver: str

    @property
    def netns(self) -> str:
        return PREFIX + self.name

    @property
    def ips(self) -> tuple[str, str]:
        """Addresses of the uplink: IPv4, IPv6."""
        return f"172.18.0.{self.number + 1}", f"fd00:172:18::{self.number + 1}"

    @property
    def mac(self) -> str:
        return f"02:42:ac:12:00:{self.number + 1:02x}"

    @property
    def vtep_mac(self) -> str:
        """Ethernet address of the node's end of the overlay."""
        return f"02:42:0a:f4:{self.number:02x}:00"

    @property
    def pod_networks(self) -> tuple[str, str]:
        return f"10.244.{self.number}.0/24", f"fd00:10:244:{self.number}::/64"

    @property
    def vtep_ips(self) -> tuple[str, str]:
        """Addresses of the node's end of the overlay: the network addresses, as flannel's."""
        return f"10.244.{self.number}.0", f"fd00:10:244:{self.number}::"

    @property
    def pod_gateway(self) -> tuple[str, str]:
        return f"10.244.{self.number}.1", f"fd00:10:244:{self.number}::1"


@dataclass(frozen=True)
class Pod:
    """One pod with one container. `number` is the last part of its addresses.

    `given_uid` is for what starts while the lab is up, which has a new uid each time.
    """

    namespace: str
    name: str
    node: Node
    number: int
    app: str
    container: str = "app"
    dns_policy: str = "ClusterFirst"
    host_network: bool = False
    given_uid: str | None = None
    more_labels: tuple[tuple[str, str], ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def file_name(self) -> str:
        return f"{self.namespace}_{self.name}"

    @cached_property
    def uid(self) -> str:
        name = f"{self.name}.{self.namespace}.pod.dnstrace"
        return self.given_uid or str(uuid.uuid5(uuid.NAMESPACE_DNS, name))

    @cached_property
    def container_id(self) -> str:
        return hashlib.sha256(f"{self.uid}/{self.container}".encode()).hexdigest()

    @property
    def labels(self) -> dict[str, str]:
        key = "k8s-app" if self.app in (DNS_APP, NODE_LOCAL_APP) else "app"
        return {key: self.app, **dict(self.more_labels)}

    @property
    def netns(self) -> str:
        if self.host_network:
            return self.node.netns
        return f"{PREFIX}{self.namespace}-{self.name}"

    @property
    def ips(self) -> tuple[str, str]:
        if self.host_network:
            return self.node.ips
        node = self.node.number
        return f"10.244.{node}.{self.number}", f"fd00:10:244:{node}::{self.number}"

    @property
    def veth(self) -> str | None:
        """Name of the node's end of the pod's link; None on the host network."""
        if self.host_network:
            return None
        return "veth" + hashlib.sha256(self.full_name.encode()).hexdigest()[:8]

    @property
    def cgroup(self) -> str:
        """The container's cgroup below the lab's own, named as kubelet and containerd do."""
        if self.node.cgroup_driver == "cgroupfs":
            return f"kubepods/burstable/pod{self.uid}/{self.container_id}"
        pod = self.uid.replace("-", "_")
        return (
            "kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-pod{pod}.slice/cri-containerd-{self.container_id}.scope"
        )


@dataclass(frozen=True)
class Port:
    """One port of a service; `target` is where its endpoints listen."""

    name: str
    protocol: str
    number: int
    target: int


@dataclass(frozen=True)
class Service:
    """One ClusterIP service; `endpoints` are (IPv4, IPv6) pairs."""

    namespace: str
    name: str
    ips: tuple[str, str]
    ports: tuple[Port, ...]
    endpoints: tuple[tuple[str, str], ...]


NODES = (Node("node1", 1, "systemd"), Node("node2", 2, "cgroupfs"))
_node1, _node2 = NODES

DNS_PODS = (
    Pod("kube-system", "coredns-7c65d6cfc9-4kx2p", _node1, 2, DNS_APP, "coredns", "Default"),
    Pod("kube-system", "coredns-7c65d6cfc9-zq8mt", _node2, 2, DNS_APP, "coredns", "Default"),
)
_web = Pod("sre", "web-0", _node1, 10, "web")
_api = Pod("sre", "api-0", _node1, 11, "api")
_worker = Pod("sre", "worker-0", _node2, 10, "worker")
_shop = Pod("default", "shop-0", _node1, 12, "shop")
_agent = Pod("sre", "host-agent", _node1, 0, "host-agent", "agent", "ClusterFirstWithHostNet", True)
# Caches on the nodes themselves: only in the cluster where the options say so.
NODE_LOCAL_PODS = tuple(
    Pod(
        "kube-system",
        f"node-local-dns-{end}",
        node,
        0,
        NODE_LOCAL_APP,
        "node-cache",
        "Default",
        True,
    )
    for end, node in (("d8k4q", _node1), ("w2r7x", _node2))
)
PODS = (*DNS_PODS, _web, _api, _worker, _shop, _agent)


def _http(namespace: str, number: int, pod: Pod) -> Service:
    ips = (f"10.96.11.{number}", f"fd00:10:96::11:{number}")
    return Service(namespace, pod.app, ips, (Port("http", "tcp", 80, 8080),), (pod.ips,))


def _dns(namespace: str, name: str, ips: tuple[str, str]) -> Service:
    ports = (Port("dns", "udp", DNS_PORT, DNS_PORT), Port("dns-tcp", "tcp", DNS_PORT, DNS_PORT))
    return Service(namespace, name, ips, ports, tuple(pod.ips for pod in DNS_PODS))


DNS_SERVICE = _dns("kube-system", "kube-dns", ("10.96.0.10", "fd00:10:96::a"))
# A cluster may have more than one; this one has the same servers.
SECOND_DNS_SERVICE = _dns("dns2", "kube-dns-2", ("10.96.0.20", "fd00:10:96::14"))
# Where a cache on each node finds the cluster's servers, when it has their service's address.
UPSTREAM_DNS_SERVICE = _dns("kube-system", "kube-dns-upstream", ("10.96.0.11", "fd00:10:96::b"))
API_SERVICE = Service(
    "default",
    "kubernetes",
    ("10.96.0.1", "fd00:10:96::1"),
    (Port("https", "tcp", 443, 6443),),
    (_node1.ips,),
)
SERVICES = (
    API_SERVICE,
    DNS_SERVICE,
    SECOND_DNS_SERVICE,
    _http("sre", 10, _web),
    _http("sre", 11, _api),
    _http("sre", 12, _worker),
    _http("default", 13, _shop),
)


def namespaces() -> tuple[str, ...]:
    """Every network namespace of the lab, the fabric first."""
    pods = (pod.netns for pod in PODS if not pod.host_network)
    return (FABRIC, UPSTREAM, *(node.netns for node in NODES), *pods)


def resolv_conf(pod: Pod, server: str = DNS_SERVICE.ips[0]) -> str:
    """What kubelet writes for the pod's dnsPolicy; `Default` is the node's own."""
    if pod.dns_policy == "Default":
        return node_resolv_conf()
    domains = f"{pod.namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}"
    return f"search {domains}\nnameserver {server}\noptions ndots:5\n"


def node_resolv_conf() -> str:
    return f"nameserver {UPSTREAM_IPS[0]}\n"
