# SPDX-License-Identifier: Apache-2.0
"""Metrics: what they say, that the real Prometheus takes them, and that strangers cannot bend them."""

from __future__ import annotations

import http.client
import json
import math
import random
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.test_recorder import HOSTILE
from tracer.continuous import metrics
from tracer.continuous.book import Entry, Histogram
from tracer.continuous.labels import Labels
from tracer.continuous.metrics import Figures, Health
from tracer.continuous.server import Server
from tracer.record import Stage
from tracer.stages import buckets_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PATIENCE_S = 60.0
DEPLOY = Path(__file__).parent.parent / "deploy"
WEB = Labels(
    False, "sre", "web-0", "app", "10.96.0.10", 53, "kube-system/kube-dns", "cluster",
    "10.244.2.2", "kube-system", "coredns-1", "A", "NOERROR", "answered", "udp",
)  # fmt: skip
WAY = Labels(True, "sre", "web-0", "app", backend_namespace="kube-system", backend_pod="coredns-1")
HEALTH = Health(
    lost={"ring_full": 3, "filtered": 1}, unmatched={"responses": 2}, recorded=5, not_kept=6,
    skipped=7, sample=100, cpu_s=1.5, rss_bytes=50 << 20, tables={"series": (7, 4096)},
    hooks="kprobe", devices=9, names_age_s=12.5,
)  # fmt: skip


def entry(*times_ns: int, stage: Stage = Stage.TOTAL, count: int | None = None) -> Entry:
    import numpy as np

    histogram = Histogram(sum_ns=sum(times_ns), max_ns=max(times_ns, default=0))
    histogram.counts.update(buckets_of(np.array(times_ns, np.int64)).tolist())
    return Entry(len(times_ns) if count is None else count, {stage: histogram} if times_ns else {})


def figures(*found: tuple[Labels, Entry], ready: bool = True) -> Figures:
    made = Figures()
    made.add(found)
    made.tell(HEALTH, is_ready=ready)
    return made


@contextmanager
def served(made: Figures) -> Iterator[int]:
    server = Server("127.0.0.1", 0, made)
    try:
        yield server.port
    finally:
        server.close()


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]


def scraped(*found: tuple[Labels, Entry]) -> str:
    with served(figures(*found)) as port:
        return get(port)[1]


def test_transactions_and_times_are_told() -> None:
    text = scraped((WEB, entry(10**6, 3 * 10**6)), (WAY, entry(500_000, stage=Stage.SERVER)))
    who = {"namespace": "sre", "pod": "web-0", "backend": "kube-system/coredns-1"}
    asked = {**who, "server": "kube-system/kube-dns", "type": "A", "rcode": "NOERROR", "protocol": "udp"}  # fmt: skip
    assert samples(text, "dnstrace_transactions_total") == [({**asked, "status": "answered"}, 2)]
    assert samples(text, "dnstrace_latency_seconds_sum") == [(asked, 0.004)]
    assert samples(text, "dnstrace_stage_seconds_sum") == [({**who, "stage": "server"}, 0.0005)]
    assert samples(text, "dnstrace_lost_total") == [({"kind": "ring_full"}, 3), ({"kind": "filtered"}, 1)]  # fmt: skip
    assert samples(text, "dnstrace_sample_ratio") == [({}, 0.01)]
    assert samples(text, "dnstrace_table_entries") == [({"table": "series"}, 7)]


def test_buckets_are_exact_at_their_bounds() -> None:
    times = [1, 65_535, 65_536, 131_071, 131_072, 10**6, 2**33 - 1, 2**33, 10**11]
    text = scraped((WEB, entry(*times)))
    found = {k["le"]: n for k, n in samples(text, "dnstrace_latency_seconds_bucket")}
    assert found.pop("+Inf") == len(times)
    for bound, count in found.items():
        assert count == sum(ns < round(float(bound) * 1e9) for ns in times), bound
    assert list(found.values()) == sorted(found.values())


def test_what_is_without_an_answer_has_no_latency() -> None:
    lost = WEB._replace(status="timeout", rcode=None)
    text = scraped((lost, entry(count=3)))
    assert [n for _, n in samples(text, "dnstrace_transactions_total")] == [3]
    assert [n for _, n in samples(text, "dnstrace_latency_seconds_count")] == [0]


