# SPDX-License-Identifier: Apache-2.0
"""What the path of a cgroup says: which pod and which container it is.

kubelet names a pod's cgroup, and the runtime that of a container below it:

    systemd   kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/<runtime>-<id>.scope
    cgroupfs  kubepods/burstable/pod<uid>/<id>

In a slice's name, "-" separates the levels, so that uids have "_" there. Guaranteed pods have no
level of their own. `--cgroup-root` puts a prefix before "kubepods" and more directories above it. A
runtime without its systemd driver, below a kubelet with it, names a cgroup after what it should have
asked systemd for: `<slice>:cri-containerd:<id>`.

Containers of nodes that are containers themselves have two pods' or containers' names in their
path. A pod is told by the innermost, and everything below a container is the container's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ID = r"[0-9a-f]{64}"
_POD = re.compile(
    rf"""
    /(?:[^/]*-)?kubepods(?:-[a-z]+)?-pod(?P<in_slice>[0-9A-Za-z_]{{1,63}})\.slice
        (?::(?P<prefix>[^:/]+):(?P<id>{_ID}))?(?=/|$)
    |
    /kubepods(?:/[a-z]+)?/pod(?P<in_directory>[0-9A-Za-z_-]{{1,63}})(?=/|$)
    """,
    re.VERBOSE,
)
_CONTAINER = re.compile(rf"/(?:(?P<prefix>[a-z][a-z0-9_-]*)-)?(?P<id>{_ID})(?:\.scope)?(?=/|$)")
_GONE = " (deleted)"


class ContainerCgroup(NamedTuple):
    """A container's cgroup, or one below. One of both is known.

    Without `container_id` it is the pod's own, or that of a container's monitor. Without `pod_uid`
    the container is not kubelet's. A static pod's uid is the hash of its manifest, not the uid that
    the API server gives its mirror.
    """

    pod_uid: str | None
    container_id: str | None


def parse_cgroup_path(path: str) -> ContainerCgroup | None:
    """Whose cgroup it is; None if it is no container's. Absolute, or relative to any cgroup."""
    path = "/" + path.removesuffix(_GONE)
    pods = list(_POD.finditer(path)) if "kubepods" in path else []
    if pods:
        pod = pods[-1]
        uid = pod["in_directory"] or pod["in_slice"].replace("_", "-")
        named = pod if pod["id"] else _CONTAINER.match(path, pod.end())
        return ContainerCgroup(uid, _container_id(named))
    for named in _CONTAINER.finditer(path):
        if container_id := _container_id(named):
            return ContainerCgroup(None, container_id)
    return None


def _container_id(named: re.Match[str] | None) -> str | None:
    # conmon, which watches over a container of CRI-O or podman, has a cgroup with the same id.
    if named is None or (named["prefix"] or "").endswith("conmon"):
        return None
    return named["id"]
