# SPDX-License-Identifier: Apache-2.0
"""What is taken from the API's objects, and that nothing in them can do harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.cluster import objects
from tracer.cluster.model import Container, Endpoint, Node, Service
from tracer.cluster.node_name import Choice, Machine, choose
from tracer.cluster.objects import KnownNode, Malformed
from tracer.cluster.watch import Backoff, Lines

_METADATA = {"namespace": "kube-system", "name": "kube-dns"}


def pod(metadata: object = None, spec: object = None, status: object = None) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "sre", "name": "web-0", **dict(metadata or {})},  # type: ignore[call-overload]
        "spec": spec,
        "status": status,
    }


def test_pod_keeps_what_names_it() -> None:
    found = objects.pod(
        {
            "metadata": {
                "namespace": "sre",
                "name": "web-0",
                "uid": "u-1",
                "labels": {"app": "web", "bell": "\a"},
                "annotations": {"kubernetes.io/config.mirror": "h-1"},
                "deletionTimestamp": "2026-11-20T10:55:38Z",
            },
            "spec": {
                "nodeName": "node1",
                "hostNetwork": True,
                "initContainers": [{"name": "wait"}],
                "containers": [{"name": "app"}, {"name": "late"}],
                "ephemeralContainers": [{"name": "debug"}],
            },
            "status": {
                "phase": "Running",
                "podIP": "10.244.1.10",
                "podIPs": [{"ip": "10.244.1.10"}, {"ip": "FD00::A"}],
                "initContainerStatuses": [{"name": "wait", "containerID": "containerd://1"}],
                "containerStatuses": [
                    {"name": "app", "containerID": "cri-o://2"},
                    {"name": "late"},
                ],
                "ephemeralContainerStatuses": [{"name": "debug", "containerID": "docker://3"}],
            },
        }
    )
    assert (found.full_name, found.uid, found.node) == ("sre/web-0", "u-1", "node1")
    assert found.ips == ("10.244.1.10", "fd00::a")
    assert (found.host_network, found.phase, found.deleting) == (True, "Running", True)
    assert found.labels == (("app", "web"),)
    assert found.static_uid == "h-1"
    assert {c.name: c.id for c in found.containers} == {
        "wait": "1", "app": "2", "late": "", "debug": "3",
    }  # fmt: skip
    assert found.containers[0] == Container("wait", "1", "")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_pod_that_has_finished_has_no_address(phase: str) -> None:
    """The status still has it, while it is another pod's already."""
    assert objects.pod(pod(status={"phase": phase, "podIP": "10.244.1.10"})).ips == ()


@pytest.mark.parametrize(
    ("labels", "ports", "targets", "dns"),
    [
        ({}, [{"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353}], (5353,), True),
        ({}, [{"port": 53, "protocol": "UDP"}], (53,), True),
        ({}, [{"name": "dns", "port": 5300, "targetPort": "dns"}], (), True),
        ({}, [{"name": "web", "port": 80}], (), False),
        ({"k8s-app": "kube-dns"}, [{"name": "q", "port": 54, "protocol": "UDP"}], (54,), True),
        ({"app.kubernetes.io/name": "coredns"}, [{"port": 9153, "protocol": "TCP"}], (), False),
    ],
)
def test_dns_service_is_told_by_port_or_label(
    labels: dict[str, str], ports: list[Any], targets: tuple[int, ...], dns: bool
) -> None:
    found = objects.service(
        {
            "metadata": {**_METADATA, "labels": labels},
            "spec": {"clusterIP": "10.96.0.10", "ports": ports},
        }
    )
    assert found is not None
    numbers = (ports[0]["port"],)
    assert found.service == Service(
        "kube-system", "kube-dns", ("10.96.0.10",), numbers, (), targets, dns
    )


def test_service_without_address_is_kept_for_dns_only() -> None:
    headless: dict[str, Any] = {"metadata": _METADATA, "spec": {"clusterIP": "None"}}
    assert objects.service(headless) is None
    headless["spec"]["ports"] = [{"port": 53}]
    assert objects.service(headless) is not None


def test_endpoints_name_their_pods() -> None:
    found = objects.endpoint_slice(
        {
            "metadata": {
                **_METADATA,
                "name": "kube-dns-x",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "ports": [{"name": "dns", "port": 5353}, {"name": "all"}],
            "endpoints": [
                {
                    "addresses": ["10.244.2.2"],
                    "nodeName": "node2",
                    "targetRef": {"kind": "Pod", "namespace": "kube-system", "name": "coredns-0"},
                },
                {
                    "addresses": ["10.244.2.3"],
                    "conditions": {"ready": False, "serving": True, "terminating": True},
                },
                {"addresses": ["10.244.2.4"], "conditions": {"ready": False, "serving": False}},
                {"addresses": ["dns.example.com"]},
            ],
        }
    )
    assert found is not None
    assert found.service == ("kube-system", "kube-dns")
    assert found.ports == (("dns", 5353),)
    assert found.endpoints == (
        Endpoint("10.244.2.2", "kube-system", "coredns-0", "node2"),
        Endpoint("10.244.2.3", None, None, None),
        Endpoint("10.244.2.4", None, None, None, ready=False),
    )


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {"metadata": None},
        {"metadata": {"name": "web-0"}},
        {"metadata": {"namespace": "sre", "name": "a\x1b[2J"}},
        {"metadata": {"namespace": "sre", "name": "a" * 254}},
        {"metadata": {"namespace": "sre", "name": 7}},
        pod(spec=[]),
        pod(spec={"containers": {}}),
        pod(spec={"containers": ["app"]}),
        pod(spec={"nodeName": "a b"}),
        pod(status={"podIPs": [7]}),
        pod(metadata={"labels": ["app"]}),
    ],
)
def test_malformed_pod_is_told_from_others(raw: Any) -> None:
    with pytest.raises(Malformed):
        objects.pod(raw)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["metadata", "spec", "status", "name", "namespace", "labels", "ports", "port", "endpoints",
             "addresses", "address", "containers", "containerStatuses", "containerID", "podIPs", "ip",
             "conditions", "targetRef", "kind", "clusterIP", "clusterIPs", "nodeInfo", "type"]
        ),
        inner,
        max_size=6,
    ),
    max_leaves=30,
)  # fmt: skip


