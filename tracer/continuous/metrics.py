# SPDX-License-Identifier: Apache-2.0
"""What is counted, as Prometheus metrics; and whether we are alive and ready.

Labels are bounded: who is beyond the largest LATENCIES_MAX is counted as "(other)"; names that
were asked for are no labels, unless somebody wants those that are asked for most.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracer import __version__
from tracer.continuous import exposition, native
from tracer.continuous.book import Entry, Histogram
from tracer.decode.words import printable
from tracer.record import Stage
from tracer.stages import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

    from tracer.continuous.labels import Labels

    # Name, help, names of the labels, and each one's values and times.
    _Family = tuple[str, str, tuple[str, ...], list[tuple[tuple[str, ...], Histogram]]]

LATENCIES_MAX = 1000  # histograms of transactions
WAYS_MAX = 250  # of who asked and who answered, each with a histogram for every stage
SHARE = 4  # of both, what one client may have: it chooses whom it asks for what
FORGET_S = 900.0  # after which those that nothing is added to may go, when there is no room
STALE_S = 30.0  # how old a reading may be at least
# Powers of two, at which no bucket of ours has to be split: 65.5 µs to 8.59 s.
_BOUNDS = tuple(range(16, 34))
_OTHER = "(other)"
_STATUSES = ("answered", "timeout", "dropped", "refused")
_CLIENT = ("namespace", "pod")
_LATENCY_LABELS = (*_CLIENT, "server", "backend", "type", "rcode", "protocol")
_COUNT_LABELS = (*_LATENCY_LABELS, "status")
_WAY_LABELS = ("stage", *_CLIENT, "backend")


@dataclass(slots=True)
class Health:
    """What the tracer says of itself. Counters are since the start."""

    lost: Mapping[str, int] = field(default_factory=dict)
    unmatched: Mapping[str, int] = field(default_factory=dict)
    recorded: int = 0
    not_kept: int = 0
    skipped: int = 0
    sample: int = 0  # 1 of so many ordinary transactions is kept
    cpu_s: float = 0.0
    rss_bytes: int = 0
    tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # entries, capacity
    names_problem: str | None = None
    names_age_s: float | None = None  # since all the API server tells was last heard of
    recording_problem: str | None = None
    hooks: str = ""
    devices: int = 0


class Figures:
    """What was counted since the start; written by the tracing thread, read by scrapes."""

    def __init__(self, stale_s: float = STALE_S) -> None:
        self._stale_s = stale_s
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._latencies: dict[tuple[str, ...], Histogram] = {}
        self._ways: dict[tuple[str, ...], dict[Stage, Histogram]] = {}
        self._last_s: dict[tuple[str, ...], float] = {}  # when each was last added to
        self._names: Mapping[str, int] = {}
        self._has_made_room: set[int] = set()  # where looking again would find no more
        # How many of each there are, by client: (kind, namespace, pod).
        self._shares: Counter[tuple[Any, ...]] = Counter()
        self._health = Health()
        self._alive_s = time.monotonic()
        self._is_ready = False
        self._version = 0  # another one whenever anything has changed
        self._render_lock = threading.Lock()
        self._rendered: dict[str, bytes] = {}  # by content type, of one version
        self._rendered_version = 0

    def add(
        self, entries: Iterable[tuple[Labels, Entry]], names: Mapping[str, int] | None = None
    ) -> None:
        """What has come in an interval; and how often each of the top names was asked for by now."""
        with self._lock:
            self._version += 1
            self._names = names or {}
            self._has_made_room.clear()
            for labels, entry in entries:
                if labels.of_stages:
                    self._add_way(labels, entry)
                else:
                    self._add_transactions(labels, entry)

    def tell(self, health: Health, *, is_ready: bool) -> None:
        """That we are alive, and how we are."""
        with self._lock:
            self._version += 1
            self._health = health
            self._is_ready = is_ready
            self._alive_s = time.monotonic()
        if self._render_lock.acquire(blocking=False):  # what nobody will ask for again
            self._rendered.clear()
            self._render_lock.release()

    def problem(self) -> str | None:
        """Why we are not well; None: we are."""
        silent_s = time.monotonic() - self._alive_s
        return f"no reading for {silent_s:.0f} s" if silent_s > self._stale_s else None

    def is_ready(self) -> bool:
        """Whether programs are attached, and names known as far as they will be."""
        return self._is_ready and self.problem() is None

    def rendered(self, content_type: str, render: Callable[[], bytes]) -> bytes:
        """What `render` makes of all this, once for each change, however many ask for it."""
        with self._render_lock:
            version = self._version
            if version != self._rendered_version:
                self._rendered.clear()
                self._rendered_version = version
            if content_type not in self._rendered:
                self._rendered[content_type] = render()
            return self._rendered[content_type]

    def text(self, encode: Callable[[Any], bytes]) -> bytes:
        """All of it, as one of prometheus_client's encoders writes text."""
        families, others = self._copy()
        page = bytearray()
        for name, text, labels, found in families:
            times = ((key, _classic(one), one.sum_ns / 1e9) for key, one in found)
            exposition.add_histograms(page, name, text, labels, times)
        page += encode(_Collected(others))  # which knows how a page ends
        return bytes(page)

    def protobuf(self) -> bytes:
        """The same as protocol buffers, with native histograms."""
        families, others = self._copy()
        parts = []
        for name, text, labels, found in families:
            with_classic = ((key, one, _classic(one)) for key, one in found)
            parts.append(native.histograms(name, text, labels, with_classic))
        parts += map(native.simple, others)
        return b"".join(parts)

    def _copy(self) -> tuple[list[_Family], list[Metric]]:
        """Histograms, and all else, as it is now: no scrape holds up the tracing thread for long."""
        with self._lock:
            latencies = [(key, one.copy()) for key, one in self._latencies.items()]
            stages = [
                ((stage.name.lower(), *key), one.copy())
                for key, times in self._ways.items()
                for stage, one in times.items()
            ]
            counts, names, health = dict(self._counts), self._names, self._health
        families = [
            (
                "dnstrace_latency_seconds",
                "From the client's send of a query to its receive of the answer.",
                _LATENCY_LABELS,
                latencies,
            ),
            (
                "dnstrace_stage_seconds",
                "Parts of the way of a query and its answer, between two places they were seen at.",
                _WAY_LABELS,
                stages,
            ),
        ]
        others = [_counts(counts), *_own(health)]
        return families, [*others, _names(names)] if names else others

    def _add_transactions(self, labels: Labels, entry: Entry) -> None:
        key: tuple[str, ...] = (
            *_client(labels),
            _text(labels.service or labels.server_ip),
            _text(_pod(labels.backend_namespace, labels.backend_pod) or labels.backend_ip),
            _text(labels.type),
            _text(labels.rcode),
            _text(labels.protocol),
        )
        key = self._with_room(self._latencies, key, LATENCIES_MAX, is_other=labels.overflow)
        self._counts[*key, labels.status] += entry.count
        histogram = self._latencies.setdefault(key, Histogram())
        if Stage.TOTAL in entry.times:
            histogram.add(entry.times[Stage.TOTAL])

    def _add_way(self, labels: Labels, entry: Entry) -> None:
        backend = _pod(labels.backend_namespace, labels.backend_pod) or labels.backend_ip
        key: tuple[str, ...] = (*_client(labels), _text(backend))
        key = self._with_room(self._ways, key, WAYS_MAX, is_other=labels.overflow)
        times = self._ways.setdefault(key, {})
        for stage, histogram in entry.times.items():
            times.setdefault(stage, Histogram()).add(histogram)

    def _with_room(
        self, among: dict[tuple[str, ...], Any], key: tuple[str, ...], most: int, *, is_other: bool
    ) -> tuple[str, ...]:
        """The key, or what stands for it: its client's for all that find no room, or that of all."""
        client = key[: len(_CLIENT)]
        others = (*client, *(_OTHER,) * (len(key) - len(client)))
        if is_other:
            key = others
        if key not in among and len(among) >= most:
            self._forget(among)
        is_much = self._shares[id(among), *client] >= most // SHARE
        if key not in among and key != others and any(client) and is_much:
            key = others
        if key not in among and len(among) >= most:
            key = (_OTHER,) * len(key)
        if key not in among:
            self._shares[id(among), *client] += 1
        self._last_s[key] = time.monotonic()
        return key

    def _forget(self, among: dict[tuple[str, ...], Any]) -> None:
        """Makes room: whoever has long asked nothing has gone, as a rule."""
        if id(among) in self._has_made_room:
            return
        self._has_made_room.add(id(among))
        before_s = time.monotonic() - FORGET_S
        for key in [key for key in among if self._last_s.get(key, 0.0) < before_s]:
            del among[key]
            self._shares[id(among), *key[: len(_CLIENT)]] -= 1
            self._last_s.pop(key, None)
            for status in _STATUSES:
                self._counts.pop((*key, status), None)
        self._shares += Counter()  # keeps no zeros


