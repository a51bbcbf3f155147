# SPDX-License-Identifier: Apache-2.0
"""Containers and pods as the node tells of them, on a made-up node."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tracer.cluster import known_containers
from tracer.cluster.identities import Identities
from tracer.cluster.local import LocalContainers
from tracer.cluster.local_records import NOT_A_CONTAINER, LocalContainer, LocalPod
from tracer.cluster.model import Inventory, Pod

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_UID = "5a9e0c1e-7a3b-4c1d-9e2f-0123456789ab"
_UID2 = "6a3cb1ee0e5a4d7b8d3c7f7a1b2c3d4e"
_ID, _ID2, _SANDBOX, _NODE = "a1" * 32, "b2" * 32, "c3" * 32, "f0" * 32
_TASKS = "run/containerd/io.containerd.runtime.v2.task/k8s.io"


class FakeNode:
    """A cgroup tree, a /proc and a root, as plain directories; and the time."""

    def __init__(self, top: Path) -> None:
        self.now = 1000.0
        self.cgroups, self.host, self.proc = top / "cgroup", top / "host", top / "proc"
        for directory in (self.cgroups, self.host, self.proc):
            directory.mkdir()
        self.host_netns = self.namespace("host")
        self.process(1, "/init.scope", "host")

    def local(self, *, has_cgroup2: bool = True) -> LocalContainers:
        cgroups = self.cgroups if has_cgroup2 else None
        return LocalContainers(cgroups, self.host, self.proc, clock=lambda: self.now)

    def namespace(self, name: str) -> int:
        """Its inode number: that of a file that stands for it."""
        file = self.proc / name
        file.touch()
        return file.stat().st_ino

    def cgroup(self, path: str, *pids: int) -> int:
        directory = self.cgroups / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        return directory.stat().st_ino

    def process(self, pid: int, cgroup: str, netns: str) -> None:
        directory = self.proc / str(pid)
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "ns").mkdir(parents=True)
        (directory / "ns" / "net").hardlink_to(self.proc / netns)
        (directory / "cgroup").write_text(f"5:pids:{cgroup}\n0::/\n")

    def container(
        self, uid: str, container_id: str, pid: int, netns: str, name: str | None = None
    ) -> int:
        """A container with one process, and what containerd writes if it has a name."""
        path = f"kubepods/burstable/pod{uid}/{container_id}"
        self.namespace(netns)
        self.process(pid, f"/{path}", netns)
        if name is not None:
            self.name(container_id, name)
        return self.cgroup(path, pid)

    def name(self, container_id: str, name: str, **annotations: str) -> None:
        about = {"container-type": "container", "container-name": name}
        if name == "":
            about = {"container-type": "sandbox"}
        about |= {"sandbox-namespace": "sre", "sandbox-name": "web-0"}
        about |= {key.replace("_", "-"): value for key, value in annotations.items()}
        file = self.host / _TASKS / container_id / "config.json"
        file.parent.mkdir(parents=True)
        annotated = {f"io.kubernetes.cri.{key}": value for key, value in about.items()}
        namespaces = [] if annotations.get("network") == "host" else [{"type": "network"}]
        file.write_text(json.dumps({"annotations": annotated, "linux": {"namespaces": namespaces}}))

    def gone(self, path: str) -> None:
        shutil.rmtree(self.cgroups / path)


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


@pytest.fixture
def local(node: FakeNode) -> Iterator[LocalContainers]:
    """Started on a node without containers."""
    made = node.local()
    made.start()
    yield made
    made.close()


def polled(local: LocalContainers, node: FakeNode, seconds: float) -> bool:
    """Whether anything changed while that time went by, a tenth of a second each."""
    changed = False
    for _ in range(round(seconds * 10)):
        node.now += 0.1
        changed |= local.poll()
    return changed


def found(local: LocalContainers, cgroup_id: int) -> LocalContainer:
    container = local.container(cgroup_id)
    assert isinstance(container, LocalContainer)
    return container


def test_host_and_unknown_are_told_apart(node: FakeNode, local: LocalContainers) -> None:
    service = node.cgroup("system.slice/dbus.service", 1)
    polled(local, node, 0.1)
    assert local.container(service) is NOT_A_CONTAINER
    assert local.container(node.cgroups.stat().st_ino) is NOT_A_CONTAINER
    assert local.container(2**40) is None
    assert local.container(0) is None
    assert local.by_pid(1) is NOT_A_CONTAINER
    assert local.by_pid(4711) is None


def test_names_that_are_written_later_are_learned(node: FakeNode, local: LocalContainers) -> None:
    cgroup_id = node.container(_UID, _ID, 100, "web")
    polled(local, node, 0.1)
    assert found(local, cgroup_id).container_id == _ID
    assert found(local, cgroup_id).pod is None
    version = local.version
    node.name(_ID, "app")
    assert polled(local, node, 1.0)
    assert local.version > version
    named = found(local, cgroup_id)
    assert (named.namespace, named.pod, named.name) == ("sre", "web-0", "app")


def test_nothing_changes_when_nothing_happens(node: FakeNode, local: LocalContainers) -> None:
    node.container(_UID, _ID, 100, "web", "app")
    polled(local, node, 5.0)
    version = local.version
    assert not polled(local, node, 100.0)
    assert local.version == version


def test_pod_is_named_by_any_of_its_containers(node: FakeNode, local: LocalContainers) -> None:
    nameless = node.container(_UID, _ID, 100, "web")
    sandbox = node.container(_UID, _SANDBOX, 101, "web", "")
    polled(local, node, 0.5)
    assert (found(local, nameless).pod, found(local, nameless).name) == ("web-0", None)
    assert found(local, nameless).is_sandbox is None
    assert found(local, sandbox).is_sandbox is True


def test_pod_is_named_by_its_logs(node: FakeNode, local: LocalContainers) -> None:
    (node.host / f"var/log/pods/sre_web-0_{_UID}").mkdir(parents=True)
    cgroup_id = node.container(_UID, _ID, 100, "web")
    polled(local, node, 0.5)
    assert (found(local, cgroup_id).namespace, found(local, cgroup_id).pod) == ("sre", "web-0")


def test_file_about_another_pod_is_not_believed(node: FakeNode, local: LocalContainers) -> None:
    cgroup_id = node.container(_UID, _ID, 100, "web")
    node.name(_ID, "app", sandbox_uid=_UID2)
    polled(local, node, 5.0)
    assert found(local, cgroup_id).pod is None


def test_pods_own_cgroup_is_the_pods(node: FakeNode, local: LocalContainers) -> None:
    node.container(_UID, _ID, 100, "web", "app")
    own = (node.cgroups / f"kubepods/burstable/pod{_UID}").stat().st_ino
    polled(local, node, 0.5)
    assert (found(local, own).pod, found(local, own).container_id) == ("web-0", None)
    assert [container.container_id for container in local.containers()] == [_ID]


def test_process_in_the_runtimes_namespace_is_looked_at_again(
    node: FakeNode, local: LocalContainers
) -> None:
    """A container's first process is in its cgroup before it is in its network namespace."""
    cgroup_id = node.container(_UID, _ID, 100, "host", "app")
    polled(local, node, 0.1)
    assert local.pod_of_netns(node.host_netns) is None
    web = node.namespace("web")
    node.process(100, "/", "web")
    polled(local, node, 3.0)
    assert found(local, cgroup_id).netns == web
    assert local.pod_of_netns(web) == LocalPod(_UID, "sre", "web-0", web)


