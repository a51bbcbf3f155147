# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' JSON objects, cut down to what is needed here.

Anybody may have written them: what is malformed raises Malformed as a whole, or is left out where it
is a part that others can do without. Text is bounded and printable. Equal strings are one string, so
that a thousand pods of a namespace hold its name once.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracer.cluster.model import Container, Endpoint, Node, Pod, Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Key = tuple[str, str]

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?", re.ASCII)
_TEXT_MAX = 320  # a label's key: a DNS name, a slash and 63 characters
_LABELS_MAX = 128
_CONTAINERS_MAX = 512
_ADDRESSES_MAX = 64
_PORTS_MAX = 1024
_ENDPOINTS_MAX = 5000
_FINISHED = ("Succeeded", "Failed")
_DNS_PORT = 53
_DNS_APPS = ("kube-dns", "coredns", "rke2-coredns", "node-local-dns", "dns")
_DNS_LABELS = ("k8s-app", "app.kubernetes.io/name", "dns.operator.openshift.io/owning-dns")
_SERVICE_OF_SLICE = "kubernetes.io/service-name"
_STATIC_POD = "kubernetes.io/config.mirror"


class Malformed(Exception):
    """An object that is not what the API says it is."""


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node, and what tells whether it is this machine."""

    node: Node
    hostname: str
    machine_id: str
    system_uuid: str


@dataclass(frozen=True, slots=True)
class KnownService:
    """A service. Of a DNS service, its ports for DNS: their names, and numbers where those are given."""

    service: Service
    dns_ports: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of a service's endpoints. `ports` are names and numbers."""

    service: Key
    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]


def key(raw: object) -> Key:
    """(namespace, name); the namespace is "" of what has none. Raises Malformed."""
    metadata = _dict(_dict(raw).get("metadata"))
    namespace = metadata.get("namespace")
    return name_of(namespace) if namespace else "", name_of(metadata.get("name"))


def is_name(text: str) -> bool:
    """Whether something can be called so. It can then be part of a path."""
    return _NAME.fullmatch(text) is not None


def name_of(value: object) -> str:
    """The value, if it can be a name of something. Raises Malformed."""
    if not isinstance(value, str) or not is_name(value):
        raise Malformed
    return sys.intern(value)


def pod(raw: Mapping[str, Any]) -> Pod:
    """A pod. Raises Malformed."""
    namespace, name = key(raw)
    if not namespace:
        raise Malformed
    metadata, spec, status = (_dict(raw.get(part)) for part in ("metadata", "spec", "status"))
    phase = _text(status.get("phase"))
    node = spec.get("nodeName")
    addresses = [status.get("podIP"), *(a.get("ip") for a in _dicts(status.get("podIPs"), 16))]
    return Pod(
        namespace=namespace,
        name=name,
        uid=_text(metadata.get("uid")),
        node=name_of(node) if node else None,
        ips=() if phase in _FINISHED else _ips(addresses),
        host_network=spec.get("hostNetwork") is True,
        netns=None,
        labels=_labels(metadata.get("labels")),
        containers=_containers(spec, status),
        static_uid=_text(_dict(metadata.get("annotations")).get(_STATIC_POD)),
        phase=sys.intern(phase),
        deleting=bool(metadata.get("deletionTimestamp")),
    )


def service(raw: Mapping[str, Any]) -> KnownService | None:
    """A service; None if it has no address of its own and is not for DNS. Raises Malformed."""
    namespace, name = key(raw)
    if not namespace:
        raise Malformed
    spec = _dict(raw.get("spec"))
    ips = _ips([spec.get("clusterIP"), *_list(spec.get("clusterIPs"), 16)])
    labels = _dict(_dict(raw.get("metadata")).get("labels"))
    ports = [port for port in _dicts(spec.get("ports"), _PORTS_MAX) if _port(port.get("port"))]
    for_dns = _dns_ports(ports, any(labels.get(label) in _DNS_APPS for label in _DNS_LABELS))
    if not ips and not for_dns:
        return None
    numbers = tuple(dict.fromkeys(port["port"] for port in ports))
    targets = tuple(dict.fromkeys(number for _, number in for_dns if number))
    return KnownService(
        Service(namespace, name, ips, numbers, (), targets, dns=bool(for_dns)), for_dns
    )


def endpoint_slice(raw: Mapping[str, Any]) -> Slice | None:
    """Endpoints of a service; None if they are nobody's. Raises Malformed."""
    namespace, _ = key(raw)
    of_service = _dict(_dict(raw.get("metadata")).get("labels")).get(_SERVICE_OF_SLICE)
    if not namespace or not of_service:
        return None
    return Slice(
        (namespace, name_of(of_service)),
        tuple(
            (_text(port.get("name")), number)
            for port in _dicts(raw.get("ports"), _PORTS_MAX)
            if (number := _port(port.get("port")))
        ),
        tuple(
            endpoint
            for entry in _dicts(raw.get("endpoints"), _ENDPOINTS_MAX)
            for endpoint in _endpoints(entry)
        ),
    )