@dataclass(frozen=True, slots=True)
class _Collected:
    """What an encoder asks for."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        """These."""
        return self.metrics


def _counts(counts: Mapping[tuple[str, ...], int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "dnstrace_transactions", "DNS transactions that ended.", labels=_COUNT_LABELS
    )
    for key, number in counts.items():
        family.add_metric(key, number)
    return family


def _names(names: Mapping[str, int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "dnstrace_top_name_transactions",
        "DNS transactions of the names asked for most, estimated; from 0 if one is among them again.",
        labels=("name",),
    )
    found: Counter[str] = Counter()
    for name, number in names.items():
        found[_text(name)] += number
    for name, number in found.items():
        family.add_metric((name,), number)
    return family


def _classic(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, up to each bound in seconds."""
    below = Counter[int]()
    beyond = 0
    for bucket, count in histogram.counts.items():
        # The least power of two that is above all of the bucket.
        exponent = bucket // PARTS + 4 if bucket >= PARTS else 4
        if exponent > _BOUNDS[-1]:
            beyond += count
        else:
            below[max(exponent, _BOUNDS[0])] += count
    so_far = 0
    buckets: list[tuple[str, float]] = []
    for exponent in _BOUNDS:
        so_far += below[exponent]
        buckets.append((repr((1 << exponent) / 1e9), so_far))
    buckets.append(("+Inf", so_far + beyond))
    return buckets