def test_namespace_of_the_host_is_no_pods(node: FakeNode, local: LocalContainers) -> None:
    cgroup_id = node.container(_UID, _ID, 100, "host", "app")
    polled(local, node, 5.0)
    assert found(local, cgroup_id).netns == node.host_netns
    assert local.pod_of_netns(node.host_netns) is None


def test_namespace_of_a_node_in_a_container_is_no_pods(
    node: FakeNode, local: LocalContainers
) -> None:
    netns = node.namespace("node")
    node.process(50, f"/docker/{_NODE}", "node")
    node.cgroup(f"docker/{_NODE}", 50)
    node.process(100, "/", "node")
    pod = node.cgroup(f"docker/{_NODE}/kubelet/kubepods/pod{_UID}/{_ID}", 100)
    polled(local, node, 5.0)
    assert found(local, pod).pod_uid == _UID
    assert found(local, pod).netns == netns
    assert local.pod_of_netns(netns) is None


def test_namespace_of_two_pods_is_neithers(node: FakeNode, local: LocalContainers) -> None:
    node.container(_UID, _ID, 100, "shared")
    node.container(_UID2, _ID2, 101, "shared")
    polled(local, node, 5.0)
    assert local.pod_of_netns(node.namespace("shared")) is None


def test_namespace_that_the_runtime_calls_the_hosts_is_no_pods(
    node: FakeNode, local: LocalContainers
) -> None:
    node.container(_UID, _SANDBOX, 100, "node")
    node.name(_SANDBOX, "", network="host")
    polled(local, node, 5.0)
    assert local.pod_of_netns(node.namespace("node")) is None


