# SPDX-License-Identifier: Apache-2.0
"""What the Vagrant cluster's scripts make of what kubectl, cgroups and a trace say."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tracer.cluster import pods_file as reader
from tracer.cluster.identities import Identities
from vagrant import check, pods_file

if TYPE_CHECKING:
    from pathlib import Path

Object = dict[str, Any]

GLIBC, COREDNS, HOST, SIDECAR, GONE = (digit * 64 for digit in "abcde")
HOST_NETNS, GLIBC_NETNS, COREDNS_NETNS = 4026531840, 4026532246, 4026532310


def container(name: str, container_id: str | None, state: str = "running") -> Object:
    status: Object = {"name": name, "ready": state == "running", "state": {state: {}}}
    if container_id:
        status["containerID"] = f"containerd://{container_id}"
    return status


def pod(name: str, node: str, ip: str, *containers: Object, **more: Any) -> Object:
    """A pod as the API server tells of it, without what nobody here reads."""
    namespace, name = name.split("/")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": "6f0e1d0a-5c0b-4b7e-9c7b-1f2e3d4c5b6a",
            "labels": {"app": name.split("-")[0], "pod-template-generation": "1"},
            "ownerReferences": [{"kind": "DaemonSet", "name": name.split("-")[0]}],
        },
        "spec": {"nodeName": node, "dnsPolicy": "ClusterFirst", **more.get("spec", {})},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "hostIP": "192.168.56.11",
            "containerStatuses": list(containers),
            "conditions": [{"type": "Ready", "status": "True"}],
            **more.get("status", {}),
        },
    }


def node(name: str, ip: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"podCIDR": "10.42.0.0/24"},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": ip},
                {"type": "Hostname", "address": name},
            ]
        },
    }


def listed() -> list[Object]:
    """What `kubectl get pods,services,endpointslices,nodes --all-namespaces -o json` says."""
    return [
        pod("sre/glibc-7xk2p", "node1", "10.42.0.7", container("app", GLIBC)),
        pod("sre/glibc-m4w8d", "node2", "10.42.1.5", container("app", "f" * 64)),
        pod(
            "sre/host-2hs5v",
            "node1",
            "192.168.56.11",
            container("agent", HOST),
            spec={"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"},
        ),
        pod("kube-system/coredns-6799fbcd5-4kx2p", "node1", "10.42.0.2", container("dns", COREDNS)),
        pod("sre/new-abcde", "", "", container("app", None, "waiting")),
        # It has ended, and another pod has its address by now.
        pod("sre/job-x", "node1", "10.42.0.7", container("job", GONE), status={"phase": "Failed"}),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {
                "clusterIP": "10.43.0.10",
                "clusterIPs": ["10.43.0.10", "fd00:43::a"],
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
                    {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
                ],
                "selector": {"k8s-app": "kube-dns"},
            },
            "status": {"loadBalancer": {}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "headless", "namespace": "sre"},
            "spec": {"clusterIP": "None", "clusterIPs": ["None"]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "metadata": {
                "name": "kube-dns-x7v9k",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "endpoints": [
                {"addresses": ["10.42.1.2"], "conditions": {"ready": True}, "nodeName": "node2"},
                {"addresses": ["10.42.0.2"], "conditions": {}, "nodeName": "node1"},
                {"addresses": ["10.42.0.9"], "conditions": {"ready": False}},
            ],
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}],
        },
        node("node1", "192.168.56.11"),
        node("node2", "192.168.56.12"),
    ]


class Machine:
    """Directories like those of cgroup v2 and /proc, of a node that runs some containers."""

    def __init__(self, directory: Path) -> None:
        self.cgroup, self.proc = directory / "cgroup", directory / "proc"
        self.process(1, HOST_NETNS, self.cgroup / "init.scope")

    def process(self, pid: int, netns: int, group: Path) -> None:
        """Puts a process into a cgroup and a network namespace."""
        ns = self.proc / str(pid) / "ns"
        ns.mkdir(parents=True)
        (ns / "net").symlink_to(f"net:[{netns}]")
        group.mkdir(parents=True, exist_ok=True)
        with (group / "cgroup.procs").open("a") as procs:
            procs.write(f"{pid}\n")

    def slice(self, uid: str) -> Path:
        """A pod's cgroup, as the systemd driver names it."""
        besteffort = "kubepods.slice/kubepods-besteffort.slice"
        return self.cgroup / besteffort / f"kubepods-besteffort-pod{uid.replace('-', '_')}.slice"

    def made(self, items: list[Object], name: str = "node1") -> Object:
        return pods_file.pods_file(items, name, str(self.cgroup), str(self.proc))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """node1: the host's processes, and three pods with their sandboxes."""
    machine = Machine(tmp_path)
    glibc = machine.slice("6f0e1d0a-0001")
    machine.process(900, GLIBC_NETNS, glibc / f"cri-containerd-{'9' * 64}.scope")  # the sandbox
    machine.process(910, GLIBC_NETNS, glibc / f"cri-containerd-{GLIBC}.scope")
    coredns = machine.slice("6f0e1d0a-0002")
    machine.process(800, COREDNS_NETNS, coredns / f"cri-containerd-{COREDNS}.scope")
    machine.process(700, HOST_NETNS, machine.slice("0003") / f"cri-containerd-{HOST}.scope")
    return machine


