# SPDX-License-Identifier: Apache-2.0
"""Device programs for kernels without TCX (before 6.6): filters in the clsact qdisc.

Unlike links, filters outlive their process. Ours are told from others' by priority and by name,
which has the process's id, so that the next start takes away what a killed one left, and nothing
else. pyroute2 is loaded here only, since it takes 20 MB.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRIORITY = 0x646E  # "dn": late, behind whatever decides about packets
_ETH_P_ALL = 0x0003
_NAME = re.compile(r"dnstrace-(\d+)")
_PARENTS = {HopKind.INGRESS: 0xFFFFFFF2, HopKind.EGRESS: 0xFFFFFFF3}


def attach(programs: Mapping[HopKind, int], ifindex: int) -> bool:
    """Puts our filters on a device of this thread's namespace, in place of any left over.

    Returns whether the qdisc is dnstrace's. Raises OSError.
    """
    with _route() as route:
        if _remove_filters(route, ifindex):
            _remove_if_empty(route, ifindex)
        present = any(entry.get("kind") == "clsact" for entry in route.get_qdiscs(index=ifindex))
        if not present:
            route.tc("add", "clsact", ifindex)
        # Where only other runs of dnstrace are, the qdisc goes with whichever ends last.
        # An entry without a handle stands for a priority, not for a filter.
        filters = [entry for _, entry in _all_filters(route, ifindex) if entry["handle"]]
        made = not present or (bool(filters) and None not in map(_owner, filters))
        for kind, parent in _PARENTS.items():
            route.tc(
                "add-filter",
                "bpf",
                ifindex,
                fd=programs[kind],
                name=f"dnstrace-{os.getpid()}",
                parent=parent,
                prio=PRIORITY,
                protocol=_ETH_P_ALL,
                direct_action=True,
                classid=1,
            )
    return made


def detach(ifindex: int, *, made: bool) -> None:
    """Takes our filters away, and the qdisc if it is dnstrace's and nobody else uses it."""
    with _route() as route:
        _remove_filters(route, ifindex)
        if made:
            _remove_if_empty(route, ifindex)


@contextmanager
def _route() -> Iterator[Any]:
    """A netlink socket; what the kernel refuses comes out as OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as route:
        try:
            yield route
        except NetlinkError as error:
            raise OSError(error.code, f"tc: {error}") from error


def _remove_filters(route: Any, ifindex: int) -> bool:
    """Whether there were any of this process, or of one that is no more."""
    found = False
    for parent, entry in _all_filters(route, ifindex):
        owner = _owner(entry)
        if owner is not None and (owner == os.getpid() or not _lives(owner)):
            where = {"parent": parent, "info": entry["info"], "handle": entry["handle"]}
            route.tc("del-filter", "bpf", ifindex, **where)
            found = True
    return found


def _owner(entry: Any) -> int | None:
    """The process id of the dnstrace whose filter it is, or None if it is somebody else's."""
    options = entry.get("options")
    if entry.get("kind") != "bpf" or options is None or entry["info"] >> 16 != PRIORITY:
        return None
    name = _NAME.fullmatch(options.get_attr("TCA_BPF_NAME") or "")
    return int(name[1]) if name else None


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def _remove_if_empty(route: Any, ifindex: int) -> None:
    if not _all_filters(route, ifindex):
        route.tc("del", "clsact", ifindex)


def _all_filters(route: Any, ifindex: int) -> list[tuple[int, Any]]:
    """Those of both directions, each with its parent."""
    return [
        (parent, entry)
        for parent in _PARENTS.values()
        for entry in _filters(route, ifindex, parent)
    ]


def _filters(route: Any, ifindex: int, parent: int) -> list[Any]:
    try:
        return list(route.get_filters(index=ifindex, parent=parent))
    except Exception as error:
        if getattr(error, "code", None) in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []  # no clsact there
        raise
