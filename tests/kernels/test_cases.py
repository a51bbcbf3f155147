# SPDX-License-Identifier: Apache-2.0
"""The matrix of one kernel: every case with every set of hooks, over the same traffic.

On a kernel with kprobes both sets trace side by side, and what they say is compared. Run as root;
`make test-kernels` runs it on stock kernels, `make test` on this machine's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.counting import running
from tests.kernels import clients, losses, messages, services
from tests.kernels.clients import epoch_ns
from tests.kernels.test_degrade import NO_CGROUP2, doctor, hidden
from tests.kernels.world import HOOK_SETS, Case, Check, NotOffered, Seen, World
from tests.tracing import (
    DNSTRACE,
    Trace,
    capturing,
    our_links,
    our_programs,
    soon_gone,
    tracing,
)
from tracer.kernel import kprobes
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

CASES = [*clients.CASES, *services.CASES, *losses.CASES, *messages.CASES]
WATCHED = ("sre/web-0", "sre/worker-0")
TIMEOUT_S = 5
WITH_CLSACT = [sys.executable, "-m", "tests.kernels.with_clsact"]


@dataclass
class Run:
    """What became of all traffic."""

    world: World
    checks: dict[str, Check] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    filters: dict[str, str] = field(default_factory=dict)  # `tc filter show` by hook set
    links: dict[str, int] = field(default_factory=dict)  # how many BPF links a set added


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """All cases' traffic, made while a tracer per set of hooks watches."""
    tmp = tmp_path_factory.mktemp("kernels")
    world = new_world(tmp)
    done = Run(world)
    try:
        with contextlib.ExitStack() as watching:
            for pod in (*WATCHED, *(pod.full_name for pod in world.lab.dns_pods)):
                world.pcaps[pod] = watching.enter_context(capturing(world.lab, pod, tmp))
            trace_traffic(done)
        yield done
    finally:
        world.lab.down()
        keep_evidence(tmp)


def keep_evidence(tmp: Path) -> None:
    """Captures and traces, where whoever runs this wants to look at them."""
    kept = os.environ.get("DNSTRACE_EVIDENCE")
    if kept:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(tmp, kept)


def new_world(tmp: Path) -> World:
    """The lab, with a variant of iptables per node where the kernel has both."""
    legacy = ["unshare", "--net", "iptables-legacy", "-t", "nat", "-L"]
    refused = subprocess.run(legacy, capture_output=True, check=False).returncode
    lab = Lab(iptables="nft" if refused else "both")
    lab.up()
    return World(lab, tmp, {"node1": "nft"} if refused else {"node1": "nft", "node2": "legacy"})


def trace_traffic(done: Run) -> None:
    sets = [hooks for hooks in HOOK_SETS if hooks != "kprobe" or kprobes.available()]
    arguments = ["--pods", str(done.world.lab.pods_file), "--namespace", "sre"]
    arguments += ["--timeout", f"{TIMEOUT_S}s", "--duration", "30m"]
    with contextlib.ExitStack() as stack:
        tracers = {}
        for hooks in sets:
            before = our_links()
            # Side by side, one of the two shows the devices' other way.
            command = WITH_CLSACT if hooks != sets[0] else None
            tracers[hooks] = stack.enter_context(
                tracing(*arguments, "--hooks", hooks, tmp_path=done.world.tmp, command=command)
            )
            done.links[hooks] = our_links() - before
            done.filters[hooks] = tc_filters(done.world)
        for case in CASES:
            try:
                done.checks[case.name] = case.traffic(done.world)
            except Exception as error:  # noqa: BLE001 - told by the test of that case
                done.failed[case.name] = error
        time.sleep(TIMEOUT_S + 1.5)
        for hooks, tracer in tracers.items():
            done.seen[hooks] = Seen(hooks, tracer.stop(90))


def tc_filters(world: World) -> str:
    veth = world.lab.pod("sre/web-0").veth
    return "".join(
        world.node("node1", f"tc filter show dev {veth} {way}") for way in ("ingress", "egress")
    )