def test_labels_are_bounded_and_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LATENCIES_MAX", 10)
    monkeypatch.setattr(metrics, "WAYS_MAX", 5)
    found: list[tuple[Labels, Entry]] = []
    for n in range(50):
        found.append((WEB._replace(pod=f"p{n}"), entry(1000)))
        found.append((WAY._replace(pod=f"p{n}"), entry(1000, stage=Stage.NODE)))
    text = scraped(*found)
    for name, at_most in (("transactions_total", 11), ("latency_seconds_count", 11), ("stage_seconds_count", 6)):  # fmt: skip
        told = samples(text, f"dnstrace_{name}")
        assert len(told) <= at_most
        assert sum(n for _, n in told) == 50
        assert any(k["pod"] == "(other)" for k, _ in told)


def test_who_has_gone_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LATENCIES_MAX", 10)
    monkeypatch.setattr(metrics, "WAYS_MAX", 10)
    made = figures()
    for n in range(10):
        made.add([(WEB._replace(pod=f"old{n}"), entry(1000)), (WAY._replace(pod=f"old{n}"), entry(9, stage=Stage.NODE))])  # fmt: skip
    for key in made._last_s:
        made._last_s[key] -= metrics.FORGET_S + 1
    made.add([(WEB._replace(pod="old0"), entry(1000))])
    made.add([(WEB._replace(pod="new"), entry(1000)), (WAY._replace(pod="new"), entry(9, stage=Stage.NODE))])  # fmt: skip
    with served(made) as port:
        text = get(port)[1]
    told = {k["pod"]: n for k, n in samples(text, "dnstrace_transactions_total")}
    assert told == {"old0": 2, "new": 1}
    assert {k["pod"] for k, _ in samples(text, "dnstrace_stage_seconds_count")} == {"new"}


def test_client_that_asks_whoever_it_likes_leaves_room_for_others() -> None:
    evil = WEB._replace(namespace="evil", pod="e", service=None)
    made = figures(
        *((evil._replace(server_ip=f"192.0.2.{n // 250}.{n % 250}"), entry(1000)) for n in range(2000)),
        *((WEB._replace(pod=f"p{n}"), entry(1000)) for n in range(50)),
    )  # fmt: skip
    with served(made) as port:
        told = samples(get(port)[1], "dnstrace_transactions_total")
    assert {k["pod"] for k, _ in told} == {"e", *(f"p{n}" for n in range(50))}
    of_evil = [(k["server"], n) for k, n in told if k["pod"] == "e"]
    assert sum(n for _, n in of_evil) == 2000
    assert len(of_evil) <= metrics.LATENCIES_MAX // metrics.SHARE + 1
    assert dict(of_evil)["(other)"] > 1000


@pytest.mark.parametrize("pod", [None, "web-0"])
def test_what_the_kernel_had_no_room_for_is_called_so(pod: str | None) -> None:
    namespace = "sre" if pod else None
    text = scraped(
        (Labels(False, namespace, pod, overflow=True), entry(count=4)),
        (Labels(True, namespace, pod, overflow=True), entry(9, stage=Stage.NODE)),
    )
    ((labels, number),) = samples(text, "dnstrace_transactions_total")
    assert (labels["pod"], labels["namespace"]) == (pod or "(other)", namespace or "(other)")
    assert (labels["server"], labels["backend"], number) == ("(other)", "(other)", 4)
    ((labels, _),) = samples(text, "dnstrace_stage_seconds_count")
    assert (labels["pod"], labels["backend"]) == (pod or "(other)", "(other)")


def test_many_scrapes_cost_as_much_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = figures((WEB, entry(1000)))
    copies: list[Figures] = []
    copy = Figures._copy

    def counted(self: Figures) -> Any:
        copies.append(self)
        return copy(self)

    monkeypatch.setattr(Figures, "_copy", counted)
    with served(made) as port:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: get(port), range(64)))
        assert {status for status, _ in answers} == {200}
        assert len({text for _, text in answers}) == 1
        assert len(copies) == 1
        made.add([(WEB, entry(1000))])
        assert samples(get(port)[1], "dnstrace_transactions_total")[0][1] == 2
        assert len(copies) == 2


