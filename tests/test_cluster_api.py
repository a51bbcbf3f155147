# SPDX-License-Identifier: Apache-2.0
"""What a real API server tells a node's tracer, and what becomes of that when it is not there."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests import api_server
from tests.api_server import (
    KUBELET,
    NOBODY,
    TRACER,
    ApiServer,
    endpoint_slice,
    pod,
    running,
    service,
)
from tracer.cluster import api_source
from tracer.cluster.api_source import ApiSource, ConfigError
from tracer.cluster.cluster import ClusterWatch
from tracer.cluster.model import Endpoint
from tracer.cluster.watch import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tracer.cluster.model import Pod, Service

_SOON_S = 60.0
_CLOSED_S = 3.0
_QUICK = Timing(answer_s=3.0, quiet_s=75.0, first_retry_s=0.05, last_retry_s=0.5, denied_s=0.3)
_PODS = "/api/v1/namespaces/sre/pods"
_SERVICES = "/api/v1/namespaces/kube-system/services"
_SLICES = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
_RULES = [
    {"apiGroups": [""], "resources": ["nodes", "pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["services", "namespaces"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Two nodes, and a DNS service whose one endpoint is on the other."""
    server = ApiServer(tmp_path_factory.mktemp("api"))
    try:
        server.start()
        _fill(server)
        with watching(server.kubeconfig(TRACER)) as watch:  # what is granted holds a little later
            eventually(lambda: watch.status().problem is None)
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(control_plane: ApiServer) -> Iterator[ApiServer]:
    """The same with no pods but far-0, which is on the other node; and it runs."""
    control_plane.delete(_PODS)
    _wait_until_cached(control_plane, control_plane.create(_PODS, pod("sre", "far-0", "node2")))
    yield control_plane
    control_plane.thaw()


def _fill(server: ApiServer) -> None:
    for name, ip in (("node1", "172.18.0.2"), ("node2", "172.18.0.3")):
        body, status = api_server.node(name, ip)
        server.create("/api/v1/nodes", body)
        server.patch(f"/api/v1/nodes/{name}/status", status)
    server.create("/api/v1/namespaces", {"metadata": {"name": "sre"}})
    _grant(server, "tracer", _RULES)
    ports = [("dns", 53, "UDP", "dns"), ("metrics", 9153, "TCP", 9153)]
    server.create(_SERVICES, service("kube-system", "kube-dns", "10.96.0.10", *ports))
    server.create(_SLICES, endpoint_slice("kube-system", "kube-dns-1", "kube-dns",
        {"dns": 5353, "metrics": 9153}, _endpoint("10.244.2.2", "coredns-0")))  # fmt: skip


def _endpoint(ip: str, name: str) -> dict[str, Any]:
    target = {"kind": "Pod", "namespace": "kube-system", "name": name}
    return {"addresses": [ip], "nodeName": "node2", "targetRef": target}


