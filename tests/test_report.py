# SPDX-License-Identifier: Apache-2.0
"""Reports, against what is known of the transactions that were recorded."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pytest
from rich.cells import cell_len

from tests.recordings import START_NS, Made, record
from tests.test_recorder import HOSTILE
from tracer.continuous.recorder import Recorder
from tracer.filters import Filters
from tracer.report.export import to_json
from tracer.report.figures import SHARES
from tracer.report.recordings import RecordingError
from tracer.report.report import HEAT_COLUMNS, make
from tracer.report.text import render
from tracer.report.where import NotRecorded
from tracer.stages import ERROR, STAGE_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DICE = random.Random(11)  # noqa: S311 - no secret
MANY = [
    Made(
        time_ns=START_NS + DICE.randrange(8 * 10**9),
        latency_ns=round(DICE.lognormvariate(13, 1.2)),
        name=f"n{DICE.randrange(6)}.example.com.",
        pod=DICE.choice(["web-0", "web-1", "api-0"]),
        namespace=DICE.choice(["sre", "default"]),
        backend=DICE.choice(["coredns-1", "coredns-2"]),
        type=DICE.choice(["A", "AAAA"]),
        rcode=DICE.choice(["NOERROR", "NOERROR", "NXDOMAIN", "SERVFAIL"]),
        comm=DICE.choice(["dig", "nginx"]),
    )
    for _ in range(3000)
]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    record(directory, MANY)
    return directory


def exact(values: list[int], share: float) -> int:
    return sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]


def check_times(times: Any, values: list[int]) -> None:
    assert times.count == len(values)
    assert times.sum_ns == sum(values)
    assert times.max_ns == max(values)
    for share, found in zip(SHARES, times.quantiles, strict=True):
        if found is None:
            assert len(values) < {0.99: 100, 0.999: 1000}[share]
            continue
        true = exact(values, share)
        assert abs(found - true) <= math.ceil(true * ERROR), share


def latencies(made: list[Made]) -> list[int]:
    return [one.latency_ns for one in made if one.latency_ns is not None]


def test_percentiles_are_the_exact_ones_within_the_error(many: Path) -> None:
    report = make([many], Filters())
    assert report.counted
    assert report.transactions == len(MANY) == sum(report.statuses.values())
    check_times(report.total, latencies(MANY))
    assert list(report.stages) == [name for name in STAGE_NAMES if name in report.stages]
    for name, times in report.stages.items():
        check_times(times, [one.stages()[name] for one in MANY if one.stages()[name]])
    assert sum(times.sum_ns for times in report.stages.values()) == report.total.sum_ns


@pytest.mark.parametrize("by", ["pod", "backend", "server", "type", "rcode", "name"])
def test_groups_are_what_they_are_called(many: Path, by: str) -> None:
    keys: dict[str, Callable[[Made], str | None]] = {
        "pod": lambda one: f"{one.namespace}/{one.pod}",
        "backend": lambda one: f"kube-system/{one.backend}",
        "server": lambda _: "kube-system/kube-dns",
        "type": lambda one: one.type,
        "rcode": lambda one: one.rcode,
        "name": lambda one: one.name,
    }
    key = keys[by]
    report = make([many], Filters())
    groups = {group.name: group for group in report.by[by]}
    assert set(groups) == {key(one) for one in MANY}
    for name, group in groups.items():
        members = [one for one in MANY if key(one) == name]
        assert group.count == len(members)
        assert group.failed == sum(one.rcode == "SERVFAIL" for one in members)
        check_times(group.times, latencies(members))


FILTERS = {
    "namespace": (Filters(namespaces=("sre",)), lambda one: one.namespace == "sre"),
    "pod": (Filters(pods=("web-*",)), lambda one: one.pod.startswith("web-")),
    "namespace and pod": (
        Filters(pods=("default/web-0", "api-*")),
        lambda one: (one.namespace, one.pod) == ("default", "web-0") or one.pod == "api-0",
    ),
    "type": (Filters(type="aaaa"), lambda one: one.type == "AAAA"),
    "rcode": (Filters(rcode="servfail"), lambda one: one.rcode == "SERVFAIL"),
    "failed": (Filters(failed=True), lambda one: one.rcode != "NOERROR"),
    "backend": (Filters(backend="coredns-1"), lambda one: one.backend == "coredns-1"),
    "backend's address": (Filters(backend="10.244.2.2"), lambda _: True),
    "server": (Filters(server="10.96.0.11"), lambda _: False),
    "side": (Filters(pods=("coredns-2",), side="server"), lambda one: one.backend == "coredns-2"),
    "name": (Filters(name="N3.example.com"), lambda one: one.name == "n3.example.com."),
    "comm": (Filters(comm="ngin?"), lambda one: one.comm == "nginx"),
    "pid": (Filters(pid=9), lambda _: True),
    "slower": (Filters(slower="1ms"), lambda one: one.latency_ns >= 10**6),
    "two": (Filters(name="n*", type="A"), lambda one: one.type == "A"),
}


@pytest.mark.parametrize(("filters", "wanted"), FILTERS.values(), ids=FILTERS)
def test_filters_keep_just_what_they_ask_for(many: Path, filters: Filters, wanted: Any) -> None:
    report = make([many], filters)
    left = [one for one in MANY if wanted(one)]
    assert report.transactions == len(left)
    of_transactions = (filters.name, filters.comm, filters.pid, filters.slower)
    assert report.counted == all(value is None for value in of_transactions)
    if left:
        check_times(report.total, latencies(left))
        for name, times in report.stages.items():
            check_times(times, [one.stages()[name] for one in left if one.stages()[name]])
    else:
        assert report.stages == {}
        assert "0 transactions" in render(report)


def test_sample_is_scaled_up_and_called_an_estimate(tmp_path: Path) -> None:
    record(tmp_path, MANY, every=10)
    report = make([tmp_path], Filters(name="*"))
    assert not report.counted
    assert report.transactions == len(MANY)
    assert "about 3,000 transactions" in render(report)
    assert make([tmp_path], Filters()).counted


def test_what_servers_ask_is_in_their_clients_time(tmp_path: Path) -> None:
    """And so in no figure of its own, but where it is asked for."""
    asked = [Made(latency_ns=3_000_000), Made(pod="api-0", latency_ns=2_000_000)]
    by_server = Made(namespace="kube-system", pod="coredns-1", latency_ns=2_900_000, by_server=True)
    record(tmp_path, [*asked, by_server])
    report = make([tmp_path], Filters())
    assert (report.transactions, report.by_servers) == (2, 1)
    assert report.total.count == 2
    assert [group.name for group in report.by["pod"]] == ["sre/api-0", "sre/web-0"]
    assert [group.count for group in report.by["name"]] == [2]
    assert len(report.slowest) == 2
    assert np.array(report.heat.counts).sum() == 2
    assert "and 1 that DNS servers asked themselves" in render(report)
    assert to_json(report)["by_servers"] == 1
    estimated = make([tmp_path], Filters(name="www*"))
    assert (estimated.transactions, estimated.by_servers) == (2, 1)
    for filters in (Filters(namespaces=("kube-system",)), Filters(pods=("coredns-*",))):
        report = make([tmp_path], filters)
        assert (report.transactions, report.by_servers) == (1, 0)
        assert report.total.max_ns == 2_900_000


def test_estimates_are_marked_where_not_all_was_recorded(tmp_path: Path, many: Path) -> None:
    record(tmp_path, MANY, every=10)
    text = render(make([tmp_path], Filters()))
    rows = [line for line in text.splitlines() if line.startswith("n1.example.com.")]
    assert "~" in rows[0]
    assert "give or take" in text
    assert "~" not in next(line for line in text.splitlines() if line.startswith("sre/web-0"))
    assert "~" not in render(make([many], Filters()))


def test_nothing_asked_is_no_estimate(tmp_path: Path) -> None:
    recorder = Recorder(
        tmp_path, "node-1", rotate_s=1e9, size_max=1 << 50, age_max_s=1e12, tell=lambda _: None
    )
    times = {"time_start_ns": START_NS, "time_end_ns": START_NS + 10**9}
    recorder.write("coverage", [{**times, "transactions": 0, "lost": {}, "unmatched": {}}])
    recorder.close()
    report = make([tmp_path], Filters())
    assert (report.counted, report.transactions) == (True, 0)
    assert "about" not in render(report)


def test_names_are_whole_where_there_is_room(tmp_path: Path) -> None:
    pod = "a-deployment-with-a-long-name-65d6cfc9-zq8mt"
    record(tmp_path, [Made(pod=pod, backend=pod)])
    report = make([tmp_path], Filters())
    assert f"sre/{pod}" not in render(report)
    assert render(report, None).count(f"sre/{pod} ") >= 1
    assert f"kube-system/{pod} " in render(report, 160)
    for width in (80, 100, 160):
        assert max(cell_len(line) for line in render(report, width).splitlines()) <= width


def test_names_are_whole_in_a_pipe_wherever_they_are(tmp_path: Path) -> None:
    name = "www.li-rui.top.sre.svc.cluster.local."
    record(tmp_path, [Made(name=name, rcode="SERVFAIL")])
    assert render(make([tmp_path], Filters()), None).count(f"{name} ") == 3


@pytest.mark.parametrize("what", ["pipe", "link"])
def test_page_goes_to_what_is_no_file_of_its_own_and_leaves_it(tmp_path: Path, what: str) -> None:
    """As /dev/stdout is none, which a file in its place would break for all."""
    record(tmp_path / "rec", [Made()])
    at = tmp_path / "at"
    os.mkfifo(at) if what == "pipe" else at.symlink_to(tmp_path / "page")
    argv = [sys.executable, "-m", "tracer", "report", str(tmp_path / "rec"), "--html", str(at)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        page = at.read_text() if what == "pipe" else ""
        process.communicate()
    assert process.returncode == 0
    assert at.is_fifo() if what == "pipe" else at.is_symlink()
    assert (page or (tmp_path / "page").read_text()).startswith("<!doctype html>")


def test_few_values_have_no_high_percentiles(tmp_path: Path) -> None:
    record(tmp_path, [Made(latency_ns=1000 + n) for n in range(99)])
    report = make([tmp_path], Filters())
    assert [quantile is None for quantile in report.total.quantiles] == [False, False, True, True]


def test_nodes_are_reported_together(tmp_path: Path) -> None:
    for node in ("node-1", "node-2"):
        record(tmp_path / node, MANY[:100], node=node)
    report = make([tmp_path / "node-1", tmp_path / "node-2"], Filters())
    assert report.nodes == ["node-1", "node-2"]
    assert report.transactions == 200
    twice = make([tmp_path / "node-1", *(tmp_path / "node-1").glob("*.parquet")], Filters())
    assert twice.transactions == 100


def test_failures_and_the_slowest_are_shown_with_their_ways(tmp_path: Path) -> None:
    made = [
        *[Made(status="dropped", latency_ns=None, rcode=None, reason="NETFILTER_DROP")] * 3,
        Made(status="timeout", latency_ns=None, rcode=None, name="lost.example.com."),
        Made(rcode="SERVFAIL", latency_ns=5_000_000),
        *(Made(latency_ns=10_000_000 * n) for n in range(1, 20)),
    ]
    record(tmp_path, made)
    report = make([tmp_path], Filters())
    found = [(f.count, f.status, f.rcode, f.reason, f.question) for f in report.failures]
    assert found == [
        (3, "dropped", None, "NETFILTER_DROP", "www.example.com."),
        (1, "timeout", None, None, "lost.example.com."),
        (1, "answered", "SERVFAIL", None, "www.example.com."),
    ]
    assert [one["latency_ns"] for one in report.slowest] == [
        10_000_000 * n for n in range(19, 9, -1)
    ]
    assert report.slowest[0]["hops"]
    assert report.statuses == {"answered": 20, "dropped": 3, "timeout": 1}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    record(tmp_path / "a", [Made()], lost={"ring_full": 3}, skipped=4, problem="the API is away")
    record(tmp_path / "a", [Made(time_ns=START_NS + 60 * 10**9)])
    whole = next((tmp_path / "a").glob("transactions-*.parquet"))
    (tmp_path / "a" / "transactions-cut.parquet").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "a" / "transactions-none.parquet").write_bytes(b"")
    (tmp_path / "a" / "histograms-junk.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    report = make([tmp_path / "a"], Filters())
    coverage = report.coverage
    assert (coverage.lost, coverage.skipped) == ({"ring_full": 3}, 4)
    assert len(coverage.unreadable) == 3
    assert [(node, known) for node, _, _, known in coverage.gaps] == [("node-1", 0)]
    text = render(report)
    for words in ("ring full", "not read", "nothing was counted on node-1", "the API is away"):
        assert words in text
    assert "nothing is known to be missing" not in text


def test_what_a_killed_run_has_recorded_is_told_with_what_it_has_not_counted(
    tmp_path: Path,
) -> None:
    """Its transactions were written as they came, its counts with the next interval only."""
    second = 10**9
    record(tmp_path, [Made()])
    one = Recorder(
        tmp_path, "node-1", rotate_s=1e9, size_max=1 << 50, age_max_s=1e12, tell=lambda _: None
    )
    killed = [Made(time_ns=START_NS + (10 + n) * second) for n in range(3)]
    one.write("transactions", (each.row(1) for each in killed))
    one.close()
    for at in (20, 30):  # the next start begins with an interval of next to nothing
        begun_ns = START_NS + at * second
        one = Recorder(
            tmp_path, "node-1", rotate_s=1e9, size_max=1 << 50, age_max_s=1e12, tell=lambda _: None
        )
        row = {"transactions": 0, "recorded": 0, "not_kept": 0, "skipped": 0, "sample": 1}
        times = {"time_start_ns": begun_ns, "time_end_ns": begun_ns + 1000}
        one.write("coverage", [{**times, **row, "lost": {}, "unmatched": {}}])
        one.close()
    (tmp_path / ".journal-node-1-20261127T064510502Z").mkdir()
    report = make([tmp_path], Filters())
    ((node, start, end, known),) = report.coverage.gaps
    assert (node, known) == ("node-1", 3)
    assert round((end - start).total_seconds()) == 29
    assert (report.coverage.recorded, report.coverage.pending) == (4, ["node-1"])
    text = " ".join(render(report).split())
    assert "but for 3 that were recorded one by one" in text
    assert "not in here: what node-1 has recorded since its last complete file" in text
    assert "nothing is known to be missing" not in text


def test_filters_are_told_and_what_there_is_where_they_find_nothing(many: Path) -> None:
    filters = Filters(namespaces=("sree",), failed=True, name="a b*")
    report = make([many], filters)
    assert report.filters == to_json(report)["filters"] == "--namespace sree --name 'a b*' --failed"
    text = " ".join(render(report).split())
    assert "filters: --namespace sree --name 'a b*' --failed" in text
    assert "none of the 3,000 transactions" in text
    assert "namespaces there: default, sre" in text


def test_few_of_a_sample_have_no_percentiles_at_all(tmp_path: Path) -> None:
    record(tmp_path, MANY[:50], every=10)
    report = make([tmp_path], Filters(comm="*"))
    assert not report.counted
    assert report.total.quantiles == (None,) * len(SHARES)
    assert report.total.max_ns == max(one.latency_ns for one in MANY[:50:10])  # type: ignore[type-var]
    assert "within" not in render(report).partition("HOW COMPLETE")[0]


def test_why_nobody_was_there_is_said(tmp_path: Path) -> None:
    gone = [Made(status="dropped", reason="NO_SOCKET"), Made(status="refused", reason="NO_SOCKET")]
    record(tmp_path, gone)
    text = render(make([tmp_path], Filters()))
    assert "the client no longer waited (NO_SOCKET)" in text
    assert "nothing listens there (NO_SOCKET)" in text


@pytest.mark.parametrize("what", ["nowhere", "empty", "junk", "other"])
def test_nothing_to_report_on_is_said(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "junk":
        path.write_bytes(b"PAR1 is not enough")
    elif what == "other":
        import duckdb

        with duckdb.connect() as database:
            database.execute(f"COPY (SELECT 1 AS a) TO '{path}' (FORMAT parquet)")
    with pytest.raises(RecordingError, match=what):
        make([path], Filters())


def test_labels_are_not_in_recordings(many: Path) -> None:
    with pytest.raises(NotRecorded, match="live windows alone"):
        make([many], Filters(selector="app=web"))


def test_hostile_names_are_shown_harmlessly(tmp_path: Path) -> None:
    record(tmp_path, [Made(name=text, pod=text, comm=text, backend=text) for text in HOSTILE])
    report = make([tmp_path], Filters())
    text = render(report)
    assert all(line.isprintable() for line in text.splitlines())
    assert "[bold]markup[/]" in text
    json.loads(json.dumps(to_json(report), default=str))
    assert len(report.by["name"]) == len(HOSTILE)


def test_report_fits_into_80_columns(many: Path) -> None:
    for line in render(make([many], Filters())).splitlines():
        assert cell_len(line) <= 80, line


def test_command_line_says_all_three_ways(many: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "tracer", "report", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    text = run(str(many))
    assert (text.returncode, text.stderr) == (0, "")
    assert "3,000 transactions" in text.stdout
    said = json.loads(run(str(many), "--json", "-n", "sre").stdout)
    assert said["event"] == "report"
    assert said["transactions"] == sum(one.namespace == "sre" for one in MANY)
    assert said["latency"]["p99_ns"] == pytest.approx(
        exact(latencies([one for one in MANY if one.namespace == "sre"]), 0.99), rel=ERROR
    )
    page = tmp_path / "page.html"
    done = run(str(many), "--html", str(page))
    assert (done.returncode, done.stdout) == (0, "")
    assert page.read_text().startswith("<!doctype html>")
    nowhere = run(str(tmp_path / "nowhere"))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "No such file" in nowhere.stderr
    assert run(str(many), "--type", "NOSUCH").returncode == 2
    assert run(str(many), "--html", "/nowhere/page.html").returncode == 1
    assert run(str(many), "-l", "app=web").returncode == 2


def test_heat_map_has_every_transaction(many: Path) -> None:
    heat = make([many], Filters()).heat
    assert np.array(heat.counts).sum() == len(MANY)
    assert len(heat.starts) == len(heat.counts)
    assert all(len(column) == len(heat.octaves) for column in heat.counts)


def test_heat_map_is_bounded_wherever_histograms_lie(tmp_path: Path) -> None:
    """A coverage file was removed, and a clock was wrong for a while."""
    record(tmp_path / "now", [Made(latency_ns=1000 + n) for n in range(10)])
    long_ago = START_NS - 10**9 * 86_400 * 3650
    record(tmp_path / "then", [Made(time_ns=long_ago, latency_ns=1000)])
    for path in (tmp_path / "then").glob("[ct]*.parquet"):
        path.unlink()
    heat = make([tmp_path / "now", tmp_path / "then"], Filters()).heat
    assert len(heat.starts) <= HEAT_COLUMNS + 1
    assert np.array(heat.counts).sum() == 11


def test_latency_of_a_minute_is_in_a_sample_too(tmp_path: Path) -> None:
    """Without histograms, quantiles are made of what was kept; 2^36 ns are 68.7 s."""
    record(tmp_path, [Made(latency_ns=1 << 36)])
    for path in tmp_path.glob("histograms-*.parquet"):
        path.unlink()
    report = make([tmp_path], Filters())
    assert report.total.quantiles[0] == 1 << 36


def test_directories_say_nothing_of_what_is_in_the_files(tmp_path: Path) -> None:
    """As nodes' recordings are often collected."""
    for directory in ("node=7", "status=old", "node=worker-1"):
        record(tmp_path / directory, [Made(latency_ns=1000)])
    paths = [tmp_path / name for name in ("node=7", "status=old", "node=worker-1")]
    report = make(paths, Filters())
    assert report.transactions == 3
    assert report.coverage.unreadable == []
    assert report.nodes == ["node-1"]
    assert dict(report.statuses) == {"answered": 3}


