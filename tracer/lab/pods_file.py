# SPDX-License-Identifier: Apache-2.0
"""The cluster in the format of `dnstrace --pods FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.lab.cgroups import PARENT
from tracer.lab.commands import netns_path
from tracer.lab.topology import NODES, Pod, Service

if TYPE_CHECKING:
    from collections.abc import Iterable


def content(pods: Iterable[Pod], services: Iterable[Service]) -> dict[str, Any]:
    """The file's content; the namespaces must exist, for their inode numbers are in it."""
    return {
        "pods": [_pod(pod) for pod in pods],
        "services": [_service(service) for service in services],
        "nodes": [
            {"name": node.name, "ips": list(node.ips), "netns": netns_inode(node.netns)}
            for node in NODES
        ],
    }


def netns_inode(name: str) -> int:
    return Path(netns_path(name)).stat().st_ino


def _pod(pod: Pod) -> dict[str, Any]:
    container = {
        "name": pod.container,
        "id": pod.container_id,
        "cgroup": f"{PARENT}/{pod.cgroup}",
    }
    return {
        "namespace": pod.namespace,
        "name": pod.name,
        "uid": pod.uid,
        "node": pod.node.name,
        "ips": list(pod.ips),
        "host_network": pod.host_network,
        "netns": netns_inode(pod.netns),
        "labels": pod.labels,
        "dns_policy": pod.dns_policy,
        "containers": [container],
    }


def _service(service: Service) -> dict[str, Any]:
    return {
        "namespace": service.namespace,
        "name": service.name,
        "ips": list(service.ips),
        "ports": sorted({port.number for port in service.ports}),
        "target_ports": sorted({port.target for port in service.ports if "dns" in port.name}),
        "endpoints": [ip for pair in service.endpoints for ip in pair],
    }