def only(entries: list[Object], name: str) -> Object:
    (entry,) = (entry for entry in entries if entry["name"] == name)
    return entry


def test_pod_of_this_node_has_netns_and_cgroup(machine: Machine) -> None:
    """Its cgroup is the one with the container's id; its namespace that of the process in there."""
    assert only(machine.made(listed())["pods"], "glibc-7xk2p") == {
        "namespace": "sre",
        "name": "glibc-7xk2p",
        "uid": "6f0e1d0a-5c0b-4b7e-9c7b-1f2e3d4c5b6a",
        "node": "node1",
        "host_network": False,
        "ips": ["10.42.0.7"],
        "netns": GLIBC_NETNS,
        "labels": {"app": "glibc", "pod-template-generation": "1"},
        "dns_policy": "ClusterFirst",
        "containers": [
            {
                "name": "app",
                "id": GLIBC,
                "cgroup": "kubepods.slice/kubepods-besteffort.slice/"
                f"kubepods-besteffort-pod6f0e1d0a_0001.slice/cri-containerd-{GLIBC}.scope",
            }
        ],
    }


def test_pod_of_another_node_is_named_by_address_only(machine: Machine) -> None:
    other = only(machine.made(listed())["pods"], "glibc-m4w8d")
    assert "netns" not in other
    assert other["containers"] == [{"name": "app", "id": "f" * 64}]
    assert other["ips"] == ["10.42.1.5"]


def test_pod_on_the_host_network_is_told_by_its_cgroup(machine: Machine) -> None:
    host = only(machine.made(listed())["pods"], "host-2hs5v")
    assert (host["host_network"], host["netns"]) == (True, HOST_NETNS)
    assert host["containers"][0]["cgroup"].endswith(f"cri-containerd-{HOST}.scope")


def test_what_has_ended_or_not_begun(machine: Machine) -> None:
    """An ended pod is left out, for its address is another's; a new one has no container yet."""
    pods = machine.made(listed())["pods"]
    assert "job-x" not in {entry["name"] for entry in pods}
    new = only(pods, "new-abcde")
    assert (new["ips"], new["containers"], new["node"]) == ([], [], "")


def test_services_and_nodes(machine: Machine) -> None:
    made = machine.made(listed())
    assert made["services"] == [
        {
            "namespace": "kube-system",
            "name": "kube-dns",
            "ips": ["10.43.0.10", "fd00:43::a"],
            "ports": [53, 9153],
            "endpoints": ["10.42.0.2", "10.42.1.2"],
        },
        {"namespace": "sre", "name": "headless", "ips": [], "ports": [], "endpoints": []},
    ]
    assert made["nodes"] == [
        {"name": "node1", "ips": ["192.168.56.11"], "netns": HOST_NETNS},
        {"name": "node2", "ips": ["192.168.56.12"]},
    ]


