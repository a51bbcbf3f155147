# SPDX-License-Identifier: Apache-2.0
"""The user's filters: what they let through, and what they say about bad values."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import COREDNS, WEB, transaction
from tracer.filters import Filters, duration_ns
from tracer.transaction import Client, Transaction

ANSWERED = transaction("WWW.example.com.", latency_ns=5_000_000)
TIMED_OUT = transaction("web.sre.svc.cluster.local.", "AAAA", rcode=None)
REFUSED = TIMED_OUT._replace(status="refused")
DROPPED = TIMED_OUT._replace(status="dropped")
NXDOMAIN = transaction("no.example.com.", rcode="NXDOMAIN", latency_ns=100)
NOBODY = transaction(client=Client("192.0.2.1", 5))._replace(backend=None, name=None, type=None)

PASSES: list[tuple[dict[str, Any], Transaction]] = [
    ({}, NOBODY),
    ({"namespaces": ("sre", "default")}, ANSWERED),
    ({"namespaces": ("kube-system",), "side": "server"}, ANSWERED),
    ({"pods": ("x", "my-nginx-*")}, ANSWERED),
    ({"pods": ("default/my-*",)}, ANSWERED),
    ({"pods": ("coredns-*",), "side": "server"}, ANSWERED),
    ({"container": "app"}, ANSWERED),
    ({"pid": 4242}, ANSWERED),
    ({"comm": "dig"}, ANSWERED),
    ({"comm": "d?[a-g]"}, ANSWERED),
    (
        {"comm": "systemd-resolved"},
        transaction(client=WEB._replace(comm="systemd-resolve")),
    ),
    ({"name": "www.example.com"}, ANSWERED),
    ({"name": "www.EXAMPLE.com."}, ANSWERED),
    ({"name": "*.com"}, ANSWERED),
    ({"name": "*.com."}, ANSWERED),
    ({"name": "."}, transaction(".", "NS", rcode="NXDOMAIN")),
    ({"type": "aaaa"}, TIMED_OUT),
    ({"type": "TYPE28"}, TIMED_OUT),
    ({"rcode": "nxdomain"}, NXDOMAIN),
    ({"rcode": "3"}, NXDOMAIN),
    ({"rcode": "RCODE3"}, NXDOMAIN),
    ({"failed": True}, NXDOMAIN),
    ({"failed": True}, TIMED_OUT),
    ({"failed": True}, REFUSED),
    ({"slower": "5ms"}, ANSWERED),
    ({"slower": "5ms"}, TIMED_OUT),
    ({"slower": "5ms"}, DROPPED),
    ({"server": "10.96.0.10"}, ANSWERED),
    ({"server": "::ffff:10.96.0.10"}, ANSWERED),
    ({"backend": "10.244.0.3"}, ANSWERED),
    ({"backend": "coredns-*"}, ANSWERED),
    ({"backend": "kube-system/coredns-*"}, ANSWERED),
    ({"backend": "FD00::0:3"}, ANSWERED._replace(backend=COREDNS._replace(ip="fd00::3"))),
    ({"namespaces": ("default",), "name": "www*", "slower": "1ms"}, ANSWERED),
]

STOPS: list[tuple[dict[str, Any], Transaction]] = [
    ({"namespaces": ("sre",)}, ANSWERED),
    ({"namespaces": ("sre",)}, NOBODY),
    ({"namespaces": ("default",), "side": "server"}, ANSWERED),
    ({"namespaces": ("default",), "side": "server"}, NOBODY),
    ({"pods": ("my-nginx",)}, ANSWERED),
    ({"pods": ("sre/my-*",)}, ANSWERED),
    ({"pods": ("*",)}, NOBODY),
    ({"pods": ("*",), "side": "server"}, NOBODY),
    ({"container": "*"}, NOBODY),
    ({"pid": 1}, ANSWERED),
    ({"pid": 1}, NOBODY),
    ({"comm": "di"}, ANSWERED),
    ({"comm": "*"}, NOBODY),
    ({"name": "example.com"}, ANSWERED),
    ({"name": "www?"}, ANSWERED),
    ({"name": "*"}, NOBODY),
    ({"type": "A"}, TIMED_OUT),
    ({"rcode": "NOERROR"}, TIMED_OUT),
    ({"failed": True}, ANSWERED),
    ({"slower": "5.000001ms"}, ANSWERED),
    ({"slower": "5ms"}, REFUSED),
    ({"server": "10.96.0.1"}, ANSWERED),
    ({"backend": "10.96.0.10"}, ANSWERED),
    ({"backend": "10.96.0.10"}, NOBODY),
    ({"backend": "default/coredns-*"}, ANSWERED),
    ({"backend": "*"}, NOBODY),
    ({"namespaces": ("default",), "name": "www*", "slower": "1s"}, ANSWERED),
]


@pytest.mark.parametrize(("asked", "t"), PASSES, ids=lambda value: str(value)[:50])
def test_what_is_asked_for_passes(asked: dict[str, Any], t: Transaction) -> None:
    assert Filters(**asked).predicate()(t) is True


@pytest.mark.parametrize(("asked", "t"), STOPS, ids=lambda value: str(value)[:50])
def test_what_is_not_asked_for_is_stopped(asked: dict[str, Any], t: Transaction) -> None:
    assert Filters(**asked).predicate()(t) is False


BAD_VALUES = [
    ({"type": "AAAAA"}, "'AAAAA' is not a DNS type, such as A, AAAA or TYPE65280"),
    ({"type": "TYPE65536"}, "'TYPE65536' is not a DNS type, such as A, AAAA or TYPE65280"),
    ({"rcode": "NXDOMIAN"}, "'NXDOMIAN' is not a response code, such as NXDOMAIN or SERVFAIL"),
    ({"rcode": "4096"}, "'4096' is not a response code, such as NXDOMAIN or SERVFAIL"),
    ({"slower": "5"}, "'5' is not a time; write a number with ns, us, ms, s or m: 5ms"),
    ({"slower": "-5ms"}, "'-5ms' is not a time; write a number with ns, us, ms, s or m: 5ms"),
    ({"server": "kube-dns"}, "server 'kube-dns' is not an IP address"),
    ({"server": "10.96.0"}, "server '10.96.0' is not an IP address"),
    ({"backend": "10.244.0.300"}, "backend '10.244.0.300' is not an IP address"),
    ({"backend": "fd00::x"}, "backend 'fd00::x' is not an IP address"),
    ({"backend": ""}, "pod is empty; write a name or a pattern such as 'web-*'"),
    ({"name": ""}, "name is empty; write a name or a pattern such as 'web-*'"),
    ({"pods": ("",)}, "pod is empty; write a name or a pattern such as 'web-*'"),
    ({"namespaces": ("",)}, "a namespace has a name"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_value_is_named(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        Filters(**asked).predicate()
    assert str(raised.value) == message


TIMES = {
    "5ms": 5_000_000,
    "1.5s": 1_500_000_000,
    "200us": 200_000,
    "200µs": 200_000,
    "7ns": 7,
    "0.3ns": 0,
    "2m": 120_000_000_000,
    "1.000000001s": 1_000_000_001,
}


@pytest.mark.parametrize(("text", "ns"), TIMES.items())
def test_time_is_exact(text: str, ns: int) -> None:
    assert duration_ns(text) == ns


@pytest.mark.fuzz
@given(st.text(max_size=20))
def test_any_text_is_a_filter_or_a_value_error(text: str) -> None:
    for asked in ("name", "type", "rcode", "slower", "server", "backend", "comm", "container"):
        options: dict[str, Any] = {asked: text}
        with suppress(ValueError):
            Filters(**options).predicate()(ANSWERED)
