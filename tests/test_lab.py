# SPDX-License-Identifier: Apache-2.0
"""The lab: real namespaces, real name servers, real commands. Every test here leaves it down."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.asking import CLIENTS, dig, fresh_name, log_text
from tests.leftovers import NOTHING, leftovers, names_in
from tracer.cluster import pods_file
from tracer.cluster.identities import Identities
from tracer.lab import Lab, LabError, cgroups, cli, commands, enter, services, state, topology

pytestmark = pytest.mark.usefixtures("root")

SERVICE_IPS = topology.DNS_SERVICE.ips
WWW = "93.184.216.34"
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """The lab, up with its usual options, and down afterwards."""
    with Lab() as up:
        yield up


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


def mounts_of_the_host() -> list[str]:
    """All mounts but the one on /run/netns, which `ip netns` makes once and leaves."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if " /run/netns " not in line]


def lab_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tracer.lab", *arguments]


# --- up and down ---


def test_up_twice_is_up_once(lab: Lab) -> None:
    """The second `up` with the same options changes nothing."""
    before = [pod.pid for pod in lab.pods]
    assert lab.up() is False
    assert [pod.pid for pod in lab.pods] == before


def test_up_with_other_options_replaces_the_lab(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    before = lab.pod("sre/web-0").pid
    assert capsys.readouterr().err == ""
    with Lab(quiet_servers=True) as other:
        assert other.pod("sre/web-0").pid != before
    said = "lab: replaces the one that was up, which had other options\n"
    assert capsys.readouterr().err == said


def test_demo_leaves_a_lab_that_is_up(lab: Lab, project: Path) -> None:
    before = [pod.pid for pod in lab.pods]
    demo = subprocess.run([project / "tools/demo"], capture_output=True, text=True, check=False)
    assert (demo.returncode, demo.stdout) == (1, "")
    assert "run 'sudo dnstrace lab down' first" in demo.stderr
    assert [pod.pid for pod in lab.pods] == before


def test_up_mends_a_lab_with_a_dead_server(lab: Lab) -> None:
    os.kill(lab.state.process("upstream").pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while lab.up() is False and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dig(lab, "sre/web-0", fresh_name()) == "198.51.100.1"


def test_down_leaves_nothing_and_the_host_as_it_was() -> None:
    Lab().down()
    files = {name: Path(name).read_bytes() for name in HOST_FILES if Path(name).exists()}
    mounts = mounts_of_the_host()
    links = subprocess.check_output(["ip", "-br", "link"])
    with Lab() as lab:
        lab.run("sre/web-0", ["dig", "example.com"])
        assert links == subprocess.check_output(["ip", "-br", "link"])
    assert leftovers() == NOTHING
    assert {name: Path(name).read_bytes() for name in files} == files
    assert mounts_of_the_host() == mounts


def test_down_ends_what_runs_in_the_pods(lab: Lab) -> None:
    argv = ["sh", "-c", "echo there; exec sleep 100"]
    with lab.popen("sre/web-0", argv, stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "there\n"
        lab.down()
        assert sleeper.wait(60) == -signal.SIGKILL


def test_down_where_nothing_is_up_is_no_failure() -> None:
    lab = Lab()
    lab.down()
    assert lab.down() is False
    assert subprocess.run(lab_command("down"), check=False, capture_output=True).returncode == 0


def test_what_is_not_the_labs_survives() -> None:
    """A namespace and a cgroup with names like the lab's own."""
    Lab().down()
    mount = cgroups.find_mount(Path("/proc/self/mountinfo").read_text())
    assert mount is not None
    foreign = mount / "dnstrace-lab-of-somebody-else"
    name = topology.PREFIX + "foreign"
    subprocess.run(["ip", "netns", "add", name], check=True)
    foreign.mkdir()
    try:
        with Lab() as lab:
            lab.down()
            lab.up()
        assert foreign.is_dir()
        assert name in names_in("/run/netns")
    finally:
        foreign.rmdir()
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_up_refuses_a_namespace_that_somebody_else_made() -> None:
    Lab().down()
    name = topology.NODES[0].netns
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with pytest.raises(LabError, match=f"ip netns del {name}"):
            Lab().up()
        assert name in names_in("/run/netns")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
    assert leftovers() == NOTHING


# `lab up`, which goes no further once a path is there: at its next step, it waits to be killed.
UP_TO = """
import os, signal, sys
from tracer.lab import Lab
sys.addaudithook(lambda *_: os.path.exists(sys.argv[1]) and signal.pause())
Lab().up()
"""


@pytest.mark.parametrize(
    "sign",
    [
        state.OWNED,
        Path("/run/netns", topology.NODES[0].netns),
        state.LOGS / "sre_web-0.log",
        state.ENTER / "sre_web-0",
        state.LOGS / "upstream.log",
    ],
    ids=lambda path: path.name,
)
def test_a_lab_killed_while_it_came_up_is_cleared_away(sign: Path, project: Path) -> None:
    """Killed as soon as a sign of its progress is there."""
    Lab().down()
    argv = [sys.executable, "-c", UP_TO, str(sign)]
    with subprocess.Popen(argv, cwd=project, stderr=subprocess.DEVNULL) as up:
        while not sign.exists() and up.poll() is None:
            pass
        up.kill()
    assert up.returncode == -signal.SIGKILL
    with Lab() as lab:
        assert dig(lab, "sre/web-0", "www.example.com") == WWW
    assert leftovers() == NOTHING


def test_a_pod_that_is_added_is_as_good_as_the_first_ones() -> None:
    """On the other kind of node, through the overlay, and gone with the lab."""
    with Lab(overlay=True) as lab:
        added = lab.add_pod("sre", "batch-0", "node2", container="job")
        shown = lab.run("sre/batch-0", ["cat", "/proc/self/cgroup", "/etc/resolv.conf"]).stdout
        assert f"0::/{added.cgroup}\n" in shown
        assert "search sre.svc.cluster.local" in shown
        for server in SERVICE_IPS:
            assert dig(lab, "sre/batch-0", f"@{server}", "www.example.com") == WWW
        assert lab.up() is False
        pods = json.loads(lab.pods_file.read_text())["pods"]
        assert [pod["netns"] for pod in pods if pod["name"] == "batch-0"] == [added.netns]
        with pytest.raises(LabError, match="choose another name"):
            lab.add_pod("sre", "batch-0")
        lab.add_pod("sre", "batch-1", host_network=True)
        assert dig(lab, "sre/batch-1", "www.example.com") == WWW
    assert leftovers() == NOTHING


def test_a_pod_that_is_removed_leaves_nothing(lab: Lab) -> None:
    before = json.loads(lab.pods_file.read_text())
    added = lab.add_pod("sre", "batch-0")
    assert added.veth is not None
    lab.remove_pod("sre/batch-0")
    assert not (lab.cgroup_mount / added.cgroup).parent.exists()
    assert added.netns_name not in names_in("/run/netns") + names_in("/etc/netns")
    links = (
        lab.node_exec("node1", ["ip", "link"]).stdout
        + lab.node_exec("node1", ["ip", "route"]).stdout
    )
    assert added.veth not in links
    assert json.loads(lab.pods_file.read_text()) == before
    with pytest.raises(LabError, match="no pod sre/batch-0"):
        lab.run("sre/batch-0", ["true"])
    with pytest.raises(LabError, match="came with the lab"):
        lab.remove_pod("sre/web-0")


def test_without_an_api_server_there_is_none_to_ask(lab: Lab) -> None:
    for ask in (lambda: lab.api, lab.start_api):
        with pytest.raises(LabError, match="run `dnstrace lab up --api`"):
            ask()


def test_a_recycled_pid_is_not_taken_for_the_labs() -> None:
    started = state.start_time(os.getpid())
    assert started is not None
    assert state.Process("me", os.getpid(), started).alive()
    assert not state.Process("not me", os.getpid(), started - 1).alive()


# --- the network ---


@pytest.mark.parametrize("server", SERVICE_IPS)
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_every_pod_is_answered_through_the_service(lab: Lab, server: str, transport: str) -> None:
    answers = {pod: dig(lab, pod, transport, f"@{server}", "www.example.com") for pod in CLIENTS}
    assert answers == dict.fromkeys(CLIENTS, WWW)


def test_pods_reach_pods_of_the_other_node(lab: Lab) -> None:
    near, far = lab.dns_pods
    for client, server in (("sre/web-0", far), ("sre/worker-0", near)):
        for address in (server.ipv4, server.ipv6):
            assert dig(lab, client, f"@{address}", "www.example.com") == WWW


def test_both_replicas_get_queries(lab: Lab) -> None:
    names = [fresh_name() for _ in range(40)]
    for name in names:
        dig(lab, "sre/web-0", name)
    seen = {node: log_text(lab, node) for node in ("node1", "node2")}
    counts = {node: sum(name in text for name in names) for node, text in seen.items()}
    assert sum(counts.values()) == len(names)
    assert all(counts.values())


def test_conntrack_shows_the_way_through_the_service(lab: Lab) -> None:
    dig(lab, "sre/web-0", "www.example.com")
    entries = lab.node_exec("node1", ["conntrack", "-L", "-p", "udp", "-d", SERVICE_IPS[0]]).stdout
    backends = "|".join(pod.ipv4 for pod in lab.dns_pods)
    assert re.search(rf"src=10\.244\.1\.10 dst=10\.96\.0\.10 .*src=({backends}) ", entries)


def test_a_pod_on_the_host_network_is_masqueraded(lab: Lab) -> None:
    """What comes from the node itself reaches the servers with an address of the node's."""
    names = [fresh_name() for _ in range(20)]
    for name in names:
        dig(lab, "sre/host-agent", name)
    clients = {}
    for node in ("node1", "node2"):
        for line in log_text(lab, node).splitlines():
            if any(name in line for name in names):
                clients[node] = line.split()[1].rpartition(":")[0]
    assert clients == {"node1": "10.244.1.1", "node2": "172.18.0.2"}


def test_queries_leave_the_cluster_with_the_nodes_address(lab: Lab) -> None:
    name = fresh_name()
    dig(lab, "sre/web-0", name)
    line = next(line for line in log_text(lab, "upstream").splitlines() if name in line)
    assert re.match(r"\[INFO\] 172\.18\.0\.[23]:", line)


def test_uplinks_look_like_network_cards(lab: Lab) -> None:
    """A tracer must not take a node's uplink for one of its pods' veths."""
    for node in topology.NODES:
        shown = lab.node_exec(node.name, ["ip", "-d", "-j", "link", "show", "eth0"]).stdout
        link: dict[str, Any] = json.loads(shown)[0]
        assert link["linkinfo"]["info_kind"] != "veth"


def test_overlay_carries_what_goes_between_the_nodes() -> None:
    with Lab(overlay=True) as lab:
        before = packets(lab)
        far = lab.dns_pods[1]
        for address in (far.ipv4, far.ipv6):
            assert dig(lab, "sre/web-0", f"@{address}", "www.example.com") == WWW
            assert dig(lab, "sre/web-0", "+tcp", f"@{address}", "big.example.com", "TXT")
        for pod in CLIENTS:
            assert dig(lab, pod, "www.example.com") == WWW
        assert packets(lab) >= before + 4


def packets(lab: Lab) -> int:
    """Packets that node1 has sent into the overlay."""
    argv = ["ip", "-s", "-j", "link", "show", "flannel.1"]
    link: dict[str, Any] = json.loads(lab.node_exec("node1", argv).stdout)[0]
    return int(link["stats64"]["tx"]["packets"])


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_services_work_with_either_iptables(variant: str) -> None:
    probe = ["unshare", "--net", f"iptables-{variant}", "-t", "nat", "-L"]
    if subprocess.run(probe, check=False, capture_output=True).returncode != 0:
        pytest.skip(f"this kernel has no iptables-{variant}: enable it, or test on one that has")
    with Lab(iptables=variant) as lab:
        assert dig(lab, "sre/web-0", "www.example.com") == WWW
        assert dig(lab, "sre/web-0", f"@{SERVICE_IPS[1]}", "www.example.com") == WWW


def test_chains_are_named_as_on_real_clusters() -> None:
    """The names that kube-proxy gives to the DNS service's chains everywhere."""
    rules = services.restore_input(topology.SERVICES, 4)
    assert "KUBE-SVC-TCOU7JCQXEZGVUNU" in rules  # kube-system/kube-dns:dns
    assert "KUBE-SVC-ERIFXISQEP7F7OF4" in rules  # kube-system/kube-dns:dns-tcp
    assert "--probability 0.50000000000 " in rules


# --- the name servers ---

ANSWERS = [
    ("kubernetes.default.svc.cluster.local", "A", "10.96.0.1"),
    ("kube-dns.kube-system.svc.cluster.local", "A", "10.96.0.10"),
    ("kube-dns.kube-system.svc.cluster.local", "AAAA", "fd00:10:96::a"),
    ("web.sre.svc.cluster.local", "A", "10.96.11.10"),
    ("10-244-1-11.api.sre.svc.cluster.local", "A", "10.244.1.11"),
    (
        "_dns._udp.kube-dns.kube-system.svc.cluster.local",
        "SRV",
        "0 100 53 kube-dns.kube-system.svc.cluster.local.",
    ),
    ("10.0.96.10.in-addr.arpa", "PTR", "kube-dns.kube-system.svc.cluster.local."),
    ("10.2.244.10.in-addr.arpa", "PTR", "10-244-2-10.worker.sre.svc.cluster.local."),
    ("www.example.com", "AAAA", "2606:2800:220:1:248:1893:25c8:1946"),
    (
        "alias.example.com",
        "A",
        f"chain1.example.com.\nchain2.example.com.\nwww.example.com.\n{WWW}",
    ),
    ("www.li-rui.top", "A", "li-rui.top.\n203.0.113.10"),
    ("ycwu314.top", "A", "203.0.113.11"),
    ("anything.bench.example.com", "A", "198.51.100.1"),
]


@pytest.mark.parametrize("resolver", ["coredns", "unbound"])
def test_servers_know_their_zones(resolver: str) -> None:
    with Lab(resolver=resolver) as lab:
        answers = [(name, kind, dig(lab, "sre/web-0", name, kind)) for name, kind, _ in ANSWERS]
        nowhere = ["nowhere.sre.svc.cluster.local", "nowhere.example.com", "nowhere.example.org"]
        codes = {name: rcode(lab, name) for name in nowhere}
    assert answers == ANSWERS
    assert codes == dict.fromkeys(nowhere, "NXDOMAIN")


def rcode(lab: Lab, name: str) -> str:
    found = re.search(r"status: (\w+)", lab.run("sre/web-0", ["dig", "+tries=1", name]).stdout)
    return found.group(1) if found else "none"


def test_outside_can_be_slow_silent_and_failing(lab: Lab) -> None:
    assert rcode(lab, "servfail.example.com") == "SERVFAIL"
    assert rcode(lab, "refused.example.com") == "REFUSED"
    # Without -u, dig reads a clock that is up to a tick (4 ms) behind.
    shown = lab.run("sre/web-0", ["dig", "-u", "slow.example.com"]).stdout
    took_us = re.search(r"Query time: (\d+) usec", shown)
    assert took_us is not None
    assert 300_000 <= int(took_us.group(1)) < 3_000_000
    silent = lab.run("sre/web-0", ["dig", "+tries=1", "+time=1", "lost.example.com"])
    assert "timed out" in silent.stdout


def test_a_big_answer_is_truncated_and_comes_again_over_tcp(lab: Lab) -> None:
    argv = ["dig", "+ignore", "big.example.com", "TXT"]
    assert " tc " in lab.run("sre/web-0", argv).stdout
    whole = lab.run("sre/web-0", ["dig", "big.example.com", "TXT"]).stdout
    assert "(TCP)" in whole
    size = re.search(r"MSG SIZE +rcvd: (\d+)", whole)
    assert size is not None
    assert 4000 < int(size.group(1)) < 4200


def test_search_list_is_expanded_before_the_name_itself(lab: Lab) -> None:
    """ndots:5 makes three names out of one before it, each for both address families."""
    assert "203.0.113.10" in lab.run("sre/web-0", ["getent", "ahosts", "www.li-rui.top"]).stdout
    logs = [log_text(lab, node) for node in ("node1", "node2")]
    asked = re.findall(r'"(A|AAAA) IN (www\.li-rui\.top\S*) udp', "".join(logs))
    searched = ["sre.svc.cluster.local.", "svc.cluster.local.", "cluster.local.", ""]
    wanted = {(kind, f"www.li-rui.top.{rest}") for kind in ("A", "AAAA") for rest in searched}
    assert set(asked) == wanted


def test_quiet_servers_write_no_queries() -> None:
    with Lab(quiet_servers=True) as lab:
        name = fresh_name()
        assert dig(lab, "sre/web-0", name)
        logs = [log_text(lab, server) for server in ("node1", "node2", "upstream")]
    assert name not in "".join(logs)


# --- inside the pods ---


def test_a_command_is_in_its_pod_from_its_first_moment(lab: Lab) -> None:
    for pod in lab.pods:
        shown = lab.run(pod.full_name, ["cat", "/proc/self/cgroup"]).stdout
        assert f"0::/{pod.cgroup}\n" in shown
        netns = lab.run(pod.full_name, ["readlink", "/proc/self/ns/net"]).stdout
        assert netns == f"net:[{pod.netns}]\n"


def test_a_command_keeps_pid_output_and_exit_status(lab: Lab) -> None:
    script = 'echo "$$ $1"; exit 7'
    argv = ["sh", "-c", script, "sh", "a b"]
    with lab.popen("sre/worker-0", argv, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate()
    assert output == f"{process.pid} a b\n"
    assert process.returncode == 7


def test_a_thousand_commands_are_cheap(lab: Lab) -> None:
    """Beside what it takes this machine to enter a namespace at all."""
    plain = ["nsenter", "--net=/proc/self/ns/net", "--", "true"]
    began = time.monotonic()
    for _ in range(100):
        subprocess.run(plain, check=True, capture_output=True)
    entered = time.monotonic()
    for _ in range(1000):
        lab.run("sre/web-0", ["true"], check=True)
    assert time.monotonic() - entered < max(30, 40 * (entered - began))


def test_each_pod_has_its_own_resolv_conf(lab: Lab) -> None:
    for pod in lab.pods:
        content = Path(f"/proc/{pod.pid}/root/etc/resolv.conf").read_text()
        if pod.container == "coredns":
            assert content == "nameserver 172.18.0.53\n"
        else:
            search = f"search {pod.namespace}.svc.cluster.local svc.cluster.local cluster.local\n"
            assert content == search + "nameserver 10.96.0.10\noptions ndots:5\n"


# A lab of its own, seen by nobody else, where /run is mounted noexec and resolv.conf is a link.
ODD_HOST = """
set -e
mount -t tmpfs -o noexec,mode=755 tmpfs /run
cp -a /etc /run/etc
rm /run/etc/resolv.conf
echo nameserver 127.0.0.53 > /run/stub-resolv.conf
ln -s /run/stub-resolv.conf /run/etc/resolv.conf
mount --bind /run/etc /etc
{lab} up
{lab} run cat /etc/resolv.conf
{lab} run dig +short www.example.com
{lab} down
cat /etc/resolv.conf
"""


@pytest.mark.parametrize("resolver", ["coredns", "unbound"])
def test_up_on_a_host_with_a_linked_resolv_conf_and_noexec_run(
    resolver: str, project: Path
) -> None:
    Lab().down()
    script = ODD_HOST.format(lab=" ".join(lab_command())).replace(
        " up\n", f" up --resolver {resolver}\n"
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    result = subprocess.run(argv, check=False, cwd=project, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "search sre.svc.cluster.local svc.cluster.local cluster.local",
        "nameserver 10.96.0.10",
        "options ndots:5",
        WWW,
        "nameserver 127.0.0.53",
    ], result.stderr


def test_a_host_without_cgroup2_gets_one_for_as_long_as_the_lab_is_up(project: Path) -> None:
    Lab().down()
    mount = cgroups.find_mount(Path("/proc/self/mountinfo").read_text())
    up, run, down = (" ".join(lab_command(*words)) for words in (["up"], ["run"], ["down"]))
    script = f"set -e; umount {mount}; {up}; {run} cat /proc/self/cgroup; {down}; cat /proc/mounts"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    result = subprocess.run(argv, check=False, cwd=project, capture_output=True, text=True)
    web = next(pod for pod in topology.PODS if pod.full_name == "sre/web-0")
    assert f"0::/{cgroups.PARENT}/{web.cgroup}\n" in result.stdout, result.stderr
    assert " cgroup2 " not in result.stdout


def test_a_command_dies_of_a_closed_pipe_as_usual(project: Path, lab: Lab) -> None:
    """Python ignores SIGPIPE; what it becomes must not."""
    script = " ".join(lab_command("run", "yes")) + " | head -n 1"
    result = subprocess.run(
        ["sh", "-c", script], check=False, cwd=project, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("y\n", "")
    assert lab.up() is False


# --- what it tells ---


def test_pods_file_describes_what_runs(lab: Lab) -> None:
    content = json.loads(lab.pods_file.read_text())
    described = {f"{pod['namespace']}/{pod['name']}": pod for pod in content["pods"]}
    for pod in lab.pods:
        entry = described.pop(pod.full_name)
        assert entry["ips"] == [pod.ipv4, pod.ipv6]
        assert entry["netns"] == Path(f"/proc/{pod.pid}/ns/net").stat().st_ino
        assert entry["containers"] == [
            {"name": pod.container, "id": pod.container_id, "cgroup": pod.cgroup}
        ]
        procs = lab.cgroup_mount / pod.cgroup / "cgroup.procs"
        assert str(pod.pid) in procs.read_text().split()
        assert pod.cgroup_id == (lab.cgroup_mount / pod.cgroup).stat().st_ino
    assert described == {}
    dns = next(service for service in content["services"] if service["name"] == "kube-dns")
    assert dns == {
        "namespace": "kube-system",
        "name": "kube-dns",
        "ips": ["10.96.0.10", "fd00:10:96::a"],
        "ports": [53],
        "target_ports": [53],
        "endpoints": ["10.244.1.2", "fd00:10:244:1::2", "10.244.2.2", "fd00:10:244:2::2"],
    }
    assert [node["name"] for node in content["nodes"]] == ["node1", "node2"]


def test_pods_file_has_the_port_that_the_replicas_listen_on() -> None:
    with Lab(dns_port=5353) as lab:
        assert Identities(pods_file.load(lab.pods_file), None).dns_ports() == (53, 5353)


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        ("31 23 0:28 / /sys rw - cgroup2 none rw", "/sys"),
        ("31 23 0:28 / /sys rw shared:9 master:1 - cgroup2 cgroup2 rw", "/sys"),
        ("31 23 0:28 /part /sys rw - cgroup2 none rw", None),
        ("31 23 0:28 / /sys rw - cgroup none rw,cpu", None),
        ("31 23 0:28 / /nowhere rw - cgroup2 none rw", None),
        ("", None),
    ],
)
def test_cgroup2_is_found_wherever_it_is_mounted(mountinfo: str, found: str | None) -> None:
    assert cgroups.find_mount(mountinfo) == (Path(found) if found else None)


def run_cli(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(arguments))


def test_failures_are_one_line_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    Lab().down()
    assert run_cli("run", "true") == 1
    assert capsys.readouterr().err == "dnstrace: the lab is not up: run `dnstrace lab up`\n"
    assert run_cli("run", "--pod", "sre/nobody", "true") == 1
    assert capsys.readouterr().err.startswith("dnstrace: no pod sre/nobody: there are ")
    assert run_cli("status") == 1


@pytest.mark.parametrize("action", [["up"], ["down"], ["run", "true"]], ids=" ".join)
def test_who_is_not_root_is_told_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run_cli(*action) == 3
    said = "dnstrace: the lab makes network namespaces: run it as root\n"
    assert capsys.readouterr().err == said


def test_a_missing_tool_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "find", lambda tool: None if "iptables" in tool else tool)
    assert run_cli("up") == 3
    said = "dnstrace: the lab needs iptables-restore: apt install iptables\n"
    assert capsys.readouterr().err == said


def test_a_tool_that_fails_is_quoted(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"`ip link show nowhere` failed: Device .* does not exist"):
        commands.run(["ip", "link", "show", "nowhere"])
    assert enter("sre/web-0")[-1].endswith("sre_web-0")
    assert lab.state.served_by == "coredns"
