# SPDX-License-Identifier: Apache-2.0
"""resolv.conf, as the C library reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.cluster.resolvconf import TEXT_MAX, ResolvConf, parse

POD = """\
nameserver 10.68.0.2
search sre.svc.cluster.local. svc.cluster.local. cluster.local.
options ndots:5
"""
NODE = """\
nameserver 100.64.11.3
nameserver 114.114.114.114
nameserver 119.29.29.29
# Too many DNS servers configured, the following entries may be ignored.
nameserver 1.2.4.8
"""
CLUSTER = ("sre.svc.cluster.local", "svc.cluster.local", "cluster.local")

CASES = {
    "a pod": (POD, ResolvConf(("10.68.0.2",), CLUSTER, ndots=5)),
    "a node": (
        NODE,
        ResolvConf(("100.64.11.3", "114.114.114.114", "119.29.29.29", "1.2.4.8")),
    ),
    "nothing": ("", ResolvConf()),
    "tabs and spaces": ("search\t a  b\t\noptions \t ndots:2", ResolvConf((), ("a", "b"), 2)),
    "carriage returns": (POD.replace("\n", "\r\n"), ResolvConf(("10.68.0.2",), CLUSTER, 5)),
    "the last search list wins": ("search a b\nsearch c", ResolvConf((), ("c",))),
    "a domain after a search list wins": ("search a b\ndomain c d", ResolvConf((), ("c",))),
    "a search list after a domain wins": ("domain c\nsearch a b", ResolvConf((), ("a", "b"))),
    "options add up, the last of each wins": (
        "options ndots:5 rotate\noptions ndots:2 edns0 rotate",
        ResolvConf(ndots=2, options=("rotate", "edns0")),
    ),
    "limits of the C library": (
        "options ndots:99 timeout:99 attempts:99",
        ResolvConf(ndots=15, timeout_s=30, attempts=5),
    ),
    "numbers that are none": ("options ndots:x ndots: ndots timeout:-1", ResolvConf(options=("ndots",))),
    "comments": ("#nameserver 1.1.1.1\n;search a\n# options ndots:3", ResolvConf()),
    "a comment after an address": ("nameserver 192.0.2.1#x", ResolvConf(("192.0.2.1",))),
    "a keyword that is not first": (" nameserver 192.0.2.1", ResolvConf()),
    "a keyword in capitals": ("SEARCH a", ResolvConf()),
    "a longer keyword": ("searching a", ResolvConf()),
    "no value": ("nameserver\nsearch\noptions \ndomain", ResolvConf()),
    "an address that is none": ("nameserver dns.example.com", ResolvConf()),
    "IPv6": ("nameserver FD00:0::A\nnameserver fe80::1%eth0", ResolvConf(("fd00::a", "fe80::1%eth0"))),
    "the root": ("search . a.", ResolvConf((), (".", "a"))),
    "no search list at all": ("search a\nsearch \x07", ResolvConf()),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_file_is_read_as_the_c_library_does(text: str, expected: ResolvConf) -> None:
    assert parse(text) == expected


def test_only_three_name_servers_are_asked() -> None:
    assert parse(NODE).used_nameservers == ("100.64.11.3", "114.114.114.114", "119.29.29.29")


def test_huge_file_is_bounded() -> None:
    found = parse("search " + "a " * TEXT_MAX + "\n" + "nameserver 192.0.2.1\n" * 1000)
    assert len(found.search) == 64
    found = parse("nameserver 192.0.2.1\n" * 10_000 + "options " + "x" * 1000)
    assert len(found.nameservers) == 32
    assert found.options == ()


@pytest.mark.fuzz
@given(st.text(alphabet=st.sampled_from("searchnmvoptidon .:;#\t\n\r0159\x00é\u2028")))
def test_any_text_is_read(text: str) -> None:
    found = parse(text)
    for domain in found.search:
        assert domain.isascii()
        assert domain.isprintable()
        assert " " not in domain
    assert 0 <= found.ndots <= 15
