# SPDX-License-Identifier: Apache-2.0
"""The live view: a line per transaction as it completes, and one per lookup that went badly.

On a terminal the columns fit its width, long values are shortened in the middle, and a wide one
shows more columns. Into a pipe go all values in full, the same columns always, no spaces in any of
them but the last two (the latency and the answer), and no colour.

SERVER is whom the client addressed, and after the arrow who answered, where NAT made that another;
a narrow terminal shows only the latter. STATUS is the rcode; NODATA where there is no error and no
answer either; TC where the answer was truncated; in small letters what happened instead of an
answer.

ANSWER is where aliases lead and the first of the records; how long it may be remembered that there
are none, which the SOA record says; the extended error.

rich says what the terminal can do. The lines are made by plain formatting, since thousands a second
may come.
"""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, NamedTuple, TextIO

from rich.console import Console

from tracer.show import answer, upstream
from tracer.show.cells import address, ansi, clean, duration, encodable, fit, fit_name
from tracer.transaction import Lookup

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tracer.transaction import Client, Transaction

NS_PER_S = 1_000_000_000
SLOW_NS = 100_000_000
VERY_SLOW_NS = NS_PER_S

_WIDTH_MIN = 80
_TYPE_WIDTH = 5
_STATUS_WIDTH = 8
_LATENCY_WIDTH = 7
_PROTOCOL_WIDTH = 5
_ATTEMPT_WIDTH = 3
_HOPS_WIDTH = 4
_BOTH_SERVERS_WIDTH = 22
_LOOKUP_FACTS_WIDTH = 54  # of what is said about a lookup beside its question
_HEADER_EVERY_MIN = 10
_ANSWER_WIDTH = 20  # at least, where there is room for it
_NO_ANSWERS = b"\0\0"
_FAILURES = {"SERVFAIL", "REFUSED", "FORMERR", "NOTIMP", "timeout", "dropped", "refused"}
_DISAPPOINTMENTS = {"NXDOMAIN", "NODATA", "TC"}


class _Layout(NamedTuple):
    """Widths of the columns that vary, and which others there are."""

    client: int
    name: int
    server: int
    process: int = 0
    ms: bool = False  # whether the time has milliseconds
    attempt: bool = False
    protocol: bool = False
    hops: bool = False
    answer: int = 0
    piped: bool = False


_NARROWEST = _Layout(client=12, name=20, server=14)
_PIPED = _Layout(36, 48, 36, process=16, ms=True, attempt=True, protocol=True, answer=6, piped=True)


