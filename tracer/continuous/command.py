# SPDX-License-Identifier: Apache-2.0
"""`dnstrace continuous`, and the window of `dnstrace report`: what runs beside the loop."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.continuous import memory
from tracer.continuous.budget import Budget
from tracer.continuous.log import log
from tracer.continuous.loop import Continuous
from tracer.continuous.metrics import STALE_S, Figures
from tracer.continuous.recorder import Recorder, RecorderError
from tracer.continuous.server import Server
from tracer.continuous.top_names import TopNames
from tracer.continuous.usage import cpu_s
from tracer.kernel.session import Keeping
from tracer.transaction import Backend as TransactionBackend
from tracer.transaction import Client, Transaction
from tracer.transaction import Server as TransactionServer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tracer.cluster.identities import Identities
    from tracer.cluster.sources import Source
    from tracer.continuous.labels import Labels
    from tracer.filters import Filters
    from tracer.keep_up import KeepUp
    from tracer.kernel.session import Session
    from tracer.run import Stop

_WINDOW_INTERVAL_S = 1.0
_NO_BUDGET = 1e9
# How long a scrape keeps the interpreter before tracing has its turn, and the other way round. Where
# all CPUs are busy, a turn takes long to come; with Python's own 5 ms, a page took seven seconds.
_TURN_S = 0.02
_MISSED = 3  # intervals without a reading, and we are not well


class CannotServe(Exception):
    """The metrics cannot be served there. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the command line has made ready by now."""

    session: Session
    identities: Identities
    keep_up: KeepUp
    stop: Stop
    filters: Filters
    node: str
    source: Source


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where what is counted goes."""

    figures: Figures
    recorder: Recorder | None
    server: Server | None


@contextmanager
def outlets(args: argparse.Namespace, node: str) -> Iterator[Outlets]:
    """Open in the block. Raises CannotServe and RecorderError."""
    figures = Figures(max(STALE_S, _MISSED * args.interval / 1e9))
    recorder = _recorder(args, args.record, node) if args.record else None
    server = None
    try:
        server = _serve(args.metrics, figures) if args.metrics else None
        yield Outlets(figures, recorder, server)
    finally:
        if server:
            server.close()
        if recorder:
            recorder.close()


def run(args: argparse.Namespace, around: Surroundings, outlets: Outlets) -> None:
    """Until stopped."""
    memory.keep_little()
    sys.setswitchinterval(_TURN_S)
    asked = Keeping(slower_ns=args.slower, share=args.sample, notable_share=1)
    if outlets.recorder is None and not args.metrics_names:  # nobody would read what leaves
        asked = Keeping(slower_ns=args.slower, share=0, notable_share=0)
    budget = Budget(args.cpu_budget, asked, cpu_s)
    loop = _loop(
        args, around, outlets.figures, outlets.recorder, budget, TopNames(args.metrics_names)
    )
    loop.interval_s = args.interval / 1e9
    at = _netloc(args.metrics[0], outlets.server.port) if outlets.server else None
    log(
        "info", "tracing",
        hooks=around.session.hooks,
        devices=around.session.devices.count(),
        metrics=f"http://{at}/metrics" if at else None,
        record=str(args.record) if args.record else None,
    )  # fmt: skip
    loop.run()
    _tell_end(loop)


def measure(args: argparse.Namespace, around: Surroundings, directory: Path) -> None:
    """Records a window, all of it, for a report. Raises RecorderError."""
    recorder = Recorder(
        directory, around.node, rotate_s=3600.0, size_max=1 << 62, age_max_s=1e9,
        tell=lambda problem: None if problem is None else log("error", problem),
    )  # fmt: skip
    budget = Budget(_NO_BUDGET, Keeping(slower_ns=0, share=1, notable_share=1), cpu_s)
    loop = _loop(args, around, Figures(), recorder, budget, TopNames(0))
    loop.interval_s = _WINDOW_INTERVAL_S
    loop.run()
    if recorder.problem is not None:
        raise RecorderError(f"the report would not be complete: {recorder.problem}")


def labels_wanted(filters: Filters, identities: Identities) -> Callable[[Labels], bool]:
    """The filters, of what the kernel has counted. Stages are not told apart by what was asked."""
    predicate = filters.predicate(identities.labels)

    def wanted(labels: Labels) -> bool:
        if labels.overflow and labels.pod is None:
            return filters.is_open
        return predicate(_as_transaction(labels))

    return wanted


def _as_transaction(labels: Labels) -> Transaction:
    backend = None
    if labels.backend_ip is not None:
        backend = TransactionBackend(
            labels.backend_ip, 0, labels.backend_namespace, labels.backend_pod
        )
    return Transaction(
        time_ns=0,
        status=labels.status,  # type: ignore[arg-type]
        dns_id=None,
        protocol="udp",
        name=None,
        type=labels.type,
        rcode=labels.rcode,
        flags=(),
        latency_ns=None,
        attempt=1,
        client=Client(
            "", 0, namespace=labels.namespace, pod=labels.pod, container=labels.container
        ),
        server=TransactionServer(labels.server_ip or "", labels.server_port or 0, labels.service),
        backend=backend,
        query=b"",
        response=None,
        response_len=None,
        make_hops=tuple,
    )


def _loop(
    args: argparse.Namespace,
    around: Surroundings,
    figures: Figures,
    recorder: Recorder | None,
    budget: Budget,
    top_names: TopNames,
) -> Continuous:
    return Continuous(
        around.session,
        around.identities,
        around.keep_up,
        around.stop,
        figures,
        recorder,
        budget,
        args.timeout,
        _WINDOW_INTERVAL_S,
        labels_wanted(around.filters, around.identities),
        around.filters.predicate(around.identities.labels),
        around.source,
        top_names,
    )


def _recorder(args: argparse.Namespace, directory: Path, node: str) -> Recorder:
    def tell(problem: str | None) -> None:
        if problem is None:
            log("info", "recordings are written again", directory=str(directory))
        else:
            log("error", problem, directory=str(directory))

    recorder = Recorder(
        directory, node,
        rotate_s=args.rotate / 1e9, size_max=args.keep_size, age_max_s=args.keep_age, tell=tell,
    )  # fmt: skip
    if recorder.taken_over:
        log(
            "info", "recordings that the last run did not complete are completed",
            journals=recorder.taken_over, directory=str(directory),
        )  # fmt: skip
    return recorder


def _serve(where: tuple[str, int], figures: Figures) -> Server:
    host, port = where
    try:
        return Server(host, port, figures)
    except OSError as error:
        raise CannotServe(
            f"--metrics {_netloc(host, port)}: {error.strerror}; give another ADDR:PORT, or off"
        ) from error


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tell_end(loop: Continuous) -> None:
    lost, unmatched = loop.losses()
    numbers: dict[str, float | str | None] = {f"lost_{kind}": n for kind, n in lost.items() if n}
    numbers |= {f"unmatched_{kind}": n for kind, n in unmatched.items() if n}
    log(
        "info", "ended",
        transactions=loop.totals.transactions,
        seconds=round(loop.totals.duration_ns / 1e9, 3),
        cpu_seconds=round(loop.cpu_used_s(), 3),
        **numbers,
    )  # fmt: skip
