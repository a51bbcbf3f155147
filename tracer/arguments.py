# SPDX-License-Identifier: Apache-2.0
"""The command line: what can be asked for, and what is wrong with what was."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tracer import __version__
from tracer.filters import duration_ns

if TYPE_CHECKING:
    from collections.abc import Callable

_DESCRIPTION = """\
Shows every DNS query of this node's pods: who asked, what for, through which hops, which replica
answered, how long each step took, and what was wasted or lost.

commands:
  dnstrace [FILTER...]        one line per DNS transaction, as it completes
  dnstrace path [FILTER...]   each transaction as a waterfall of its hops
  dnstrace continuous         runs until stopped: metrics, recordings
  dnstrace report [FILE...]   where the time goes: from recordings, or a live window
  dnstrace doctor             what this host offers, what is missing, and the fix
  dnstrace lab up|down|run    a small cluster of network namespaces on this machine
"""
_EXAMPLES = """\
examples:
  sudo dnstrace --namespace sre             all DNS of the pods in namespace sre
  sudo dnstrace --failed --slower 100ms     what failed and took longer than 100 ms
  sudo dnstrace path --name 'www.*'         where the time goes for these names
  sudo dnstrace --json --duration 30s       JSON lines for half a minute, then a summary
"""
COMMANDS = ("path", "continuous", "report", "doctor", "lab")
_SPELLINGS = {"--continuous": "continuous", "--report": "report"}
_OF_SINGLE_ONES = ("--pid", "--comm", "--name", "--failed")
_COUNTED = (
    " (a filter of single transactions; here the kernel counts them by pod, server, backend, type "
    "and rcode)"
)
_NAMES_MAX = 1000  # as labels of metrics
_TIMEOUT_MAX_NS = 60 * 10**9


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `command` set. Exits with status 2 when they are wrong."""
    argv = [_SPELLINGS.get(argv[0], argv[0]), *argv[1:]] if argv else []
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        _live().error(f"there is no command {argv[0]!r}{_near(argv[0])}")
    command = argv[0] if argv and argv[0] in COMMANDS else "live"
    rest = argv if command == "live" else argv[1:]
    parser = _PARSERS[command]()
    args, beyond = parser.parse_known_args(rest)
    if beyond:
        is_single = command == "continuous" and beyond[0].partition("=")[0] in _OF_SINGLE_ONES
        parser.error(f"unrecognized arguments: {' '.join(beyond)}{_COUNTED if is_single else ''}")
    args.command = command
    if command == "continuous" and args.metrics_names:
        if args.metrics is None:
            parser.error("--metrics-names: with --metrics off, nobody would see them")
        if not args.sample:
            parser.error("--metrics-names: with --sample 0, only slow and failed ones would count")
    return args


