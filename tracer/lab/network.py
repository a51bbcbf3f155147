# SPDX-License-Identifier: Apache-2.0
"""The links, addresses and routes, as input for `ip -batch`: one text per namespace.

The fabric namespace holds the wire: a veth pair of which one end carries a macvlan per node and
one for the world outside. So a node's uplink is a device with its own Ethernet address that is
no veth, and the wire is never in a namespace that anybody looks into.

Every batch runs as `ip -n NAMESPACE -batch -`; links are born in the namespace they belong to,
so nothing ever appears in the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.lab.topology import (
    FABRIC,
    NODES,
    OUTSIDE_GATEWAY,
    UPSTREAM,
    UPSTREAM_IPS,
    Node,
    Pod,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

UPLINK = "eth0"
OVERLAY = "flannel.1"
OVERLAY_PORT = 8472
MTU = 1500
OVERLAY_MTU = MTU - 50
UPSTREAM_MAC = "02:42:ac:12:00:35"

SYSCTLS = """\
cd /proc/sys/net || exit
for scope in all default; do
  echo 0 > ipv4/conf/$scope/rp_filter
  echo 0 > ipv6/conf/$scope/disable_ipv6
  echo 0 > ipv6/conf/$scope/accept_dad
  echo 0 > ipv6/conf/$scope/accept_ra
  echo 0 > ipv6/conf/$scope/dad_transmits
done
"""
FORWARDING = """\
echo 1 > ipv4/ip_forward
echo 1 > ipv6/conf/all/forwarding
"""


def sysctl_scripts() -> Iterator[tuple[str, str]]:
    """(namespace, shell script): to run in each namespace but the pods' before it has links."""
    forwarding = {node.netns for node in NODES}
    for name in (FABRIC, UPSTREAM, *sorted(forwarding)):
        yield name, SYSCTLS + (FORWARDING if name in forwarding else "")


def link_batches(*, overlay: bool) -> Iterator[tuple[str, list[str]]]:
    """(namespace, lines for `ip -batch`), in an order that works."""
    yield FABRIC, list(_fabric())
    yield UPSTREAM, list(_upstream())
    for node in NODES:
        yield node.netns, list(_node(node, overlay=overlay))


def pod_batches(pods: Iterable[Pod], *, overlay: bool) -> Iterator[tuple[str, list[str]]]:
    """The same for the pods' links, once those of the nodes are there."""
    linked = [pod for pod in pods if not pod.host_network]
    for node in NODES:
        lines = [line for pod in linked if pod.node == node for line in _way_to(pod, overlay)]
        if lines:
            yield node.netns, lines
    for pod in linked:
        yield pod.netns, list(_pod(pod))


def forwarding_entries(node: Node) -> list[str]:
    """Lines for `bridge -batch`: where the overlay finds the other nodes."""
    return [
        f"fdb append {other.vtep_mac} dev {OVERLAY} dst {other.ips[0]}"
        for other in NODES
        if other != node
    ]


def _fabric() -> Iterator[str]:
    yield "link set lo up"
    yield f"link add wire0 mtu {MTU} type veth peer name wire1 mtu {MTU}"
    yield "link set wire0 up"
    yield "link set wire1 up"
    uplinks = [(node.netns, node.mac) for node in NODES] + [(UPSTREAM, UPSTREAM_MAC)]
    for namespace, mac in uplinks:
        yield (
            f"link add link wire0 name {UPLINK} address {mac} netns {namespace}"
            " type macvlan mode bridge"
        )


def _uplink(addresses: list[tuple[str, str]]) -> Iterator[str]:
    yield "link set lo up"
    for ipv4, ipv6 in addresses:
        yield f"addr add {ipv4}/16 dev {UPLINK}"
        yield f"addr add {ipv6}/64 dev {UPLINK} nodad"
    yield f"link set {UPLINK} up"


def _upstream() -> Iterator[str]:
    yield from _uplink([UPSTREAM_IPS, OUTSIDE_GATEWAY])


def _node(node: Node, *, overlay: bool) -> Iterator[str]:
    yield from _uplink([node.ips])
    for gateway in OUTSIDE_GATEWAY:
        yield f"route add default via {gateway} dev {UPLINK}"
    if overlay:
        yield (
            f"link add {OVERLAY} mtu {OVERLAY_MTU} address {node.vtep_mac} type vxlan id 1"
            f" local {node.ips[0]} dev {UPLINK} dstport {OVERLAY_PORT} nolearning"
        )
        yield f"addr add {node.vtep_ips[0]}/32 dev {OVERLAY}"
        yield f"addr add {node.vtep_ips[1]}/128 dev {OVERLAY} nodad"
        yield f"link set {OVERLAY} up"
    for other in NODES:
        if other != node:
            yield from _routes_to(other, overlay=overlay)


def _way_to(pod: Pod, overlay: bool) -> Iterator[str]:
    """The node's end of a pod's link, and the routes to it."""
    mtu = OVERLAY_MTU if overlay else MTU
    yield f"link add {pod.veth} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod.netns}"
    yield f"addr add {pod.node.pod_gateway[0]}/32 dev {pod.veth}"
    yield f"addr add {pod.node.pod_gateway[1]}/128 dev {pod.veth} nodad"
    yield f"link set {pod.veth} up"
    for ip in pod.ips:
        yield f"route add {ip} dev {pod.veth}"


def _routes_to(other: Node, *, overlay: bool) -> Iterator[str]:
    for network, vtep, uplink in zip(other.pod_networks, other.vtep_ips, other.ips, strict=True):
        if overlay:
            yield f"neigh add {vtep} lladdr {other.vtep_mac} dev {OVERLAY} nud permanent"
            yield f"route add {network} via {vtep} dev {OVERLAY} onlink"
        else:
            yield f"route add {network} via {uplink} dev {UPLINK}"


def _pod(pod: Pod) -> Iterator[str]:
    yield "link set lo up"
    yield f"addr add {pod.ips[0]}/32 dev eth0"
    yield f"addr add {pod.ips[1]}/128 dev eth0 nodad"
    yield "link set eth0 up"
    for gateway in pod.node.pod_gateway:
        yield f"route add {gateway} dev eth0"
        yield f"route add default via {gateway} dev eth0"