def test_gone_container_is_remembered_and_then_forgotten(
    node: FakeNode, local: LocalContainers
) -> None:
    cgroup_id = node.container(_UID, _ID, 100, "web", "app")
    web = node.namespace("web")
    polled(local, node, 0.5)
    before = found(local, cgroup_id)
    node.gone("kubepods")
    polled(local, node, 0.2)
    assert found(local, cgroup_id) == before
    assert local.containers() == []
    assert local.pod_of_netns(web)
    node.now += 11.0  # by now, the number of the namespace may be another's
    local.poll()
    assert local.pod_of_netns(web) is None
    assert found(local, cgroup_id) == before
    node.now += 600.0
    local.poll()
    assert local.container(cgroup_id) is None


def test_namespace_of_a_gone_pod_is_the_next_ones_at_once(
    node: FakeNode, local: LocalContainers
) -> None:
    node.container(_UID, _ID, 100, "web", "app")
    polled(local, node, 0.5)
    node.gone(f"kubepods/burstable/pod{_UID}")
    node.container(_UID2, _ID2, 101, "web")
    polled(local, node, 0.5)
    pod = local.pod_of_netns(node.namespace("web"))
    assert pod
    assert pod.uid == _UID2


def test_number_of_gone_ones_is_bounded(
    node: FakeNode, local: LocalContainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_containers, "_GONE_MAX", 3)
    ids = [node.container(_UID, f"{number:064x}", 100 + number, "web") for number in range(10)]
    polled(local, node, 0.2)
    for number in range(10):
        node.gone(f"kubepods/burstable/pod{_UID}/{number:064x}")
    polled(local, node, 0.2)
    assert len([cgroup_id for cgroup_id in ids if local.container(cgroup_id)]) == 3


@pytest.mark.parametrize("has_cgroup2", [True, False])
def test_process_is_its_containers_by_any_hierarchy(node: FakeNode, has_cgroup2: bool) -> None:
    """As on hosts with cgroup v1, where the cgroup that the kernel tells is the root."""
    node.name(_ID, "app")
    web = node.namespace("web")
    node.process(100, f"/kubepods/burstable/pod{_UID}/{_ID}", "web")
    local = node.local(has_cgroup2=has_cgroup2)
    local.start()
    expected = LocalContainer((), _ID, _UID, "sre", "web-0", "app", is_sandbox=False, netns=web)
    assert local.by_pid(100) == expected
    assert local.pod_of_netns(web) == LocalPod(_UID, "sre", "web-0", web)
    node.now += 60.0
    local.poll()
    assert local.by_pid(100) == expected
    assert local.pod_of_netns(web)
    local.close()


def test_hierarchy_that_is_not_there_is_done_without(tmp_path: Path) -> None:
    local = LocalContainers(tmp_path / "nothing", tmp_path / "nothing", tmp_path / "nothing")
    local.start()
    assert not local.poll()
    assert local.containers() == []
    assert local.container(1) is None
    assert local.by_pid(os.getpid()) is None
    local.close()


def test_pod_that_is_known_to_share_a_nodes_namespace_is_not_told_by_it(
    node: FakeNode, local: LocalContainers
) -> None:
    """As in the lab, where no file says so, and the node is not the whole machine."""
    node.container(_UID, _ID, 100, "node")
    netns = node.namespace("node")
    polled(local, node, 1.0)
    for host_network, expected in ((True, None), (False, "web-0")):
        pod = Pod("sre", "web-0", _UID, None, (), host_network, None, (), ())
        who = Identities(Inventory((pod,)), None, local=local).client(0, netns, "10.244.1.10")
        assert who[1] == expected