def _grant(server: ApiServer, user: str, rules: list[Any]) -> None:
    role = {"metadata": {"name": user}}
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    server.create(f"{rbac}/clusterroles", {**role, "rules": rules})
    server.create(
        f"{rbac}/clusterrolebindings",
        {
            **role,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": user},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        },
    )  # fmt: skip


@contextmanager
def watching(
    source: ApiSource | Path, *nodes: str, timing: Timing = _QUICK, synced: bool = True
) -> Iterator[ClusterWatch]:
    if not isinstance(source, ApiSource):
        source = ApiSource((str(source),), None, "--kubeconfig")
    watch = ClusterWatch(source, nodes, lambda: ["127.0.0.1", "172.18.0.2"], timing=timing)
    watch.start()
    try:
        if synced:
            assert watch.wait_synced(_SOON_S), watch.status()
        yield watch
    finally:
        began_s = time.monotonic()
        watch.close()
        assert time.monotonic() - began_s < _CLOSED_S


def eventually(what: Callable[[], object], within_s: float = _SOON_S) -> None:
    end_s = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end_s, "it does not become so"
        time.sleep(0.01)


def pods(watch: ClusterWatch) -> dict[str, Pod]:
    known = watch.inventory().pods
    found = {pod.full_name: pod for pod in known}
    assert len(found) == len(known), "a pod is there twice"
    return found


def dns(watch: ClusterWatch) -> dict[str, Service]:
    return {s.name: s for s in watch.inventory().services if s.dns}


def create_pod(server: ApiServer, name: str, ip: str, node: str = "node1") -> None:
    server.create(_PODS, pod("sre", name, node))
    _wait_until_cached(server, server.patch(f"{_PODS}/{name}/status", running(ip)))


def _wait_until_cached(server: ApiServer, made: Any) -> None:
    """Until a pod is in lists at resourceVersion 0 as well, which may be of a while ago."""
    version = made["metadata"]["resourceVersion"]
    query = f"limit=1&resourceVersion={version}&resourceVersionMatch=NotOlderThan"
    server.call("GET", f"{_PODS}?{query}")


def test_pods_of_this_node_are_followed(server: ApiServer) -> None:
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(TRACER)) as watch:
        assert watch.status().nodes == ("node1",)
        assert set(pods(watch)) == {"sre/web-0"}
        web = pods(watch)["sre/web-0"]
        assert (web.ips, web.node, web.labels) == (("10.244.1.10",), "node1", (("app", "web"),))
        assert [(c.name, c.id) for c in web.containers] == [("app", "c0ffee")]

        version = watch.version
        create_pod(server, "web-1", "10.244.1.11")
        eventually(lambda: "sre/web-1" in pods(watch) and pods(watch)["sre/web-1"].ips)
        assert watch.version > version

        server.patch(f"{_PODS}/web-1/status", running("10.244.1.12"))
        eventually(lambda: pods(watch)["sre/web-1"].ips == ("10.244.1.12",))

        server.call("DELETE", f"{_PODS}/web-1")  # with 30 s to end in
        eventually(lambda: pods(watch)["sre/web-1"].deleting)
        server.delete(f"{_PODS}/web-1")
        eventually(lambda: set(pods(watch)) == {"sre/web-0"})


def test_pod_made_again_under_its_name_is_the_new_one(server: ApiServer) -> None:
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(TRACER)) as watch:
        before = pods(watch)["sre/web-0"].uid
        server.delete(f"{_PODS}/web-0")
        create_pod(server, "web-0", "10.244.1.99")
        eventually(lambda: pods(watch).get("sre/web-0", None) and pods(watch)["sre/web-0"].ips
                   == ("10.244.1.99",))  # fmt: skip
        assert pods(watch)["sre/web-0"].uid != before


def test_version_stays_while_nothing_that_is_kept_changes(server: ApiServer) -> None:
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(TRACER)) as watch:
        version = watch.version
        server.patch(f"{_PODS}/web-0", {"metadata": {"annotations": {"note": "x"}}})
        server.patch(
            "/api/v1/nodes/node1/status", {"status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}}
        )  # fmt: skip
        create_pod(server, "far-1", "10.244.2.77", "node2")
        time.sleep(0.5)
        assert watch.version == version
        assert watch.inventory() is watch.inventory()


def test_several_nodes_may_be_this_machine(server: ApiServer) -> None:
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(TRACER), "node1", "node2") as watch:
        assert {pod.node for pod in pods(watch).values()} == {"node1", "node2"}
        assert watch.status().problem is None


def test_endpoints_of_dns_services_are_known_wherever_they_are(server: ApiServer) -> None:
    with watching(server.kubeconfig(TRACER)) as watch:
        kube_dns = dns(watch)["kube-dns"]
        assert (kube_dns.ips, kube_dns.ports) == (("10.96.0.10",), (53, 9153))
        assert (kube_dns.endpoints, kube_dns.target_ports) == (("10.244.2.2",), (5353,))
        assert watch.inventory().endpoints == (
            Endpoint("10.244.2.2", "kube-system", "coredns-0", "node2"),
        )
        assert {s.name for s in watch.inventory().services} == {"kubernetes", "kube-dns"}
        assert {(n.name, n.ips) for n in watch.inventory().nodes} == {
            ("node1", ("172.18.0.2",)), ("node2", ("172.18.0.3",)),
        }  # fmt: skip

        two = [_endpoint("10.244.2.2", "coredns-0"), _endpoint("10.244.2.3", "coredns-1")]
        server.patch(f"{_SLICES}/kube-dns-1", {"endpoints": two})
        eventually(lambda: dns(watch)["kube-dns"].endpoints == ("10.244.2.2", "10.244.2.3"))
        server.patch(f"{_SLICES}/kube-dns-1", {"endpoints": two[:1]})
        eventually(lambda: dns(watch)["kube-dns"].endpoints == ("10.244.2.2",))


