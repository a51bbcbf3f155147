# SPDX-License-Identifier: Apache-2.0
"""Which of the cluster's nodes are this machine. There may be several: nodes in containers."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.cluster.api_source import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from tracer.cluster.objects import KnownNode

_MACHINE_ID = "/etc/machine-id"
_SYSTEM_UUID = "/sys/class/dmi/id/product_uuid"
_NAMES_SHOWN = 3
_EVERYWHERE = ("127.", "169.254.", "::1", "fe80:")  # addresses that other machines have too


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine calls itself; "" if unknown."""

    hostname: str
    machine_id: str
    system_uuid: str

    @classmethod
    def this(cls) -> Machine:
        """As the kubelet reads it."""
        return cls(socket.gethostname().lower(), _content(_MACHINE_ID), _content(_SYSTEM_UUID))


@dataclass(frozen=True, slots=True)
class Choice:
    """Names of nodes, and why those: a clause that can be shown. No names: why none."""

    names: tuple[str, ...]
    why: str


def choose(
    asked: Collection[str],
    nodes: Collection[KnownNode] | None,
    addresses: Callable[[], Collection[str]],
    machine: Machine,
    environ: Mapping[str, str] = os.environ,
) -> Choice:
    """The nodes that are this machine. `nodes` is None as long as those are not known.

    Addresses tell it best; identifiers do where exactly one node has them, as copies of a virtual
    machine share theirs. `environ`'s NODE_NAME may be meant for others than us, so it must exist.
    """
    if asked:
        return Choice(tuple(dict.fromkeys(asked)), "as asked by --node")
    named = environ.get("NODE_NAME", "")
    if named and (nodes is None or any(known.node.name == named for known in nodes)):
        return Choice((named,), "as NODE_NAME says")
    if nodes is None:
        return Choice((), "the cluster's nodes are not known yet")
    return _by_address(nodes, addresses()) or _by_identity(nodes, machine) or _none(nodes)


def _by_address(nodes: Iterable[KnownNode], addresses: Collection[str]) -> Choice | None:
    own = {ip for ip in addresses if not ip.startswith(_EVERYWHERE)}
    found = {}
    for known in nodes:
        common = [ip for ip in known.node.ips if ip in own]
        if common:
            found[known.node.name] = common[0]
    if not found:
        return None
    shown = ", ".join(list(found.values())[:_NAMES_SHOWN])
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    whose = "their addresses are" if len(found) > 1 else "its address is"
    return Choice(tuple(found), f"{whose} of this machine: {shown}{more}")


def _by_identity(nodes: Iterable[KnownNode], machine: Machine) -> Choice | None:
    nodes = list(nodes)
    own = {
        "system UUID": (machine.system_uuid, [known.system_uuid for known in nodes]),
        "machine id": (machine.machine_id, [known.machine_id for known in nodes]),
        "name": (machine.hostname, [known.node.name for known in nodes]),
        "hostname": (machine.hostname, [known.hostname for known in nodes]),
    }
    for what, (ours, theirs) in own.items():
        same = [i for i, value in enumerate(theirs) if ours and value.lower() == ours]
        if len(same) == 1:
            return Choice((nodes[same[0]].node.name,), f"its {what} is this machine's")
    return None


def _none(nodes: Collection[KnownNode]) -> Choice:
    if not nodes:
        return Choice((), "the cluster has no nodes")
    names = [known.node.name for known in nodes]
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    which = f"none of the cluster's {len(names)} nodes ({shown}) is this machine"
    return Choice((), one_line(f"{which}; if one is, name it with --node"))


def _content(path: str) -> str:
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return file.read(128).strip().lower()
    return ""
