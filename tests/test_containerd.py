# SPDX-License-Identifier: Apache-2.0
"""Containers that a real containerd made, as the node tells of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests import containerd
from tests.containerd import Cri, PodConfig
from tracer.cluster.local import LocalContainers
from tracer.cluster.local_records import NOT_A_CONTAINER, LocalContainer
from tracer.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UID = "5a9e0c1e-7a3b-4c1d-9e2f-0123456789ab"
_HOST_UID = "6a3cb1ee0e5a4d7b8d3c7f7a1b2c3d4e"
_WAIT_S = 60.0


class Node(NamedTuple):
    """A pod "web-0" with one container, and what was watching when they were made."""

    cri: Cri
    host: Path
    top: str
    pod: PodConfig
    sandbox: str
    app: str
    local: LocalContainers

    def directory(self, container_id: str) -> Path:
        """The container's cgroup of the v2 hierarchy."""
        root = netns.cgroup2_root()
        assert root
        (found,) = (root / self.top).glob(f"**/{container_id}")
        return found

    def pid(self, container_id: str) -> int:
        return int((self.directory(container_id) / "cgroup.procs").read_text().split()[0])


def config(host: Path, top: str, name: str, uid: str, *, host_network: bool = False) -> PodConfig:
    logs = host / f"var/log/pods/sre_{name}_{uid}"
    return PodConfig("sre", name, uid, f"/{top}/kubepods/pod{uid}", str(logs), host_network)


@pytest.fixture(scope="module")
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """All of it is gone afterwards."""
    request.getfixturevalue("root")
    # A socket's path has 108 bytes at most.
    own, host = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("host")
    top = f"dnstrace-test-{os.getpid()}"
    (host / "run/containerd").mkdir(parents=True)
    local = LocalContainers(netns.cgroup2_root(), host)
    local.start()
    try:
        with containerd.running(own, host) as cri:
            pod = config(host, top, "web-0", _UID)
            sandbox = cri.run_sandbox(pod)
            app = cri.run_container(sandbox, pod, "app", "/bin/sleep", "1000")
            yield Node(cri, host, top, pod, sandbox, app, local)
            cri.remove_sandbox(sandbox)
    finally:
        local.close()
        remove_cgroups(top)


def remove_cgroups(top: str) -> None:
    """In all hierarchies; those of processes that have just ended are busy for a moment."""
    deadline = time.monotonic() + _WAIT_S
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup" not in line:
            continue
        directory = Path(line.split()[4], top)
        while directory.exists():
            for path, _, _ in os.walk(directory, topdown=False):
                try:
                    os.rmdir(path)
                except OSError:
                    assert time.monotonic() < deadline, f"{path} stays busy"
                    time.sleep(0.01)


