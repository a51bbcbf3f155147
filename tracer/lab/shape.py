# SPDX-License-Identifier: Apache-2.0
"""The cluster as the options shape it, out of what `topology` fixes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracer.lab.topology import (
    DNS_PORT,
    DNS_SERVICE,
    NODE_LOCAL_PODS,
    PODS,
    SECOND_DNS_SERVICE,
    SERVICES,
    UPSTREAM_DNS_SERVICE,
    Pod,
    Service,
)

if TYPE_CHECKING:
    from tracer.lab.state import Options

NODE_LOCAL_IP = "169.254.20.10"
# Where the caches on the nodes listen, by --node-local; the pods ask the first of `resolver`.
NODE_LOCAL = {
    "no": (),
    "link-local": (NODE_LOCAL_IP,),
    "cluster-ip": (NODE_LOCAL_IP, DNS_SERVICE.ips[0]),
}
_DNS_SERVICES = (DNS_SERVICE, SECOND_DNS_SERVICE, UPSTREAM_DNS_SERVICE)


@dataclass(frozen=True)
class Shape:
    """Pods and services; where the replicas listen, and where pods ask.

    `node_local_ips` are the addresses of the caches on the nodes, none if there are no caches.
    """

    pods: tuple[Pod, ...]
    services: tuple[Service, ...]
    resolver: str
    dns_port: int
    node_local_ips: tuple[str, ...]


def of(options: Options) -> Shape:
    """The cluster that these options mean."""
    ips = NODE_LOCAL[options.node_local]
    pods = (*PODS, *NODE_LOCAL_PODS) if ips else PODS
    services = (*SERVICES, UPSTREAM_DNS_SERVICE) if ips else SERVICES
    return Shape(
        pods,
        tuple(_listening(service, options.dns_port) for service in services),
        NODE_LOCAL_IP if options.node_local == "link-local" else DNS_SERVICE.ips[0],
        options.dns_port,
        ips,
    )


def _listening(service: Service, port: int) -> Service:
    """The service, whose servers listen on `port` if they serve DNS."""
    if service not in _DNS_SERVICES or port == DNS_PORT:
        return service
    return replace(service, ports=tuple(replace(each, target=port) for each in service.ports))
