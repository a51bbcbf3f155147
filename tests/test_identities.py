# SPDX-License-Identifier: Apache-2.0
"""Who is who, by cgroup, network namespace and address; and what a pods file may say of it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tracer.cluster import pods_file
from tracer.cluster.identities import Identities
from tracer.cluster.model import Container, Inventory, Pod
from tracer.cluster.pods_file import PodsFileError

if TYPE_CHECKING:
    from pathlib import Path

_NETNS = 4026532246
_IP = "10.244.1.10"


def pod(
    name: str,
    *containers: Container,
    ip: str = _IP,
    netns: int | None = None,
    host_network: bool = False,
) -> Pod:
    return Pod("sre", name, "", "node1", (ip,), host_network, netns, (), containers)


def identities(*pods: Pod, cgroup_root: Path | None = None) -> Identities:
    return Identities(Inventory(pods), cgroup_root)


def name(found: tuple[str | None, ...]) -> tuple[str | None, str | None]:
    return found[1], found[2]


def test_process_is_its_containers_only_by_cgroup(tmp_path: Path) -> None:
    (tmp_path / "app" / "nested").mkdir(parents=True)
    (tmp_path / "sandbox").mkdir()
    who = identities(
        pod("web-0", Container("app", "", "app"), netns=_NETNS), cgroup_root=tmp_path
    ).client
    nested, sandbox = (os.stat(tmp_path / d).st_ino for d in ("app/nested", "sandbox"))
    assert name(who(nested, _NETNS, _IP)) == ("web-0", "app")
    assert name(who(nested, 1, _IP)) == ("web-0", "app")
    assert name(who(sandbox, _NETNS, _IP)) == ("web-0", None)
    assert name(who(0, _NETNS, _IP)) == ("web-0", None)
    assert name(who(0, _NETNS, "127.0.0.1")) == ("web-0", None)


def test_namespace_number_that_was_given_to_another_pod_names_nobody() -> None:
    """The pods are those of a moment ago, and the address contradicts them."""
    assert name(identities(pod("gone-0", netns=_NETNS)).client(0, _NETNS, "10.244.1.99")) == (
        None,
        None,
    )


def test_what_is_learned_replaces_what_was_known() -> None:
    known = identities(pod("web-0", netns=_NETNS))
    known.learn(Inventory((pod("web-1", netns=_NETNS),)))
    assert name(known.client(0, _NETNS, _IP)) == ("web-1", None)


def test_cgroup_made_since_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = identities(
        pod("web-0", Container("app", "", "app"), netns=_NETNS), cgroup_root=tmp_path
    )
    (tmp_path / "app").mkdir()
    monkeypatch.setattr(known, "_walked_at", -10.0)
    assert name(known.client(os.stat(tmp_path / "app").st_ino, _NETNS, "")) == ("web-0", "app")


def test_pod_of_unknown_netns_is_found_by_its_address() -> None:
    who = identities(pod("web-0")).client
    assert name(who(0, _NETNS, "10.244.1.10")) == ("web-0", None)
    assert name(who(0, 0, "10.244.1.10")) == ("web-0", None)
    assert name(who(0, _NETNS, "10.244.1.11")) == (None, None)


def test_address_in_another_netns_than_the_pods_is_not_the_pod() -> None:
    who = identities(pod("web-0", netns=_NETNS)).client
    assert name(who(0, _NETNS + 1, "10.244.1.10")) == (None, None)
    assert name(who(0, 0, "10.244.1.10")) == ("web-0", None)


def test_address_of_two_pods_names_neither() -> None:
    known = identities(pod("web-0"), pod("web-1"), pod("web-2", ip="10.244.1.12"))
    assert known.pod("10.244.1.10") == (None, None)
    assert name(known.client(0, 0, "10.244.1.10")) == (None, None)
    assert known.pod("10.244.1.12") == ("sre", "web-2")


def test_pods_that_nothing_tells_are_untraceable(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    pods = [
        pod("netns", netns=1),
        pod("cgroup", Container("app", "", "app")),
        pod("neither"),
        pod("gone", Container("app", "", "gone")),
        pod("host", netns=2, host_network=True),
    ]
    known = identities(*pods, cgroup_root=tmp_path)
    assert known.untraceable(pods) == ["sre/neither", "sre/gone", "sre/host"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cgroup", "kubepods\0slice"),
        ("cgroup", "../../etc"),
        ("cgroup", "/kubepods.slice/.."),
        ("cgroup", "."),
        ("netns", -1),
        ("netns", 2**32),
        ("netns", True),
    ],
)
def test_impossible_value_is_refused_in_one_line(tmp_path: Path, field: str, value: Any) -> None:
    entry = {"namespace": "sre", "name": "web-0", "netns": 1, "containers": []}
    if field == "cgroup":
        entry["containers"] = [{"name": "app", "cgroup": value}]
    else:
        entry[field] = value
    path = tmp_path / "pods.json"
    path.write_text(json.dumps({"pods": [entry]}))
    with pytest.raises(PodsFileError, match=rf"\.{field} must be") as wrong:
        pods_file.load(path)
    assert str(wrong.value).isprintable()


WRONG = {
    '{"pod": []}': "'pod' is unknown; there are: pods, services, nodes",
    '{"pods": [], "service": []}': "'service' is unknown; there are: pods, services, nodes",
    '{"\\u001b[2J": []}': "'\\x1b[2J' is unknown; there are: pods, services, nodes",
    '{"pods": [{"namespace": "a", "name": "b", "ips": ["10.244.1.300"]}]}': (
        "pods[0].ips: '10.244.1.300' is not an IP address"
    ),
    '{"nodes": [{"name": "a"}, {"name": "b", "ips": ["node1"]}]}': (
        "nodes[1].ips: 'node1' is not an IP address"
    ),
    '{"services": [{"namespace": "a", "name": "b", "endpoints": [""]}]}': (
        "services[0].endpoints: '' is not an IP address"
    ),
    '{"services": [{"namespace": "a", "name": "b", "target_ports": [65536]}]}': (
        "services[0].target_ports must be ports, from 1 to 65535"
    ),
}


@pytest.mark.parametrize(("content", "said"), WRONG.items(), ids=WRONG.values())
def test_mistake_in_a_pods_file_is_said_with_its_place(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "pods.json"
    path.write_text(content)
    with pytest.raises(PodsFileError) as wrong:
        pods_file.load(path)
    assert str(wrong.value) == f"pods file {path}: {said}"


def test_endpoints_ports_of_a_pods_file_count_as_dns(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    service = {"namespace": "kube-system", "name": "kube-dns", "ips": ["10.96.0.10"], "ports": [53]}
    other = {"namespace": "sre", "name": "web", "ips": ["10.96.0.80"], "ports": [80]}
    for ports, expected in (([5353], (53, 5353)), ([], (53,))):
        content = {"services": [{**service, "target_ports": ports}, other]}
        path.write_text(json.dumps(content))
        assert Identities(pods_file.load(path), None).dns_ports() == expected


def test_possible_values_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    container = {"name": "app", "cgroup": "/a..b/c/"}
    entry = {"namespace": "sre", "name": "web-0", "netns": 2**32 - 1, "containers": [container]}
    node = {"name": "node1", "netns": 0}
    path.write_text(json.dumps({"pods": [entry], "nodes": [node]}))
    loaded = pods_file.load(path)
    assert loaded.pods[0].netns == 2**32 - 1
    assert loaded.pods[0].containers[0].cgroup == "a..b/c"
    assert loaded.nodes[0].netns is None