@pytest.mark.parametrize(
    "group",
    [
        f"kubepods/besteffort/pod6f0e1d0a-0009/{SIDECAR}",
        f"kubepods.slice/kubepods-pod6f0e1d0a_0009.slice/crio-{SIDECAR}.scope",
        f"kubepods.slice/kubepods-pod6f0e1d0a_0009.slice/docker-{SIDECAR}.scope",
        f"system.slice/k3s.service/kubepods/pod6f0e1d0a-0009/{SIDECAR}",
    ],
)
def test_runtimes_and_cgroup_drivers(machine: Machine, group: str) -> None:
    """The id is found however the cgroup around it is named; a monitor's cgroup is none."""
    machine.process(500, COREDNS_NETNS, machine.cgroup / "a" / f"crio-conmon-{SIDECAR}.scope")
    machine.process(501, GLIBC_NETNS, machine.cgroup / group)
    entry = pod("sre/x-1", "node1", "10.42.0.8", container("app", SIDECAR))
    (made,) = machine.made([entry])["pods"]
    assert (made["netns"], made["containers"][0]["cgroup"]) == (GLIBC_NETNS, group)


def test_processes_below_the_containers_cgroup(machine: Machine) -> None:
    """Where init itself makes cgroups, its own is empty; the first that bears the id counts."""
    group = machine.cgroup / "kubepods" / SIDECAR
    machine.process(502, GLIBC_NETNS, group / "init.scope")
    machine.process(503, COREDNS_NETNS, group / "nested" / SIDECAR)
    (group / "cgroup.procs").write_text("")
    entry = pod("sre/x-1", "node1", "10.42.0.8", container("app", SIDECAR))
    (made,) = machine.made([entry])["pods"]
    assert (made["netns"], made["containers"][0]["cgroup"]) == (GLIBC_NETNS, f"kubepods/{SIDECAR}")


def test_process_that_entered_the_node_or_has_gone_does_not_tell(machine: Machine) -> None:
    group = machine.cgroup / "kubepods" / SIDECAR
    machine.process(503, HOST_NETNS, group)
    machine.process(504, GLIBC_NETNS, group)
    (group / "cgroup.procs").write_text("0\n502\n503\n504\n")
    entry = pod("sre/x-1", "node1", "10.42.0.8", container("app", SIDECAR))
    (made,) = machine.made([entry])["pods"]
    assert made["netns"] == GLIBC_NETNS


def test_sidecars_and_terminated_containers(machine: Machine) -> None:
    """Init containers that go on, and debuggers, are containers too; what has ended is not."""
    machine.process(600, GLIBC_NETNS, machine.cgroup / "kubepods" / SIDECAR)
    entry = pod("sre/x-1", "node1", "10.42.0.8", container("app", GONE, "terminated"))
    entry["status"]["initContainerStatuses"] = [container("proxy", SIDECAR)]
    (made,) = machine.made([entry])["pods"]
    assert [found["name"] for found in made["containers"]] == ["proxy"]
    assert made["netns"] == GLIBC_NETNS


def test_without_cgroup_or_proc_everything_is_named_by_address(tmp_path: Path) -> None:
    made = pods_file.pods_file(listed(), "node1", None, str(tmp_path / "none"))
    assert {"netns", "cgroup"}.isdisjoint(
        key for entry in made["pods"] for part in (entry, *entry["containers"]) for key in part
    )
    assert only(made["pods"], "glibc-7xk2p")["ips"] == ["10.42.0.7"]