def test_server_outlives_that_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with served(figures()) as port:
        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", none_left)
            for _ in range(100):
                with pytest.raises((OSError, http.client.HTTPException)):
                    get(port, "/healthz")
        assert get(port, "/healthz") == (200, "ok\n")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_come_out_harmless(text: str) -> None:
    label = WEB._replace(namespace=text, pod=text, service=text, backend_pod=text, type=text)
    page = scraped((label, entry(1000)), (WAY._replace(pod=text), entry(1, stage=Stage.NODE)))
    ((labels, number),) = samples(page, "dnstrace_transactions_total")
    assert number == 1
    assert all(value.isascii() and value.isprintable() for value in labels.values())
    lines = [line for line in page.splitlines() if line.startswith("dnstrace_transactions_total")]
    assert len(lines) == 1


def test_names_that_are_asked_for_most_are_told_and_harmless() -> None:
    made = figures((WEB, entry(1000)))
    with served(made) as port:
        assert "top_name" not in get(port)[1]
        made.add([], {**dict.fromkeys(HOSTILE, 7), "www.example.com.": 9})
        text = get(port)[1]
    found = {k["name"]: n for k, n in samples(text, "dnstrace_top_name_transactions_total")}
    assert found["www.example.com."] == 9
    assert len(found) == len(HOSTILE) + 1
    assert all(name.isascii() and name.isprintable() for name in found)
    assert promtool("check", "metrics", text=text).returncode == 0


def test_health_and_readiness() -> None:
    made = figures(ready=False)
    with served(made) as port:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (503, "not tracing yet\n")
        made.tell(HEALTH, is_ready=True)
        assert get(port, "/readyz")[0] == 200
        made._alive_s -= metrics.STALE_S + 1
        assert get(port, "/healthz")[0] == 503
        assert get(port, "/readyz")[0] == 503
        assert "no reading for" in get(port, "/healthz")[1]
        assert get(port, "/nothing")[0] == 404
        assert get(port, "/metrics", "HEAD")[0] == 405


def test_long_interval_is_no_illness() -> None:
    made = metrics.Figures(stale_s=180.0)
    made.tell(HEALTH, is_ready=True)
    made._alive_s -= 120
    assert made.problem() is None
    made._alive_s -= 120
    assert made.problem() is not None


def test_probe_is_answered_however_many_take_their_time() -> None:
    with served(figures()) as port:
        for _ in range(3):
            slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
            for peer in slow:
                with suppress(OSError):  # the oldest are cut off by the youngest
                    peer.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            began = time.monotonic()
            assert get(port, "/healthz") == (200, "ok\n")
            assert time.monotonic() - began < 5
            for peer in slow:
                peer.close()


def test_clients_that_misbehave_hold_up_nobody() -> None:
    with served(figures((WEB, entry(1000)))) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for peer in silent[:10]:
            peer.sendall(b"GET /metr")
        silent[0].close()
        with socket.create_connection(("127.0.0.1", port)) as junk:
            junk.sendall(b"\x16\x03\x01\x00\xff" + b"x" * 70_000)
        began = time.monotonic()
        assert get(port)[0] == 200
        assert time.monotonic() - began < 5
        for peer in silent:
            peer.close()


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, check=False
    )


def test_promtool_has_nothing_to_say_of_metrics() -> None:
    done = promtool("check", "metrics", text=scraped((WEB, entry(1000)), (WAY, entry(1, stage=Stage.NODE))))  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_promtool_takes_the_alerts() -> None:
    done = promtool("check", "rules", str(DEPLOY / "alerts.yaml"))
    assert done.returncode == 0, done.stderr
    assert "11 rules found" in done.stdout


