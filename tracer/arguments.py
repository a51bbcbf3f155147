# SPDX-License-Identifier: Apache-2.0
"""The command line: what can be asked for, and what is wrong with what was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tracer import __version__
from tracer.filters import duration_ns
from tracer.lab import cli as lab

if TYPE_CHECKING:
    from collections.abc import Callable

_DESCRIPTION = """\
Shows every DNS query of this node's pods: who asked, what for, through which hops, which replica
answered, how long each step took, and what was wasted or lost.

commands:
  dnstrace [FILTER...]        one line per DNS transaction, as it completes
  dnstrace path [FILTER...]   each transaction as a waterfall of its hops
  dnstrace doctor             what this host offers, what is missing, and the fix
  dnstrace lab up|down|run    a small cluster of network namespaces on this machine
"""
_EXAMPLES = """\
examples:
  sudo dnstrace --namespace sre             all DNS of the pods in namespace sre
  sudo dnstrace --failed --slower 100ms     what failed, or took longer than 100 ms
  sudo dnstrace path --name 'www.*'         where the time goes for these names
  sudo dnstrace --json --duration 30s       JSON lines for half a minute, then a summary
"""
COMMANDS = ("path", "doctor", "lab")
_TIMEOUT_MAX_NS = 60 * 10**9


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `command` set. Exits with status 2 when they are wrong."""
    command = argv[0] if argv and argv[0] in COMMANDS else "live"
    rest = argv if command == "live" else argv[1:]
    parser = _PARSERS[command]()
    args = parser.parse_args(rest)
    args.command = command
    return args


def _live() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    parser = argparse.ArgumentParser(
        prog="dnstrace path",
        description="Shows each transaction as a waterfall of hops, with the time between them.",
        allow_abbrev=False,
    )
    _add_tracing(parser)
    return parser


def _doctor() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="dnstrace doctor",
        description="Says what this kernel and host offer, what is missing, and how to get it. "
        "Exits with 3 if nothing can be traced.",
        allow_abbrev=False,
    )


def _lab() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dnstrace lab",
        description="A small cluster of network namespaces, with real CoreDNS and real DNAT.",
        allow_abbrev=False,
    )
    lab.add_arguments(parser)
    return parser


_PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "live": _live,
    "path": _path,
    "doctor": _doctor,
    "lab": _lab,
}


def _add_tracing(parser: argparse.ArgumentParser) -> None:
    only = parser.add_argument_group("filters (all must hold; globs are quoted: 'web-*')")
    only.add_argument("-n", "--namespace", action="append", default=[], metavar="NS",
                      help="pods of this namespace (repeatable)")  # fmt: skip
    only.add_argument(
        "--pod", action="append", default=[], metavar="GLOB", help="pods of this name"
    )
    only.add_argument("--container", metavar="NAME", help="containers of this name")
    only.add_argument("--pid", type=_positive, metavar="PID", help="one process")
    only.add_argument("--comm", metavar="NAME", help="processes of this name")
    only.add_argument("--name", metavar="GLOB", help="query name, any case, final dot or not")
    only.add_argument("--type", metavar="TYPE", help="query type: A, AAAA, PTR, ...")
    only.add_argument("--rcode", metavar="RCODE", help="response code: NOERROR, NXDOMAIN, ...")
    only.add_argument("--failed", action="store_true", help="no answer, or an error code")
    only.add_argument("--slower", metavar="TIME", help="took at least this long: 5ms, 1.5s")
    only.add_argument("--server", metavar="IP", help="address that the client asked")
    only.add_argument("--backend", metavar="IP|POD", help="who answered, after NAT")
    only.add_argument("--side", choices=("client", "server"), default="client",
                      help="which side --namespace and --pod speak of (default client)")  # fmt: skip
    only.add_argument("--port", type=_port, action="append", metavar="N",
                      help="port that counts as DNS (repeatable; default 53)")  # fmt: skip
    how = parser.add_argument_group("output and limits")
    how.add_argument("--json", action="store_true", help="JSON lines on stdout")
    how.add_argument("--duration", type=_time, metavar="TIME", help="stop after this time: 30s, 5m")
    how.add_argument("--count", type=_positive, metavar="N", help="stop after N transactions")
    how.add_argument("--timeout", type=_timeout, default=5 * 10**9, metavar="TIME",
                     help="how long a query may stay unanswered (default 5s, at most 60s)")  # fmt: skip
    how.add_argument(
        "--pods",
        type=Path,
        metavar="FILE",
        help="pod metadata from a file (default: the lab's, if it is up)",
    )
    how.add_argument(
        "--no-kubernetes", action="store_true", help="no pod metadata: processes and addresses only"
    )
    how.add_argument("--hooks", choices=("auto", "kprobe", "tracepoint"), default="auto",
                     help="how sockets are watched (default: what this kernel offers)")  # fmt: skip
    how.add_argument("--max-in-flight", type=_slots, default=8192, metavar="N",
                     help="queries followed at a time, a power of two (default 8192)")  # fmt: skip


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
