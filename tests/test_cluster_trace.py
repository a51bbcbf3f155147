# SPDX-License-Identifier: Apache-2.0
"""The trace of a cluster with a real API server, while its pods and services come and go.

What is true is told by tcpdump in the pods' namespaces, the servers' own logs, and the lab, which
knows what it started.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes import client

from tests.asking import log_text
from tests.counting import running
from tests.test_cluster_api import eventually
from tests.tracing import DNSTRACE, Trace, Tracer, capturing, exchanges, tracing
from tracer.cluster.api_source import ApiSource
from tracer.cluster.cluster import ClusterWatch
from tracer.lab import Lab, cluster_objects, entering, manifests, topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracer.lab.lab import RunningPod

pytestmark = pytest.mark.usefixtures("root")

_UPSTREAM = topology.UPSTREAM_IPS[0]
_DIG = ["dig", "+short", "+notcp", "+ignore", "+tries=1", "+time=2"]
_CONNECTED_S = 15.0  # the longest that an API server is left alone which did not answer, and more
_LEARNED_S = 1.5  # until what the API server was told is known here


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """The lab with its API server. Pods that a test has added are taken away."""
    lab = Lab(api=True)
    lab.up()
    yield lab
    for pod in lab.state.added:
        lab.remove_pod(pod.full_name)


def ask(lab: Lab, pod: str, name: str, *arguments: str) -> None:
    lab.run(pod, [*_DIG, *arguments, f"{name}.bench.example.com"])


def told_by(tracer: Tracer) -> list[dict[str, Any]]:
    """The transactions that it has told by now."""
    lines = tracer.so_far().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "transaction"]


def wait_until_told(tracer: Tracer, name: str) -> None:
    """Until what was asked has been read, named and written."""
    eventually(lambda: f"{name}.bench.example.com." in {t["name"] for t in told_by(tracer)})


def ask_until_named(lab: Lab, tracer: Tracer) -> None:
    """A tracer that chooses nobody does not wait for names before it begins."""
    for number in range(100):
        ask(lab, "sre/web-0", f"named-{number}", "@10.96.0.10")
        wait_until_told(tracer, f"named-{number}")
        if any(
            t["name"].startswith("named-") and t["client"]["pod"] == "web-0"
            for t in told_by(tracer)
        ):
            return
    raise AssertionError("never named")


def ask_until_traced(lab: Lab, pod: str, name: str, tracer: Tracer, *, is_traced: bool) -> None:
    """Asks for name-0, name-1, … until they are traced, or no longer."""
    for number in range(40):
        ask(lab, pod, f"{name}-{number}")
        time.sleep(_LEARNED_S)
        if (f"{name}-{number}." in tracer.so_far()) == is_traced:
            return
    raise AssertionError(f"{name} {'never' if is_traced else 'always'} traced")


def clients(trace: Trace, name: str) -> list[tuple[Any, ...]]:
    """(namespace, pod, container, node) of all who asked for a name, but for the servers."""
    return [
        tuple(t["client"][key] for key in ("namespace", "pod", "container", "node"))
        for t in trace.named(f"{name}.bench.example.com.")
        if t["client"]["namespace"] != "kube-system"
    ]


def names(trace: Trace) -> set[str]:
    return {t["name"].partition(".")[0] for t in trace.transactions}


def losses(trace: Trace) -> dict[str, int]:
    return {kind: n for kind, n in trace.summary["lost"].items() if n and kind != "filtered"}


@contextmanager
def before_running(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[topology.Pod], object]
) -> Iterator[None]:
    """Something that a pod does as soon as its sandbox is up: the API server says Pending."""
    real = cluster_objects.set_running

    def set_running(api: client.ApiClient, pod: topology.Pod) -> None:
        do(pod)
        real(api, pod)

    with monkeypatch.context() as patch:
        patch.setattr(cluster_objects, "set_running", set_running)
        yield


def ask_first(pod: topology.Pod) -> None:
    """One query of a pod that the lab does not know itself yet."""
    command = entering.command(pod.file_name)
    _run([*command, *_DIG, f"first-{pod.name}.bench.example.com"])


def _run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def ask_in_vain(lab: Lab, pod: str, name: str) -> None:
    """A query to nobody, without waiting: what becomes of it is told when the pod has gone."""
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        f"n = b''.join(bytes([len(l)]) + l for l in {name.encode()!r}.split(b'.'));"
        "s.sendto(b'\\0\\7\\1\\0\\0\\1' + bytes(6) + n + b'\\0\\0\\1\\0\\1', ('192.0.2.1', 53))"
    )
    assert lab.run(pod, [sys.executable, "-c", script]).returncode == 0


def test_namespace_is_traced_whole_and_named(lab: Lab, tmp_path: Path) -> None:
    """Two nodes, one of which is not ours: its replica is named by the service's EndpointSlices."""
    pods = ["sre/web-0", "sre/api-0"]
    with ExitStack() as stack:
        pcaps = {pod: stack.enter_context(capturing(lab, pod, tmp_path)) for pod in pods}
        tracer = stack.enter_context(
            tracing("--namespace", "sre", "--node", "node1", tmp_path=tmp_path)
        )
        for number in range(10):
            for pod in (*pods, "sre/host-agent", "default/shop-0", "sre/worker-0"):
                ask(lab, pod, f"{pod.partition('/')[2]}-{number}", "@10.96.0.10")
        wait_until_told(tracer, "host-agent-9")
        trace = tracer.stop()
    for pod, pcap in pcaps.items():
        name = pod.partition("/")[2]
        told = [t for t in trace.transactions if t["client"]["pod"] == name]
        seen = sorted((e.id, e.name, e.rcode) for e in exchanges(pcap))
        assert len(seen) == 10
        assert sorted((t["id"], t["name"], t["rcode"]) for t in told) == seen
    expected = {
        "web-0": ("sre", "web-0", "app", "node1"),
        "api-0": ("sre", "api-0", "app", "node1"),
        "host-agent": ("sre", "host-agent", "agent", "node1"),
    }
    for name, who in expected.items():
        for number in range(10):
            assert clients(trace, f"{name}-{number}") == [who]
    assert len(trace.transactions) == 30
    logs = {pod.name: log_text(lab, pod.node) for pod in lab.dns_pods}
    for t in trace.transactions:
        assert t["server"]["service"] == "kube-system/kube-dns"
        assert t["server"]["role"] == "cluster"
        assert t["backend"]["namespace"] == "kube-system"
        assert t["name"] in logs[t["backend"]["pod"]]
    assert {t["backend"]["pod"] for t in trace.transactions} == logs.keys()
    assert losses(trace) == {}
    assert trace.summary["problem"] is None