class LiveTable:
    """Lines for one stream. `width` and `color` override what is found out about it."""

    def __init__(self, stream: TextIO, width: int | None = None, color: bool | None = None) -> None:
        self._stream = stream
        self._console = Console(file=stream)
        self._width = width
        self._terminal = width is not None or self._console.is_terminal
        if color is None:
            color = self._console.is_terminal and not self._console.no_color
        self._bad = ansi("red", color=color)
        self._warn = ansi("yellow", color=color)
        self._bold = ansi("bold", color=color)
        self._dim = ansi("dim", color=color)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._second = -1
        self._time = ""
        self._lines_to_header = 0
        self._measured = 0
        self._layout = _PIPED
        self._measure()

    def header(self) -> str:
        """The names of the columns."""
        layout = self._layout
        cells = [
            "TIME".ljust(12 if layout.ms else 8),
            "CLIENT".ljust(layout.client),
            "NAME".ljust(layout.name),
            "TYPE".ljust(_TYPE_WIDTH),
            "SERVER".ljust(layout.server),
        ]
        if layout.process:
            cells.insert(2, "PROCESS".ljust(layout.process))
        if layout.protocol:
            cells.append("PROTO")
        if layout.attempt:
            cells.append("TRY")
        if layout.hops:
            cells.append("HOPS")
        cells += ["STATUS".ljust(_STATUS_WIDTH), "LATENCY".rjust(_LATENCY_WIDTH)]
        if layout.answer:
            cells.append("ANSWER".ljust(layout.answer))
        return self._colored(" ".join(cells), self._bold)

    def line(self, t: Transaction) -> str:
        """One transaction, without a line end."""
        layout = self._layout
        second, ns = divmod(t.time_ns, NS_PER_S)
        if second != self._second:
            self._second = second
            self._time = time.strftime("%H:%M:%S", time.localtime(second))
        clock = f"{self._time}.{ns // 1_000_000:03d}" if layout.ms else self._time
        name = t.name or "-"
        status = _status(t)
        latency = duration(t.latency_ns)
        client = _client(t.client, with_process=layout.piped or bool(layout.process))
        server = _servers(t, both=layout.server >= _BOTH_SERVERS_WIDTH)
        if layout.piped:
            line = (
                f"{clock} {_field(client):<36} {_field(_process(t.client)):<16} {name:<48}"
                f" {t.type or '-':<5} {_field(server):<36} {t.protocol:<5} {t.attempt:>3}"
                f" {status:<8} {latency:>7} {answer.short(t)}"
            )
            return self._encodable(line.rstrip())
        cells = [
            clock,
            fit(client, layout.client),
            fit_name(name, layout.name),
            fit(t.type or "-", _TYPE_WIDTH),
            fit(server, layout.server),
        ]
        if layout.process:
            cells.insert(2, fit(_process(t.client), layout.process))
        if layout.protocol:
            cells.append(t.protocol.ljust(_PROTOCOL_WIDTH))
        if layout.attempt:
            cells.append(f"{t.attempt:>{_ATTEMPT_WIDTH}}")
        if layout.hops:
            cells.append(f"{len(t.hops):>{_HOPS_WIDTH}}")
        cells.append(self._status_cell(status))
        cells.append(self._latency_cell(t.latency_ns, latency))
        if layout.answer:
            cells.append(fit(answer.short(t), layout.answer))
        return self._encodable(" ".join(cells))

    def lookup(self, found: Lookup) -> str | None:
        """What a lookup wasted or lost and how to avoid that, indented; None if it is nothing."""
        if not found.wasted and found.advice is None:
            return None
        question = found.question
        if self._terminal:
            question = fit_name(question, min(len(question), self._room() - _LOOKUP_FACTS_WIDTH))
        facts = f"  └ {question}: {found.queries} queries"
        if found.wasted:
            by = "the search list" if found.ndots is None else f"ndots:{found.ndots}"
            facts += f", {found.wasted} wasted by {by} ({duration(found.wasted_ns)})"
        elif found.latency_ns is not None:
            facts += f", {duration(found.latency_ns)}"
        if found.advice is None:
            rows = [facts]
        elif self._terminal:
            indent = "    "
            rows = [
                facts,
                *textwrap.wrap(
                    found.advice, self._room() - 4, initial_indent=indent, subsequent_indent=indent
                ),
            ]
        else:
            rows = [f"{facts} — {found.advice}"]
        return "\n".join(self._colored(row, self._dim) for row in rows)

    def because(self, t: Transaction) -> str | None:
        """Whom its server waited for too long, or in vain, indented; None if for nobody."""
        found = upstream.in_short(t) or t.problem
        if found is None:
            return None
        text = f"  └ {found}"
        return self._colored(
            fit(text, self._room()).rstrip() if self._terminal else text, self._dim
        )

    def write(self, items: Iterable[Transaction | Lookup]) -> None:
        """Writes a batch in one go, with the header where a reader would miss it."""
        lines: list[str] = []
        if self._terminal:
            self._measure()
        for item in items:
            if isinstance(item, Lookup):
                shown = self.lookup(item)
            else:
                shown = "\n".join(filter(None, (self.line(item), self.because(item))))
            if shown is None:
                continue
            if self._lines_to_header <= 0:
                lines.append(self.header())
                self._lines_to_header = self._header_every()
            lines.append(shown)
            if self._terminal:
                self._lines_to_header -= 1 + shown.count("\n")
        if lines:
            lines.append("")
            self._stream.write("\n".join(lines))
            self._stream.flush()

    def _header_every(self) -> int:
        return max(self._console.height - 2, _HEADER_EVERY_MIN) if self._terminal else 1

    def _room(self) -> int:
        return max(self._measured, _WIDTH_MIN)

    def _measure(self) -> None:
        if not self._terminal:
            return
        width = self._console.width if self._width is None else self._width
        if width != self._measured:
            self._measured = width
            self._layout = _layout(width)
            self._lines_to_header = 0

    def _status_cell(self, status: str) -> str:
        cell = fit(status, _STATUS_WIDTH)
        if status in _FAILURES:
            return self._bad[0] + cell + self._bad[1]
        if status in _DISAPPOINTMENTS:
            return self._warn[0] + cell + self._warn[1]
        return cell

    def _latency_cell(self, latency_ns: int | None, shown: str) -> str:
        cell = shown.rjust(_LATENCY_WIDTH)
        if latency_ns is None or latency_ns < SLOW_NS:
            return cell
        on, off = self._warn if latency_ns < VERY_SLOW_NS else self._bad
        return on + cell + off

    def _colored(self, text: str, color: tuple[str, str]) -> str:
        return color[0] + self._encodable(text) + color[1]

    def _encodable(self, text: str) -> str:
        return encodable(text, self._encoding)


