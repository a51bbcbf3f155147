# SPDX-License-Identifier: Apache-2.0
"""What changes while the lab is up: pods come and go, the API server stops and starts.

Each function takes the lab as it is and gives it as it is then, for `state.save`; the caller
holds the lab's lock.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab import bringup, cgroups, cluster_objects, control_plane, sandbox, teardown
from tracer.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kubernetes.client import ApiClient

    from tracer.lab.state import Process, State
    from tracer.lab.topology import Pod

# Far from the addresses that the topology has given away.
_NUMBERS = range(100, 250)


def add_pod(current: State, pod: Pod, api: ApiClient | None, lock: int) -> State:
    """Starts a pod in the order of real ones: object, sandbox, status. Its uid is the API's.

    Its `number` is taken if it is not 0, else the first that is free on its node. Where this
    raises, the pod may be half made; `lab down` removes that too.
    """
    if any(known.full_name == pod.full_name for known in current.pods):
        raise LabError(f"there is a pod {pod.full_name}: choose another name")
    if pod.number == 0 and not pod.host_network:
        pod = replace(pod, number=_free_number(current, pod))
    if not pod.host_network:
        teardown.own_more(pod.netns)
    uid = str(uuid.uuid4())
    if api is not None:
        cluster_objects.ensure_namespace(api, pod.namespace)
        uid = cluster_objects.create_pod(api, pod)["metadata"]["uid"]
    pod = replace(pod, given_uid=uid)
    holders = sandbox.make([pod], _parent(current), current.options, lock=lock)
    new = replace(
        current,
        processes=(*current.processes, *holders.values()),
        added=(*current.added, pod),
    )
    bringup.write_pods_file(new.pods, new.options)
    if api is not None:
        cluster_objects.set_running(api, pod)
    return new


def remove_pod(current: State, pod: Pod, api: ApiClient | None, lock: int) -> State:
    """Ends a pod that was added, as `kubectl delete` and the kubelet do."""
    if pod not in current.added:
        raise LabError(f"{pod.full_name} came with the lab: remove only what was added")
    if api is not None:
        cluster_objects.terminate_pod(api, pod.namespace, pod.name)
    sandbox.remove(pod, _parent(current), lock)
    if api is not None:
        cluster_objects.set_ended(api, pod)
    new = replace(
        current,
        processes=tuple(p for p in current.processes if p.name != pod.file_name),
        added=tuple(other for other in current.added if other != pod),
    )
    bringup.write_pods_file(new.pods, new.options)
    if api is not None:
        cluster_objects.delete_pod(api, pod.namespace, pod.name)
    return new


def stop_api(current: State) -> State:
    """Kills the API server and its etcd; they may be stopped already."""
    control_plane.stop(api_processes(current))
    kept = tuple(p for p in current.processes if p.name not in control_plane.NAMES)
    return replace(current, processes=kept)


def start_api(current: State, flags: Sequence[str]) -> State:
    """Starts them again with the same port and data, and waits until the server is ready."""
    if current.api_port is None:
        raise LabError("the lab has no API server: run `dnstrace lab up --api`")
    try:
        started = control_plane.start(current.api_port, _parent(current), flags)
        control_plane.wait_until_ready(started[control_plane.SERVER], current.api_port)
    except BaseException:
        control_plane.remove(_parent(current))
        raise
    return replace(current, processes=(*current.processes, *started.values()))


def api_processes(current: State) -> list[Process]:
    """The processes of the API server, none if it is stopped."""
    return [p for p in current.processes if p.name in control_plane.NAMES]


def _free_number(current: State, pod: Pod) -> int:
    taken = {other.number for other in current.pods if other.node == pod.node}
    for number in _NUMBERS:
        if number not in taken:
            return number
    raise LabError(f"{pod.node.name} has no free address: remove a pod")


def _parent(current: State) -> Path:
    return Path(current.cgroup_mount) / cgroups.PARENT
