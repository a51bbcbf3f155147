# SPDX-License-Identifier: Apache-2.0
"""`dnstrace continuous` in the lab, against dnsperf's counts and tcpdump's times."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pytest

from tests.asking import dig
from tests.counting import Run, running
from tests.test_cluster_api import eventually
from tests.test_recorder import HOSTILE
from tests.tracing import capturing, exchanges, our_links, our_programs
from tracer.kernel.limits import CONTINUOUS
from tracer.lab import Lab
from tracer.stages import ERROR, STAGE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("root")

SERVICE = "10.96.0.10"
CLIENT = "sre/web-0"
MAPS_MAX = 16 << 20
KEEP_ALL = ("--sample", "1/1", "--cpu-budget", "100%")


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    Lab().down()


@pytest.fixture
def lab() -> Lab:
    lab = Lab(quiet_servers=True)
    lab.up()
    return lab


def dnsperf(lab: Lab, tmp_path: Path, questions: str, *options: str, pod: str = CLIENT) -> tuple[int, int]:  # fmt: skip
    """(sent, completed)."""
    queries = tmp_path / "queries"
    queries.write_text(questions)
    argv = ["dnsperf", "-s", SERVICE, "-d", str(queries), "-t", "5", *options]
    done = lab.run(pod, argv, check=True)
    sent, completed = (
        int(re.search(rf"Queries {what}:\s+(\d+)", done.stdout)[1])  # type: ignore[index]
        for what in ("sent", "completed")
    )
    return sent, completed


def query(sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as database:
        return database.execute(sql).fetchall()


def counted(run: Run, pod: str) -> list[tuple[dict[str, str], float]]:
    """(labels, number) of a pod's transactions."""
    found = run.scrape().get("dnstrace_transactions_total", [])
    return [(labels, n) for labels, n in found if n and labels["pod"] == pod]


def has_counted(run: Run, pod: str, number: int) -> bool:
    return sum(n for _, n in counted(run, pod)) >= number


def slow_name() -> str:
    """A name that no cache has; the lab's resolver takes 300 ms for each."""
    return f"u{time.monotonic_ns()}.slow.example.com"


MIXTURE = (
    "kubernetes.default.svc.cluster.local A\nkubernetes.default.svc.cluster.local AAAA\n"
    "nothing.sre.svc.cluster.local A\nwww.example.com A\n"
)


