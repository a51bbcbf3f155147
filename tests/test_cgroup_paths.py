# SPDX-License-Identifier: Apache-2.0
"""Whose cgroup a path is, in the forms that runtimes and kubelet write."""

from __future__ import annotations

import pytest

from tracer.cluster.cgroup_paths import ContainerCgroup, parse_cgroup_path

_UID = "5a9e0c1e-7a3b-4c1d-9e2f-0123456789ab"
_SLICED = _UID.replace("-", "_")
_HASH = "6a3cb1ee0e5a4d7b8d3c7f7a1b2c3d4e"  # a static pod's
_ID = "3d51a4b2c07ad20d7a0d8ca1a9b1b5a8f4b4b5a7e33c3b8d76bbfe1b5e5a0c11"
_OTHER = "b2a102854b4969b2ce98dc329c86b4fb2b06e4ad2cc8da9d8a7578c9cd2004a2"
_NODE = "f0" * 32

_SYSTEMD = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{_SLICED}.slice"
_CGROUPFS = f"/kubepods/burstable/pod{_UID}"
_KIND = (
    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
    f"kubelet-kubepods-burstable-pod{_SLICED}.slice"
)
_STATIC = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{_HASH}.slice"
_CONTAINER = ContainerCgroup(_UID, _ID)
_POD = ContainerCgroup(_UID, None)
_PLAIN = ContainerCgroup(None, _ID)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # containerd
        (f"{_SYSTEMD}/cri-containerd-{_ID}.scope", _CONTAINER),
        (f"{_CGROUPFS}/{_ID}", _CONTAINER),
        (f"/kubepods/besteffort/pod{_UID}/{_ID}", _CONTAINER),
        # Guaranteed pods have no level of their own.
        (
            f"/kubepods.slice/kubepods-pod{_SLICED}.slice/cri-containerd-{_ID}.scope",
            _CONTAINER,
        ),
        (f"/kubepods/pod{_UID}/{_ID}", _CONTAINER),
        # The runtime without its systemd driver, below a kubelet with it.
        (
            f"/system.slice/containerd.service/kubepods-burstable-pod{_SLICED}.slice:cri-containerd:{_ID}",
            _CONTAINER,
        ),
        (f"/kubepods-besteffort-pod{_SLICED}.slice:cri-containerd:{_ID}", _CONTAINER),
        # CRI-O; crun makes one more cgroup below
        (f"{_SYSTEMD}/crio-{_ID}.scope", _CONTAINER),
        (f"{_SYSTEMD}/crio-{_ID}.scope/container", _CONTAINER),
        (f"{_CGROUPFS}/crio-{_ID}", _CONTAINER),
        (f"{_SYSTEMD}/crio-conmon-{_ID}.scope", _POD),
        (f"{_CGROUPFS}/crio-conmon-{_ID}", _POD),
        # cri-dockerd
        (f"{_SYSTEMD}/docker-{_ID}.scope", _CONTAINER),
        # static pods
        (f"{_STATIC}/cri-containerd-{_ID}.scope", ContainerCgroup(_HASH, _ID)),
        (f"/kubepods/burstable/pod{_HASH}/{_ID}", ContainerCgroup(_HASH, _ID)),
        # kind, as its node sees it, and as the host does
        (f"{_KIND}/cri-containerd-{_ID}.scope", _CONTAINER),
        (f"/system.slice/docker-{_NODE}.scope{_KIND}/cri-containerd-{_ID}.scope", _CONTAINER),
        (f"/machine.slice/libpod-{_NODE}.scope{_KIND}/cri-containerd-{_ID}.scope", _CONTAINER),
        (f"/docker/{_NODE}/kubelet/kubepods/burstable/pod{_UID}/{_ID}", _CONTAINER),
        (f"/docker/{_NODE}/kubepods/burstable/pod{_UID}/{_ID}", _CONTAINER),  # k3d
        # a node within a pod: the innermost pod
        (
            f"/kubepods/besteffort/pod{_HASH}/{_NODE}{_KIND}/cri-containerd-{_ID}.scope",
            _CONTAINER,
        ),
        # below the container: systemd in it, Docker in it
        (f"{_SYSTEMD}/cri-containerd-{_ID}.scope/init.scope", _CONTAINER),
        (f"{_SYSTEMD}/cri-containerd-{_ID}.scope/system.slice/dbus.service", _CONTAINER),
        (f"{_CGROUPFS}/{_ID}/docker/{_OTHER}", _CONTAINER),
        # relative to another cgroup, as /proc shows it inside a cgroup namespace; and gone
        (f"/../../..{_CGROUPFS}/{_ID}", _CONTAINER),
        (f"/../{_ID}", _PLAIN),
        (f"{_CGROUPFS}/{_ID} (deleted)", _CONTAINER),
        (f"dnstrace-lab/node2{_CGROUPFS}/{_ID}", _CONTAINER),
        # a pod's own
        (_SYSTEMD, _POD),
        (_CGROUPFS, _POD),
        # Docker and podman without Kubernetes; a podman pod is not one of Kubernetes
        (f"/docker/{_ID}", _PLAIN),
        (f"/system.slice/docker-{_ID}.scope", _PLAIN),
        (f"/system.slice/docker-{_ID}.scope/system.slice/containerd.service", _PLAIN),
        (f"/machine.slice/libpod-{_ID}.scope/container", _PLAIN),
        (f"/machine.slice/machine-libpod_pod_{_OTHER}.slice/libpod-{_ID}.scope", _PLAIN),
        (
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{_ID}.scope/container",
            _PLAIN,
        ),
        # neither pod nor container
        ("", None),
        ("/", None),
        ("/kubepods.slice", None),
        ("/kubepods.slice/kubepods-burstable.slice", None),
        ("/kubepods/burstable", None),
        ("/system.slice/containerd.service", None),
        ("/system.slice/kubelet.service", None),
        ("/user.slice/user-1000.slice/session-1.scope", None),
        ("/podman/pod1", None),
        (f"/machine.slice/libpod-conmon-{_ID}.scope", None),
        (f"/system.slice/var-lib-docker-overlay2-{_ID}-merged.mount", None),
        (f"/system.slice/docker-{_ID}0.scope", None),
        (f"/mykubepods/burstable/pod{_UID}", None),
        (f"/kubepods/burstable/pod{'a' * 64}", None),
        ("/kubepods/burstable/pod", None),
        ("/kubepods/burstable/pod..", None),
    ],
)
def test_path_tells_pod_and_container(path: str, expected: ContainerCgroup | None) -> None:
    assert parse_cgroup_path(path) == expected