@given(_JSON, _JSON, _JSON)
def test_no_object_does_harm(metadata: Any, spec: Any, status: Any) -> None:
    raw = {"metadata": metadata, "spec": spec, "status": status, "endpoints": spec, "ports": status}
    if isinstance(metadata, dict):
        metadata |= {"namespace": "sre", "name": "web-0"}
    for read in (objects.pod, objects.service, objects.endpoint_slice, objects.node):
        try:
            read(raw)
        except Malformed:
            continue


def test_lines_come_whole_whatever_the_pieces() -> None:
    lines = Lines()
    assert lines.feed(b'{"a"') == []
    assert lines.feed(b':1}\n\n{"b":2}\r\n{"c"') == [b'{"a":1}', b'{"b":2}\r']
    assert lines.feed(b":3}\n") == [b'{"c":3}']
    assert lines.left_out == 0


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=20))
def test_line_that_is_too_long_is_left_out_and_counted(pieces: list[bytes]) -> None:
    lines = Lines(at_most=10)
    found = [line for piece in pieces for line in lines.feed(piece)]
    all_ = b"".join(pieces).split(b"\n")
    assert found == [line for line in all_[:-1] if line.strip() and len(line) <= 10]
    assert lines.left_out == sum(len(line) > 10 for line in all_)


def test_waits_grow_to_a_bound_and_begin_anew() -> None:
    backoff = Backoff(0.2, 10.0, rng=lambda: 1.0)
    assert [backoff.next_s() for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    backoff.reset()
    assert backoff.next_s() == 0.2
    assert Backoff(0.2, 10.0, rng=lambda: 0.0).next_s() == 0.1


_HERE = Machine("host-a", "m-1", "u-1")


def known(name: str, *ips: str, machine_id: str = "", uuid: str = "") -> KnownNode:
    return KnownNode(Node(name, ips, None), name, machine_id, uuid)


@pytest.mark.parametrize(
    ("asked", "nodes", "addresses", "environ", "names"),
    [
        (["x", "x", "y"], None, [], {"NODE_NAME": "z"}, ("x", "y")),
        ([], None, [], {"NODE_NAME": "z"}, ("z",)),
        ([], None, [], {}, ()),
        ([], [known("z"), known("host-a")], [], {"NODE_NAME": "z"}, ("z",)),
        # Jenkins has one too.
        ([], [known("host-a")], [], {"NODE_NAME": "built-in"}, ("host-a",)),
        (
            [],
            [known("c", "172.18.0.2"), known("w", "172.18.0.3", "fd00::3"), known("far", "10.0.0.9")],
            ["127.0.0.1", "172.18.0.2", "fd00::3"],
            {},
            ("c", "w"),
        ),
        ([], [known("a", "127.0.0.1"), known("b", "169.254.20.10")], ["127.0.0.1"], {}, ()),
        ([], [known("a", uuid="U-1"), known("b", uuid="u-2")], [], {}, ("a",)),
        ([], [known("a", machine_id="m-1"), known("b")], [], {}, ("a",)),
        # Copies of a virtual machine.
        ([], [known("a", machine_id="m-1"), known("b", machine_id="m-1")], [], {}, ()),
        # An address counts for more than a name.
        ([], [known("host-a", "10.0.0.1"), known("b", "10.0.0.2")], ["10.0.0.2"], {}, ("b",)),
        ([], [], [], {}, ()),
    ],
)  # fmt: skip
def test_nodes_that_are_this_machine(
    asked: list[str],
    nodes: list[KnownNode] | None,
    addresses: list[str],
    environ: dict[str, str],
    names: tuple[str, ...],
) -> None:
    choice = choose(asked, nodes, lambda: addresses, _HERE, environ)
    assert choice.names == names
    assert choice.why
    assert choice.why.isprintable()


def test_no_node_is_this_machine_is_said_with_a_way_out() -> None:
    choice = choose([], [known("a"), known("b")], list, _HERE, {})
    assert choice == Choice(
        (), "none of the cluster's 2 nodes (a, b) is this machine; if one is, name it with --node"
    )
