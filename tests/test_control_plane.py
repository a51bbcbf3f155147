# SPDX-License-Identifier: Apache-2.0
"""The lab's API server: the real one, with what a cluster's would tell of the lab."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from kubernetes import client, watch
from urllib3.exceptions import MaxRetryError

from tests.leftovers import NOTHING, leftovers
from tracer.lab import Lab, LabError, cluster_objects, entering, go_build, state, topology

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(scope="module")
def lab(root: None) -> Iterator[Lab]:  # noqa: ARG001 -- root comes first
    """The lab with its API server; the pods that a test adds, it removes."""
    with Lab(api=True) as up:
        yield up


@pytest.fixture(scope="module")
def tracer(lab: Lab) -> Iterator[client.ApiClient]:
    """The API as the tracer sees it."""
    with cluster_objects.connect(lab.kubeconfig) as api:
        yield api


def plain(model: Any) -> Any:
    """A model as the API has it."""
    return model.to_dict(serialize=True)


def pods_of(api: client.ApiClient, namespace: str) -> dict[str, Any]:
    """The pods of a namespace by name, as `kubectl get -o yaml` shows them."""
    found = plain(client.CoreV1Api(api).list_namespaced_pod(namespace))
    return {pod["metadata"]["name"]: pod for pod in found["items"]}


def events_since(api: client.ApiClient, version: str, last: str) -> list[tuple[str, Any]]:
    """(type, pod) of what happened in namespace sre since a resource version, up to a type."""
    watcher: Any = watch.Watch  # which has no types
    listed = client.CoreV1Api(api).list_namespaced_pod
    seen = []
    for event in watcher().stream(listed, "sre", resource_version=version, timeout_seconds=20):
        seen.append((event["type"], event["raw_object"]))
        if event["type"] == last:
            break
    return seen


def version_of(api: client.ApiClient) -> str:
    found = client.CoreV1Api(api).list_namespaced_pod("sre").metadata
    assert found is not None
    return str(found.resource_version)


def test_pods_are_told_as_they_run(lab: Lab, tracer: client.ApiClient) -> None:
    for pod in lab.pods:
        told = pods_of(tracer, pod.namespace)[pod.name]
        status = told["status"]
        assert told["spec"]["nodeName"] == pod.node
        assert bool(told["spec"]["hostNetwork"]) == pod.host_network
        assert (status["phase"], status["qosClass"]) == ("Running", "Burstable")
        assert [entry["ip"] for entry in status["podIPs"]] == [pod.ipv4, pod.ipv6]
        (container,) = status["containerStatuses"]
        assert container["name"] == pod.container
        assert container["containerID"] == f"containerd://{pod.container_id}"


def test_nodes_are_told_with_their_addresses(tracer: client.ApiClient) -> None:
    nodes = plain(client.CoreV1Api(tracer).list_node())["items"]
    told = {
        node["metadata"]["name"]: [entry["address"] for entry in node["status"]["addresses"]]
        for node in nodes
    }
    assert told == {node.name: [*node.ips, node.name] for node in topology.NODES}


def test_services_are_told_with_their_endpoints(lab: Lab, tracer: client.ApiClient) -> None:
    """Both addresses of each, and the pods behind them by the uids of the API."""
    core, discovery = client.CoreV1Api(tracer), client.DiscoveryV1Api(tracer)
    for service in topology.SERVICES:
        told = plain(core.read_namespaced_service(service.name, service.namespace))
        assert told["spec"]["clusterIPs"] == list(service.ips)
        label = f"kubernetes.io/service-name={service.name}"
        slices = discovery.list_namespaced_endpoint_slice(service.namespace, label_selector=label)
        told_slices = plain(slices)["items"]
        endpoints = [endpoint for one in told_slices for endpoint in one["endpoints"]]
        assert sorted(endpoint["addresses"] for endpoint in endpoints) == sorted(
            [ip] for pair in service.endpoints for ip in pair
        )
        assert {one["addressType"] for one in told_slices} == {"IPv4", "IPv6"}
        if service == topology.API_SERVICE:
            continue
        for endpoint in endpoints:
            target = endpoint["targetRef"]
            pods = pods_of(tracer, target["namespace"])
            assert pods[target["name"]]["metadata"]["uid"] == target["uid"]
    assert lab.state.api_port is not None


def test_the_tracer_may_read_what_it_needs_and_nothing_else(tracer: client.ApiClient) -> None:
    core = client.CoreV1Api(tracer)
    assert client.DiscoveryV1Api(tracer).list_endpoint_slice_for_all_namespaces().items
    for read in (core.list_namespace, core.list_node, core.list_service_for_all_namespaces):
        assert read().items
    for forbidden in (
        core.list_secret_for_all_namespaces,
        core.list_config_map_for_all_namespaces,
        lambda: cluster_objects.delete_pod(tracer, "sre", "web-0"),
    ):
        with pytest.raises(client.ApiException) as refused:
            forbidden()
        assert refused.value.status == 403


def test_a_pod_comes_and_goes_in_the_steps_of_a_real_one(lab: Lab) -> None:
    before = version_of(lab.api)
    added = lab.add_pod("sre", "batch-0", "node2", labels={"tier": "night"})
    asked = lab.run("sre/batch-0", ["dig", "+short", "+tries=1", "www.example.com"]).stdout
    lab.remove_pod("sre/batch-0")
    assert asked == "93.184.216.34\n"
    events = events_since(lab.api, before, "DELETED")
    kinds = [kind for kind, _ in events]
    assert kinds == ["ADDED", *["MODIFIED"] * 4, "DELETED"]
    created, running, terminating, ended, *_ = (pod for _, pod in events)
    assert created["status"]["phase"] == "Pending"
    assert created["spec"]["nodeName"] == "node2"
    assert "podIPs" not in created["status"]
    assert created["metadata"]["labels"] == {"app": "batch-0", "tier": "night"}
    assert {pod["metadata"]["uid"] for _, pod in events} == {added.uid}
    assert added.uid in added.cgroup
    assert running["status"]["podIP"] == added.ipv4
    assert running["status"]["containerStatuses"][0]["containerID"].endswith(added.container_id)
    assert terminating["metadata"]["deletionTimestamp"]
    assert set(ended["status"]["containerStatuses"][0]["state"]) == {"terminated"}


def test_a_pod_of_the_same_name_is_another_one(lab: Lab) -> None:
    """As a StatefulSet's: same name and, if so asked, same address; all else is new."""
    first = lab.add_pod("sre", "batch-0", number=120)
    lab.remove_pod("sre/batch-0")
    second = lab.add_pod("sre", "batch-0", number=120)
    lab.remove_pod("sre/batch-0")
    assert (first.ipv4, first.full_name) == (second.ipv4, second.full_name)
    assert first.uid != second.uid
    assert first.container_id != second.container_id
    assert first.cgroup_id != second.cgroup_id


