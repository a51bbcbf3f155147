# SPDX-License-Identifier: Apache-2.0
"""What the node's own files say of a container: its pod and its name, without any API.

Container runtimes write down what kubelet told them, each in its place, as long as the container is
there (CRI-O and Docker: until it is removed); kubelet names logs by pod and container, until
the pod is removed. Only root writes these files, but names in them came from users, so they are
checked before they are believed.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracer.cluster.host_files import HostFiles

# containerd, k3s and RKE2, k0s, MicroK8s; then what containerd wrote before 1.4.
_CONTAINERD = (
    "run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
    "run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
    "run/k0s/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
    "var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
    "run/containerd/io.containerd.runtime.v1.linux/k8s.io/{}/config.json",
)
_CRIO = (
    "run/containers/storage/overlay-containers/{}/userdata/config.json",
    "var/run/containers/storage/overlay-containers/{}/userdata/config.json",
    "var/lib/containers/storage/overlay-containers/{}/userdata/config.json",
)
_DOCKER = ("var/lib/docker/containers/{}/config.v2.json",)
_POD_LOGS = "var/log/pods"
_CONTAINER_LOGS = "var/log/containers"

_FILE_MAX = 8 << 20  # an environment has up to seven variables for each service of a namespace
_ENTRIES_MAX = 20_000
_LIST_AGAIN_S = 0.2
_TICK_NS = 1_000_000_000

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123, as Kubernetes has it
_label = re.compile(_LABEL).fullmatch
_subdomain = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*").fullmatch
_uid = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,62}").fullmatch
_pod_log = re.compile(r"([^_]+)_([^_]+)_([^_]+)").fullmatch
_container_log = re.compile(r"([^_]+)_([^_]+)_([^_]+)-([0-9a-f]{64})\.log").fullmatch


class Names(NamedTuple):
    """`container` is None for the pod's sandbox, which has no name.

    `host_network`: whether the pod has the node's own network namespace. Unknown is None.
    """

    namespace: str
    pod: str
    uid: str | None
    container: str | None
    is_sandbox: bool
    host_network: bool | None = None


@dataclass(frozen=True, slots=True)
class NotKubernetes:
    """The runtime knows the container, and it is not kubelet's."""


