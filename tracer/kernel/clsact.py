# SPDX-License-Identifier: Apache-2.0
"""Device programs for kernels without TCX (before 6.6): filters in the clsact qdisc.

Unlike links, filters outlive their process. Ours are told from others' by name and priority, so
that the next start takes away what a killed one left, and nothing else. pyroute2 is loaded here
only, since it takes 20 MB.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAME = "dnstrace"
PRIORITY = 0x646E  # "dn": late, behind whatever decides about packets
_ETH_P_ALL = 0x0003
_PARENTS = {HopKind.INGRESS: 0xFFFFFFF2, HopKind.EGRESS: 0xFFFFFFF3}


def attach(programs: Mapping[HopKind, int], ifindex: int) -> bool:
    """Puts our filters on a device of this thread's namespace, in place of any left over.

    Returns whether the qdisc had to be made. Raises OSError.
    """
    with _route() as route:
        if _remove_filters(route, ifindex):
            _remove_if_empty(route, ifindex)
        made = not any(entry.get("kind") == "clsact" for entry in route.get_qdiscs(index=ifindex))
        if made:
            route.tc("add", "clsact", ifindex)
        for kind, parent in _PARENTS.items():
            route.tc(
                "add-filter",
                "bpf",
                ifindex,
                fd=programs[kind],
                name=NAME,
                parent=parent,
                prio=PRIORITY,
                protocol=_ETH_P_ALL,
                direct_action=True,
                classid=1,
            )
    return made


def detach(ifindex: int, *, made: bool) -> None:
    """Takes our filters away, and the qdisc if it was made for them and nobody else uses it."""
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
    """Whether there were any of ours."""
    found = False
    for parent in _PARENTS.values():
        for entry in _filters(route, ifindex, parent):
            options = entry.get("options")
            if (
                entry.get("kind") == "bpf"
                and options is not None
                and options.get_attr("TCA_BPF_NAME") == NAME
                and entry["info"] >> 16 == PRIORITY
            ):
                where = {"parent": parent, "info": entry["info"], "handle": entry["handle"]}
                route.tc("del-filter", "bpf", ifindex, **where)
                found = True
    return found


def _remove_if_empty(route: Any, ifindex: int) -> None:
    if not any(True for parent in _PARENTS.values() for _ in _filters(route, ifindex, parent)):
        route.tc("del", "clsact", ifindex)


def _filters(route: Any, ifindex: int, parent: int) -> list[Any]:
    try:
        return list(route.get_filters(index=ifindex, parent=parent))
    except Exception as error:
        if getattr(error, "code", None) in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []  # no clsact there
        raise
