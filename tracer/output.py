# SPDX-License-Identifier: Apache-2.0
"""Where a trace goes: a live table, waterfalls, or JSON lines; and the summary that ends it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from tracer import streams
from tracer.export import jsonl
from tracer.run import Totals, losses
from tracer.transaction import Lookup, Transaction

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tracer.kernel.session import Session


class Output(Protocol):
    """One way of showing a trace."""

    def write(self, items: Sequence[Transaction | Lookup]) -> None:
        """Shows a batch."""

    def finish(self, session: Session, totals: Totals) -> None:
        """Shows the summary."""


def make_output(args: argparse.Namespace) -> Output:
    """The output that the command line asks for."""
    if args.json:
        return JsonOutput()
    return TextOutput(waterfalls=args.command == "path")


class JsonOutput:
    """JSON lines on stdout, the summary as the last of them; losses in words on stderr."""

    def write(self, items: Sequence[Transaction | Lookup]) -> None:
        """Writes a batch in one go."""
        lines = [
            jsonl.lookup(item) if isinstance(item, Lookup) else jsonl.transaction(item)
            for item in items
        ]
        self._write(b"".join(lines))

    def finish(self, session: Session, totals: Totals) -> None:
        """The summary line."""
        lost, unmatched = losses(session, totals)
        self._write(
            jsonl.summary(
                transactions=totals.transactions,
                lookups=totals.lookups,
                duration_ns=totals.duration_ns,
                lost=lost,
                unmatched=unmatched,
                problem=totals.names_problem,
            )
        )
        from tracer.show import summary

        lost.pop("filtered")
        for line in summary.losses(lost, unmatched):
            streams.say(line)

    def _write(self, lines: bytes) -> None:
        with streams.writing():
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()


class TextOutput:
    """For people: lines or waterfalls on stdout, the summary on stderr."""

    def __init__(self, *, waterfalls: bool) -> None:
        from tracer.show.live import LiveTable
        from tracer.show.path import PathView
        from tracer.show.summary import Summary

        self._view = PathView(sys.stdout) if waterfalls else LiveTable(sys.stdout)
        self._summary = Summary()

    def write(self, items: Sequence[Transaction | Lookup]) -> None:
        """Writes a batch in one go."""
        for item in items:
            if isinstance(item, Lookup):
                self._summary.add_lookup(item)
            else:
                self._summary.add(item)
        with streams.writing():
            self._view.write(items)

    def finish(self, session: Session, totals: Totals) -> None:
        """The summary, in words."""
        lost, unmatched = losses(session, totals)
        with streams.writing():
            sys.stdout.flush()
        streams.tell(self._summary.text(totals.duration_ns, lost, unmatched, totals.names_problem))