class Runtimes:
    """Finds containers in the files of one node."""

    def __init__(self, files: HostFiles, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._pod_logs = _Listing(files, _POD_LOGS, _by_uid, clock)
        self._container_logs = _Listing(files, _CONTAINER_LOGS, _by_container_id, clock)

    def container(self, container_id: str) -> Names | NotKubernetes | None:
        """What is written of a container; None if nothing is (yet)."""
        for paths, understand in (
            (_CONTAINERD, _containerd),
            (_CRIO, _crio),
            (_DOCKER, _docker),
        ):
            for path in paths:
                content = self._files.read(path.format(container_id), _FILE_MAX)
                if content is None:
                    continue
                try:
                    found = understand(orjson.loads(content))
                except (orjson.JSONDecodeError, _Odd):  # half written; or nothing we know
                    continue
                if found:
                    return found
        return self._container_logs.get(container_id)

    def pod(self, uid: str) -> tuple[str, str] | None:
        """(namespace, name) of the pod with this uid, as long as its logs are kept."""
        found = self._pod_logs.get(uid)
        return (found.namespace, found.pod) if found else None


class _Listing:
    """The entries of a directory by what their names tell, read again when it has changed."""

    def __init__(
        self,
        files: HostFiles,
        path: str,
        understand: Callable[[str], tuple[str, Names] | None],
        clock: Callable[[], float],
    ) -> None:
        self._files, self._path, self._understand, self._clock = files, path, understand, clock
        self._known: dict[str, Names] = {}
        self._changed_ns: int | None = None
        self._looked_at = -_LIST_AGAIN_S

    def get(self, key: str) -> Names | None:
        if key not in self._known:
            self._refresh()
        return self._known.get(key)

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LIST_AGAIN_S:
            return
        self._looked_at = now
        changed_ns = self._files.changed_ns(self._path)
        if changed_ns is not None and changed_ns == self._changed_ns:
            return
        # Another change may come within the same tick of the clock that stamps it.
        settled = changed_ns is not None and time.time_ns() - changed_ns > _TICK_NS
        self._changed_ns = changed_ns if settled else None
        names = self._files.names(self._path, _ENTRIES_MAX) or ()
        self._known = dict(filter(None, map(self._understand, names)))


class _Odd(Exception):
    """Not what such a file should hold."""


def _containerd(config: object) -> Names | NotKubernetes | None:
    """The OCI bundle (runtime-spec, config.json) as containerd's CRI plugin writes it."""
    about = _strings(_member(config, "annotations", optional=True))
    prefix = "io.kubernetes.cri."
    if prefix + "container-type" not in about:
        return NotKubernetes()
    is_sandbox = about[prefix + "container-type"] == "sandbox"
    return _checked(
        about.get(prefix + "sandbox-namespace"),
        about.get(prefix + "sandbox-name"),
        about.get(prefix + "sandbox-uid"),
        None if is_sandbox else about.get(prefix + "container-name", ""),
        # Other containers join the sandbox's namespace by its path, whichever it is.
        host_network=not _has_network_namespace(config) if is_sandbox else None,
    )


def _crio(config: object) -> Names | NotKubernetes | None:
    """The OCI bundle as CRI-O writes it; podman's bundles lie in the same place."""
    about = _strings(_member(config, "annotations", optional=True))
    prefix = "io.kubernetes.cri-o."
    if prefix + "ContainerType" not in about:
        return NotKubernetes()
    labels = _strings(_embedded(about.get(prefix + "Labels"))) | about
    is_sandbox = about[prefix + "ContainerType"] == "sandbox"
    host_network = {"true": True, "false": False}.get(about.get(prefix + "HostNetwork", ""))
    return _from_labels(labels, is_sandbox=is_sandbox, host_network=host_network)


def _docker(config: object) -> Names | NotKubernetes | None:
    """dockerd's own file, with the labels that cri-dockerd (before: dockershim) gave."""
    labels = _strings(_member(_member(config, "Config"), "Labels", optional=True))
    if "io.kubernetes.pod.name" not in labels:
        return NotKubernetes()
    is_sandbox = labels.get("io.kubernetes.docker.type") == "podsandbox"
    networks = _member(_member(config, "NetworkSettings", optional=True), "Networks", optional=True)
    host_network = "host" in networks if is_sandbox and networks else None
    return _from_labels(labels, is_sandbox=is_sandbox, host_network=host_network)


def _from_labels(
    labels: dict[str, str], *, is_sandbox: bool, host_network: bool | None
) -> Names | None:
    name = labels.get("io.kubernetes.container.name", "")
    return _checked(
        labels.get("io.kubernetes.pod.namespace"),
        labels.get("io.kubernetes.pod.name"),
        labels.get("io.kubernetes.pod.uid"),
        None if is_sandbox or name == "POD" else name,
        host_network=host_network,
    )


def _by_uid(name: str) -> tuple[str, Names] | None:
    """kubelet's <namespace>_<pod>_<uid>."""
    match = _pod_log(name)
    if match is None:
        return None
    found = _checked(match[1], match[2], match[3], None)
    return (match[3], found) if found else None


def _by_container_id(name: str) -> tuple[str, Names] | None:
    """kubelet's <pod>_<namespace>_<container>-<id>.log; it cuts off what is above 255 bytes."""
    match = _container_log(name)
    if match is None:
        return None
    found = _checked(match[2], match[1], None, match[3])
    return (match[4], found) if found else None


def _checked(
    namespace: str | None,
    pod: str | None,
    uid: str | None,
    container: str | None,
    *,
    host_network: bool | None = None,
) -> Names | None:
    """None if one of them is not a name that Kubernetes would take."""
    if not namespace or not _label(namespace) or not pod or not _subdomain(pod):
        return None
    if uid and not _uid(uid):
        return None
    if container is not None and not _label(container):
        return None
    return Names(namespace, pod, uid or None, container, container is None, host_network)


def _has_network_namespace(config: object) -> bool:
    namespaces = _member(config, "linux", optional=True).get("namespaces")
    if not isinstance(namespaces, list):
        return False
    return any(isinstance(n, dict) and n.get("type") == "network" for n in namespaces)


def _member(owner: object, name: str, *, optional: bool = False) -> dict[str, Any]:
    if not isinstance(owner, dict):
        raise _Odd
    found = owner.get(name)
    if found is None and optional:
        return {}
    if not isinstance(found, dict):
        raise _Odd
    return found


def _embedded(text: str | None) -> dict[str, Any]:
    """JSON within JSON."""
    found = orjson.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


def _strings(mapping: dict[str, Any]) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if isinstance(value, str)}