def test_dns_service_that_comes_later_has_its_endpoints(server: ApiServer) -> None:
    with watching(server.kubeconfig(TRACER)) as watch:
        server.create(_SERVICES, service("kube-system", "more", "10.96.0.11", ("q", 53, "UDP", 54)))
        server.create(_SLICES, endpoint_slice("kube-system", "more-1", "more", {"q": 54},
                                              _endpoint("10.244.2.9", "more-0")))  # fmt: skip
        try:
            eventually(lambda: "more" in dns(watch) and dns(watch)["more"].endpoints)
            assert dns(watch)["more"].target_ports == (54,)
            assert dns(watch)["kube-dns"].endpoints == ("10.244.2.2",)
        finally:
            server.delete(f"{_SERVICES}/more")
            server.delete(f"{_SLICES}/more-1")
        eventually(lambda: set(dns(watch)) == {"kube-dns"})
        eventually(lambda: len(watch.inventory().endpoints) == 1)


def test_what_is_elsewhere_is_told_from_what_is_nowhere(server: ApiServer) -> None:
    with watching(server.kubeconfig(TRACER)) as watch:
        found = watch.find_pods("far-0")
        assert found is not None
        assert [(pod.full_name, pod.node) for pod in found] == [("sre/far-0", "node2")]
        assert watch.find_pods("near-0") == []
        assert watch.find_pods("../..") == []
        assert watch.pods_in("sre") == ["far-0"]
        assert watch.pods_in("none") == []
        assert "sre" in (watch.namespaces() or ())


def test_node_that_does_not_exist_is_said(server: ApiServer) -> None:
    with watching(server.kubeconfig(TRACER), "node3,x=y") as watch:
        assert watch.status().problem == (
            "the cluster has no node node3,x=y; there are: node1, node2"
        )
        assert watch.wrong_nodes() == watch.status().problem
        assert pods(watch) == {}
    with watching(server.kubeconfig(TRACER), "node1") as watch:
        assert watch.wrong_nodes() is None


def test_server_that_goes_and_comes_again(server: ApiServer) -> None:
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(TRACER)) as watch:
        version = watch.version
        server.stop()
        try:
            eventually(lambda: watch.status().problem)
            assert re.fullmatch(
                r"the API server has been unreachable for \d+ s \(connection refused\): "
                "names may be out of date",
                watch.status().text,
            )
            assert set(pods(watch)) == {"sre/web-0"}
            assert watch.version == version
            assert watch.namespaces() is None
            assert watch.find_pods("far-0") is None
        finally:
            server.start()
        create_pod(server, "web-1", "10.244.1.11")
        eventually(lambda: set(pods(watch)) == {"sre/web-0", "sre/web-1"})
        eventually(lambda: watch.status().problem is None)


def test_server_that_comes_later_than_we_do(server: ApiServer) -> None:
    server.stop()
    try:
        with watching(server.kubeconfig(TRACER), synced=False) as watch:
            assert not watch.wait_synced(0.5)
            eventually(lambda: watch.status().problem)
            assert watch.status().text == (
                f"the API server {server.url} cannot be reached (connection refused): "
                "pods are not known yet"
            )
            server.start()
            assert watch.wait_synced(_SOON_S)
            # A server that starts denies what it will allow, and that counts as synced.
            eventually(
                lambda: [service.endpoints for service in dns(watch).values()] == [("10.244.2.2",)]
            )
    finally:
        server.stop()
        server.start()


def test_server_that_hangs_is_noticed_and_does_not_keep_us(server: ApiServer) -> None:
    """The connections stand; only the silence tells. It lasts longer than closing may."""
    patience_s = _CLOSED_S + 1
    impatient = Timing(patience_s, 300, patience_s, 0.05, 0.5, 0.3)
    with watching(server.kubeconfig(TRACER), timing=impatient) as watch:
        server.freeze()
        eventually(lambda: watch.status().problem)
        assert "(no answer " in watch.status().text
        server.thaw()
        eventually(lambda: watch.status().problem is None)
        server.freeze()
    server.thaw()