def node(raw: Mapping[str, Any]) -> KnownNode:
    """A node. Raises Malformed."""
    _, name = key(raw)
    status = _dict(raw.get("status"))
    info = _dict(status.get("nodeInfo"))
    addresses = _dicts(status.get("addresses"), _ADDRESSES_MAX)
    hostnames = [_text(a.get("address")) for a in addresses if a.get("type") == "Hostname"]
    return KnownNode(
        # What some clouds give as Hostname is an address; names are no addresses.
        Node(name, _ips(a.get("address") for a in addresses), None),
        hostname=hostnames[0] if hostnames else "",
        machine_id=_text(info.get("machineID")),
        system_uuid=_text(info.get("systemUUID")),
    )


def _containers(spec: Mapping[str, Any], status: Mapping[str, Any]) -> tuple[Container, ...]:
    """Those that run, ran or will run; the id is known once one has been started."""
    ids: dict[str, str] = {}
    for kind in ("initContainer", "container", "ephemeralContainer"):
        for entry in _dicts(spec.get(f"{kind}s"), _CONTAINERS_MAX):
            ids.setdefault(_text(entry.get("name")), "")
        for entry in _dicts(status.get(f"{kind}Statuses"), _CONTAINERS_MAX):
            runtime_id = _text(entry.get("containerID")).rpartition("://")[2]
            ids[_text(entry.get("name"))] = runtime_id
    return tuple(Container(sys.intern(name), id_, "") for name, id_ in ids.items() if name)


def _dns_ports(ports: list[dict[str, Any]], labelled: bool) -> tuple[tuple[str, int | None], ...]:
    """Those for DNS: by number or by name; else, of a service labelled as DNS's, all for UDP."""
    found = [
        port
        for port in ports
        if port["port"] == _DNS_PORT or _text(port.get("name")) in ("dns", "dns-tcp", "dns-udp")
    ]
    if labelled and not found:
        found = [port for port in ports if port.get("protocol") == "UDP"]
    return tuple((_text(p.get("name")), _target(p)) for p in found)


def _target(port: dict[str, Any]) -> int | None:
    """The number that a service's port leads to; None if the pods' own port names tell it."""
    target = port.get("targetPort")
    if target is None or target == 0:
        return _port(port["port"])
    return _port(target)


def _endpoints(entry: Mapping[str, Any]) -> Iterator[Endpoint]:
    target = _dict(entry.get("targetRef"))
    namespace = pod_name = node_name = None
    try:
        if target.get("kind") == "Pod":
            namespace = name_of(target.get("namespace"))
            pod_name = name_of(target.get("name"))
        if entry.get("nodeName"):
            node_name = name_of(entry.get("nodeName"))
    except Malformed:
        namespace = pod_name = None
    conditions = _dict(entry.get("conditions"))
    # While all are terminating, those that still serve are sent queries (KEP-1669).
    ready = conditions.get("ready") is not False or (
        conditions.get("serving") is True and conditions.get("terminating") is True
    )
    for ip in _ips(_list(entry.get("addresses"), 128)):
        yield Endpoint(ip, namespace, pod_name, node_name, ready)


def _dict(value: object) -> dict[str, Any]:
    """The value, or nothing if there is none. Raises Malformed."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Malformed
    return value


def _list(value: object, at_most: int) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed
    return value[:at_most]


def _dicts(value: object, at_most: int) -> list[dict[str, Any]]:
    return [_dict(entry) for entry in _list(value, at_most)]


def _text(value: object) -> str:
    """The value if it is text that can be shown, else nothing."""
    if isinstance(value, str) and len(value) <= _TEXT_MAX and value.isprintable():
        return value
    return ""


def _port(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16:
        return value
    return None


def _ips(values: Any) -> tuple[str, ...]:
    """Those of the values that are addresses, as this tool writes them, each once."""
    found = []
    for value in values:
        if not isinstance(value, str) or len(value) > _TEXT_MAX:
            continue
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            continue
        found.append(str(getattr(address, "ipv4_mapped", None) or address))
    return tuple(dict.fromkeys(found[:_ADDRESSES_MAX]))


def _labels(value: object) -> tuple[tuple[str, str], ...]:
    labels = _dict(value)
    return tuple(
        (sys.intern(name), sys.intern(_text(content)))
        for name, content in list(labels.items())[:_LABELS_MAX]
        if _text(name) and _text(content) == content
    )
