# SPDX-License-Identifier: Apache-2.0
"""What is said of who is asked for and is not there."""

from __future__ import annotations

import os

import pytest

from tracer.chosen import Chosen, NobodyChosen
from tracer.cluster.identities import Identities
from tracer.cluster.model import Endpoint, Inventory, Pod
from tracer.cluster.sources import Nowhere
from tracer.filters import Filters

_INVENTORY = Inventory(
    pods=(Pod("sre", "web-0", "", "node1", ("10.244.1.10",), False, 1, (), ()),),
    endpoints=(
        Endpoint("10.244.2.2", "kube-system", "coredns-0", "node2"),
        Endpoint("192.0.2.53", None, None, None),
    ),
)


def said(filters: Filters, inventory: Inventory = _INVENTORY) -> list[str]:
    lines: list[str] = []
    Chosen(filters, (), Identities(inventory, None), Nowhere()).check(lines.append)
    return lines


@pytest.mark.parametrize(
    "backend", ["web-0", "sre/web-0", "coredns-*", "kube-system/coredns-0", "192.0.2.1", "fd00::1"]
)
def test_backend_that_is_known_or_an_address_needs_no_word(backend: str) -> None:
    assert said(Filters(backend=backend)) == []


@pytest.mark.parametrize(
    ("backend", "near"),
    [
        ("coredns-1", "; did you mean coredns-0?"),
        ("sre/coredns-0", "; did you mean coredns-0?"),
        ("nosuchpod", "; there are: coredns-0, web-0"),
    ],
)
def test_backend_that_is_not_known_is_noted(backend: str, near: str) -> None:
    assert said(Filters(backend=backend)) == [
        f"--backend: no pod that is known is called '{backend}' yet{near}"
    ]


def test_backend_is_noted_where_nobody_is_known() -> None:
    (line,) = said(Filters(backend="web-0"), Inventory())
    assert line.endswith("is called 'web-0' yet; there are none")


def test_process_that_is_not_there_is_nobody() -> None:
    assert said(Filters(pid=os.getpid())) == []
    with pytest.raises(NobodyChosen, match="there is no process 4194305"):  # > PID_MAX_LIMIT
        said(Filters(pid=4_194_305))
