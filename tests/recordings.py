# SPDX-License-Identifier: Apache-2.0
"""Makes recordings of transactions that a test thinks up, by the recorder itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.continuous.recorder import Recorder
from tracer.stages import bounds, buckets_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

START_NS = 1_795_761_504_000_000_000
STAGES = {"application_send": 0.1, "node": 0.2, "server": 0.6, "wake_up": 0.1}


@dataclass(frozen=True, slots=True)
class Made:
    """One transaction."""

    time_ns: int = START_NS
    latency_ns: int | None = 1_000_000
    name: str = "www.example.com."
    pod: str | None = "web-0"
    namespace: str | None = "sre"
    backend: str = "coredns-1"
    type: str = "A"
    rcode: str | None = "NOERROR"
    status: str = "answered"
    comm: str = "dig"
    reason: str | None = None
    client_seen: bool = True
    by_server: bool = False

    def stages(self) -> dict[str, int]:
        """Nanoseconds in each, which add up."""
        if self.latency_ns is None or self.status != "answered":
            return {}
        parts = {name: int(self.latency_ns * share) for name, share in STAGES.items()}
        parts["server"] += self.latency_ns - sum(parts.values())
        return parts

    def row(self, weight: int = 1) -> dict[str, Any]:
        """As it is recorded."""
        last = {"kind": "drop", "direction": "query", "t_ns": 10, "reason": self.reason}
        return {
            "time_ns": self.time_ns,
            "kept": "sample",
            "weight": weight,
            "client_seen": self.client_seen,
            "by_server": self.by_server,
            "status": self.status,
            "id": 7,
            "protocol": "udp",
            "name": self.name,
            "type": self.type,
            "rcode": self.rcode,
            "latency_ns": self.latency_ns,
            "client": {
                "ip": "10.244.1.10", "port": 5, "comm": self.comm, "pid": 9,
                "namespace": self.namespace, "pod": self.pod,
            },
            "server": {"ip": "10.96.0.10", "port": 53, "service": "kube-system/kube-dns"},
            "backend": {
                "ip": "10.244.2.2", "port": 53, "namespace": "kube-system", "pod": self.backend,
            },
            "hops": [
                {"kind": "send", "direction": "query", "t_ns": 0, "owner": self.pod},
                *([last] if self.reason else []),
            ],
            "stages": self.stages(),
        }  # fmt: skip


def record(
    directory: Path,
    made: Sequence[Made],
    *,
    node: str = "node-1",
    every: int = 1,
    **coverage: Any,
) -> None:
    """Counts all, and keeps one of `every`; intervals are a second."""
    recorder = Recorder(
        directory, node, rotate_s=1e9, size_max=1 << 50, age_max_s=1e12, tell=lambda _: None
    )
    recorder.write("transactions", (one.row(every) for one in made[::every]))
    seconds = {one.time_ns // 10**9 for one in made}
    for second in sorted(seconds):
        now = [one for one in made if one.time_ns // 10**9 == second]
        times = {"time_start_ns": second * 10**9, "time_end_ns": (second + 1) * 10**9}
        recorder.write("histograms", ({**times, **row} for row in _histograms(now)))
        row = {"transactions": len(now), "recorded": len(now) // every, "not_kept": 0, "skipped": 0}
        recorder.write("coverage", [{**times, **row, "lost": {}, "unmatched": {}, **coverage}])
    recorder.close()
    assert recorder.problem is None


def _histograms(made: Iterable[Made]) -> Iterable[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[Made]] = {}
    for one in made:
        key = (
            one.namespace,
            one.pod,
            one.backend,
            one.type,
            one.rcode,
            one.status,
            one.client_seen,
            one.by_server,
        )
        groups.setdefault(key, []).append(one)
    for (namespace, pod, backend, type_, rcode, status, seen, by_server), members in groups.items():
        who = {
            "client_namespace": namespace, "client_pod": pod, "backend_ip": "10.244.2.2",
            "backend_namespace": "kube-system", "backend_pod": backend, "protocol": "udp",
            "client_seen": seen, "by_server": by_server,
        }  # fmt: skip
        asked = {
            "server_ip": "10.96.0.10", "server_port": 53, "service": "kube-system/kube-dns",
            "type": type_, "rcode": rcode, "status": status,
        }  # fmt: skip
        whole = [m.latency_ns for m in members if m.latency_ns is not None and status == "answered"]
        yield {**who, **asked, "stage": "total", **_counted(whole), "count": len(members)}
        for stage in STAGES:
            parts = [m.stages()[stage] for m in members if m.stages()]
            if parts:
                yield {**who, "stage": stage, **_counted(parts)}


def _counted(times: Sequence[int]) -> dict[str, Any]:
    counts = Counter(buckets_of(np.array(times, np.int64)).tolist()) if times else Counter()
    return {
        "count": len(times),
        "timed": len(times),
        "sum_ns": sum(times),
        "max_ns": max(times, default=None),
        "buckets": [
            {"lower_ns": bounds(bucket)[0], "upper_ns": bounds(bucket)[1], "count": count}
            for bucket, count in counts.items()
        ],
    }