def test_quiet_server_is_no_failure(server: ApiServer) -> None:
    """A watch that has had nothing to tell for a while is asked for anew, from where it was."""
    # Longer than a watch must last that was not ended at once.
    with watching(server.kubeconfig(TRACER), timing=Timing(3.0, 300, 1.5, 0.05, 0.5)) as watch:
        before = watch.status().requests
        end_s = time.monotonic() + 4.0
        while time.monotonic() < end_s:
            assert watch.status().problem is None
            assert {r.failing_s for r in watch.status().resources} == {None}
            time.sleep(0.01)
        assert {r.lists for r in watch.status().resources} == {1}
        assert watch.status().requests >= before + len(watch.status().resources)
        create_pod(server, "web-0", "10.244.1.10")
        eventually(lambda: set(pods(watch)) == {"sre/web-0"})


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_too_old_to_be_told_is_listed_anew(server: ApiServer, cached: bool) -> None:
    """With its cache, the server refuses an old version itself; without, etcd does, once compacted."""
    if not cached:
        server.stop()
        server.start("--watch-cache=false")
    try:
        with watching(server.kubeconfig(TRACER)) as watch:
            reflector = watch._pods["node1"]
            old = "1" if cached else reflector._version
            for number in range(3):
                create_pod(server, f"web-{number}", f"10.244.1.{number + 10}")
            eventually(lambda: len(pods(watch)) == 3)
            server.delete(f"{_PODS}/web-0")
            eventually(lambda: len(pods(watch)) == 2)
            server.compact()
            reflector._version = old
            assert reflector._stream is not None
            reflector._stream.cut()
            eventually(lambda: reflector.condition.lists == 2)
            eventually(lambda: reflector._stream is not None)
            assert set(pods(watch)) == {"sre/web-1", "sre/web-2"}
            create_pod(server, "web-3", "10.244.1.13")
            eventually(lambda: set(pods(watch)) == {"sre/web-1", "sre/web-2", "sre/web-3"})
            assert watch.status().problem is None
    finally:
        if not cached:
            server.stop()
            server.start()


def test_what_is_forbidden_is_said_with_the_rule_that_is_missing(server: ApiServer) -> None:
    """Others go on; and what is granted later is known then."""
    create_pod(server, "web-0", "10.244.1.10")
    with watching(server.kubeconfig(NOBODY), "node1") as watch:
        problem = watch.status().problem or ""
        rule = 'apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]'
        assert f"pods of node1: not allowed; the RBAC rule that is missing: {rule}" in problem
        assert problem.isprintable()
        assert watch.namespaces() is None
        _grant(server, "nobody", _RULES[1:])
        eventually(lambda: dns(watch) and dns(watch)["kube-dns"].endpoints)
        assert pods(watch) == {}
        rbac = "/apis/rbac.authorization.k8s.io/v1/clusterroles/nobody"
        server.patch(rbac, {"rules": _RULES})
        eventually(lambda: set(pods(watch)) == {"sre/web-0"})
        eventually(lambda: watch.status().problem is None)


def test_node_that_may_read_only_itself_is_found_by_its_name(server: ApiServer) -> None:
    """As a kubelet's credentials have it; the API server may forbid them all other nodes."""
    hostname = socket.gethostname().lower()
    own = {"apiGroups": [""], "resources": ["nodes"], "resourceNames": [hostname], "verbs": ["get"]}
    pods_only = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    _grant(server, "kubelet", [own, pods_only, *_RULES[1:]])
    server.create("/api/v1/nodes", api_server.node(hostname)[0])
    create_pod(server, "web-0", "10.244.1.10", hostname)
    try:
        with watching(server.kubeconfig(KUBELET)) as watch:
            eventually(lambda: set(pods(watch)) == {"sre/web-0"})
            assert watch.status().why == "its name is this machine's"
            assert [node.name for node in watch.inventory().nodes] == [hostname]
    finally:
        server.delete(f"/api/v1/nodes/{hostname}")