def polled(local: LocalContainers, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not done():
        assert time.monotonic() < deadline
        local.poll()
        time.sleep(0.02)


def found(local: LocalContainers, cgroup_id: int) -> LocalContainer:
    container = local.container(cgroup_id)
    assert isinstance(container, LocalContainer)
    return container


def test_container_is_what_was_asked_for(node: Node) -> None:
    directory, pid = node.directory(node.app), node.pid(node.app)
    cgroup_id, namespace = directory.stat().st_ino, os.stat(f"/proc/{pid}/ns/net").st_ino
    polled(node.local, lambda: found(node.local, cgroup_id).netns == namespace)
    expected = LocalContainer(
        (cgroup_id,), node.app, _UID, "sre", "web-0", "app", is_sandbox=False, netns=namespace
    )
    assert node.local.container(cgroup_id) == expected
    assert node.local.by_pid(pid) == expected
    assert expected in node.local.containers()


def test_sandbox_is_told_as_such(node: Node) -> None:
    sandbox = found(node.local, node.directory(node.sandbox).stat().st_ino)
    assert (sandbox.pod, sandbox.name, sandbox.is_sandbox) == ("web-0", None, True)


def test_cgroup_below_a_container_is_the_containers(node: Node) -> None:
    below = node.directory(node.app) / "below"
    below.mkdir()
    cgroup_id = below.stat().st_ino
    assert cgroup_id in found(node.local, cgroup_id).cgroup_ids
    below.rmdir()
    node.local.poll()
    assert found(node.local, cgroup_id).name == "app"


def test_process_that_joins_from_outside_is_told_by_its_namespace(node: Node) -> None:
    network = f"/proc/{node.pid(node.app)}/ns/net"
    with subprocess.Popen(["nsenter", f"--net={network}", "sleep", "60"]) as process:
        try:
            assert node.local.by_pid(process.pid) is NOT_A_CONTAINER
            pod = node.local.pod_of_netns(os.stat(network).st_ino)
        finally:
            process.kill()
    assert pod
    assert (pod.uid, pod.namespace, pod.name) == (_UID, "sre", "web-0")


def test_container_that_went_before_anybody_looked_is_named(node: Node) -> None:
    """containerd's file has gone with it; the link that kubelet makes to its log has not."""
    node.local.poll()
    container = node.cri.run_container(node.sandbox, node.pod, "brief", "/bin/sleep", "1000")
    logs = node.host / "var/log/containers"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"web-0_sre_brief-{container}.log").symlink_to("0.log")
    directory = node.directory(container)
    cgroup_id = directory.stat().st_ino
    os.kill(node.pid(container), signal.SIGKILL)
    state = node.host / "run/containerd/io.containerd.runtime.v2.task/k8s.io" / container
    deadline = time.monotonic() + _WAIT_S
    while directory.exists() or state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    polled(node.local, lambda: found(node.local, cgroup_id).name == "brief")
    gone = found(node.local, cgroup_id)
    assert (gone.container_id, gone.pod, gone.name) == (container, "web-0", "brief")
    assert gone not in node.local.containers()


def test_pod_of_the_hosts_network_is_told_by_cgroup_only(node: Node) -> None:
    pod = config(node.host, node.top, "agent", _HOST_UID, host_network=True)
    sandbox = node.cri.run_sandbox(pod)
    try:
        pid, cgroup_id = node.pid(sandbox), node.directory(sandbox).stat().st_ino
        namespace = os.stat(f"/proc/{pid}/ns/net").st_ino
        polled(node.local, lambda: found(node.local, cgroup_id).netns == namespace)
        assert found(node.local, cgroup_id).pod == "agent"
        assert node.local.pod_of_netns(namespace) is None
    finally:
        node.cri.remove_sandbox(sandbox)


@pytest.mark.parametrize("has_cgroup2", [True, False])
def test_what_was_there_before_is_found(node: Node, has_cgroup2: bool) -> None:
    local = LocalContainers(netns.cgroup2_root() if has_cgroup2 else None, node.host)
    local.start()
    try:
        pid = node.pid(node.app)
        by_pid = local.by_pid(pid)
        assert isinstance(by_pid, LocalContainer)
        assert (by_pid.pod, by_pid.name) == ("web-0", "app")
        pod = local.pod_of_netns(os.stat(f"/proc/{pid}/ns/net").st_ino)
        assert pod
        assert pod.name == "web-0"
        assert local.by_pid(os.getpid()) is NOT_A_CONTAINER
    finally:
        local.close()


def test_files_are_where_they_are_expected(node: Node) -> None:
    """What the rest relies on, by name, for when another containerd writes something else."""
    tasks = node.host / "run/containerd/io.containerd.runtime.v2.task/k8s.io"
    about = json.loads((tasks / node.app / "config.json").read_text())
    prefix = "io.kubernetes.cri."
    expected = {
        "container-type": "container",
        "container-name": "app",
        "sandbox-id": node.sandbox,
        "sandbox-name": "web-0",
        "sandbox-namespace": "sre",
        "sandbox-uid": _UID,
    }
    assert {k: about["annotations"].get(prefix + k) for k in expected} == expected
    assert about["linux"]["cgroupsPath"] == f"/{node.top}/kubepods/pod{_UID}/{node.app}"
