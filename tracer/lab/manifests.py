# SPDX-License-Identifier: Apache-2.0
"""The topology as Kubernetes objects: what a user, a kubelet and the controllers would write.

Objects are plain dicts in the API's own words. A pod's uid is not in them, because the API
server gives each its own. So a pod of the topology has one uid in the API and another one in its
cgroup's path (as static pods of real nodes do); the container ids are the same in both.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tracer.lab.services import chain_hash
from tracer.lab.topology import API_SERVICE, DNS_APP, NODES, SECOND_DNS_SERVICE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tracer.lab.topology import Node, Pod, Service

Manifest = dict[str, Any]
FAMILIES = ("IPv4", "IPv6")
IMAGE = "registry.k8s.io/pause:3.10"


def now() -> str:
    """The time as objects have it: RFC 3339, seconds, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def namespace(name: str) -> Manifest:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def node(which: Node) -> Manifest:
    """A node as its kubelet registers it."""
    addresses = [{"type": "InternalIP", "address": ip} for ip in which.ips]
    addresses.append({"type": "Hostname", "address": which.name})
    labels = {"kubernetes.io/hostname": which.name, "kubernetes.io/os": "linux"}
    resources = {"cpu": "2", "memory": "4Gi", "pods": "110"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": which.name, "labels": labels},
        "spec": {"podCIDR": which.pod_networks[0], "podCIDRs": list(which.pod_networks)},
        "status": {
            "addresses": addresses,
            "capacity": resources,
            "allocatable": resources,
            "conditions": [_condition("Ready", now(), "KubeletReady")],
        },
    }


def pod(which: Pod) -> Manifest:
    """A pod that is bound to its node and waits for the kubelet: Pending."""
    requests = {"cpu": "10m", "memory": "16Mi"}  # so it is Burstable, as its cgroup says
    container = {"name": which.container, "image": IMAGE, "resources": {"requests": requests}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": which.name,
            "namespace": which.namespace,
            "labels": which.labels,
        },
        "spec": {
            "nodeName": which.node.name,
            "hostNetwork": which.host_network,
            "dnsPolicy": which.dns_policy,
            "containers": [container],
        },
    }


def running(which: Pod) -> Manifest:
    """The status that a kubelet writes once the pod's container runs."""
    return running_status(which.container, which.container_id, which.ips, which.node.ips)


def running_status(
    container: str, container_id: str, ips: Sequence[str], host_ips: Sequence[str]
) -> Manifest:
    """The same in general; `container_id` is 64 hex digits."""
    time = now()
    conditions = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady")
    status = {
        "name": container,
        "image": IMAGE,
        "imageID": f"{IMAGE}@sha256:{'0' * 64}",
        "containerID": f"containerd://{container_id}",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": time}},
    }
    return {
        "phase": "Running",
        "startTime": time,
        "hostIP": host_ips[0],
        "hostIPs": [{"ip": ip} for ip in host_ips],
        "podIP": ips[0],
        "podIPs": [{"ip": ip} for ip in ips],
        "conditions": [_condition(kind, time) for kind in (*conditions, "PodScheduled")],
        "containerStatuses": [status],
    }


def ended(which: Pod) -> Manifest:
    """What changes in a status when the container is killed; `None` takes a field away."""
    code = 128 + signal.SIGKILL
    container_id = f"containerd://{which.container_id}"
    terminated = {"exitCode": code, "containerID": container_id, "finishedAt": now()}
    status = {
        "name": which.container,
        "ready": False,
        "started": False,
        "state": {"running": None, "terminated": terminated},
    }
    return {"phase": "Failed", "containerStatuses": [status]}


def service(which: Service) -> Manifest:
    """A ClusterIP service of both families."""
    serves_dns = any(port.name == "dns" for port in which.ports)
    key, app = ("k8s-app", DNS_APP) if serves_dns else ("app", which.name)
    spec: Manifest = {
        "type": "ClusterIP",
        "clusterIP": which.ips[0],
        "clusterIPs": list(which.ips),
        "ipFamilyPolicy": "RequireDualStack",
        "ipFamilies": list(FAMILIES),
        "ports": [
            {
                "name": p.name,
                "protocol": p.protocol.upper(),
                "port": p.number,
                "targetPort": p.target,
            }
            for p in which.ports
        ],
    }
    # The API server itself tells its endpoints, and a selector finds no pods of other namespaces.
    if which.name not in (API_SERVICE.name, SECOND_DNS_SERVICE.name):
        spec["selector"] = {key: app}
    metadata = {"name": which.name, "namespace": which.namespace, "labels": {key: app}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoint_slices(which: Service, endpoints: Iterable[Manifest]) -> list[Manifest]:
    """One slice per family; the endpoints are those of `endpoint`, whatever their families."""
    given = list(endpoints)
    ports = [
        {"name": port.name, "protocol": port.protocol.upper(), "port": port.target}
        for port in which.ports
    ]
    slices = []
    for version, family in enumerate(FAMILIES):
        metadata = {
            "name": f"{which.name}-{chain_hash(which.namespace + which.name + family)[:5].lower()}",
            "namespace": which.namespace,
            "labels": {
                "kubernetes.io/service-name": which.name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        }
        of_family = [e for e in given if (":" in e["addresses"][0]) == bool(version)]
        slices.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": metadata,
                "addressType": family,
                "endpoints": of_family,
                "ports": ports,
            }
        )
    return slices


def endpoint(ip: str, target: Mapping[str, Any] | None = None) -> Manifest:
    """An endpoint that is ready; `target` is the pod's object, if it is a pod's."""
    known: Manifest = {
        "addresses": [ip],
        "conditions": {"ready": True, "serving": True, "terminating": False},
    }
    if target is not None:
        metadata = target["metadata"]
        named = {key: metadata[key] for key in ("namespace", "name", "uid")}
        known |= {"targetRef": {"kind": "Pod", **named}, "nodeName": target["spec"]["nodeName"]}
    for other in NODES:
        if target is None and ip in other.ips:
            known["nodeName"] = other.name
    return known


def _condition(kind: str, time: str, reason: str | None = None) -> Manifest:
    condition = {"type": kind, "status": "True", "lastTransitionTime": time}
    return condition if reason is None else {**condition, "reason": reason}