def test_credentials_are_read_again_when_they_are_not_taken_any_more(server: ApiServer) -> None:
    path = server.kubeconfig("stale", "rotated")
    with watching(path, synced=False) as watch:
        eventually(lambda: watch.status().problem)
        assert watch.status().problem == (
            f"{server.url} does not accept the credentials of {path} (--kubeconfig) (HTTP 401)"
        )
        server.kubeconfig(TRACER, "rotated")
        eventually(lambda: watch.wait_synced(0) and watch.status().problem is None)


def test_service_account_of_a_pod_is_used(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TRACER}\n")
    kubeconfig = json.loads(server.kubeconfig(TRACER).read_text())
    authority = kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"]
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(authority))
    monkeypatch.setattr(api_source, "_SERVICE_ACCOUNT", str(token))
    monkeypatch.setattr(api_source, "_SERVICE_AUTHORITY", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    source = api_source.find()
    assert str(source) == "this pod's service account (KUBERNETES_SERVICE_HOST)"
    assert source is not None
    with watching(source) as watch:
        assert watch.status().problem is None
        token.write_text("stale")  # and read again, but only when it must be
        assert "kube-system" in (watch.namespaces() or ())


def test_client_certificate_leaves_no_key_on_disk(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = server.kubeconfig(TRACER).parent
    key, request, certificate = (tmp_path / name for name in ("key", "request", "certificate"))
    subprocess.run(
        ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc",
         "-subj", "/CN=tracer", "-keyout", str(key), "-out", str(request)],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        ["openssl", "x509", "-req", "-in", str(request), "-CA", str(directory / "server.crt"),
         "-CAkey", str(directory / "server.key"), "-CAcreateserial", "-days", "2",
         "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    user = {
        f"client-{what}-data": base64.b64encode(path.read_bytes()).decode()
        for what, path in (("certificate", certificate), ("key", key))
    }
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with watching(server.kubeconfig("", "certificate", **user)) as watch:
        assert list(temporary.iterdir()) == []
        assert watch.status().problem is None
        assert "kube-system" in (watch.namespaces() or ())


def test_server_that_nobody_vouches_for_is_not_trusted(server: ApiServer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads(server.kubeconfig(TRACER).read_text())
    authority = (ApiServer(other).kubeconfig(TRACER)).read_text()
    content["clusters"][0]["cluster"]["certificate-authority-data"] = json.loads(authority)[
        "clusters"
    ][0]["cluster"]["certificate-authority-data"]
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(content))
    with watching(path, synced=False) as watch:
        eventually(lambda: watch.status().problem)
        assert f"{server.url} is not trusted: " in watch.status().text
        # As when its certificate is renewed, and the kubeconfig with it.
        path.write_text(server.kubeconfig(TRACER).read_text())
        eventually(lambda: watch.status().problem is None)


_NO_SERVER = {
    "current-context": "x",
    "contexts": [{"name": "x", "context": {"cluster": "c"}}],
    "clusters": [{"name": "c", "cluster": {}}],
}
_NO_COMMAND = {
    "current-context": "x",
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {"exec": {"command": "/none", "apiVersion": "v1"}}}],
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("[]", "is not a kubeconfig"),
        ("{", "is not a kubeconfig"),
        ("\x00", "is not a kubeconfig"),
        ('{"contexts": 7}', "is not a kubeconfig"),
        ('{"current-context": "x", "contexts": [], "clusters": [], "users": []}', "name x"),
        (json.dumps(_NO_SERVER), "names no server"),
        (json.dumps(_NO_COMMAND), "gives no credentials: [Errno 2]"),
    ],
)
def test_bad_kubeconfig_is_said_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content)
    with watching(path, synced=False) as watch:
        assert not watch.wait_synced(_SOON_S)
        told = watch.status().text
        assert told.startswith(f"{path} (--kubeconfig)")
        assert words in told
        assert told.isprintable()
        assert watch.namespaces() is None