def test_unknown_node_is_said(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    made = machine.made(listed(), "elsewhere")
    assert all("netns" not in entry for entry in made["nodes"])
    assert "give --node" in capsys.readouterr().err


def test_odd_objects_are_survived(machine: Machine) -> None:
    """Every field but the kind may be missing, or null."""
    kinds = ("Pod", "Service", "EndpointSlice", "Node", "Other")
    items: list[Object] = [{"kind": kind} for kind in kinds]
    items += [{"kind": k, "metadata": None, "spec": None, "status": None} for k in kinds]
    made = machine.made([*items, {}])
    assert [len(made[key]) for key in ("pods", "services", "nodes")] == [2, 2, 2]


def test_dnstrace_reads_the_file(machine: Machine, tmp_path: Path) -> None:
    """And tells who is who by it."""
    path = tmp_path / "pods.json"
    path.write_text(json.dumps(machine.made(listed())))
    identities = Identities(reader.load(path), machine.cgroup)
    group = machine.slice("0003") / f"cri-containerd-{HOST}.scope"
    assert identities.client(group.stat().st_ino, HOST_NETNS, "192.168.56.11") == (
        "sre", "host-2hs5v", "agent", "node1",
    )  # fmt: skip
    assert identities.client(0, GLIBC_NETNS, "10.42.0.7")[:2] == ("sre", "glibc-7xk2p")
    assert identities.pod("10.42.1.5") == ("sre", "glibc-m4w8d")
    assert identities.service("10.43.0.10", 53) == "kube-system/kube-dns"


def run_script(
    *arguments: str, path: str = "", stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", pods_file.__file__, *arguments],
        env={"PATH": path},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


def test_script_reads_stdin_and_writes_whole_files(machine: Machine, tmp_path: Path) -> None:
    output = tmp_path / "pods.json"
    arguments = ["--cgroup", str(machine.cgroup), "--proc", str(machine.proc), "--node", "node1"]
    said = json.dumps({"kind": "List", "items": listed()})
    done = run_script("--input", "-", "--output", str(output), *arguments, stdin=said)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(output.read_text()) == machine.made(listed())
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".pods-")] == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--input", "-"], "no JSON", "no list"),
        (["--input", "-"], '{"items": 3}', "no list"),
        (["--input", "-"], "[]", "no list"),
        (["--input", "/nonexistent"], "", "cannot use /nonexistent"),
        ([], "", "cannot use kubectl"),
        (["--input", "-", "--output", "/nonexistent/pods"], '{"items": []}', "cannot write"),
    ],
)
def test_script_says_what_is_wrong_in_a_line(
    arguments: list[str], stdin: str, message: str
) -> None:
    done = run_script(*arguments, path="/nonexistent", stdin=stdin)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_watch_follows_kubectl_through_its_failures(machine: Machine, tmp_path: Path) -> None:
    """The file is written again only when it changes, and stays when kubectl fails."""
    answer, output = tmp_path / "answer.json", tmp_path / "pods.json"
    asked, failed = tmp_path / "asked", tmp_path / "failed"
    answer.write_text(json.dumps({"items": listed()}))
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(
        f"#!/bin/sh\necho >>{asked}; cat {answer} && exit; status=$?; echo >>{failed}; exit $status\n"
    )
    kubectl.chmod(0o755)
    command = [sys.executable, "-P", pods_file.__file__, "--watch", "0.05", "--output", str(output),
               "--cgroup", str(machine.cgroup), "--proc", str(machine.proc),
               "--node", "node1"]  # fmt: skip
    env = {"PATH": f"{kubectl.parent}:/usr/bin:/bin"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(output.exists)
            first = output.stat()
            before = lines(asked)
            wait_until(lambda: lines(asked) >= before + 3)
            assert output.stat() == first
            answer.rename(tmp_path / "away")
            wait_until(lambda: lines(failed) >= 3)
            assert output.stat() == first
            new = tmp_path / "new"
            new.write_text(json.dumps({"items": listed()[1:]}))
            new.rename(answer)
            wait_until(lambda: output.stat().st_ino != first.st_ino)
            assert "glibc-7xk2p" not in output.read_text()
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors.count("pods-file:") == 1


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition: Any) -> None:
    assert check.wait_for(condition, 60, 0.05)


def transaction(name: str, **more: Any) -> Object:
    return {
        "event": "transaction",
        "name": name,
        "status": "answered",
        "rcode": "NOERROR",
        "latency_ns": 412_000,
        "client": {"namespace": "sre", "pod": "glibc-7xk2p"},
        "backend": {"ip": "10.42.0.2", "namespace": "kube-system", "pod": "coredns-4kx2p"},
        **more,
    }


def lookup(question: str, queries: int, wasted: int) -> Object:
    return {"event": "lookup", "question": question, "queries": queries, "wasted": wasted}


POD = check.Pod("glibc-7xk2p", "node1", "glibc", ready=True)
NAME = "glibc-1f.dnstrace.test"
TRACE = [
    transaction(f"{NAME}.sre.svc.cluster.local.", rcode="NXDOMAIN"),
    transaction(f"{NAME}."),
    lookup(NAME, 8, 6),
    {"event": "summary"},
]


