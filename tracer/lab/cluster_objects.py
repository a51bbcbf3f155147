# SPDX-License-Identifier: Apache-2.0
"""Writing the cluster's objects, in the place of users, kubelets and controllers.

Every function raises `kubernetes.client.ApiException` where the API server refuses. Answers come
as dicts, since making models of thousands of pods costs more than the server needs to store them.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.lab import control_plane, manifests, topology

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

    from tracer.lab.manifests import Manifest
    from tracer.lab.shape import Shape
    from tracer.lab.topology import Pod, Service

RBAC = Path(__file__).parent.parent / "deploy" / "rbac.yaml"
_AT_ONCE = 8
_ADOPT_TIMEOUT_S = 30.0
_YEAR_S = 365 * 24 * 3600


def connect(kubeconfig: Path) -> ApiClient:
    """A client for whom the file names."""
    from kubernetes import config

    new_client: Any = config.new_client_from_config
    client: ApiClient = new_client(config_file=str(kubeconfig))
    return client


def create_topology(api: ApiClient, cluster: Shape) -> None:
    """All of the lab as a cluster has it: namespaces, nodes, running pods, services, slices."""
    homes = [pod.namespace for pod in cluster.pods] + [each.namespace for each in cluster.services]
    for name in dict.fromkeys(homes):
        ensure_namespace(api, name)
    for node in topology.NODES:
        _core(api).create_node(manifests.node(node), _preload_content=False)
    pods: dict[str, Manifest] = {}
    for pod in cluster.pods:
        created = create_pod(api, pod)
        set_running(api, pod)
        if not pod.host_network:
            pods |= dict.fromkeys(pod.ips, created)
    for service in cluster.services:
        create_service(api, service)
        targets = [(ip, pods.get(ip)) for pair in service.endpoints for ip in pair]
        put_endpoints(api, service, [manifests.endpoint(ip, pod) for ip, pod in targets])


def grant_tracer(api: ApiClient) -> str:
    """Applies deploy/rbac.yaml; a token, good for a year, of the ServiceAccount in it."""
    from kubernetes import utils

    create: Any = utils.create_from_yaml
    create(api, str(RBAC))
    wanted = {"audiences": [control_plane.ISSUER], "expirationSeconds": _YEAR_S}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": wanted}
    answer = _core(api).create_namespaced_service_account_token(
        "dnstrace", "kube-system", body, _preload_content=False
    )
    token: str = _read(answer)["status"]["token"]
    return token


def ensure_namespace(api: ApiClient, name: str) -> None:
    """Creates a namespace unless it is there, as those are that the API server makes itself."""
    from kubernetes.client import ApiException

    try:
        _core(api).create_namespace(manifests.namespace(name), _preload_content=False)
    except ApiException as error:
        if error.status != 409:
            raise


def create_pod(api: ApiClient, pod: Pod) -> Manifest:
    """The pod as the scheduler leaves it: bound to its node, Pending. The object, with its uid."""
    body = manifests.pod(pod)
    return _read(_core(api).create_namespaced_pod(pod.namespace, body, _preload_content=False))


def set_running(api: ApiClient, pod: Pod) -> None:
    """What the kubelet writes when the pod's container runs."""
    patch_status(api, pod.namespace, pod.name, manifests.running(pod))


def set_ended(api: ApiClient, pod: Pod) -> None:
    """What the kubelet writes when the pod's container was killed."""
    patch_status(api, pod.namespace, pod.name, manifests.ended(pod))


def patch_status(api: ApiClient, namespace: str, name: str, status: Manifest) -> None:
    """Merges into a pod's status; lists of named things (containers, conditions) by name."""
    _core(api).patch_namespaced_pod_status(
        name, namespace, {"status": status}, _preload_content=False
    )


def terminate_pod(api: ApiClient, namespace: str, name: str) -> None:
    """What a user's `kubectl delete` does: the pod has 30 s to end, then the kubelet deletes it."""
    _core(api).delete_namespaced_pod(name, namespace, _preload_content=False)