def test_all_is_counted_once_as_dnsperf_counts(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    pods = ["--pods", str(lab.pods_file)]
    with running(*pods, "--record", str(record), "-n", "sre") as run:
        sent, completed = dnsperf(lab, tmp_path, MIXTURE, "-n", "3000", "-Q", "3000", "-c", "20")
        assert sent == completed == 12_000
        run.wait_for(sent)
        found = run.scrape()
        ended = run.stop()
    assert ended["transactions"] == sent
    assert not [name for name in ended if name.startswith(("lost", "unmatched"))]
    mine = [(k, n) for k, n in found["dnstrace_transactions_total"] if k["pod"] == "web-0"]
    assert sum(n for _, n in mine) == sent
    assert {k["status"] for k, _ in mine} == {"answered"}
    assert {k["backend"].split("/")[0] for k, _ in mine} == {"kube-system"}
    assert {k["server"] for k, _ in mine} == {"kube-system/kube-dns"}
    assert sum(n for k, n in mine if k["rcode"] == "NXDOMAIN") == pytest.approx(sent / 4, abs=2)
    assert sum(n for k, n in mine if k["type"] == "AAAA") == pytest.approx(sent / 4, abs=2)
    latencies = found["dnstrace_latency_seconds_count"]
    assert sum(n for k, n in latencies if k["pod"] == "web-0") == sent
    infinite = [n for k, n in found["dnstrace_latency_seconds_bucket"] if k["le"] == "+Inf"]
    assert sum(infinite) == sent
    files = f"'{record}/histograms-*.parquet'"
    assert query(f"SELECT sum(count), sum(timed) FROM {files} WHERE stage = 'total'") == [
        (sent, sent)
    ]
    buckets = f"SELECT unnest(buckets).count AS n FROM {files} WHERE stage = 'total'"
    assert query(f"SELECT sum(n) FROM ({buckets})") == [(sent,)]
    coverage = query(
        f"SELECT sum(transactions), sum(recorded + not_kept + skipped) FROM '{record}/coverage-*.parquet'"
    )
    # Servers ask as well, which the filter leaves out of the counts, but not of what was decided.
    assert coverage[0][0] == sent
    assert coverage[0][1] >= sent


def test_stages_of_each_transaction_add_up_to_its_latency(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    with running("--pods", str(lab.pods_file), "--record", str(record), *KEEP_ALL) as run:
        sent, _ = dnsperf(lab, tmp_path, MIXTURE, "-n", "100", "-c", "4", "-Q", "500")
        run.wait_for(sent)
        run.stop()
    names = " + ".join(f'coalesce(stages."{name}", 0)' for name in STAGE_NAMES)
    found = query(
        f"SELECT count(*), count(*) FILTER ({names} = latency_ns), count(DISTINCT id) "
        f"FROM '{record}/transactions-*.parquet' WHERE client.pod = 'web-0'"
    )
    assert found[0][0] == found[0][1] == sent
    # What the kernel counted in stages is the same time as in the whole.
    times = query(
        f"SELECT stage = 'total', sum(sum_ns), sum(count) FROM '{record}/histograms-*.parquet' "
        "WHERE client_pod = 'web-0' GROUP BY 1 ORDER BY 1"
    )
    assert [(row[0], row[1]) for row in times] == [(False, times[1][1]), (True, times[1][1])]


def test_upstream_time_is_told_from_the_servers_own(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    with running(
        "--pods", str(lab.pods_file), "--record", str(record), "-n", "sre", *KEEP_ALL
    ) as run:
        for _ in range(5):
            dig(lab, CLIENT, slow_name(), "A", f"@{SERVICE}")
        run.wait_for(5)
        run.stop()
    times = query(
        f"SELECT stages.upstream / 1e6, stages.server / 1e6 FROM '{record}/transactions-*.parquet' "
        "WHERE client.pod = 'web-0'"
    )
    assert len(times) == 5
    # The least of what the lab's resolver takes is known, and how long a busy machine does is not.
    assert 295 < min(upstream for upstream, _ in times) < 400
    assert min(server for _, server in times) < 50
    sums = stage_sums(record, "client_pod = 'web-0'")
    assert sums["total"] >= sums["upstream"] + sums["server"] > 0


def stage_sums(record: Path, condition: str) -> dict[str, int]:
    """Nanoseconds in each stage."""
    return dict(
        query(
            f"SELECT stage, sum(sum_ns) FROM '{record}/histograms-*.parquet' "
            f"WHERE {condition} GROUP BY stage"
        )
    )


def test_wait_for_an_upstream_that_is_silent_is_upstream(lab: Lab, tmp_path: Path) -> None:
    """CoreDNS gives up after seconds, and says SERVFAIL."""
    record = tmp_path / "rec"
    budget = ("--cpu-budget", "100%")
    with running("--pods", str(lab.pods_file), "--record", str(record), *budget) as run:
        dig(lab, CLIENT, "silent.lost.example.com", "A", f"@{SERVICE}", "+time=9")
        run.wait_for(1)
        run.stop()
    sums = stage_sums(record, "NOT by_server AND client_pod = 'web-0'")
    assert sums["upstream"] > 3_000_000_000
    assert sums["server"] < 100_000_000
    ((kept, upstream, server, latency),) = query(
        "SELECT kept, stages.upstream, stages.server, latency_ns "
        f"FROM '{record}/transactions-*.parquet' WHERE NOT by_server AND client.pod = 'web-0'"
    )
    assert kept == "failed"
    assert upstream == sums["upstream"] // 1000 * 1000
    assert upstream + server < latency


ASK_AT_ONCE = """
import socket, struct, sys
address, name = sys.argv[1:]
labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(10)]
for number, one in enumerate(sockets):
    header = struct.pack("!6H", number, 0x100, 1, 0, 0, 0)
    one.sendto(header + labels + bytes([0, 0, 1, 0, 1]), (address, 53))
for one in sockets:
    one.recv(512)
"""


def test_many_that_wait_for_the_same_all_wait_upstream(lab: Lab, tmp_path: Path) -> None:
    """All have asked before the first is answered, so that none is answered from a cache."""
    record = tmp_path / "rec"
    replica = lab.dns_pods[0].ipv4
    with running("--pods", str(lab.pods_file), "--record", str(record), *KEEP_ALL) as run:
        lab.run(CLIENT, [sys.executable, "-c", ASK_AT_ONCE, replica, slow_name()], check=True)
        run.wait_for(10)
        run.stop()
    times = query(
        "SELECT latency_ns, stages.upstream, stages.server "
        f"FROM '{record}/transactions-*.parquet' WHERE NOT by_server AND client.pod = 'web-0'"
    )
    assert len(times) == 10
    for latency, upstream, server in times:
        assert latency > 290_000_000
        assert 5 * server < upstream < latency
    assert statistics.median(latency - upstream for latency, upstream, _ in times) < 60_000_000
    assert statistics.median(server for _, _, server in times) < 60_000_000


def test_times_and_percentiles_are_those_of_tcpdump(lab: Lab, tmp_path: Path) -> None:
    """Of the whole way between the client's device and back, which both see."""
    record = tmp_path / "rec"
    with (
        capturing(lab, CLIENT, tmp_path) as pcap,
        running("--pods", str(lab.pods_file), "--record", str(record), "-n", "sre", *KEEP_ALL) as run,
    ):  # fmt: skip
        sent, completed = dnsperf(lab, tmp_path, MIXTURE, "-l", "5", "-Q", "300", "-c", "4")
        run.wait_for(sent)
        run.stop()
    # Ids are used again: the transactions of one are in the order of their times.
    theirs = sorted(
        (e.id, e.port, e.name, e.type, e.query_s, e.latency_s * 1e9)
        for e in exchanges(pcap)
        if e.latency_s is not None
    )
    ours = sorted(
        query(
            f"SELECT id, client.port, name, type, time, latency_ns FROM '{record}/transactions-*.parquet' "
            "WHERE client.pod = 'web-0'"
        )
    )
    assert len(ours) == len(theirs) == completed == sent
    assert [row[:4] for row in ours] == [row[:4] for row in theirs]
    times = [row[5] for row in ours]
    longer = [time_ns - row[5] for time_ns, row in zip(times, theirs, strict=True)]
    # From socket to socket takes a little longer than from device to device; tcpdump tells microseconds.
    assert min(longer) >= -2000
    assert statistics.median(longer) < 60_000
    rows = query(
        f"SELECT unnest(buckets).lower_ns, unnest(buckets).upper_ns, unnest(buckets).count "
        f"FROM '{record}/histograms-*.parquet' WHERE stage = 'total' AND client_pod = 'web-0'"
    )
    values = np.concatenate(
        [np.full(count, 2 * low * high / (low + high)) for low, high, count in rows]
    )
    assert len(values) == sent
    for share in (0.5, 0.9, 0.99):
        exact = np.quantile(times, share, method="inverted_cdf")
        told = np.quantile(values, share, method="inverted_cdf")
        assert abs(told - exact) <= ERROR * exact, share


@pytest.mark.parametrize("how", ["timeout", "refused", "dropped", "tcp"])
def test_other_ends_are_counted_and_recorded(lab: Lab, tmp_path: Path, how: str) -> None:
    record = tmp_path / "rec"
    ask = {
        "timeout": ["+tries=1", "+time=1", "x.lost.example.com"],
        "refused": ["@10.244.1.11", "www.example.com"],
        "dropped": ["+tries=1", "+time=1", "@10.244.1.99", "www.example.com"],
        "tcp": ["+tcp", "www.example.com"],
    }[how]
    with running("--pods", str(lab.pods_file), "--record", str(record), "-n", "sre",
                 "--timeout", "2s", "--slower", "10s", *KEEP_ALL) as run:  # fmt: skip
        lab.run(CLIENT, ["dig", *ask])
        eventually(lambda: counted(run, "web-0"))
        time.sleep(1)  # for what must not be counted as well
        labels = [labels for labels, _ in counted(run, "web-0")]
        run.stop()
    recorded = query(
        f"SELECT status, protocol, kept FROM '{record}/transactions-*.parquet' "
        "WHERE client.pod = 'web-0'"
    )
    if how == "tcp":
        assert [(k["status"], k["protocol"]) for k in labels] == [("answered", "tcp")]
        assert recorded == [("answered", "tcp", "sample")]
        return
    statuses = {k["status"] for k in labels}
    assert statuses <= ({"timeout", "dropped"} if how in {"timeout", "dropped"} else {"refused"})
    assert statuses == {row[0] for row in recorded}
    assert {row[2] for row in recorded} == {"failed"}


def test_hostile_names_pass_through(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    with running("--pods", str(lab.pods_file), "--record", str(record), *KEEP_ALL) as run:
        for number, text in enumerate(HOSTILE[:4]):
            name = "".join(f"\\{byte:03d}" for byte in text.encode()[:60])
            dig(lab, CLIENT, f"{name}.h{number}.sre.svc.cluster.local", f"@{SERVICE}")
        run.wait_for(4)
        found = run.scrape()
        run.stop()
    assert found["dnstrace_transactions_total"]
    names = query(f"SELECT name FROM '{record}/transactions-*.parquet' WHERE client.pod = 'web-0'")
    assert len(names) >= 4
    assert all(name.isprintable() and name.isascii() for (name,) in names)


def test_top_names_are_those_that_were_asked_for_most(lab: Lab, tmp_path: Path) -> None:
    """One of four transactions leaves the kernel; nothing is recorded, and servers' queries are not in it."""
    questions = "often.example.com A\n" * 6 + "Seldom.example.com A\n" * 2 + "once.example.com A\n"
    top = ("--metrics-names", "2", "--sample", "1/4", "--cpu-budget", "100%")
    with running("--pods", str(lab.pods_file), "-n", "sre", *top) as run:
        sent, _ = dnsperf(lab, tmp_path, questions, "-n", "1000", "-Q", "3000", "-c", "20")
        run.wait_for(sent)
        found = run.scrape()["dnstrace_top_name_transactions_total"]
        run.stop()
    names = {k["name"]: n for k, n in found}
    assert names.keys() == {"often.example.com.", "seldom.example.com."}
    for name, share in (("often", 6 / 9), ("seldom", 2 / 9)):
        expected = sent * share
        # Each leaves with one chance in four, and then counts for four: a variance of three.
        near = pytest.approx(expected, abs=6 * math.sqrt(3 * expected))
        assert names[f"{name}.example.com."] == near


def test_kernel_tables_are_small_and_so_are_we(lab: Lab, tmp_path: Path) -> None:
    with running("--pods", str(lab.pods_file)) as run:
        dnsperf(lab, tmp_path, MIXTURE, "-l", "2", "-Q", "2000", "-c", "20")
        time.sleep(1)
        found = run.scrape()
        ids = set()
        for fd in os.listdir(f"/proc/{run.process.pid}/fdinfo"):
            with (
                suppress(FileNotFoundError),  # closed since
                open(f"/proc/{run.process.pid}/fdinfo/{fd}") as file,
            ):
                if m := re.search(r"^map_id:\s*(\d+)", file.read(), re.MULTILINE):
                    ids.add(int(m[1]))
        listed = json.loads(subprocess.check_output(["bpftool", "--json", "map", "list"]))
        size = sum(int(m["bytes_memlock"]) for m in listed if m["id"] in ids)
        run.stop()
    assert size <= MAPS_MAX
    assert found["dnstrace_resident_memory_bytes"][0][1] <= 64 << 20
    room = {k["table"]: n for k, n in found["dnstrace_table_capacity"]}
    assert room == {
        "transactions": CONTINUOUS.slots,
        "series": CONTINUOUS.series,
        "buckets": CONTINUOUS.buckets,
    }


def test_hangup_completes_a_recording(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    with running("--pods", str(lab.pods_file), "--record", str(record), *KEEP_ALL) as run:
        dig(lab, CLIENT, "www.example.com")
        run.wait_for(1)
        assert not list(record.glob("*.parquet"))
        run.process.send_signal(signal.SIGHUP)
        eventually(lambda: list(record.glob("transactions-*.parquet")))
        assert run.process.poll() is None
        run.stop()


def test_restarted_under_load_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    """A few of the restarts that `python -m bench.soak --restarts 100` makes."""
    queries = tmp_path / "queries"
    queries.write_text(MIXTURE)
    load = lab.popen(
        CLIENT, ["dnsperf", "-s", SERVICE, "-d", str(queries), "-l", "60", "-Q", "1000"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(is_nothing_loaded)
        for number in range(4):
            with running("--pods", str(lab.pods_file)) as run:
                if number % 2:
                    run.wait_for(1)
                    run.stop()
    finally:
        load.kill()
        load.wait()
    eventually(is_nothing_loaded)


def is_nothing_loaded() -> bool:
    """The kernel frees what a process had a little after that has ended."""
    return our_links() == 0 and our_programs() == []


def test_pods_that_come_and_go_are_counted_by_name_and_leave_no_growth(
    lab: Lab, tmp_path: Path
) -> None:
    """The short form of `python -m bench.soak`."""
    queries = tmp_path / "queries"
    queries.write_text(MIXTURE)
    load = lab.popen(
        CLIENT, ["dnsperf", "-s", SERVICE, "-d", str(queries), "-l", "120", "-Q", "500"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    rounds = 6
    try:
        with running("--pods", str(lab.pods_file)) as run:
            sizes = []
            for number in range(rounds):
                pod = lab.add_pod("soak", f"pod-{number}")
                for _ in range(3):  # the first of them at once
                    dig(lab, pod.full_name, "kubernetes.default.svc.cluster.local", f"@{SERVICE}")
                eventually(partial(has_counted, run, pod.name, 3))
                time.sleep(2.5)  # the file of pods is looked at every second
                lab.remove_pod(pod.full_name)
                sizes.append(run.scrape()["dnstrace_resident_memory_bytes"][0][1])
            time.sleep(5)
            found = run.scrape()
            ended = run.stop()
    finally:
        load.kill()
        load.wait()
    told = {k["pod"]: 0.0 for k, _ in found["dnstrace_transactions_total"]}
    for labels, count in found["dnstrace_transactions_total"]:
        told[labels["pod"]] += count * (labels["namespace"] == "soak")
    assert {pod: n for pod, n in told.items() if n} == {f"pod-{n}": 3 for n in range(rounds)}
    assert not [name for name in ended if name.startswith("lost") and name != "lost_filtered"]
    assert max(sizes[rounds // 2 :]) - max(sizes[: rounds // 2]) < 8 << 20


def test_port_that_is_taken_is_said(lab: Lab) -> None:
    with running("--pods", str(lab.pods_file)) as run:
        port = re.search(r":(\d+)/", run.url)
        assert port
        again = subprocess.run(
            [sys.executable, "-m", "tracer", "continuous", "--no-kubernetes",
             "--metrics", f"127.0.0.1:{port[1]}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 1
        assert "Address already in use; give another ADDR:PORT, or off" in again.stderr
        run.stop()
    assert math.isfinite(run.said[-1]["cpu_seconds"])