def failures(
    capsys: pytest.CaptureFixture[str],
    events: list[Object],
    name: str = NAME,
    backends: check.Backends | None = None,
) -> list[str]:
    """What the check says of a trace, as far as it failed."""
    capsys.readouterr()
    verdicts = check.Verdicts()
    asked = check.Asked(POD, name, expands=not name.endswith("."))
    check.judge(events, [asked], backends or check.Backends({"coredns-4kx2p"}), verdicts)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == verdicts.passed + verdicts.failed
    return [line for line in lines if line.startswith("FAIL")]


def test_check_passes_a_true_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures(capsys, TRACE) == []
    absolute = [transaction(f"{NAME}."), lookup(f"{NAME}.", 2, 0), {"event": "summary"}]
    assert failures(capsys, absolute, f"{NAME}.") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": {"namespace": "sre", "pod": "musl-1"}}, "asked for by sre/glibc-7xk2p"),
        ({"client": {"namespace": None, "pod": None}}, "nothing but namespace sre"),
        ({"status": "timeout", "rcode": None}, "answered NOERROR"),
        ({"backend": None}, "answered by coredns-4kx2p"),
        ({"backend": {"ip": "10.43.0.10", "namespace": None, "pod": None}}, "answered by coredns"),
        ({"latency_ns": None}, "latency"),
        ({"latency_ns": 0}, "latency"),
    ],
)
def test_check_fails_a_wrong_transaction(
    capsys: pytest.CaptureFixture[str], change: Object, message: str
) -> None:
    events = copy.deepcopy(TRACE)
    events[1].update(change)
    said = failures(capsys, events)
    assert any(message in line for line in said), said


def test_check_fails_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Each event of the trace that is not there is missed; so is everything of an empty one."""
    assert "no such transaction" in failures(capsys, TRACE[2:])[0]
    assert "search list" in failures(capsys, TRACE[:2] + TRACE[3:])[0]
    assert "search list" in failures(capsys, [*TRACE[:2], lookup(NAME, 2, 0), TRACE[3]])[0]
    assert "summary" in failures(capsys, TRACE[:3])[0]
    wasted = [transaction(f"{NAME}."), lookup(NAME, 8, 6), {"event": "summary"}]
    assert "final dot" in failures(capsys, wasted, f"{NAME}.")[0]
    assert len(failures(capsys, [])) == 2


def test_check_with_nodelocal_takes_the_cache_for_the_backend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = check.Backends({"coredns-4kx2p"}, {"169.254.20.10", "10.43.0.10"})
    events = copy.deepcopy(TRACE)
    for event in events[:2]:
        event["backend"] = {"ip": "10.43.0.10", "namespace": None, "pod": None}
    assert failures(capsys, events, backends=cache) == []
    assert "answered by 10.43.0.10" in failures(capsys, TRACE, backends=cache)[0]


def test_check_reads_what_kubectl_lists(machine: Machine, tmp_path: Path) -> None:
    items = [item for item in listed() if item["kind"] == "Pod"]
    items[1]["metadata"]["deletionTimestamp"] = "2026-11-20T12:00:00Z"
    items[4]["status"] = {"phase": "Pending"}
    found = {p.name: (p.node, p.app, p.ready) for p in check.pods_of({"items": items})}
    assert found["glibc-7xk2p"] == ("node1", "glibc", True)
    assert found["glibc-m4w8d"] == ("node2", "glibc", False)
    assert found["new-abcde"] == ("", "new", False)
    path = tmp_path / "pods.json"
    assert not check.known(str(path), POD)
    path.write_text(json.dumps(machine.made(listed())))
    assert check.known(str(path), POD)
    assert not check.known(str(path), POD._replace(name="glibc-m4w8d"))


def test_check_without_a_cluster_fails_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing on the PATH: it says what is missing, and its status is 1."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert check.main(["--node", "node1"]) == 1
    assert "kubectl on the PATH" in capsys.readouterr().out


def test_manifests_name_what_the_check_uses(project: Path) -> None:
    manifests = project / "vagrant" / "manifests"
    workloads = (manifests / "workloads.yaml").read_text()
    assert all(f"      app: {app}\n" in workloads for app in check.WORKLOADS)
    assert f"{check.DOMAIN}:53" in (manifests / "dns.yaml").read_text()
    assert check.NODELOCAL_IP in (manifests / "nodelocal.yaml").read_text()
