# SPDX-License-Identifier: Apache-2.0
"""Names of containers and pods in a node's files, as runtimes and kubelet write them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tracer.cluster import runtimes
from tracer.cluster.host_files import HostFiles
from tracer.cluster.runtimes import Names, NotKubernetes, Runtimes

_UID = "5a9e0c1e-7a3b-4c1d-9e2f-0123456789ab"
_ID = "3d51a4b2c07ad20d7a0d8ca1a9b1b5a8f4b4b5a7e33c3b8d76bbfe1b5e5a0c11"
_APP = Names("sre", "web-0", _UID, "app", is_sandbox=False)

_TASK = f"io.containerd.runtime.v2.task/k8s.io/{_ID}/config.json"
_CRIO = f"run/containers/storage/overlay-containers/{_ID}/userdata/config.json"
_DOCKER = f"var/lib/docker/containers/{_ID}/config.v2.json"

# containerd 1.7, sandbox and container
_CONTAINERD_CONTAINER = {
    "ociVersion": "1.1.0",
    "annotations": {
        "io.kubernetes.cri.container-name": "app",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.image-name": "docker.io/library/nginx:latest",
        "io.kubernetes.cri.sandbox-id": "cb" * 32,
        "io.kubernetes.cri.sandbox-name": "web-0",
        "io.kubernetes.cri.sandbox-namespace": "sre",
        "io.kubernetes.cri.sandbox-uid": _UID,
    },
    "linux": {"namespaces": [{"type": "mount"}, {"type": "network", "path": "/proc/64/ns/net"}]},
}


def containerd_sandbox(*namespaces: str) -> dict[str, Any]:
    return {
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-cpu-shares": "2",
            "io.kubernetes.cri.sandbox-name": "web-0",
            "io.kubernetes.cri.sandbox-namespace": "sre",
            "io.kubernetes.cri.sandbox-uid": _UID,
        },
        "linux": {"namespaces": [{"type": kind} for kind in namespaces]},
    }


_LABELS = {
    "io.kubernetes.container.name": "app",
    "io.kubernetes.pod.name": "web-0",
    "io.kubernetes.pod.namespace": "sre",
    "io.kubernetes.pod.uid": _UID,
}
_CRIO_CONTAINER = {
    "annotations": {
        "io.kubernetes.container.hash": "d2eac6e3",
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.Labels": json.dumps(_LABELS),
        "io.kubernetes.cri-o.SandboxName": f"k8s_POD_web-0_sre_{_UID}_0",
        "io.container.manager": "cri-o",
    }
}


def crio_sandbox(host_network: str) -> dict[str, Any]:
    labels = _LABELS | {"io.kubernetes.container.name": "POD", "app": "web"}
    return {
        "annotations": labels
        | {
            "io.kubernetes.cri-o.ContainerType": "sandbox",
            "io.kubernetes.cri-o.HostNetwork": host_network,
            "io.kubernetes.cri-o.KubeName": "web-0",
            "io.kubernetes.cri-o.Labels": json.dumps(labels),
        }
    }


def docker(kind: str, name: str, network: str) -> dict[str, Any]:
    labels = _LABELS | {"io.kubernetes.docker.type": kind, "io.kubernetes.container.name": name}
    return {
        "ID": _ID,
        "Config": {"Labels": labels},
        "NetworkSettings": {"Networks": {network: {}}} if network else {"Networks": None},
    }


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return tmp_path


def write(host: Path, path: str, content: object) -> None:
    file = host / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def container(host: Path) -> Names | NotKubernetes | None:
    files = HostFiles(host)
    found = Runtimes(files).container(_ID)
    files.close()
    return found


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        (f"run/containerd/{_TASK}", _CONTAINERD_CONTAINER, _APP),
        (f"run/k3s/containerd/{_TASK}", _CONTAINERD_CONTAINER, _APP),
        (f"run/k0s/containerd/{_TASK}", _CONTAINERD_CONTAINER, _APP),
        (f"var/snap/microk8s/common/run/containerd/{_TASK}", _CONTAINERD_CONTAINER, _APP),
        (
            f"run/containerd/{_TASK}",
            containerd_sandbox("mount", "network"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=False),
        ),
        (
            f"run/containerd/{_TASK}",
            containerd_sandbox("mount"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=True),
        ),
        (_CRIO, _CRIO_CONTAINER, _APP),
        (
            _CRIO,
            crio_sandbox("false"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=False),
        ),
        (
            _CRIO,
            crio_sandbox("true"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=True),
        ),
        (_DOCKER, docker("container", "app", ""), _APP),
        (
            _DOCKER,
            docker("podsandbox", "POD", "none"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=False),
        ),
        (
            _DOCKER,
            docker("podsandbox", "POD", "host"),
            Names("sre", "web-0", _UID, None, is_sandbox=True, host_network=True),
        ),
        (
            f"var/log/containers/web-0_sre_app-{_ID}.log",
            "",
            Names("sre", "web-0", None, "app", is_sandbox=False),
        ),
        # other uses of the same runtimes
        (f"run/containerd/{_TASK}", {"ociVersion": "1.1.0"}, NotKubernetes()),
        (_CRIO, {"annotations": {"io.podman.annotations.autoremove": "FALSE"}}, NotKubernetes()),
        (_DOCKER, {"Config": {"Labels": {}}}, NotKubernetes()),
    ],
)
def test_names_are_read_where_the_runtime_writes_them(
    host: Path, path: str, content: object, expected: Names | NotKubernetes
) -> None:
    write(host, path, content)
    assert container(host) == expected


def with_annotation(name: str, value: object) -> dict[str, Any]:
    return {
        "annotations": _CONTAINERD_CONTAINER["annotations"]  # type: ignore[operator]
        | {"io.kubernetes.cri." + name: value}
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"annotations": []}',
        "[" * 100_000,
        with_annotation("sandbox-name", "web_0"),
        with_annotation("sandbox-name", "web-0\n"),
        with_annotation("sandbox-name", "\x1b[31mweb"),
        with_annotation("sandbox-name", "a." * 126 + "aa"),
        with_annotation("sandbox-name", 7),
        with_annotation("sandbox-namespace", "a" * 64),
        with_annotation("sandbox-namespace", "a.b"),
        with_annotation("sandbox-namespace", ""),
        with_annotation("sandbox-uid", "../../etc"),
        with_annotation("container-name", ""),
        with_annotation("container-name", "-app"),
        with_annotation("container-name", None),
    ],
)
def test_what_is_no_name_is_not_believed(host: Path, content: object) -> None:
    write(host, f"run/containerd/{_TASK}", content)
    assert container(host) is None


def test_longest_names_are_taken(host: Path) -> None:
    name = "a." * 126 + "a"
    write(host, f"run/containerd/{_TASK}", with_annotation("sandbox-name", name))
    found = container(host)
    assert isinstance(found, Names)
    assert found.pod == name


def test_file_that_is_too_large_is_not_read(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(host, f"run/containerd/{_TASK}", _CONTAINERD_CONTAINER)
    size = (host / f"run/containerd/{_TASK}").stat().st_size
    monkeypatch.setattr(runtimes, "_FILE_MAX", size - 1)
    assert container(host) is None
    monkeypatch.setattr(runtimes, "_FILE_MAX", size)
    assert container(host) == _APP


def test_fifo_and_directory_are_not_read(host: Path) -> None:
    fifo = host / f"run/containerd/{_TASK}"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    (host / f"run/k3s/containerd/{_TASK}").mkdir(parents=True)
    assert container(host) is None


def test_links_are_those_of_the_host(host: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An absolute one does not lead out of where the host's root is seen."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, "config.json", _CONTAINERD_CONTAINER)
    task = host / f"run/containerd/{_TASK}"
    task.parent.mkdir(parents=True)
    task.symlink_to(elsewhere / "config.json")
    assert container(host) is None
    write(host, str(elsewhere / "config.json").lstrip("/"), _CONTAINERD_CONTAINER)
    assert container(host) == _APP


def test_pod_is_named_by_its_logs_as_they_come_and_go(host: Path) -> None:
    now = [0.0]
    names = Runtimes(HostFiles(host), lambda: now[0])
    assert names.pod(_UID) is None
    now[0] += 1.0
    (host / f"var/log/pods/sre_web-0_{_UID}/app").mkdir(parents=True)
    (host / "var/log/pods/not-a-pod").mkdir()
    (host / "var/log/pods/sre_web_1_abc").mkdir()
    (host / "var/log/pods/SRE_web-1_abc").mkdir()
    assert names.pod(_UID) == ("sre", "web-0")
    now[0] += 1.0
    (host / "var/log/pods/sre_web-2_6a3cb1ee0e5a4d7b8d3c7f7a1b2c3d4e").mkdir()
    assert names.pod("6a3cb1ee0e5a4d7b8d3c7f7a1b2c3d4e") == ("sre", "web-2")
    assert names.pod("abc") is None


def test_directory_that_has_not_changed_is_not_listed_again(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, listed = [0.0], []
    directory = host / "var/log/pods"
    directory.mkdir(parents=True)
    before = time.time() - 60
    os.utime(directory, (before, before))
    files = HostFiles(host)
    names = Runtimes(files, lambda: now[0])
    monkeypatch.setattr(files, "names", lambda path, _count: listed.append(path))
    for _ in range(5):
        now[0] += 1.0
        assert names.pod(_UID) is None
    assert listed == ["var/log/pods"]


def test_log_whose_name_was_cut_off_names_nothing(host: Path) -> None:
    """kubelet cuts off what is above 255 bytes, and that is the end of the id."""
    write(host, f"var/log/containers/web-0_sre_app-{_ID[:40]}.log", "")
    assert container(host) is None


def test_host_without_a_root_has_no_files() -> None:
    files = HostFiles(Path("/nowhere"))
    assert files.read("etc/passwd", 100) is None
    assert files.names("etc", 100) is None
    assert files.changed_ns("etc") is None
    files.close()
