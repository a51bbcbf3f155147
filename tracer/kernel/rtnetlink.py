# SPDX-License-Identifier: Apache-2.0
"""The three questions to rtnetlink(7) that following devices needs, for this thread's namespace.

pyroute2 would answer them as well, but takes 20 MB of the node's memory and 60 ms of every start
for it. Layouts: include/uapi/linux/rtnetlink.h, if_link.h, net_namespace.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_IFINFO = struct.Struct("=BxHiII")  # ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")
_IFADDR = struct.Struct("=BBBBI")  # ifaddrmsg
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETNSID = 18, 22, 90
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _DUMP, _DUMP_INTERRUPTED = 1, 0x300, 0x10
_LISTINGS_MAX = 10
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_LINK_NETNSID, _IFLA_INFO_KIND = 3, 18, 37, 1
_IFLA_INFO_SLAVE_KIND = 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SCOPE_LINK = 253  # and above: addresses that other machines have too
_NETNSA_NSID, _NETNSA_FD = 1, 3
_RTMGRP_LINK = 1
_IFF_LOOPBACK = 8
_TYPE_MASK = 0x3FFF
_ERRNO_MAX = 4095  # include/linux/err.h


@dataclass(frozen=True, slots=True)
class Link:
    """A device as RTM_GETLINK tells it. `peer_nsid`: this namespace's number for the other end's."""

    ifindex: int
    name: str
    kind: str  # "veth", "vxlan", …; "" for hardware
    arphrd: int
    loopback: bool
    peer_nsid: int | None
    port_of: str = ""  # the kind of the device that it is a port of, "bridge", "bond", …


def links() -> list[Link]:
    """All devices. Raises OSError.

    If they keep changing all the while, some may be missing: `link_changes` then tells of more.
    """
    for _ in range(_LISTINGS_MAX):
        found, interrupted = _list_links()
        if not interrupted:
            break
    return found


def _list_links() -> tuple[list[Link], bool]:
    """All devices, and whether they changed meanwhile (NLM_F_DUMP_INTR), so some may be missing."""
    bodies, interrupted = _dump(_RTM_GETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    return [_link(body) for body in bodies], interrupted


def addresses() -> set[str]:
    """Addresses that others may reach this namespace by, in presentation format. Raises OSError."""
    bodies, _ = _dump(_RTM_GETADDR, _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    return {address for address in map(_address, bodies) if address}


def _dump(what: int, request: bytes) -> tuple[list[bytes], bool]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as channel:
        channel.send(_HEADER.pack(16 + len(request), what, _REQUEST | _DUMP, 1, 0) + request)
        found: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, body in _messages(channel.recv(1 << 18)):
                interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
                if kind == _NLMSG_DONE:
                    return found, interrupted
                found.append(body)


def namespace_id(fd: int) -> int | None:
    """This namespace's number for the one behind the descriptor, or None. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as channel:
        request = struct.pack("=B3xHHI", socket.AF_UNSPEC, 8, _NETNSA_FD, fd)
        channel.send(_HEADER.pack(16 + len(request), _RTM_GETNSID, _REQUEST, 1, 0) + request)
        for _, _, body in _messages(channel.recv(4096)):
            for kind, value in _attributes(body[4:]):
                if kind == _NETNSA_NSID:
                    number = _number(value)
                    return number if number >= 0 else None
    return None


def link_changes() -> socket.socket:
    """A socket that becomes readable whenever a device appears, changes or goes."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    changes = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    changes.bind((0, _RTMGRP_LINK))
    return changes


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, flags and body of each. Raises OSError: the kernel's, or EBADMSG for what is no message."""
    if not data:
        raise _malformed()
    while data:
        if len(data) < _HEADER.size:
            raise _malformed()
        length, kind, flags, _, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            raise _malformed()
        body = data[_HEADER.size : length]
        if kind == _NLMSG_ERROR:
            number = -_number(body[:4])
            if not 0 < number <= _ERRNO_MAX:
                raise _malformed()
            raise OSError(number, f"rtnetlink: {os.strerror(number)}")
        yield kind, flags, body
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _link(body: bytes) -> Link:
    if len(body) < _IFINFO.size:
        raise _malformed()
    _, arphrd, ifindex, flags, _ = _IFINFO.unpack_from(body)
    name, kind, peer, port_of = str(ifindex), "", None, ""
    for number, value in _attributes(body[_IFINFO.size :]):
        if number == _IFLA_IFNAME:
            name = _text(value)
        elif number == _IFLA_LINK_NETNSID:
            peer = _number(value)
        elif number == _IFLA_LINKINFO:
            told = dict(_attributes(value))
            kind = _text(told.get(_IFLA_INFO_KIND, b""))
            port_of = _text(told.get(_IFLA_INFO_SLAVE_KIND, b""))
    return Link(ifindex, name, kind, arphrd, bool(flags & _IFF_LOOPBACK), peer, port_of)


def _address(body: bytes) -> str | None:
    if len(body) < _IFADDR.size:
        raise _malformed()
    family, _, _, scope, _ = _IFADDR.unpack_from(body)
    length = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family)
    values = dict(_attributes(body[_IFADDR.size :]))
    value = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS, b""))  # of a peer, the latter is its
    if length is None or scope >= _SCOPE_LINK or len(value) != length:
        return None
    return socket.inet_ntop(family, value)


def _number(value: bytes) -> int:
    if len(value) != 4:
        raise _malformed()
    return int.from_bytes(value, sys.byteorder, signed=True)


def _malformed() -> OSError:
    return OSError(errno.EBADMSG, f"rtnetlink: {os.strerror(errno.EBADMSG)}")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "backslashreplace")
