# SPDX-License-Identifier: Apache-2.0
"""Device programs for kernels without TCX (before 6.6): filters in the clsact qdisc.

Unlike links, filters outlive their process. Ours are told from others' by priority and by name,
which has a token of the run. As long as a run lives, it has an abstract Unix socket of that name in
the device's network namespace, which nothing can leave behind, and which is seen from any pid
namespace: so the next start takes away what a killed run left, and nothing else. pyroute2 is
loaded here only, since it takes 20 MB.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracer.kernel import netns
from tracer.record import HopKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRIORITY = 0x646E  # "dn": late, behind whatever decides about packets
_ETH_P_ALL = 0x0003
_NAME = re.compile(r"dnstrace-([0-9a-z-]+)")
_token = f"{os.getpid()}-{secrets.token_hex(8)}"
_PARENTS = {HopKind.INGRESS: 0xFFFFFFF2, HopKind.EGRESS: 0xFFFFFFF3}


def attach(programs: Mapping[HopKind, int], ifindex: int) -> bool:
    """Puts our filters on a device of this thread's namespace, in place of any left over.

    Returns whether the qdisc is dnstrace's. Raises OSError.
    """
    _claims.take()
    try:
        try:
            with _route() as route:
                return _attach(route, programs, ifindex)
        except OSError:
            # Another run may have made the qdisc, or taken it away, at the same moment.
            with _route() as route:
                return _attach(route, programs, ifindex)
    except BaseException:
        _claims.give_up()
        raise


def _attach(route: Any, programs: Mapping[HopKind, int], ifindex: int) -> bool:
    if _remove_filters(route, ifindex):
        _remove_if_empty(route, ifindex)
    present = any(entry.get("kind") == "clsact" for entry in route.get_qdiscs(index=ifindex))
    if not present:
        route.tc("add", "clsact", ifindex)
    # Where only other runs of dnstrace are, the qdisc goes with whichever ends last.
    # An entry without a handle stands for a priority, not for a filter.
    filters = [entry for _, entry in _all_filters(route, ifindex) if entry["handle"]]
    made = not present or (bool(filters) and None not in map(_owner, filters))
    try:
        _add_filters(route, programs, ifindex)
    except BaseException:
        _remove_filters(route, ifindex)
        if not present:
            _remove_if_empty(route, ifindex)
        raise
    return made


def _add_filters(route: Any, programs: Mapping[HopKind, int], ifindex: int) -> None:
    for kind, parent in _PARENTS.items():
        route.tc(
            "add-filter",
            "bpf",
            ifindex,
            fd=programs[kind],
            name=f"dnstrace-{_token}",
            parent=parent,
            prio=PRIORITY,
            protocol=_ETH_P_ALL,
            direct_action=True,
            classid=1,
        )


def detach(ifindex: int, *, made: bool) -> None:
    """Takes our filters away, and the qdisc if it is dnstrace's and nobody else uses it."""
    try:
        with _route() as route:
            _remove_filters(route, ifindex)
            if made:
                _remove_if_empty(route, ifindex)
    finally:
        _claims.give_up()


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
    """Whether there were any of this run, or of one that is no more."""
    found = False
    for parent, entry in _all_filters(route, ifindex):
        owner = _owner(entry)
        if owner is not None and (owner == _token or not _lives(owner)):
            where = {"parent": parent, "info": entry["info"], "handle": entry["handle"]}
            route.tc("del-filter", "bpf", ifindex, **where)
            found = True
    return found


def _owner(entry: Any) -> str | None:
    """The token of the run whose filter it is, or None if it is somebody else's."""
    options = entry.get("options")
    if entry.get("kind") != "bpf" or options is None or entry["info"] >> 16 != PRIORITY:
        return None
    name = _NAME.fullmatch(options.get_attr("TCA_BPF_NAME") or "")
    return name[1] if name else None


class _Claims:
    """A socket per network namespace in which this run has filters, each for all its devices."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], tuple[socket.socket, int]] = {}

    def take(self) -> None:
        """For one more device of this thread's namespace."""
        key = (_token, netns.own())
        held, devices = self._held.get(key) or (_named_socket(_token), 0)
        self._held[key] = (held, devices + 1)

    def give_up(self) -> None:
        """For one device less. A socket that stayed would keep the namespace alive."""
        key = (_token, netns.own())
        held, devices = self._held.pop(key)
        if devices > 1:
            self._held[key] = (held, devices - 1)
        else:
            held.close()


_claims = _Claims()


def _named_socket(token: str) -> socket.socket:
    """Raises OSError (EADDRINUSE) where the run of that token has filters."""
    named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        named.bind(f"\0dnstrace-{token}")
    except OSError:
        named.close()
        raise
    return named


def _lives(token: str) -> bool:
    try:
        _named_socket(token).close()
    except OSError:
        return True
    return False


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
