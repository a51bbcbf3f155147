# SPDX-License-Identifier: Apache-2.0
"""What tracing costs: `tools/bench`, as root.

dnsperf in a pod asks the DNS service of the lab cluster while nothing, empty programs, tcpdump or
the tracer watches. Every round has every variant once, each round in another order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import load, machine, paths, report
from bench.errors import BenchError
from bench.load import Load, Settings
from bench.variants import FILTERED, VARIANTS, Figures, Variant
from tracer.lab import Lab, LabError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from bench.paths import Way

_ROOT = Path(__file__).resolve().parents[1]
_TMPFS = Path("/dev/shm")  # noqa: S108 - files of one run, in a directory of their own
_WARM_UP_S = 1.0
_ATTEMPTS = 3
_UPLINK = "eth0"
_OTHER_SECONDS = 2.0
_OTHER_PORT = 9000
_OTHER_SERVER = "sre/api-0"
_FAILED, _INTERRUPTED = 1, 130


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the load under one variant."""

    load: Load
    figures: Figures
    elapsed_s: float
    lab_share: float  # of all processors' time
    others: float
    local: float  # share of the queries that the replica on the client's node answered


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    args = _arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    results = {}
    try:
        for server in args.server:
            results[server] = _measure(server, args)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    except (BenchError, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("bench: interrupted; everything is cleaned up", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measures what tracing costs. Takes the lab cluster for itself.",
        epilog="variants:\n" + "".join(f"  {v.name:10} {v.what}\n" for v in VARIANTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load per run (default 5)")
    parser.add_argument("--server", nargs="+", choices=("coredns", "unbound"),
                        default=["coredns", "unbound"])  # fmt: skip
    parser.add_argument("--variant", nargs="+", choices=names, default=names)
    parser.add_argument("--path", choices=paths.DESCRIPTIONS, default="same-node",
                        help="where the DNS service leads to (default same-node)")  # fmt: skip
    parser.add_argument("--rate", type=int, metavar="N",
                        help="queries per second (default: as many as are answered)")  # fmt: skip
    parser.add_argument("--disturbance", type=float, default=0.1, metavar="SHARE",
                        help="of the machine for other processes; beyond, a run is repeated "
                        "up to two times (default 0.1)")  # fmt: skip
    parser.add_argument("--only-rounds", action="store_true",
                        help="nothing per program, no other traffic")  # fmt: skip
    parser.add_argument("--clients", type=int, default=20, help="dnsperf -c (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="dnsperf -T (default 2)")
    parser.add_argument("--outstanding", type=int, default=100, help="dnsperf -q (default 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as JSON")
    return parser.parse_args()


def _measure(server: str, args: argparse.Namespace) -> dict[str, object]:
    """Everything with one kind of name server; prints as it goes."""
    settings = Settings(args.seconds, args.clients, args.threads, args.outstanding, args.rate)
    variants = [variant for variant in VARIANTS if variant.name in args.variant]
    about = machine.description(server)
    questions = load.queries()
    with (
        Lab(resolver=server, quiet_servers=True) as lab,
        tempfile.TemporaryDirectory(dir=_scratch_parent()) as directory,
    ):
        bench = Bench(lab, Path(directory), settings, args.disturbance)
        bench.write_queries(questions)
        paths.choose(lab, settings, bench.queries, args.path)
        load.run(settings.lasting(_WARM_UP_S), bench.queries)
        rounds = [bench.round(variants, number) for number in range(args.rounds)]
        print(_headline(about, settings, args.path, questions, rounds), end="")
        print(report.throughput(rounds))
        for table in (report.accounts(rounds), report.processes(rounds)):
            if table:
                print(table)
        result: dict[str, object] = {
            "machine": about,
            "settings": {**asdict(settings), "path": args.path},
            "rounds": [{name: asdict(run) for name, run in each.items()} for each in rounds],
            "ratios": {
                v.name: {to: report.ratios(rounds, v.name, to) for to in ("untraced", "empty")}
                for v in variants
            },
        }
        if not args.only_rounds:
            result["more"] = bench.more()
    return result


def _scratch_parent() -> Path | None:
    """Memory, where there is a file system for it, so that no disk is measured."""
    return _TMPFS if _TMPFS.is_dir() else None


@dataclass(slots=True)
class Bench:
    """The lab under load."""

    lab: Lab
    scratch: Path
    settings: Settings
    disturbance: float

    @property
    def queries(self) -> Path:
        """dnsperf's input."""
        return self.scratch / "queries"

    def write_queries(self, text: str) -> None:
        """Prepares dnsperf's input."""
        self.queries.write_text(text)

    def round(self, variants: Sequence[Variant], number: int) -> dict[str, Run]:
        """Each variant once, beginning with another one each time; in the order given."""
        start = number % len(variants)
        order = [*variants[start:], *variants[:start]]
        runs = {variant.name: self.run(variant) for variant in order}
        return {variant.name: runs[variant.name] for variant in variants}

    def run(self, variant: Variant) -> Run:
        """The load under one variant; again if other processes disturbed it too much."""
        for _ in range(_ATTEMPTS):
            machine.wait_until_quiet(self.disturbance)
            run = self._run_once(variant)
            done = f"{run.load.queries_per_s:,.0f} queries/s"
            print(f"  {variant.name:10}{done:>18}, others {run.others:.0%}", file=sys.stderr)
            if run.others <= self.disturbance:
                break
        return run

    def _run_once(self, variant: Variant) -> Run:
        with variant.watch(self.lab, self.scratch) as figures:
            sent_before = self._replicas()
            began = time.monotonic()
            with machine.cpu_share(figures.pid) as share:
                done = load.run(self.settings, self.queries)
            elapsed_s = time.monotonic() - began
            local, remote = (b - a for a, b in zip(sent_before, self._replicas(), strict=True))
        return Run(
            done, figures, elapsed_s, share.lab, share.others, local / max(1, local + remote)
        )

    def _replicas(self) -> tuple[int, int]:
        """Packets sent so far from the client's node to its own replica, and to elsewhere."""
        node = self.lab.pod(load.CLIENT).node
        listed = self.lab.node_exec(node, ["ip", "-j", "-s", "link", "show"], check=True).stdout
        sent = {link["ifname"]: link["stats64"]["tx"]["packets"] for link in json.loads(listed)}
        replica = next(pod for pod in self.lab.dns_pods if pod.node == node)
        return sent[replica.veth], sent[_UPLINK]

    def more(self) -> dict[str, object]:
        """What is measured apart, because measuring it costs: time per program run."""
        by_traffic: dict[str, object] = {}
        with machine.program_statistics():
            for traffic in ("dns", "udp", "tcp"):
                runs, packets = {}, {}
                for name, watch in (("empty", VARIANTS[1].watch), ("dnstrace", FILTERED)):
                    with watch(self.lab, self.scratch):
                        before = machine.program_runs()
                        packets[name] = self._send(traffic)
                        runs[name] = _differences(before, machine.program_runs())
                unit = {"dns": "query", "udp": "datagram", "tcp": "round trip"}[traffic]
                print(f"BPF programs under {traffic} traffic ({sum(packets.values()):,} of it)")
                print(report.programs(runs, packets, unit))
                by_traffic[traffic] = {"programs": runs, "sent": packets}
        return {"programs": by_traffic}

    def _send(self, traffic: str) -> int:
        """Traffic for a while; how much."""
        if traffic == "dns":
            return load.run(self.settings.lasting(_OTHER_SECONDS), self.queries).sent
        return self._send_other(traffic)

    def _send_other(self, transport: str) -> int:
        address = self.lab.pod(_OTHER_SERVER).ipv4
        program = [sys.executable, "-m", "bench.traffic", transport]
        where = [address, str(_OTHER_PORT)]
        serve = [*program, "serve", *where, str(_OTHER_SECONDS + 1)]
        with self.lab.popen(_OTHER_SERVER, serve, stdout=subprocess.PIPE, cwd=_ROOT) as server:
            try:
                _ = server.stdout and server.stdout.readline()  # it listens
                sent = self.lab.run(
                    load.CLIENT,
                    [*program, "send", *where, str(_OTHER_SECONDS)],
                    cwd=_ROOT,
                    check=True,
                    timeout=_OTHER_SECONDS + 20,
                )
            finally:
                server.kill()
        return int(sent.stdout)


def _differences(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    return {
        name: (ns - before.get(name, (0, 0))[0], count - before.get(name, (0, 0))[1])
        for name, (ns, count) in after.items()
    }


def _headline(
    about: dict[str, str],
    settings: Settings,
    way: Way,
    questions: str,
    rounds: Sequence[dict[str, Run]],
) -> str:
    runs = list(itertools.chain.from_iterable(each.values() for each in rounds))
    local = [run.local for run in runs]
    distinct = len(set(questions.splitlines()))
    return (
        f"\n{about['server']}, Linux {about['kernel']}, {about['cores']} x {about['cpu']}, "
        f"{about['memory']}\n"
        f"dnsperf {about['dnsperf']} {' '.join(settings.options())} for {settings.seconds:g} s, "
        f"{len(rounds)} rounds; {distinct} different questions\n"
        f"path: pod {load.CLIENT} - veth - node - DNAT of {load.SERVICE_IP} - "
        f"{paths.DESCRIPTIONS[way]}\n"
        f"({min(local):.0%} to {max(local):.0%} of the queries stayed on the node)\n\n"
    )


if __name__ == "__main__":
    sys.exit(main())