def test_recordings_without_a_column_that_came_later_are_read(tmp_path: Path) -> None:
    record(tmp_path / "new", [Made(latency_ns=1000), Made(latency_ns=2000, by_server=True)])
    (tmp_path / "old").mkdir()
    for path in (tmp_path / "new").glob("*.parquet"):
        later = "" if path.name.startswith("coverage") else "EXCLUDE (by_server, client_seen)"
        with duckdb.connect() as database:
            database.execute(
                f"COPY (SELECT * {later} FROM read_parquet('{path}')) "
                f"TO '{tmp_path}/old/{path.name}' (FORMAT parquet)"
            )
    report = make([tmp_path / "old"], Filters())
    assert (report.transactions, report.by_servers) == (2, 0)
    assert report.coverage.unreadable == []
    report = make([tmp_path / "old", tmp_path / "new"], Filters())
    assert (report.transactions, report.by_servers) == (3, 1)


def test_parquet_that_is_no_recording_is_named(tmp_path: Path) -> None:
    record(tmp_path, [Made(latency_ns=1000)])
    with duckdb.connect() as database:
        database.execute(f"COPY (SELECT 1 AS a) TO '{tmp_path}/transactions-x.parquet'")
    ((path, why),) = make([tmp_path], Filters()).coverage.unreadable
    assert path.endswith("transactions-x.parquet")
    assert "not a recording" in why