def _layout(width: int) -> _Layout:
    """The columns for a terminal of that width, at least 80."""
    spare = max(width, _WIDTH_MIN) - _WIDTH_MIN
    process = attempt = protocol = hops = ms = False
    answer_width = 0
    if spare >= 12:
        ms, spare = True, spare - 4
    if spare >= _ANSWER_WIDTH + 1:
        answer_width, spare = _ANSWER_WIDTH, spare - _ANSWER_WIDTH - 1
    if spare >= 40:
        process, spare = True, spare - 17
    if spare >= 40:
        attempt, protocol, spare = True, True, spare - _ATTEMPT_WIDTH - _PROTOCOL_WIDTH - 2
    if spare >= 40:
        hops, spare = True, spare - _HOPS_WIDTH - 1
    client = min(spare // 4, 24)
    server = min(spare // 4, 30)
    more_answer = min(spare // 4, 40) if answer_width else 0
    return _Layout(
        client=_NARROWEST.client + client,
        name=_NARROWEST.name + spare - client - server - more_answer,
        server=_NARROWEST.server + server,
        process=16 if process else 0,
        ms=ms,
        attempt=attempt,
        protocol=protocol,
        hops=hops,
        answer=answer_width + more_answer,
    )


def _client(client: Client, *, with_process: bool) -> str:
    """`with_process`: another column says which process it is."""
    if client.pod is not None:
        return clean(f"{client.namespace}/{client.pod}" if client.namespace else client.pod)
    if client.container is not None:
        return clean(client.container)
    if with_process or (client.pid is None and client.comm is None):
        return client.ip
    return _process(client)


def _process(client: Client) -> str:
    if client.comm is None:
        return "-" if client.pid is None else f"[{client.pid}]"
    comm = clean(client.comm)
    return comm if client.pid is None else f"{comm}[{client.pid}]"


def _servers(t: Transaction, *, both: bool) -> str:
    ip, port = t.server.ip, t.server.port
    server = ip if port == 53 else address(ip, port)
    backend = t.backend
    if backend is None or (backend.ip == ip and backend.port == port):
        return server
    if backend.pod is not None:
        answered = clean(backend.pod)
    else:
        answered = backend.ip if backend.port == 53 else address(backend.ip, backend.port)
    return f"{server}→{answered}" if both else f"→{answered}"


def _status(t: Transaction) -> str:
    if t.status != "answered":
        return t.status
    if "tc" in t.flags:
        return "TC"
    if t.rcode == "NOERROR" and t.response is not None and t.response[6:8] == _NO_ANSWERS:
        return "NODATA"
    return t.rcode or "-"


def _field(text: str) -> str:
    return text.replace(" ", "_") if " " in text else text
