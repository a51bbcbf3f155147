# SPDX-License-Identifier: Apache-2.0
"""What transactions are counted by, in words: from the kernel's series to names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tracer.assemble import Names, ip_text
from tracer.decode.words import rcode_text, type_text
from tracer.record import BackendKnown, SeriesKind, Status

if TYPE_CHECKING:
    import numpy as np

_NO_RCODE = 255
_ROOT_CGROUP = 1  # where everybody is on hosts with cgroup v1 alone
_TCP = 6


class Labels(NamedTuple):
    """Who asked whom for what, and what became of it. None: unknown, or not told apart by it.

    Of stages (`of_stages`), only who asked and who answered are told apart.
    """

    of_stages: bool
    namespace: str | None = None
    pod: str | None = None
    container: str | None = None
    server_ip: str | None = None
    server_port: int | None = None
    service: str | None = None
    server_role: str | None = None
    backend_ip: str | None = None
    backend_namespace: str | None = None
    backend_pod: str | None = None
    type: str | None = None  # "other": one of the rare ones
    rcode: str | None = None
    status: str = "answered"
    protocol: str | None = None
    client_seen: bool = True  # False: its socket is not here, but on another node as a rule
    by_server: bool = False  # the client answers queries itself, so it may ask for others' sake
    overflow: bool = False  # all of that client, or of every one, that found no room


def labels_of(key: np.void, names: Names) -> Labels:
    """Names for a SERIES_KEY."""
    of_stages = key["kind"] == SeriesKind.OF_STAGES
    status = Status(int(key["status"])).name.lower()
    overflow = bool(key["backend"] == BackendKnown.OVERFLOW)
    if overflow and not key["cgroup_id"] and not key["netns"]:
        return Labels(of_stages, status=status, overflow=True)
    client_ip = ip_text(key["client_addr"].tobytes()) if key["netns"] else ""
    namespace, pod, container, _ = names.client(int(key["cgroup_id"]), int(key["netns"]), client_ip)
    if overflow:
        return Labels(of_stages, namespace, pod, container, status=status, overflow=True)
    server_ip = ip_text(key["server_addr"].tobytes())
    server_port = int(key["server_port"])
    service = None if of_stages else names.service(server_ip, server_port)
    backend_ip, backend_namespace, backend_pod = _backend(key, names)
    if of_stages:
        return Labels(
            True,
            namespace,
            pod,
            container,
            backend_ip=backend_ip,
            backend_namespace=backend_namespace,
            backend_pod=backend_pod,
            protocol=_protocol(key),
            client_seen=bool(key["netns"]),
            by_server=bool(key["by_server"]),
        )
    return Labels(
        False,
        namespace,
        pod,
        container,
        server_ip,
        server_port,
        service,
        names.role(server_ip),
        backend_ip,
        backend_namespace,
        backend_pod,
        type_text(int(key["type"])) if key["type"] else "other",
        None if key["rcode"] == _NO_RCODE else rcode_text(int(key["rcode"])),
        status,
        _protocol(key),
        bool(key["netns"]),
        bool(key["by_server"]),
    )


def renewed(before: Labels, now: Labels, key: np.void) -> Labels:
    """What a series is called once more is known: a client keeps its name, and so does whoever is
    nobody any more. An address that is another's by now is the other's, and so is a client's network
    namespace, where no cgroup tells pods apart."""
    if before.pod is not None and (key["cgroup_id"] > _ROOT_CGROUP or now.pod is None):
        now = now._replace(
            namespace=before.namespace, pod=before.pod, container=before.container or now.container
        )
    if now.service is None and before.service is not None:
        now = now._replace(service=before.service, server_role=before.server_role)
    if now.backend_pod is None and before.backend_pod is not None:
        now = now._replace(
            backend_ip=before.backend_ip,
            backend_namespace=before.backend_namespace,
            backend_pod=before.backend_pod,
        )
    return now


def _backend(key: np.void, names: Names) -> tuple[str | None, str | None, str | None]:
    """Address, namespace and pod of who answered."""
    if key["backend"] == BackendKnown.UNKNOWN:
        return None, None, None
    ip = ip_text(key["backend_addr"].tobytes())
    # A service's own address does not tell who is behind it.
    if key["backend"] == BackendKnown.AS_ASKED and names.service(ip, int(key["backend_port"])):
        return None, None, None
    return ip, *names.server(int(key["server_cgroup_id"]), ip)


def _protocol(key: np.void) -> str:
    return "tcp" if key["protocol"] == _TCP else "udp"