def test_time_and_its_bucket_may_come_in_two_intervals(tmp_path: Path) -> None:
    recorder = Recorder(
        tmp_path, "node-1", rotate_s=1e9, size_max=1 << 50, age_max_s=1e12, tell=lambda _: None
    )
    bucket = {"lower_ns": 4_980_736, "upper_ns": 5_242_880, "count": 1}
    common = {"stage": "total", "status": "answered", "rcode": "NOERROR"}
    rows: list[dict[str, Any]] = [
        {"count": 1, "timed": 0, "sum_ns": 5_000_000, "max_ns": 5_000_000, "buckets": []},
        {"count": 0, "timed": 1, "sum_ns": 0, "max_ns": None, "buckets": [bucket]},
    ]
    for n, more in enumerate(rows):
        times = {"time_start_ns": START_NS + n, "time_end_ns": START_NS + n + 1}
        recorder.write("histograms", [{**common, **times, **more}])
    recorder.close()
    total = make([tmp_path], Filters()).total
    assert (total.count, total.sum_ns, total.max_ns) == (1, 5_000_000, 5_000_000)
    assert total.quantiles[0] == 5_000_000


def test_damaged_file_costs_itself_alone(tmp_path: Path, many: Path) -> None:
    record(tmp_path, [Made(latency_ns=1000 + n) for n in range(10)], node="other")
    (file,) = tmp_path.glob("histograms-*.parquet")
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    file.write_bytes(content)
    report = make([many, tmp_path], Filters())
    assert report.transactions == len(MANY)
    assert [path for path, _ in report.coverage.unreadable] == [str(file)]