class _Parser(argparse.ArgumentParser):
    """One whose last word is what is wrong, and not buried under all that would be right."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _near(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(COMMANDS)})"


def _live() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dnstrace",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dnstrace {__version__}")
    _add_tracing(parser)
    return parser


def _path() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dnstrace path",
        description="Shows each transaction as a waterfall of hops, with the time between them.",
        allow_abbrev=False,
    )
    _add_tracing(parser)
    return parser


def _continuous() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dnstrace continuous",
        description="Runs until stopped. Transactions are counted in the kernel; only slow, failed "
        "and sampled ones leave it. SIGHUP completes the recording that is being written.",
        allow_abbrev=False,
    )
    _add_pods(parser.add_argument_group("filters (all must hold; globs are quoted: 'web-*')"))
    _add_names(parser)
    where = parser.add_argument_group("where it goes")
    where.add_argument("--metrics", type=_endpoint, default=("127.0.0.1", 9353),
                       metavar="ADDR:PORT",
                       help="serves /metrics, /healthz and /readyz (default 127.0.0.1:9353)")  # fmt: skip
    where.add_argument("--metrics-names", type=_few, default=0, metavar="K",
                       help="adds the K names that are asked for most, estimated from what leaves "
                       "the kernel: names of strangers then become labels (default 0)")  # fmt: skip
    where.add_argument("--record", type=Path, metavar="DIR",
                       help="writes Parquet files there, for 'dnstrace report' and others")  # fmt: skip
    where.add_argument("--rotate", type=_time, default=300 * 10**9, metavar="TIME",
                       help="how often files are completed (default 5m)")  # fmt: skip
    where.add_argument("--keep-size", type=_size, default=1 << 30, metavar="SIZE",
                       help="all recordings together, then the oldest go (default 1GiB)")  # fmt: skip
    where.add_argument("--keep-age", type=_age, default=7 * 86400, metavar="TIME",
                       help="how old recordings become (default 7d)")  # fmt: skip
    _add_sampling(parser)
    how = parser.add_argument_group("limits")
    how.add_argument("--cpu-budget", type=_percentage, default=0.01, metavar="PERCENT",
                     help="of one core, for all but the programs in the kernel; to keep to it, "
                     "fewer transactions leave (default 1%%)")  # fmt: skip
    how.add_argument("--interval", type=_time, default=10 * 10**9, metavar="TIME",
                     help="how often counts are read (default 10s)")  # fmt: skip
    _add_running(parser)
    return parser


def _report() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dnstrace report",
        description="Where the time goes, stage by stage: from recordings (files, or directories "
        "of them, of one node or several), or without any, from a window of --duration.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="recording, or directory of recordings")  # fmt: skip
    only = parser.add_argument_group("filters (all must hold; globs are quoted: 'web-*')")
    _add_pods(only)
    _add_questions(only)
    _add_names(parser)
    how = parser.add_argument_group("output")
    how.add_argument("--json", action="store_true", help="one JSON object on stdout")
    how.add_argument("--html", type=Path, metavar="FILE", help="a page for a browser, in one file")
    _add_running(parser)
    return parser


def _doctor() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dnstrace doctor",
        description="Says what this kernel and host offer, what is missing, and how to get it. "
        "Exits with 3 if nothing can be traced.",
        allow_abbrev=False,
    )
    _add_names(parser)
    return parser


def _lab() -> argparse.ArgumentParser:
    from tracer.lab import cli as lab  # which tracing does without

    parser = _Parser(
        prog="dnstrace lab",
        description="A small cluster of network namespaces, with real CoreDNS and real DNAT.",
        allow_abbrev=False,
    )
    lab.add_arguments(parser)
    return parser


_PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "live": _live,
    "path": _path,
    "continuous": _continuous,
    "report": _report,
    "doctor": _doctor,
    "lab": _lab,
}


def _add_tracing(parser: argparse.ArgumentParser) -> None:
    only = parser.add_argument_group("filters (all must hold; globs are quoted: 'web-*')")
    _add_pods(only)
    _add_questions(only)
    _add_names(parser)
    how = parser.add_argument_group("output and limits")
    how.add_argument("--json", action="store_true", help="JSON lines on stdout")
    how.add_argument("--count", type=_positive, metavar="N", help="stop after N transactions")
    how.add_argument("--max-in-flight", type=_slots, default=8192, metavar="N",
                     help="queries followed at a time, a power of two (default 8192)")  # fmt: skip
    _add_running(parser)


def _add_pods(only: argparse._ArgumentGroup) -> None:
    """What the kernel counts by, so that it can be told apart afterwards."""
    only.add_argument("-n", "--namespace", action="append", default=[], metavar="NS",
                      help="pods of this namespace (repeatable)")  # fmt: skip
    only.add_argument(
        "--pod", action="append", default=[], metavar="GLOB", help="pods of this name"
    )
    only.add_argument("-l", "--selector", metavar="LABELS",
                      help="pods with these labels: app=web,tier!=cache")  # fmt: skip
    only.add_argument("--container", metavar="NAME", help="containers of this name")
    only.add_argument("--type", metavar="TYPE", help="query type: A, AAAA, PTR, ...")
    only.add_argument("--rcode", metavar="RCODE", help="response code: NOERROR, NXDOMAIN, ...")
    only.add_argument("--server", metavar="IP", help="address that the client asked")
    only.add_argument("--backend", metavar="IP|POD", help="who answered, after NAT")
    only.add_argument("--side", choices=("client", "server"), default="client",
                      help="which side --namespace and --pod speak of (default client)")  # fmt: skip
    only.add_argument("--port", type=_port, action="append", metavar="N",
                      help="port that counts as DNS (repeatable; default: those of DNS services)")  # fmt: skip


def _add_questions(only: argparse._ArgumentGroup) -> None:
    """What single transactions tell."""
    only.add_argument("--pid", type=_positive, metavar="PID", help="one process")
    only.add_argument("--comm", metavar="NAME", help="processes of this name")
    only.add_argument("--name", metavar="GLOB", help="query name, any case, final dot or not")
    only.add_argument("--failed", action="store_true", help="no answer, or an error code")
    only.add_argument("--slower", metavar="TIME", help="took at least this long: 5ms, 1.5s")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("what leaves the kernel, to be recorded")
    how.add_argument("--slower", type=_time, metavar="TIME", default=100 * 10**6,
                     help="all that takes at least this long (default 100ms)")  # fmt: skip
    how.add_argument("--sample", type=_share, default=100, metavar="1/N",
                     help="and of the rest, one of N; 0: none (default 1/100)")  # fmt: skip


def _add_running(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("running")
    how.add_argument("--duration", type=_time, metavar="TIME", help="stop after this time: 30s, 5m")
    how.add_argument("--timeout", type=_timeout, default=5 * 10**9, metavar="TIME",
                     help="how long a query may stay unanswered (default 5s, at most 60s)")  # fmt: skip
    how.add_argument("--hooks", choices=("auto", "kprobe", "tracepoint"), default="auto",
                     help="how sockets are watched (default: what this kernel offers)")  # fmt: skip


def _add_names(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("names of pods and services")
    how.add_argument("--kubeconfig", metavar="FILE",
                     help="way to the API server (default: where kubectl and installers keep it)")  # fmt: skip
    how.add_argument("--context", metavar="NAME", help="context of the kubeconfig")
    how.add_argument("--node", action="append", default=[], metavar="NAME",
                     help="this machine's node (repeatable; default: found by its addresses)")  # fmt: skip
    how.add_argument(
        "--pods", type=Path, metavar="FILE", help="pod metadata from a file, not an API server"
    )
    how.add_argument(
        "--no-kubernetes", action="store_true", help="no pod metadata: processes and addresses only"
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _slots(text: str) -> int:
    number = _positive(text)
    if number & (number - 1) or not 64 <= number <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from 64 to 1048576")
    return number


def _time(text: str) -> int:
    try:
        ns = duration_ns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if ns <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return ns


def _timeout(text: str) -> int:
    ns = _time(text)
    if ns > _TIMEOUT_MAX_NS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time up to 60s")
    return ns


_SIZE = re.compile(r"(\d{1,12})(KiB|MiB|GiB|TiB)", re.ASCII)
_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_AGE = re.compile(r"(\d{1,6})(m|h|d)", re.ASCII)
_AGE_UNITS_S = {"m": 60, "h": 3600, "d": 86400}


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512MiB, 1GiB")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def _age(text: str) -> int:
    match = _AGE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 90m, 12h, 7d")
    return int(match[1]) * _AGE_UNITS_S[match[2]]


def _share(text: str) -> int:
    one, _, number = text.partition("/")
    if text == "0":
        return 0
    if one != "1":
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; write 1/100, 1/1 or 0")
    return _positive(number)


def _few(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > _NAMES_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {_NAMES_MAX}")
    return int(text)


def _percentage(text: str) -> float:
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = 0.0
    if not text.endswith("%") or not 0.0 < number <= 6400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of a core; write 1%")
    return number / 100


def _endpoint(text: str) -> tuple[str, int] | None:
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        colon = ""
    if not colon or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address and a port; write 127.0.0.1:9353, [::]:9353, or off"
        )
    return host, int(port)