def delete_pod(api: ApiClient, namespace: str, name: str) -> None:
    """What the kubelet does when all of the pod has ended: the object goes at once."""
    _core(api).delete_namespaced_pod(
        name, namespace, grace_period_seconds=0, _preload_content=False
    )


def delete_pods(api: ApiClient, namespace: str) -> None:
    """Deletes all pods of a namespace at once."""
    _core(api).delete_collection_namespaced_pod(
        namespace, grace_period_seconds=0, _preload_content=False
    )


def create_service(api: ApiClient, service: Service) -> None:
    """Creates a service with the addresses that it has in the lab."""
    body = manifests.service(service)
    if service == topology.API_SERVICE:
        _adopt(api, service, body)
    else:
        _core(api).create_namespaced_service(service.namespace, body, _preload_content=False)


def _adopt(api: ApiClient, service: Service, body: Manifest) -> None:
    """Gives default/kubernetes its second address; the API server makes it soon after its start."""
    from kubernetes.client import ApiException

    deadline = time.monotonic() + _ADOPT_TIMEOUT_S
    keys = ("clusterIPs", "ipFamilies", "ipFamilyPolicy")
    patch = {"spec": {key: body["spec"][key] for key in keys}}
    while True:
        try:
            _core(api).patch_namespaced_service(
                service.name, service.namespace, patch, _preload_content=False
            )
            return
        except ApiException as error:
            if error.status != 404 or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def delete_service(api: ApiClient, namespace: str, name: str) -> None:
    """Deletes a service and its slices."""
    _core(api).delete_namespaced_service(name, namespace, _preload_content=False)
    _discovery(api).delete_collection_namespaced_endpoint_slice(
        namespace, label_selector=f"kubernetes.io/service-name={name}", _preload_content=False
    )


def put_endpoints(api: ApiClient, service: Service, endpoints: list[Manifest]) -> None:
    """Makes these the service's endpoints, in a slice per family, whatever was there."""
    from kubernetes.client import ApiException

    discovery = _discovery(api)
    for body in manifests.endpoint_slices(service, endpoints):
        try:
            discovery.create_namespaced_endpoint_slice(
                service.namespace, body, _preload_content=False
            )
        except ApiException as error:
            if error.status != 409:
                raise
            discovery.replace_namespaced_endpoint_slice(
                body["metadata"]["name"], service.namespace, body, _preload_content=False
            )


def many_pods(api: ApiClient, count: int, node_name: str, namespace: str = "many") -> list[str]:
    """Creates running pods of which only the objects exist; their names.

    Their addresses are in 10.245.0.0/16, and in fd00:10:245::/64.
    """
    ensure_namespace(api, namespace)
    host_ips = next((node.ips for node in topology.NODES if node.name == node_name), None)
    node = topology.Node(node_name, 0, "systemd")

    def create(number: int) -> str:
        pod = topology.Pod(namespace, f"many-{number}", node, 0, "many")
        create_pod(api, pod)
        ips = (f"10.245.{number >> 8}.{number & 255}", f"fd00:10:245::{number:x}")
        container_id = hashlib.sha256(pod.full_name.encode()).hexdigest()
        status = manifests.running_status(
            pod.container, container_id, ips, host_ips or ("172.18.0.250", "fd00:172:18::250")
        )
        patch_status(api, namespace, pod.name, status)
        return pod.name

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(create, range(count)))


def _core(api: ApiClient) -> Any:
    """Any, for the sake of bodies and answers that are no models."""
    from kubernetes.client import CoreV1Api

    return CoreV1Api(api)


def _discovery(api: ApiClient) -> Any:
    from kubernetes.client import DiscoveryV1Api

    return DiscoveryV1Api(api)


def _read(response: Any) -> Manifest:
    found: Manifest = json.loads(response.data)
    return found