@pytest.mark.parametrize(
    "filters",
    [
        ["--namespace", "sre"],
        ["--pod", "new-*"],
        ["--selector", "tier=night"],
        ["--container", "app", "--namespace", "sre"],
    ],
    ids=lambda filters: filters[0],
)
def test_pod_that_comes_and_goes_is_traced_from_first_to_last(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: list[str]
) -> None:
    """Whose name is known only after the first query is let in, and judged when it is known."""
    with tracing(*filters, "--timeout", "2s", tmp_path=tmp_path) as tracer:
        with before_running(monkeypatch, ask_first):
            lab.add_pod("sre", "new-0", labels={"tier": "night"})
            lab.add_pod("default", "other-0")
        for pod in ("sre/new-0", "default/other-0"):
            ask(lab, pod, f"second-{pod.partition('/')[2]}")
        for pod in ("sre/new-0", "default/other-0"):
            ask_in_vain(lab, pod, f"last-{pod.partition('/')[2]}.bench.example.com")
            lab.remove_pod(pod)
        wait_until_told(tracer, "last-new-0")
        time.sleep(3)
        trace = tracer.stop()
    for which in ("first", "second", "last"):
        assert (which, clients(trace, f"{which}-new-0")) == (
            which,
            [("sre", "new-0", "app", "node1")],
        )
    assert names(trace) == {"first-new-0", "second-new-0", "last-new-0"}
    assert losses(trace) == {}