def test_the_rest_goes_on_while_the_api_server_is_down(lab: Lab, tracer: client.ApiClient) -> None:
    """It comes back on the same port, with what it knew, and its clients need not connect anew."""
    before = pods_of(tracer, "sre")
    lab.stop_api()
    with pytest.raises(MaxRetryError):
        pods_of(tracer, "sre")
    assert not lab.state.whole()
    assert lab.run("sre/web-0", ["dig", "+short", "www.example.com"]).stdout
    lab.stop_api()
    with pytest.raises(LabError, match="unknown flag"):
        lab.start_api("--no-such-flag")
    lab.start_api()
    lab.start_api()
    assert lab.state.whole()
    assert pods_of(tracer, "sre") == before


def test_server_that_ends_before_it_is_known_leaves_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd has started by then."""
    lab.stop_api()
    started: list[int] = []

    def start_time(pid: int) -> int | None:
        started.append(pid)
        return None if len(started) == 2 else state.start_time(pid)

    with monkeypatch.context() as patch:
        patch.setattr(entering, "start_time", start_time)
        with pytest.raises(LabError, match="kube-apiserver ended at once"):
            lab.start_api()
    assert len(started) == 2
    assert [pid for pid in started if state.start_time(pid) is not None] == []
    lab.start_api()
    assert lab.state.whole()


def test_the_past_can_be_forgotten(lab: Lab, tracer: client.ApiClient) -> None:
    """Who watches from too far back is told so, and has to list again."""
    lab.stop_api()
    lab.start_api("--watch-cache-sizes=pods#0")
    old = version_of(tracer)
    cluster_objects.patch_status(lab.api, "sre", "web-0", {"message": "changed"})
    assert lab.compact() > int(old)
    with pytest.raises(client.ApiException) as gone:
        events_since(tracer, old, "MODIFIED")
    assert gone.value.status == 410
    lab.stop_api()
    lab.start_api()


def test_many_pods_are_made_and_deleted_at_once(lab: Lab) -> None:
    names = cluster_objects.many_pods(lab.api, 300, "node1")
    made = pods_of(lab.api, "many")
    assert sorted(names) == sorted(made)
    addresses = {pod["status"]["podIP"] for pod in made.values()}
    assert len(addresses) == len(names)
    cluster_objects.delete_pods(lab.api, "many")
    assert pods_of(lab.api, "many") == {}


def test_a_service_comes_and_goes(lab: Lab) -> None:
    ips = ("10.96.77.1", "fd00:10:96::77:1")
    service = replace(topology.SERVICES[-1], name="late", ips=ips)
    cluster_objects.create_service(lab.api, service)
    cluster_objects.put_endpoints(lab.api, service, [])
    cluster_objects.put_endpoints(lab.api, service, [])
    cluster_objects.delete_service(lab.api, service.namespace, service.name)
    core = client.CoreV1Api(lab.api)
    assert "late" not in {
        one.metadata.name for one in core.list_namespaced_service("default").items if one.metadata
    }


def test_the_command_line_tells_of_the_api_server(lab: Lab) -> None:
    """And that it has gone, if it has."""
    status = [sys.executable, "-m", "tracer.lab", "status"]
    named = f"API server on port {lab.state.api_port}"
    gone = f"{named}, which does not run any more"
    found = subprocess.check_output(status, text=True)
    assert named in found
    assert gone not in found
    lab.stop_api()
    try:
        assert gone in subprocess.check_output(status, text=True)
    finally:
        lab.start_api()


def test_down_takes_the_api_server_and_added_pods_along(lab: Lab) -> None:
    """Last in this file, because it takes the lab away."""
    lab.add_pod("sre", "batch-0")
    port = lab.state.api_port
    lab.down()
    assert leftovers() == NOTHING
    listening = subprocess.check_output(["ss", "-Hlnt", f"sport = :{port}"], text=True)
    assert listening == ""


def test_the_version_that_is_told_is_the_one_that_is_built() -> None:
    text = (go_build.APISERVER.sources / "go.mod").read_text()
    (version,) = re.findall(r"k8s\.io/kubernetes (v[\d.]+)", text)
    assert f"gitVersion={version} " in go_build.APISERVER.link_flags