def test_configuration_is_found_where_kubectl_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_source, "_WELL_KNOWN", (str(tmp_path / "admin.conf"),))
    environ = {"HOME": str(tmp_path)}
    assert api_source.find(environ=environ) is None
    (tmp_path / "admin.conf").touch()
    assert str(api_source.find(environ=environ)) == f"{tmp_path}/admin.conf (found on this node)"
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube/config").touch()
    assert str(api_source.find(environ=environ)) == f"{tmp_path}/.kube/config (of this user)"
    (tmp_path / "b").touch()
    environ["KUBECONFIG"] = f"{tmp_path}/a:{tmp_path}/b"
    assert str(api_source.find(environ=environ)) == f"{tmp_path}/b (KUBECONFIG)"
    path = tmp_path / "admin.conf"
    assert str(api_source.find(str(path), environ=environ)) == f"{path} (--kubeconfig)"
    with pytest.raises(ConfigError, match=r"cannot read kubeconfig /none: No such file"):
        api_source.find("/none")
    with pytest.raises(ConfigError, match=r"no file is where KUBECONFIG says: /none"):
        api_source.find(environ={"KUBECONFIG": "/none"})
    with pytest.raises(ConfigError, match=r"is not a kubeconfig"):
        api_source.find(str(path), "x")
    path.write_text('{"contexts": [{"name": "a"}, {"name": "b"}]}')
    with pytest.raises(ConfigError, match=r"there is no context x in .*; there are: a, b"):
        api_source.find(str(path), "x")
    assert str(api_source.find(str(path), "b")) == f"{path} (--kubeconfig, context b)"


def test_nothing_of_kubernetes_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, tracer.cluster.cluster, tracer.arguments; "
        "sys.exit(any(m.split('.')[0] in ('kubernetes', 'urllib3', 'yaml') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_thread_stays(server: ApiServer) -> None:
    with watching(server.kubeconfig(TRACER)):
        pass
    eventually(
        lambda: not [t for t in threading.enumerate() if t.name.startswith(("watch ", "cluster"))]
    )


_MEASURE = """
import sys, threading, time
sys.path.insert(0, {project!r})
from tracer.cluster.api_source import ApiSource
from tracer.cluster.cluster import ClusterWatch

def rss_kb():
    with open("/proc/self/smaps_rollup") as rollup:
        return int(next(line for line in rollup if line.startswith("Rss:")).split()[1])

import numpy, orjson  # what a tracer has already
before_kb = rss_kb()
watch = ClusterWatch(ApiSource(({kubeconfig!r},), None, ""), ["node1"], list)
began_s = time.monotonic()
watch.start()
assert watch.wait_synced(60), watch.status()
synced_s = time.monotonic() - began_s
inventory = watch.inventory()
status = watch.status()
sys.stdout.write(orjson.dumps(dict(
    rss_kb=rss_kb() - before_kb, synced_s=synced_s, requests=status.requests,
    pods=len(inventory.pods), services=len(inventory.services),
)).decode())
"""


def measured(server: ApiServer, project: Path) -> dict[str, Any]:
    """A ClusterWatch in a process of its own: memory, time and requests until it is synced."""
    code = _MEASURE.format(project=str(project), kubeconfig=str(server.kubeconfig(TRACER)))
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_cost_does_not_grow_with_the_pods_of_other_nodes(
    server: ApiServer, project: Path, record_property: Callable[[str, object], None]
) -> None:
    """5,000 pods and 500 services, of which 30 pods are here."""
    empty = measured(server, project)
    of_real_size = {"metadata": {"annotations": {"notes": "x" * 5000}}}

    def create(number: int) -> None:
        body = pod("sre", f"many-{number}", "node1" if number < 30 else "node2")
        body["metadata"] |= of_real_size["metadata"]
        server.create(_PODS, body)

    def serve(number: int) -> None:
        body = service("sre", f"many-{number}", "", ("http", 80, "TCP", 8080))
        server.create("/api/v1/namespaces/sre/services", body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(5000)))
        list(pool.map(serve, range(500)))
    full = measured(server, project)
    record_property("cost", f"with no pods {empty}; with 5,000 pods {full}")
    print(f"with no pods {empty}; with 5,000 pods {full}")
    assert full["pods"] == 30
    assert full["services"] == 502
    assert full["requests"] < 20
    assert full["rss_kb"] < 60_000
    assert full["rss_kb"] - empty["rss_kb"] < 16_000