def _client(labels: Labels) -> tuple[str, str]:
    if labels.overflow and labels.pod is None:
        return _OTHER, _OTHER
    return _text(labels.namespace), _text(labels.pod)


def _pod(namespace: str | None, pod: str | None) -> str | None:
    return f"{namespace}/{pod}" if pod else None


def _text(text: str | None) -> str:
    return printable(text) if text else ""


def _own(health: Health) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    def counter(name: str, text: str, value: float) -> Metric:
        return CounterMetricFamily(f"dnstrace_{name}", text, value=value)

    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(f"dnstrace_{name}", text, value=value)

    yield InfoMetricFamily(
        "dnstrace_build",
        "What runs, and how it watches sockets.",
        value={"version": __version__, "hooks": health.hooks},
    )
    lost = CounterMetricFamily(
        "dnstrace_lost", "What was seen, but is in no transaction.", labels=("kind",)
    )
    for kind, number in health.lost.items():
        lost.add_metric((kind,), number)
    yield lost
    unmatched = CounterMetricFamily(
        "dnstrace_unmatched", "Messages without their counterpart.", labels=("kind",)
    )
    for kind, number in health.unmatched.items():
        unmatched.add_metric((kind,), number)
    yield unmatched
    yield counter(
        "recorded_transactions",
        "Transactions that were written; what was given up later is among the losses.",
        health.recorded,
    )
    yield counter(
        "unsampled_transactions", "Ordinary ones that are in the histograms alone.", health.not_kept
    )
    yield counter(
        "skipped_transactions",
        "Slow or failed ones that are in the histograms alone, for want of CPU budget.",
        health.skipped,
    )
    yield gauge(
        "sample_ratio",
        "Share of ordinary transactions that leave the kernel.",
        1 / health.sample if health.sample else 0.0,
    )
    yield counter("cpu_seconds", "CPU time of the tracer's own process.", health.cpu_s)
    yield gauge("resident_memory_bytes", "Memory of the tracer's own process.", health.rss_bytes)
    yield gauge("devices", "Network devices that are watched.", health.devices)
    entries = GaugeMetricFamily(
        "dnstrace_table_entries", "Entries in the kernel's tables.", labels=("table",)
    )
    capacity = GaugeMetricFamily(
        "dnstrace_table_capacity", "Room in the kernel's tables.", labels=("table",)
    )
    for table, (number, room) in health.tables.items():
        entries.add_metric((table,), number)
        capacity.add_metric((table,), room)
    yield entries
    yield capacity
    yield gauge(
        "names_up_to_date",
        "1: pods and services are known as they are now.",
        0 if health.names_problem else 1,
    )
    if health.names_age_s is not None:
        yield gauge(
            "names_age_seconds",
            "Since the API server was last heard of; it speaks up once a minute at least.",
            health.names_age_s,
        )
    yield gauge(
        "recording_up", "1: recordings, if any, are written.", 0 if health.recording_problem else 1
    )
