# SPDX-License-Identifier: Apache-2.0
"""Devices as the kernel lists them: the same as `ip` says, and nothing but OSError for garbage."""

from __future__ import annotations

import errno
import json
import os
import select
import struct
from typing import TYPE_CHECKING, Self
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.namespaces import new_namespace, run
from tracer.kernel import netns, rtnetlink
from tracer.kernel.rtnetlink import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

ARPHRD = {"loopback": 772, "ether": 1, "none": 65534}  # include/uapi/linux/if_arp.h
NLM_F_DUMP_INTR = 0x10
RTM_NEWLINK, RTM_NEWNSID, NLMSG_ERROR, NLMSG_DONE = 16, 88, 2, 3
IFLA_IFNAME, IFLA_LINKINFO, IFLA_LINK_NETNSID, IFLA_INFO_KIND, NETNSA_NSID = 3, 18, 37, 1, 1


@pytest.fixture
def other(root: None) -> Iterator[int]:
    """A namespace to which a veth leads from the one that the test runs in."""
    del root
    with new_namespace() as other, new_namespace() as own, netns.entered(own):
        run("ip link add veth0 type veth peer name veth1")
        run("ip link add far0 type veth peer name far1")
        run(f"ip link set far1 netns /proc/{os.getpid()}/fd/{other}")
        run("ip link add bridge0 type bridge")
        run("ip link set veth1 master bridge0")
        run("ip link add vxlan0 type vxlan id 1 dstport 4789 local 127.0.0.1")
        run("ip tuntap add tun0 mode tun")
        yield other


def test_devices_are_those_that_ip_lists(other: int) -> None:
    del other
    listed = [
        Link(
            device["ifindex"],
            device["ifname"],
            device.get("linkinfo", {}).get("info_kind", ""),
            ARPHRD[device["link_type"]],
            "LOOPBACK" in device["flags"],
            device.get("link_netnsid"),
            device.get("linkinfo", {}).get("info_slave_kind", ""),
        )
        for device in json.loads(run("ip -j -d link"))
    ]
    assert len(listed) == 7
    assert "bridge" in {link.port_of for link in listed}
    assert rtnetlink.links() == listed


def test_hundreds_of_devices_are_listed(root: None) -> None:
    """They come in several datagrams."""
    del root
    with new_namespace() as own, netns.entered(own):
        for number in range(150):
            run(f"ip link add left{number} type veth peer name right{number}")
        assert len(rtnetlink.links()) == 301


def test_namespace_has_the_number_that_its_veth_tells(other: int) -> None:
    (number,) = {link.peer_nsid for link in rtnetlink.links() if link.name == "far0"}
    assert rtnetlink.namespace_id(other) == number is not None


def test_namespace_that_no_device_leads_to_has_no_number(other: int) -> None:
    del other
    with new_namespace() as stranger:
        assert rtnetlink.namespace_id(stranger) is None


def test_what_is_no_namespace_is_an_error(other: int) -> None:
    del other
    with open(os.devnull) as null, pytest.raises(OSError, match="rtnetlink: Invalid argument"):
        rtnetlink.namespace_id(null.fileno())


def test_change_makes_the_socket_readable(other: int) -> None:
    del other
    with rtnetlink.link_changes() as changes:
        assert select.select([changes], [], [], 0)[0] == []
        run("ip link set veth0 up")
        assert select.select([changes], [], [], 5)[0] == [changes]


# Garbage.


def attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


def link(*attributes: bytes) -> bytes:
    return message(RTM_NEWLINK, struct.pack("=BxHiII", 0, 1, 2, 0x1043, 0) + b"".join(attributes))


VETH = link(
    attribute(IFLA_IFNAME, b"eth0\0"),
    attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"veth\0")),
    attribute(IFLA_LINK_NETNSID, struct.pack("=i", 3)),
)
DONE = message(NLMSG_DONE, bytes(4))
NSID = message(RTM_NEWNSID, bytes(4) + attribute(NETNSA_NSID, struct.pack("=i", 3)))


class Answering:
    """A socket that answers with given datagrams, and then no more."""

    def __init__(self, *datagrams: bytes) -> None:
        self._datagrams = iter(datagrams)

    def __call__(self, *_: object) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, _: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        return next(self._datagrams, b"")[:size]


def links_in(*datagrams: bytes) -> list[Link]:
    with mock.patch("socket.socket", Answering(*datagrams)):
        return rtnetlink.links()


def namespace_id_in(datagram: bytes) -> int | None:
    with mock.patch("socket.socket", Answering(datagram)):
        return rtnetlink.namespace_id(0)


def test_what_the_garbage_is_made_from_is_understood() -> None:
    veth = Link(2, "eth0", "veth", 1, loopback=False, peer_nsid=3)
    assert links_in(VETH + VETH, VETH + DONE) == [veth] * 3
    assert namespace_id_in(NSID) == 3


def test_interrupted_listing_is_repeated() -> None:
    veth = Link(2, "eth0", "veth", 1, loopback=False, peer_nsid=3)
    interrupted = message(NLMSG_DONE, bytes(4), NLM_F_DUMP_INTR)
    assert links_in(VETH + VETH, interrupted, VETH + interrupted, VETH + DONE) == [veth]


def test_listing_that_is_always_interrupted_ends() -> None:
    interrupted = VETH + message(NLMSG_DONE, bytes(4), NLM_F_DUMP_INTR)
    assert len(links_in(*[interrupted] * 100)) == 1


GARBAGE = {
    "nothing": (b"", errno.EBADMSG),
    "half a header": (VETH[:9], errno.EBADMSG),
    "length of 0": (struct.pack("=IHHII", 0, RTM_NEWLINK, 0, 1, 0), errno.EBADMSG),
    "length of 15": (struct.pack("=IHHII", 15, RTM_NEWLINK, 0, 1, 0), errno.EBADMSG),
    "length beyond the end": (VETH[:-1], errno.EBADMSG),
    "link without its header": (message(RTM_NEWLINK, bytes(15)), errno.EBADMSG),
    "number of three bytes": (
        link(attribute(IFLA_LINK_NETNSID, bytes(3))),
        errno.EBADMSG,
    ),
    "error of the kernel": (message(NLMSG_ERROR, struct.pack("=i", -1)), errno.EPERM),
    "error without a number": (message(NLMSG_ERROR, b""), errno.EBADMSG),
    "error that is none": (message(NLMSG_ERROR, bytes(4)), errno.EBADMSG),
    "error without a name": (
        message(NLMSG_ERROR, struct.pack("=i", -(1 << 31))),
        errno.EBADMSG,
    ),
}


@pytest.mark.parametrize(("datagram", "number"), GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_an_error_that_says_so(datagram: bytes, number: int) -> None:
    with pytest.raises(OSError, match="rtnetlink: ") as raised:
        links_in(datagram)
    assert raised.value.errno == number


@pytest.mark.fuzz
@given(
    st.sampled_from((VETH + DONE, NSID, message(NLMSG_ERROR, struct.pack("=i", -1)))),
    st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=4)), max_size=4),
    st.integers(0, 150),
)
def test_mutated_datagrams_are_answers_or_errors(
    datagram: bytes, changes: list[tuple[int, bytes]], cut_at: int
) -> None:
    for at, some in changes:
        datagram = datagram[:at] + some + datagram[at + len(some) :]
    datagram = datagram[:cut_at]
    for read in (links_in, namespace_id_in):
        try:
            read(datagram)
        except OSError as error:
            assert error.errno  # noqa: PT017 - no error is right as well