@pytest.mark.parametrize("hooks", HOOK_SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_case(run: Run, hooks: str, case: Case) -> None:
    """What the tracer says of the case's traffic is what independent witnesses say."""
    seen = offered(run, hooks)
    error = run.failed.get(case.name)
    if isinstance(error, NotOffered):
        pytest.skip(f"not offered by this kernel: {error}")
    if error:
        raise error
    run.checks[case.name](seen)


def offered(run: Run, hooks: str) -> Seen:
    if hooks not in run.seen:
        pytest.skip("not offered by this kernel: no kprobes (CONFIG_KPROBE_EVENTS)")
    return run.seen[hooks]


@pytest.mark.parametrize("hooks", HOOK_SETS)
def test_nothing_lost(run: Run, hooks: str) -> None:
    """Over all cases, no record, hop or device."""
    trace = offered(run, hooks).trace
    lost = {kind: n for kind, n in trace.summary["lost"].items() if n}
    assert lost.keys() <= {"filtered", "undecodable"}
    assert trace.summary["transactions"] == len(trace.transactions)


def test_both_sets_of_hooks_agree(run: Run, record_property: Callable[[str, object], None]) -> None:
    """The same transactions with the same fates, but for answers that no process ever took."""
    offered(run, "kprobe")
    kprobe, tracepoint = (by_key(run.seen[hooks].trace) for hooks in HOOK_SETS)
    assert kprobe.keys() == tracepoint.keys()
    sends_ns, receives_ns = [], []
    for key, one in kprobe.items():
        other = tracepoint[key]
        if is_never_taken(one) and other["status"] == "answered":
            # The process is gone or waits no more; cgroup hooks see it reach the socket.
            continue
        assert what_happened(one) == what_happened(other), key
        if one["latency_ns"] is not None:
            later_ns = epoch_ns(one["time"]) - epoch_ns(other["time"])
            sends_ns.append(later_ns)
            receives_ns.append(later_ns + one["latency_ns"] - other["latency_ns"])
    assert statistics.median(sends_ns) < 0
    assert statistics.median(receives_ns) > 0
    record_property("transactions that both sets of hooks saw", len(kprobe))
    record_property("sends earlier by kprobe, median in us", -statistics.median(sends_ns) / 1e3)
    record_property("receives later by kprobe, median in us", statistics.median(receives_ns) / 1e3)


def is_never_taken(t: dict[str, Any]) -> bool:
    """The answer was dropped with the socket that it had reached, or found none any more."""
    last = t["hops"][-1]
    return (t["status"], last["direction"], last["kind"], t["client"]["comm"]) == (
        "dropped", "response", "drop", "python",
    )  # fmt: skip


Key = tuple[int, str | None, str | None, int, int]


def by_key(trace: Trace) -> dict[Key, dict[str, Any]]:
    keyed = {
        (t["id"], t["name"], t["type"], t["client"]["port"], t["attempt"]): t
        for t in trace.transactions
    }
    assert len(keyed) == len(trace.transactions)
    return keyed


def what_happened(t: dict[str, Any]) -> dict[str, Any]:
    """All but times, and hops that a socket hook of one kind does not see."""
    told = {
        key: t[key] for key in ("status", "rcode", "server", "backend", "answers", "response_len")
    }
    told["client"] = t["client"]
    if t["name"] and t["name"].endswith(messages.NEW_DEVICE):
        return told  # each tracer finds it in its own time
    told["devices"] = [
        (h["kind"], h["direction"], h["ifname"], h["owner"])
        for h in t["hops"]
        if h["kind"] in ("ingress", "egress")
    ]
    # Sends of cgroup programs are behind the node's own NAT, those of kprobes before it.
    told["nat"] = [h["nat"] for h in t["hops"] if h["nat"]]
    return told


def test_devices_by_tcx(run: Run) -> None:
    """Links on the devices, none of our filters in the qdisc."""
    hooks = next(iter(run.seen))
    if "dnstrace-" in run.filters[hooks]:
        pytest.skip("not offered by this kernel: TCX links (before 6.6)")
    assert run.links[hooks] > 2 * len(run.world.lab.pods)


def test_devices_by_clsact(run: Run) -> None:
    """A filter of ours each way."""
    if len(run.seen) == 1 and "dnstrace-" not in run.filters["tracepoint"]:
        pytest.skip("not offered by this kernel: one tracer only, and that has TCX")
    names = [line for line in run.filters["tracepoint"].splitlines() if "dnstrace-" in line]
    assert len(names) >= 2


@pytest.mark.parametrize("hooks", HOOK_SETS)
def test_counted_in_the_kernel(run: Run, hooks: str) -> None:
    """Continuous mode counts each query once, with the stages that this set of hooks sees."""
    offered(run, hooks)
    world = run.world
    with running("--pods", str(world.lab.pods_file), "-n", "sre", "--hooks", hooks) as counting:
        for number in range(6):
            world.dig("sre/web-0", f"c{number}.bench.example.com.")
        counting.wait_for(6)
        found = counting.scrape()
        ended = counting.stop()
    assert ended["transactions"] == 6
    assert not [name for name in ended if name.startswith("lost")]
    counted = found["dnstrace_transactions_total"]
    assert sum(n for k, n in counted if k["pod"] == "web-0") == 6
    assert {k["backend"].split("/")[0] for k, _ in counted} == {"kube-system"}
    stages: Counter[str] = Counter()
    for labels, amount in found["dnstrace_stage_seconds_count"]:
        stages[labels["stage"]] += int(amount)
    # By the cgroup hooks, a send may come so late that no time passes before the device.
    assert 0 < stages.pop("application_send") <= 6
    for stage in ("node", "server_queue", "server", "return", "wake_up"):
        assert stages[stage] == 6, stages


def test_no_filters_left(run: Run) -> None:
    """After the end, no qdisc, filter or program of ours."""
    veth = run.world.lab.pod("sre/web-0").veth
    assert "clsact" not in run.world.node("node1", f"tc qdisc show dev {veth}")
    assert soon_gone(our_links)
    assert soon_gone(our_programs)


def test_cgroup_v1_alone(run: Run, tmp_path: Path) -> None:
    """Pods are told by their network namespaces, containers not at all."""
    if "kprobe" not in run.seen:
        pytest.skip("not offered by this kernel: no kprobes (CONFIG_KPROBE_EVENTS)")
    world = run.world
    mounts = f"{NO_CGROUP2}; mount -t cgroup -o none,name=dnstrace none /sys/fs/cgroup"
    arguments = ["--pods", str(world.lab.pods_file), "--namespace", "sre"]
    command = hidden(mounts, *DNSTRACE)
    with tracing(*arguments, tmp_path=tmp_path, command=command) as tracer:
        world.dig("sre/web-0", "v1.bench.example.com.")
        world.dig("default/shop-0", "v1.bench.example.com.")
        world.dig("sre/host-agent", f"@{clients.SERVICE}", "v1.bench.example.com.")
        time.sleep(0.5)
        trace = tracer.stop(90)
    (t,) = trace.transactions
    assert (t["client"]["pod"], t["client"]["container"]) == ("web-0", None)
    # What cannot be told from its node is not traced, and that is said.
    assert "sre/host-agent: not traced" in trace.stderr


def test_killed_tracer_is_cleaned_up_after(run: Run, tmp_path: Path) -> None:
    """kill -9: links are gone at once, filters at the next start; a filter of others stays."""
    world = run.world
    if len(run.seen) > 1 and "dnstrace-" not in run.filters["kprobe"]:
        pytest.skip("not offered by this kernel: with TCX, no filters could be left")
    veth = world.lab.pod("sre/web-0").veth
    world.node("node1", f"tc qdisc add dev {veth} clsact")
    world.node(
        "node1",
        f"tc filter add dev {veth} ingress protocol ip prio 7 u32 match u32 0 0 flowid 1:1",
    )
    with tracing("--no-kubernetes", tmp_path=tmp_path, command=WITH_CLSACT) as tracer:
        tracer.process.kill()
        tracer.process.wait()
    killed_left = tc_filters(world)
    links_gone = soon_gone(our_links)
    # Whatever comes of the rest, nothing may stay on this machine's own devices.
    status, said = doctor([], WITH_CLSACT)
    left = tc_filters(world)
    world.node("node1", f"tc qdisc del dev {veth} clsact")
    assert links_gone
    assert killed_left.count("dnstrace-") == 2
    assert status == 0
    assert said.count("seen at send, receive, send, receive; answered in") == 2
    assert "dnstrace-" not in left
    assert "pref 7 u32" in left