def with_another(file: Path, column: str, directory: Path) -> Path:
    """A copy of a recording that differs in one column."""
    other = directory / f"{file.name.partition('-')[0]}-other.parquet"
    with duckdb.connect() as database:
        database.execute(
            f"COPY (SELECT * REPLACE ({column}) FROM '{file}') TO '{other}' (FORMAT parquet)"
        )
    return other


def test_columns_of_other_types_are_no_recording(tmp_path: Path, many: Path) -> None:
    (file,) = many.glob("coverage-*.parquet")
    other = with_another(file, "'many' AS recorded", tmp_path)
    report = make([many, tmp_path], Filters())
    assert report.transactions == len(MANY)
    ((path, why),) = report.coverage.unreadable
    assert path == str(other)
    assert "recorded is of another type" in why


def test_rare_types_are_counted_together_and_found_all_the_same(tmp_path: Path) -> None:
    rare = [Made(type="CAA", latency_ns=1000 + n) for n in range(5)]
    record(tmp_path, [*rare, Made(type="A")])
    report = make([tmp_path], Filters(type="caa"))
    assert (report.counted, report.transactions, report.total.count) == (False, 5, 5)
    assert make([tmp_path], Filters(type="A")).counted


PATTERNS = [
    "a\\032b*", "*\\*", "x[1*", "x[[]1", "[!a]*", "[]]*", "[!]]*", "a?c", "[", "[!", "*[", "[a-", "a[\\]b",
    "\\[a]", "[a-c]\\*",
]  # fmt: skip
TEXTS = [
    "a\\032b.example.com", "x[1y", "x[1", "b", "]a", "abc", "[", "[!", "z[", "[a-", "a\\b", "\\a", "b\\x", "!x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_mean_what_they_mean_in_a_live_trace(tmp_path: Path, pattern: str) -> None:
    record(tmp_path, [Made(comm=text[:15]) for text in TEXTS])
    wanted = sum(fnmatch.fnmatchcase(text[:15], pattern[:15]) for text in TEXTS)
    assert make([tmp_path], Filters(comm=pattern)).transactions == wanted


def test_address_mapped_into_ipv6_is_the_ipv4_one(many: Path) -> None:
    assert make([many], Filters(server="::ffff:10.96.0.10")).transactions == len(MANY)


@pytest.mark.parametrize(
    "spoilt",
    ["NULL::TIMESTAMPTZ AS time", "'290000-01-01'::TIMESTAMPTZ AS time",
     "'infinity'::TIMESTAMPTZ AS time", f"{2**63 - 1}::BIGINT AS weight", "-1::BIGINT AS latency_ns"],
)  # fmt: skip
def test_impossible_numbers_cost_their_file_alone(tmp_path: Path, many: Path, spoilt: str) -> None:
    (file,) = many.glob("transactions-*.parquet")
    other = with_another(file, spoilt, tmp_path)
    report = make([many, tmp_path], Filters())
    assert report.transactions == len(MANY)
    ((path, why),) = report.coverage.unreadable
    assert path == str(other)
    assert "impossible" in why
    assert render(report)
    assert json.dumps(to_json(report))


def test_file_name_that_is_no_text_is_told_harmlessly(tmp_path: Path, many: Path) -> None:
    (tmp_path / os.fsdecode(b"transactions-\xff.parquet")).write_text("junk")
    report = make([many, tmp_path], Filters())
    assert report.transactions == len(MANY)
    for said in (render(report), json.dumps(to_json(report))):
        said.encode()


def test_clients_of_other_nodes_are_said_to_be(tmp_path: Path) -> None:
    record(tmp_path, [Made(), Made(namespace=None, pod=None, client_seen=False)])
    report = make([tmp_path], Filters())
    assert (report.transactions, report.clients_unseen) == (2, 1)
    assert "of them, 1 from clients that are not on the node" in " ".join(render(report).split())