class Prometheus:
    """The real one, scraping one target every second."""

    def __init__(self, directory: Path, target: int, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DEPLOY / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": "dnstrace", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            ],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))
        self._process = subprocess.Popen(
            ["prometheus", f"--config.file={directory}/prometheus.yml",
             f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address=127.0.0.1:{self.port}", *flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it has just begun
                raise
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def wait_for(self, query: str) -> Any:
        """Its result, as soon as there is one."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            with suppress(OSError):
                if result := self.ask("query", query=query)["result"]:
                    return result
            time.sleep(0.3)
        raise AssertionError(f"never true: {query}")

    def wait_for_rules(self, raised: set[str]) -> dict[str, Any]:
        """The rules by name, once all are evaluated and these are raised."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            groups = self.ask("rules")["groups"]
            rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
            states = {name for name, rule in rules.items() if rule["state"] != "inactive"}
            if states >= raised and {rule["health"] for rule in rules.values()} == {"ok"}:
                return rules
            assert time.monotonic() < deadline_s, rules
            time.sleep(0.3)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def expressions() -> Iterable[tuple[str, str]]:
    """(title, expression) of all panels, with variables as Grafana would put them in."""
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$namespace", ".*").replace("$__rate_interval", "5m")
            yield panel["title"], text
            assert "$" not in text


def test_the_real_prometheus_takes_all_of_it(tmp_path: Path) -> None:
    """Scrapes, alerts, and every query of the dashboard."""
    made = figures()
    # Every alert of DNS itself has a reason.
    slow = WEB._replace(backend_pod="coredns-2", rcode="SERVFAIL")
    lost = WEB._replace(status="timeout", rcode=None)
    with served(made) as port:
        prometheus = Prometheus(tmp_path, port)
        try:
            prometheus.wait_for("up == 1")
            for number in range(8):
                made.add(
                    [
                        (WEB, entry(*[10**6] * 90)),
                        (slow, entry(*[10**9] * 10)),
                        (lost, entry(count=5)),
                        (WAY, entry(*[10**9] * 10, stage=Stage.UPSTREAM)),
                    ]
                )
                made.tell(HEALTH, is_ready=True)
                prometheus.wait_for(f"sum(dnstrace_transactions_total) == {(number + 1) * 105}")
            for _, text in expressions():
                prometheus.wait_for(text)
            rules = prometheus.wait_for_rules({
                "DNSUnanswered", "DNSServerFailures", "DNSSlow", "DNSBackendSlowerThanOthers",
                "DNSUpstreamSlow",
            })  # fmt: skip
            assert len(rules) == 11
            p50 = "histogram_quantile(0.5, sum by (le) (dnstrace_latency_seconds_bucket))"
            value = float(prometheus.wait_for(p50)[0]["value"][1])
            assert 0.0005 < value < 0.0011
        finally:
            prometheus.close()


def test_native_histograms_are_within_their_error(tmp_path: Path) -> None:
    dice = random.Random(3)  # noqa: S311 - no secret
    times = [round(dice.lognormvariate(13, 1.5)) for _ in range(2000)]
    made = figures((WEB, entry(*times, 0)), (WAY, entry(5000, stage=Stage.NODE)))
    with served(made) as port:
        prometheus = Prometheus(tmp_path, port, "--enable-feature=native-histograms")
        try:
            (count,) = prometheus.wait_for("histogram_count(dnstrace_latency_seconds) > 0")
            assert float(count["value"][1]) == len(times) + 1
            assert count["metric"]["pod"] == "web-0"
            for share in (0.1, 0.5, 0.9, 0.99):
                (found,) = prometheus.wait_for(
                    f"histogram_quantile({share}, dnstrace_latency_seconds)"
                )
                exact = sorted([*times, 0])[math.ceil(share * (len(times) + 1)) - 1] / 1e9
                assert float(found["value"][1]) == pytest.approx(exact, rel=0.05), share
            (lost,) = prometheus.wait_for("dnstrace_lost_total{kind='ring_full'}")
            assert float(lost["value"][1]) == 3
            (info,) = prometheus.wait_for("dnstrace_build_info")
            assert info["metric"]["hooks"] == "kprobe"
        finally:
            prometheus.close()


def test_every_metric_of_dashboard_and_alerts_is_one_of_ours() -> None:
    text = scraped((WEB, entry(1000)), (WAY, entry(1, stage=Stage.NODE)))
    ours = set(re.findall(r"^(dnstrace_\w+)", text, re.MULTILINE))
    used = (DEPLOY / "alerts.yaml").read_text() + " ".join(text for _, text in expressions())
    assert set(re.findall(r"dnstrace_\w+", used)) <= ours
