# SPDX-License-Identifier: Apache-2.0
"""Pod metadata from a file: what `--pods FILE` reads, for hosts without an API server.

The file is JSON: an object with lists `pods`, `services` and `nodes`; see README.md for the
fields. Unknown fields of these are ignored, so that files may grow.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from tracer.cluster.model import Container, Inventory, Node, Pod, Service

if TYPE_CHECKING:
    from pathlib import Path

_SIZE_MAX = 256 << 20
_NETNS_MAX = 2**32 - 1  # inode numbers of namespaces have 32 bits
_LISTS = ("pods", "services", "nodes")
T = TypeVar("T")


class PodsFileError(Exception):
    """The pods file cannot be used. The message is one line: what is wrong, and where."""


def load(path: Path) -> Inventory:
    """Reads a pods file. Raises PodsFileError."""
    try:
        if path.stat().st_size > _SIZE_MAX:
            raise PodsFileError(f"pods file {path} is larger than {_SIZE_MAX >> 20} MiB")
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise PodsFileError(f"cannot read pods file {path}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise PodsFileError(f"pods file {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise PodsFileError(f"pods file {path} must hold an object with a list 'pods'")
    for name in content:
        if name not in _LISTS:
            known = ", ".join(_LISTS)
            raise PodsFileError(f"pods file {path}: {name!r} is unknown; there are: {known}")
    try:
        return Inventory(
            pods=tuple(_pod(_Fields(f"pods[{i}]", p)) for i, p in _entries(content, "pods")),
            services=tuple(
                _service(_Fields(f"services[{i}]", s)) for i, s in _entries(content, "services")
            ),
            nodes=tuple(_node(_Fields(f"nodes[{i}]", n)) for i, n in _entries(content, "nodes")),
        )
    except _Wrong as wrong:
        raise PodsFileError(f"pods file {path}: {wrong}") from wrong


class _Wrong(Exception):
    pass


class _Fields:
    """An entry's fields, checked as they are taken."""

    def __init__(self, where: str, entry: object) -> None:
        if not isinstance(entry, dict):
            raise _Wrong(f"{where} must be an object")
        self._where, self._entry = where, entry

    def one(self, name: str, kind: type[T], default: T | None = None) -> T:
        value = self._entry.get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _Wrong(f"{self._where}.{name} must be {_KINDS[kind]}")
        return value

    def many(self, name: str, kind: type[T]) -> tuple[T, ...]:
        values = self.one(name, list, [])
        if not all(isinstance(value, kind) for value in values):
            raise _Wrong(f"{self._where}.{name} must be a list, each {_KINDS[kind]}")
        return tuple(values)

    def ips(self, name: str) -> tuple[str, ...]:
        """Addresses, in the form in which they are compared."""
        found = []
        for text in self.many(name, str):
            try:
                found.append(str(ipaddress.ip_address(text)))
            except ValueError as error:
                raise _Wrong(f"{self._where}.{name}: {text!r} is not an IP address") from error
        return tuple(found)

    def ports(self, name: str) -> tuple[int, ...]:
        numbers = self.many(name, int)
        if not all(0 < number < 1 << 16 for number in numbers):
            raise _Wrong(f"{self._where}.{name} must be ports, from 1 to 65535")
        return numbers

    def netns(self) -> int | None:
        number = self.one("netns", int, 0)
        if not 0 <= number <= _NETNS_MAX:
            raise _Wrong(f"{self._where}.netns must be an inode number, from 0 to {_NETNS_MAX}")
        return number or None

    def cgroup(self) -> str:
        path = self.one("cgroup", str, "").strip("/")
        if "\0" in path or not {".", ".."}.isdisjoint(path.split("/")):
            raise _Wrong(f"{self._where}.cgroup must be a path below the cgroup v2 mount")
        return path


_KINDS: dict[Any, str] = {str: "a string", int: "a number", bool: "true or false", list: "a list",
                          dict: "an object"}  # fmt: skip


def _entries(content: dict[str, Any], name: str) -> enumerate[Any]:
    entries = content.get(name, [])
    if not isinstance(entries, list):
        raise _Wrong(f"{name} must be a list")
    return enumerate(entries)


def _pod(fields: _Fields) -> Pod:
    containers = fields.many("containers", dict)
    return Pod(
        namespace=fields.one("namespace", str),
        name=fields.one("name", str),
        uid=fields.one("uid", str, ""),
        node=fields.one("node", str, "") or None,
        ips=fields.ips("ips"),
        host_network=fields.one("host_network", bool, False),
        netns=fields.netns(),
        labels=_labels(fields.one("labels", dict, {})),
        containers=tuple(
            _container(_Fields(f"containers[{i}]", c)) for i, c in enumerate(containers)
        ),
    )


def _labels(labels: dict[Any, Any]) -> tuple[tuple[str, str], ...]:
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in labels.items()):
        raise _Wrong("labels must map strings to strings")
    return tuple(labels.items())


def _container(fields: _Fields) -> Container:
    return Container(fields.one("name", str), fields.one("id", str, ""), fields.cgroup())


def _service(fields: _Fields) -> Service:
    target_ports = fields.ports("target_ports")
    return Service(
        fields.one("namespace", str),
        fields.one("name", str),
        fields.ips("ips"),
        fields.ports("ports"),
        fields.ips("endpoints"),
        target_ports,
        dns=bool(target_ports),
    )


def _node(fields: _Fields) -> Node:
    return Node(fields.one("name", str), fields.ips("ips"), fields.netns())
