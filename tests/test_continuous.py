# SPDX-License-Identifier: Apache-2.0
"""`dnstrace continuous` in the lab, against dnsperf's counts and tcpdump's times."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pytest

from tests.asking import dig
from tests.counting import running
from tests.test_recorder import HOSTILE
from tests.tracing import capturing, exchanges
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


MIXTURE = (
    "kubernetes.default.svc.cluster.local A\nkubernetes.default.svc.cluster.local AAAA\n"
    "nothing.sre.svc.cluster.local A\nwww.example.com A\n"
)


def test_all_is_counted_once_as_dnsperf_counts(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    pods = ["--pods", str(lab.pods_file)]
    with running(*pods, "--record", str(record), "-n", "sre") as run:
        sent, completed = dnsperf(lab, tmp_path, MIXTURE, "-l", "4", "-Q", "3000", "-c", "20")
        assert sent == completed > 10_000
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
    with running("--pods", str(lab.pods_file), "--record", str(record), "--sample", "1/1",
                 "--cpu-budget", "100%") as run:  # fmt: skip
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
    with running("--pods", str(lab.pods_file), "--record", str(record), "-n", "sre") as run:
        for number in range(5):
            dig(lab, CLIENT, f"u{number}.slow.example.com", "A", f"@{SERVICE}")
        run.wait_for(5)
        run.stop()
    stages = dict(
        query(
            f"SELECT stage, sum(sum_ns) / 1e6 / sum(count) FROM '{record}/histograms-*.parquet' "
            "WHERE client_pod = 'web-0' GROUP BY 1"
        )
    )
    # The lab's resolver takes 300 ms for this zone.
    assert 295 < stages["upstream"] < 400
    assert stages["server"] < 50
    assert stages["total"] >= stages["upstream"] + stages["server"]


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
    with running("--pods", str(lab.pods_file), "--record", str(record)) as run:
        dig(lab, CLIENT, "silent.lost.example.com", "A", f"@{SERVICE}", "+time=9")
        run.wait_for(1)
        run.stop()
    sums = stage_sums(record, "NOT by_server")
    assert sums["upstream"] > 3_000_000_000
    assert sums["server"] < 100_000_000
    ((kept, upstream, server, latency),) = query(
        "SELECT kept, stages.upstream, stages.server, latency_ns "
        f"FROM '{record}/transactions-*.parquet' WHERE NOT by_server"
    )
    assert kept == "failed"
    assert upstream == sums["upstream"] // 1000 * 1000
    assert upstream + server < latency


def test_many_that_wait_for_the_same_all_wait_upstream(lab: Lab, tmp_path: Path) -> None:
    record = tmp_path / "rec"
    replica = lab.dns_pods[0].ipv4
    with running("--pods", str(lab.pods_file), "--record", str(record)) as run:
        name = f"same-{time.monotonic_ns()}.slow.example.com"
        started = []
        for n in range(10):
            argv = ["dig", "+tries=1", "+time=9", f"@{replica}", name]
            pod = ("sre/web-0", "sre/api-0", "default/shop-0")[n % 3]
            started.append(lab.popen(pod, argv, stdout=subprocess.DEVNULL))
            time.sleep(0.02)
        for process in started:
            process.wait()
        run.wait_for(10)
        run.stop()
    latencies = query(
        "SELECT latency_ns, stages.upstream, stages.server "
        f"FROM '{record}/transactions-*.parquet' WHERE NOT by_server"
    )
    slow = [row for row in latencies if row[0] > 50_000_000]
    assert len(slow) >= 5
    for latency, upstream, server in slow:
        assert latency - 60_000_000 < upstream < latency
        assert server < 60_000_000


def test_percentiles_are_those_of_tcpdump(lab: Lab, tmp_path: Path) -> None:
    """Of the whole way between the client's device and back, which both see."""
    record = tmp_path / "rec"
    with (
        capturing(lab, CLIENT, tmp_path) as pcap,
        running("--pods", str(lab.pods_file), "--record", str(record), "-n", "sre") as run,
    ):
        sent, completed = dnsperf(lab, tmp_path, MIXTURE, "-l", "5", "-Q", "1000", "-c", "4")
        run.wait_for(sent)
        run.stop()
    seen = [e.latency_s * 1e9 for e in exchanges(pcap) if e.latency_s is not None]
    assert len(seen) == completed == sent
    rows = query(
        f"SELECT unnest(buckets).lower_ns, unnest(buckets).upper_ns, unnest(buckets).count "
        f"FROM '{record}/histograms-*.parquet' WHERE stage = 'total' AND client_pod = 'web-0'"
    )
    values = np.concatenate(
        [np.full(count, 2 * low * high / (low + high)) for low, high, count in rows]
    )
    assert len(values) == sent
    for share in (0.5, 0.9, 0.99):
        exact = np.quantile(seen, share, method="inverted_cdf")
        ours = np.quantile(values, share, method="inverted_cdf")
        # From socket to socket takes a little longer than from device to device.
        assert -ERROR * exact <= ours - exact <= ERROR * exact + 60_000, share


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
                 "--timeout", "2s", "--sample", "1/1") as run:  # fmt: skip
        lab.run(CLIENT, ["dig", *ask])
        time.sleep(3.5)
        found = run.scrape()
        run.stop()
    labels = [k for k, n in found["dnstrace_transactions_total"] if n and k["pod"] == "web-0"]
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
    with running("--pods", str(lab.pods_file), "--record", str(record), "--sample", "1/1") as run:
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
        sent, _ = dnsperf(lab, tmp_path, questions, "-l", "3", "-Q", "3000", "-c", "20")
        run.wait_for(sent)
        found = run.scrape()["dnstrace_top_name_transactions_total"]
        run.stop()
    names = {k["name"]: n for k, n in found}
    assert names.keys() == {"often.example.com.", "seldom.example.com."}
    assert names["often.example.com."] == pytest.approx(sent * 6 / 9, rel=0.1)
    assert names["seldom.example.com."] == pytest.approx(sent * 2 / 9, rel=0.15)


def test_kernel_tables_are_small_and_so_are_we(lab: Lab, tmp_path: Path) -> None:
    with running("--pods", str(lab.pods_file)) as run:
        dnsperf(lab, tmp_path, MIXTURE, "-l", "2", "-Q", "2000", "-c", "20")
        time.sleep(1)
        found = run.scrape()
        ids = set()
        for fd in os.listdir(f"/proc/{run.process.pid}/fdinfo"):
            with open(f"/proc/{run.process.pid}/fdinfo/{fd}") as file:
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
    with running("--pods", str(lab.pods_file), "--record", str(record), "--sample", "1/1") as run:
        dig(lab, CLIENT, "www.example.com")
        run.wait_for(1)
        assert not list(record.glob("*.parquet"))
        run.process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + 10
        while not list(record.glob("transactions-*.parquet")) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert list(record.glob("transactions-*.parquet"))
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
    before = leftovers()
    try:
        for number in range(4):
            with running("--pods", str(lab.pods_file)) as run:
                if number % 2:
                    run.wait_for(1)
                    run.stop()
    finally:
        load.kill()
        load.wait()
    time.sleep(1)
    assert leftovers() == before


def leftovers() -> tuple[int, int]:
    """How many programs and links of ours the kernel has."""
    programs = json.loads(subprocess.check_output(["bpftool", "--json", "prog", "list"]))
    ours = [p for p in programs if str(p.get("name", "")).startswith("dnstrace")]
    links = json.loads(subprocess.check_output(["bpftool", "--json", "link", "list"]) or b"[]")
    return len(ours), len(links)


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