def test_first_query_is_named_however_late_the_name_is(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second passes until the API server says what the pod's container is."""

    def ask_and_wait(pod: topology.Pod) -> None:
        ask_first(pod)
        time.sleep(0.5)

    with tracing(tmp_path=tmp_path) as tracer:
        ask_until_named(lab, tracer)
        with before_running(monkeypatch, ask_and_wait):
            lab.add_pod("sre", "new-0", "node2", container="late")
        wait_until_told(tracer, "first-new-0")
        trace = tracer.stop()
    assert clients(trace, "first-new-0") == [("sre", "new-0", "late", "node2")]


def test_pods_come_and_go_with_their_labels(lab: Lab, tmp_path: Path) -> None:
    """`--selector` holds for a pod as long as its labels do."""

    def label(value: str | None) -> None:
        body = {"metadata": {"labels": {"tier": value}}}
        client.CoreV1Api(lab.api).patch_namespaced_pod("api-0", "sre", body, _preload_content=False)

    with tracing("--selector", "tier in (day, night)", tmp_path=tmp_path) as tracer:
        ask(lab, "sre/api-0", "before")
        for value in ("night", "noon", "day", None):
            label(value)
            is_traced = value in ("night", "day")
            ask_until_traced(lab, "sre/api-0", f"at-{value}", tracer, is_traced=is_traced)
            ask(lab, "sre/api-0", f"then-{value}")
            ask(lab, "sre/web-0", f"web-{value}")
            time.sleep(_LEARNED_S)  # who is traced is decided when a query is read
        trace = tracer.stop()
    told = names(trace)
    assert {name for name in told if name.startswith(("then-", "web-", "before"))} == {
        "then-night",
        "then-day",
    }


def test_pod_that_is_made_again_is_another_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same name and address, another container; what the first asked last stays the first's."""
    with tracing("--pod", "again-*", "--timeout", "2s", tmp_path=tmp_path) as tracer:
        first = lab.add_pod("sre", "again-0", number=120, container="old")
        ask_in_vain(lab, "sre/again-0", "last-again-0.bench.example.com")
        lab.remove_pod("sre/again-0")
        with before_running(monkeypatch, ask_first):
            second = lab.add_pod("sre", "again-0", number=120, container="young")
        wait_until_told(tracer, "last-again-0")
        wait_until_told(tracer, "first-again-0")
        trace = tracer.stop()
    assert clients(trace, "last-again-0") == [("sre", "again-0", "old", "node1")]
    assert clients(trace, "first-again-0") == [("sre", "again-0", "young", "node1")]
    told = {t["client"]["cgroup_id"] for t in trace.transactions}
    assert told == {first.cgroup_id, second.cgroup_id}


def test_reused_namespace_numbers_give_no_wrong_names(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods of two namespaces take turns, mostly in network namespaces of the same number."""
    entered: list[str] = []

    def ask_from_outside(pod: topology.Pod) -> None:
        """A process that is in the pod's network namespace, but not in its cgroup."""
        name = f"outside-{pod.name}.bench.example.com"
        _run(["ip", "netns", "exec", pod.netns, *_DIG, "@10.96.0.10", name])
        entered.append(pod.name)
        ask_first(pod)

    used: list[RunningPod] = []
    with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
        for number in range(8):
            namespace = ("default", "sre")[number % 2]
            with before_running(monkeypatch, ask_from_outside):
                used.append(lab.add_pod(namespace, f"turn-{number}", number=121))
            lab.remove_pod(used[-1].full_name)
        time.sleep(2.5)  # as long as a name is waited for, and more
        wait_until_told(tracer, f"first-{used[-1].name}")
        trace = tracer.stop()
    assert len({pod.netns for pod in used}) < len(used)
    for pod in used:
        wanted = [("sre", pod.name, "app", "node1")] if pod.namespace == "sre" else []
        assert clients(trace, f"first-{pod.name}") == wanted
    for pod in used:
        # Of the very first moment it may not be known whose the namespace is: then it is nobody's.
        told = clients(trace, f"outside-{pod.name}")
        assert told in ([], [("sre", pod.name, None, "node1")] if pod.namespace == "sre" else [])
    assert len(entered) == len(used)


def test_processes_of_the_host_are_no_containers(lab: Lab, tmp_path: Path) -> None:
    """In a pod's network namespace they are the pod's; in a node's they are nobody's."""
    with tracing(tmp_path=tmp_path) as tracer:
        ask_until_named(lab, tracer)
        inside = ["nsenter", "--net=/run/netns/" + lab.pod("sre/web-0").netns_name]
        _run([*inside, *_DIG, "@10.96.0.10", "entered.bench.example.com"])
        lab.node_exec("node1", [*_DIG, "@10.96.0.10", "node.bench.example.com"])
        ask(lab, "sre/host-agent", "agent", "@10.96.0.10")
        lab.add_pod("default", "agent-1", host_network=True, container="one")
        ask(lab, "default/agent-1", "agent-1", "@10.96.0.10")
        wait_until_told(tracer, "agent-1")
        trace = tracer.stop()
    assert clients(trace, "entered") == [("sre", "web-0", None, "node1")]
    assert clients(trace, "node") == [(None, None, None, None)]
    assert clients(trace, "agent") == [("sre", "host-agent", "agent", "node1")]
    assert clients(trace, "agent-1") == [("default", "agent-1", "one", "node1")]


def test_process_of_the_host_in_a_chosen_pod_is_traced(lab: Lab, tmp_path: Path) -> None:
    """By its network namespace; though its cgroup was refused, as it asked for the host before."""
    web, shop = lab.pod("sre/web-0").netns_name, lab.pod("default/shop-0").netns_name
    with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
        for netns, name in (("dnstrace-node1", "node"), (shop, "shop"), (web, "web")):
            name = f"{name}.bench.example.com"  # noqa: PLW2901 - the same in full
            _run(["ip", "netns", "exec", netns, *_DIG, "@10.96.0.10", name])
            time.sleep(_LEARNED_S)
        trace = tracer.stop()
    assert names(trace) == {"web"}
    assert clients(trace, "web") == [("sre", "web-0", None, "node1")]


def test_services_and_endpoints_are_followed(lab: Lab, tmp_path: Path) -> None:
    """A DNS service appears in front of a server outside, moves to another pod, and goes."""
    ip = "10.96.77.1"
    service = replace(topology.DNS_SERVICE, name="late", ips=(ip, "fd00:10:96::77:1"))
    rule = ["-d", ip, "-p", "udp", "-j", "DNAT", "--to-destination", f"{_UPSTREAM}:53"]

    late = "kube-system/late"
    nobodys, empty = (None, None, "answered"), (late, None, "answered")
    moves = [
        nobodys,
        empty,
        (late, "late-0", "answered"),
        (late, "late-1", "answered"),
        empty,
        nobodys,
    ]
    numbers = itertools.count()

    def put(pod: str | None) -> None:
        metadata = {"namespace": "kube-system", "name": pod, "uid": "1"}
        target = {"metadata": metadata, "spec": {"nodeName": "node2"}}
        endpoints = [manifests.endpoint(_UPSTREAM, target)] if pod else []
        cluster_objects.put_endpoints(lab.api, service, endpoints)

    def whose(t: dict[str, Any]) -> tuple[str | None, str | None, str]:
        return t["server"]["service"], t["backend"]["pod"], t["status"]

    def ask_until(expected: tuple[str | None, str | None, str]) -> None:
        """Asks for moved-0, moved-1, … until one is told to be so."""
        for number in itertools.islice(numbers, 100):
            ask(lab, "sre/web-0", f"moved-{number}", f"@{ip}")
            wait_until_told(tracer, f"moved-{number}")
            if whose(told_by(tracer)[-1]) == expected:
                return
        raise AssertionError(f"never {expected}")

    lab.node_exec("node1", ["iptables", "-t", "nat", "-I", "PREROUTING", *rule], check=True)
    try:
        with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
            ask_until(moves[0])
            cluster_objects.create_service(lab.api, service)
            ask_until(moves[1])
            for move, pod in zip(moves[2:5], ("late-0", "late-1", None), strict=True):
                put(pod)
                ask_until(move)
            cluster_objects.delete_service(lab.api, service.namespace, service.name)
            ask_until(moves[5])
            trace = tracer.stop()
    finally:
        lab.node_exec("node1", ["iptables", "-t", "nat", "-D", "PREROUTING", *rule])
    assert [told for told, _ in itertools.groupby(map(whose, trace.transactions))] == moves


def test_nothing_is_lost_while_the_api_server_is_away(lab: Lab, tmp_path: Path) -> None:
    """Names stay, it is said once, and it is said that they are good again."""
    with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
        ask(lab, "sre/web-0", "before")
        lab.stop_api()
        for number in range(8):
            ask(lab, "sre/web-0", f"while-{number}")
            ask(lab, "default/shop-0", f"shop-{number}")
            time.sleep(0.5)
        lab.start_api()
        time.sleep(_CONNECTED_S)
        lab.add_pod("sre", "new-0")
        # A server that has just begun takes its time until it tells of what it was told.
        ask_until_traced(lab, "sre/new-0", "new", tracer, is_traced=True)
        ask(lab, "sre/new-0", "after")
        wait_until_told(tracer, "after")
        trace = tracer.stop()
    for name in ("before", *(f"while-{number}" for number in range(8))):
        assert clients(trace, name) == [("sre", "web-0", "app", "node1")]
    assert clients(trace, "after") == [("sre", "new-0", "app", "node1")]
    assert len([t for t in trace.transactions if not t["name"].startswith("new-")]) == 10
    assert trace.stderr.count("names may be out of date") == 1
    assert trace.stderr.count("names are up to date again") == 1
    assert trace.summary["problem"] is None


def test_api_server_that_stays_away_is_told_at_the_end(lab: Lab, tmp_path: Path) -> None:
    """And by `dnstrace doctor`."""
    with tracing(tmp_path=tmp_path) as tracer:
        ask_until_named(lab, tracer)
        lab.stop_api()
        time.sleep(4)
        ask(lab, "sre/web-0", "still")
        wait_until_told(tracer, "still")
        trace = tracer.stop()
    assert clients(trace, "still") == [("sre", "web-0", "app", "node1")]
    assert re.search(
        r"unreachable for \d+ s \(.+\): names may be out of date", trace.summary["problem"]
    )
    assert trace.stderr.count("names may be out of date") == 1
    doctor = subprocess.run([*DNSTRACE, "doctor"], capture_output=True, text=True, check=False)
    said = " ".join(doctor.stdout.split())
    assert re.search(r"note cluster the API server https://127.0.0.1:\d+ cannot be reached", said)
    lab.start_api()


def test_age_of_names_is_a_metric(lab: Lab) -> None:
    """Of continuous mode; it grows while the API server is away."""
    with running() as run:

        def age_s() -> float:
            ((_, value),) = run.scrape()["dnstrace_names_age_seconds"]
            return value

        eventually(lambda: "dnstrace_names_age_seconds" in run.scrape())
        assert 0 <= age_s() < 75  # bookmarks come once a minute
        lab.stop_api()
        stopped_s = time.monotonic()
        before_s = age_s()
        time.sleep(4)
        assert before_s + 2 < age_s() < before_s + 6 + time.monotonic() - stopped_s
        started_s = time.monotonic()
        lab.start_api()
        eventually(lambda: age_s() < time.monotonic() - started_s)
        assert run.stop()["msg"] == "ended"


def test_api_server_that_comes_later_names_all_the_same(lab: Lab, tmp_path: Path) -> None:
    """What was chosen is traced as soon as it is known who that is."""
    lab.stop_api()
    with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
        ask(lab, "default/shop-0", "shop-early")
        lab.start_api()
        time.sleep(_CONNECTED_S)
        ask_until_traced(lab, "sre/web-0", "known", tracer, is_traced=True)
        for pod in ("default/shop-0", "sre/web-0"):
            ask(lab, pod, f"{pod.partition('/')[2]}-late")
        wait_until_told(tracer, "web-0-late")
        trace = tracer.stop()
    assert {name for name in names(trace) if not name.startswith("known-")} == {"web-0-late"}
    assert clients(trace, "web-0-late") == [("sre", "web-0", "app", "node1")]
    assert trace.stderr.count("pods are not known yet") == 1
    assert trace.stderr.count("traced once they are known") == 1
    assert trace.summary["problem"] is None


def test_nobody_of_a_cluster_that_comes_later_is_told(lab: Lab, tmp_path: Path) -> None:
    lab.stop_api()
    with tracing("--namespace", "nosuch", "--node", "node1", tmp_path=tmp_path) as tracer:
        lab.start_api()
        assert tracer.process.stderr
        said = next(line for line in tracer.process.stderr if "asked for" in line)
    assert (
        said == "dnstrace: no pod that was asked for is on this node (node1) yet: waiting for one\n"
    )


class Relay:
    """A way to the API server that can be cut, while all others go on using it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on whoever comes is turned away, and who is there is thrown out."""
        self._is_cut.set()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._is_cut.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError), source:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def test_pods_that_came_while_the_way_was_cut_are_named_afterwards(
    lab: Lab, tmp_path: Path
) -> None:
    """And those that went meanwhile keep their names for what they asked."""
    relay = Relay(int(lab.state.api_port or 0))
    kubeconfig = tmp_path / "kubeconfig"
    text = lab.kubeconfig.read_text()
    kubeconfig.write_text(text.replace(f":{lab.state.api_port}", f":{relay.port}"))
    with tracing(
        "--kubeconfig", str(kubeconfig), "--namespace", "sre", "--timeout", "2s", tmp_path=tmp_path
    ) as tracer:
        lab.add_pod("sre", "gone-0")
        ask_until_traced(lab, "sre/gone-0", "there", tracer, is_traced=True)
        relay.cut()
        lab.add_pod("sre", "new-0")
        ask_in_vain(lab, "sre/gone-0", "gone.bench.example.com")
        lab.remove_pod("sre/gone-0")
        ask(lab, "sre/web-0", "known")
        time.sleep(4)
        relay.mend()
        time.sleep(_CONNECTED_S)
        ask_until_traced(lab, "sre/new-0", "there", tracer, is_traced=True)
        ask(lab, "sre/new-0", "new")
        wait_until_told(tracer, "new")
        trace = tracer.stop()
    relay.close()
    assert clients(trace, "known") == [("sre", "web-0", "app", "node1")]
    assert clients(trace, "gone") == [("sre", "gone-0", "app", "node1")]
    assert clients(trace, "new") == [("sre", "new-0", "app", "node1")]
    assert trace.stderr.count("names may be out of date") == 1


def test_kubeconfig_that_is_wrong_is_said(lab: Lab, tmp_path: Path) -> None:
    """Once, with the file's name; the trace goes on with what the node itself tells."""
    absent = subprocess.run(
        [*DNSTRACE, "--kubeconfig", "/no/such"], capture_output=True, text=True, check=False
    )
    assert (absent.returncode, absent.stdout) == (2, "")
    assert absent.stderr == "dnstrace: cannot read kubeconfig /no/such: No such file or directory\n"
    wrong = tmp_path / "kubeconfig"
    wrong.write_text("[]")
    with tracing("--kubeconfig", str(wrong), tmp_path=tmp_path) as tracer:
        time.sleep(2)
        ask(lab, "sre/web-0", "wrong")
        time.sleep(3)
        trace = tracer.stop()
    asked = trace.named("wrong.bench.example.com.")
    assert lab.pod("sre/web-0").ipv4 in {t["client"]["ip"] for t in asked}
    assert trace.stderr.count("is not a kubeconfig") == 1
    assert "is not a kubeconfig" in trace.summary["problem"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--namespace", "srr"], "there is no namespace 'srr'; did you mean sre?"),
        (["--pod", "web-00"], "no pod on this node is called 'web-00'; did you mean web-0"),
        (["--namespace", "sre", "--pod", "web-00"], "namespace sre has no pod 'web-00'; did you mean web-0?"),
        (["--pod", "default/far-0"], "pod default/far-0 is on node node3, not on this one"),
        (["--pod", "far-0"], "pod default/far-0 is on node node3, not on this one"),
        (["-n", "sre", "-n", "default", "--pod", "far-0"], "pod default/far-0 is on node node3"),
        (["--node", "nosuch"], "the cluster has no node nosuch; there are: node1, node2"),
        (["--pid", "4194305"], "there is no process 4194305"),  # beyond PID_MAX_LIMIT
    ],
    ids=" ".join,
)  # fmt: skip
def test_who_is_not_there_is_said_with_who_is(lab: Lab, arguments: list[str], said: str) -> None:
    """Exit status 2, one line."""
    far = topology.Pod("default", "far-0", topology.Node("node3", 3, "systemd"), 9, "far")
    cluster_objects.create_pod(lab.api, far)
    try:
        for _ in range(3):  # as long as not all is known, it is traced what there is
            run = subprocess.run(
                [*DNSTRACE, *arguments, "--duration", "1s"],
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            if "has not told all yet" not in run.stderr:
                break
    finally:
        cluster_objects.delete_pod(lab.api, "default", "far-0")
    assert (run.returncode, run.stdout) == (2, "")
    assert said in run.stderr.splitlines()[-1]


def test_backend_that_is_not_known_is_noted_and_tracing_goes_on(lab: Lab, tmp_path: Path) -> None:
    known = lab.dns_pods[1].name
    with tracing("--backend", f"{known}x", tmp_path=tmp_path) as tracer:
        trace = tracer.stop()
    said = f"--backend: no pod that is known is called '{known}x' yet; did you mean {known}"
    assert said in trace.stderr
    for there in (known, f"kube-system/{known}", "coredns-*", "192.0.2.1"):
        with tracing("--backend", there, tmp_path=tmp_path) as tracer:
            assert "--backend" not in tracer.stop().stderr


def test_dns_on_another_port_is_traced_without_a_flag(tmp_path: Path) -> None:
    """CoreDNS listens on 5353: its sockets and devices are seen as those of port 53 are."""
    with (
        Lab(api=True, dns_port=5353) as lab,
        tracing("--namespace", "sre", tmp_path=tmp_path) as tracer,
    ):
        for number in range(8):
            ask(lab, "sre/web-0", f"other-{number}")
        ask(lab, "sre/web-0", "direct", f"@{lab.dns_pods[1].ipv4}", "-p", "5353")
        wait_until_told(tracer, "direct")
        trace = tracer.stop()
    assert len(trace.transactions) == 9
    for t in trace.transactions:
        assert t["status"] == "answered"
        assert t["backend"]["port"] == 5353
        assert t["backend"]["pod"].startswith("coredns-")
        assert {"send", "ingress", "egress", "receive"} == {hop["kind"] for hop in t["hops"]}
        assert f"kube-system/{t['backend']['pod']}" in {hop["owner"] for hop in t["hops"]}


def test_large_cluster_costs_little(lab: Lab, tmp_path: Path) -> None:
    """5,000 pods elsewhere, 30 more here: what is kept is this node's, and asked for once."""
    elsewhere = cluster_objects.many_pods(lab.api, 5000, "node9", "elsewhere")
    try:
        cluster_objects.many_pods(lab.api, 30, "node1", "here")
        with tracing("--namespace", "sre", tmp_path=tmp_path) as tracer:
            for number in range(20):
                ask(lab, "sre/web-0", f"large-{number}")
            time.sleep(5)
            status = Path(f"/proc/{tracer.process.pid}/status").read_text()
            trace = tracer.stop()
        watch = ClusterWatch(ApiSource((str(lab.kubeconfig),), None, ""), ["node1", "node2"], list)
        watch.start()
        try:
            assert watch.wait_synced(60)
            requests = watch.status().requests
            pods = len(watch.inventory().pods)
        finally:
            watch.close()
    finally:
        for namespace in ("elsewhere", "here"):
            cluster_objects.delete_pods(lab.api, namespace)
    assert len(elsewhere) == 5000
    assert len(trace.transactions) == 20
    assert losses(trace) == {}
    assert pods == 30 + len(topology.PODS)
    # Nodes, services, slices, and the pods of two nodes: each is listed once, then watched.
    assert requests <= 2 * 5
    (rss_kb,) = map(int, re.findall(r"VmRSS:\s+(\d+) kB", status))
    print(f"RSS {rss_kb} kB, {requests} requests")
    assert rss_kb < 100 * 1024
