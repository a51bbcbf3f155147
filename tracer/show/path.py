# SPDX-License-Identifier: Apache-2.0
"""One transaction as a waterfall of its hops: where it was when, and where the time went.

A row is a place that the query (→) or its response (←) was seen at: when, how long after the place
before, that time as a bar on the scale of the whole, and where. Between rows it says what changed:
addresses, by NAT or otherwise, and why a packet was dropped.
"""

from __future__ import annotations

import itertools
import textwrap
import time
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from tracer import decode
from tracer.show import answer, upstream
from tracer.show.cells import address, ansi, clean, duration, encodable, fit, fit_name, shorten
from tracer.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tracer.transaction import Address, Backend, Client, Hop, Lookup, Nat

NS_PER_S = 1_000_000_000

_WIDTH_MIN = 80
_PIPED_WIDTH = 120
_TIME_WIDTH = 7
_KIND_WIDTH = 9  # arrow, space, kind
_DEVICE_WIDTH = 15  # IFNAMSIZ without the zero byte
_BAR_WIDTH = 12
_OWNER_WIDTH = _WIDTH_MIN - 2 * _TIME_WIDTH - _BAR_WIDTH - _KIND_WIDTH - _DEVICE_WIDTH - 7
_ANSWER_LINES = 4
_NOTE_INDENT = " " * (2 * _TIME_WIDTH + 4)
_ARROWS = {"query": "→", "response": "←"}


class PathView:
    """Waterfalls for one stream. `width` and `color` override what is found out about it."""

    def __init__(self, stream: TextIO, width: int | None = None, color: bool | None = None) -> None:
        self._stream = stream
        self._console = Console(file=stream)
        self._width = width
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        if color is None:
            color = self._console.is_terminal and not self._console.no_color
        self._color = color

    def write(self, items: Iterable[Transaction | Lookup]) -> None:
        """Writes a batch in one go, a blank line after each; lookups are left to the live view."""
        width = self._width
        if width is None:
            width = self._console.width if self._console.is_terminal else _PIPED_WIDTH
        shown = "".join(
            render(item, width, color=self._color) + "\n\n"
            for item in items
            if isinstance(item, Transaction)
        )
        if shown:
            self._stream.write(encodable(shown, self._encoding))
            self._stream.flush()


def render(t: Transaction, width: int, *, color: bool = False) -> str:
    """The waterfall in lines of at most `width` cells (80 at least), without a last line end.

    Within it come those of the queries that its server made to answer it.
    """
    return "\n".join(_render(t, max(width, _WIDTH_MIN), color=color))


def _render(t: Transaction, width: int, *, color: bool) -> list[str]:
    hops = t.hops
    bold, faint, bad = (ansi(style, color=color) for style in ("bold", "dim", "red"))
    lines = [bold[0] + _title(t, width) + bold[1]]
    lines += _wrap(_subtitle(t), width)
    if hops:
        spare = max(width - _WIDTH_MIN, -_OWNER_WIDTH // 2)
        bar_width = _BAR_WIDTH + spare // 3
        owner_width = _OWNER_WIDTH + spare - spare // 3
        lines.append(faint[0] + _header(bar_width, owner_width) + faint[1])
        total_ns = max(hops[-1].t_ns, 1)
        before: Hop | None = None
        for hop in hops:
            paint = bad if hop.kind == "drop" else faint
            row = _row(hop, before, total_ns, bar_width, owner_width)
            notes = [line for note in _notes(hop, before, hops[0]) for line in _note(note, width)]
            lines += [faint[0] + note + faint[1] for note in notes]
            lines.append(paint[0] + row + paint[1] if hop.kind == "drop" else row)
            if hop.kind == "drop":
                lines += [bad[0] + line + bad[1] for line in _note(_dropped(hop), width)]
            before = hop
            if hop.kind == "receive" and hop.direction == "query":
                lines += _nested(t, width, color=color)
    else:
        lines.append("  no hops were seen")
    for said in answer.long(t):
        lines += _cut(_wrap(said, width))
    verdict = bad if t.status != "answered" else bold
    lines += [verdict[0] + line + verdict[1] for line in _wrap(_verdict(t, hops), width)]
    return lines


def _cut(lines: list[str]) -> list[str]:
    """The beginning of what is long, and how much more there is."""
    more = len(lines) - _ANSWER_LINES
    if more <= 1:
        return lines
    return [*lines[:_ANSWER_LINES], f"  … {more} lines more; --json has all"]


def _nested(t: Transaction, width: int, *, color: bool) -> list[str]:
    """What the server asked itself meanwhile, indented, where it had the query."""
    lines = []
    for query in t.upstream or ():
        after = duration(query.time_ns - t.time_ns)
        lines.append(f"  ┌ at {after}, because of it:")
        lines += ["  │ " + line for line in _render(query, width - 4, color=color)]
    doubt = upstream.unsure(t)
    if doubt:
        lines += _wrap(doubt, width)
    return lines


def _title(t: Transaction, width: int) -> str:
    second, ns = divmod(t.time_ns, NS_PER_S)
    clock = time.strftime("%H:%M:%S", time.localtime(second)) + f".{ns // 1_000:06d}"
    name, type_ = t.name or "no question", t.type or ""
    room = width - len(clock) - len(type_) - 2
    client = _who(t.client)
    shown = fit_name(name, min(len(name), max(room - len(client) - 2, room // 2)))
    left = room - len(shown) - 2
    return f"{shown} {type_} {fit(client, left)}  {clock}"


def _subtitle(t: Transaction) -> str:
    opcode = decode.opcode(t.query)
    what = "" if opcode in (None, "QUERY") else f" {opcode}"
    number = "" if t.dns_id is None else f", id {t.dns_id}"
    parts = [f"{t.protocol.upper()}{what}{number}", _servers(t)]
    if t.attempt > 1:
        parts.insert(1, f"attempt {t.attempt}")
    if t.client.pod is not None and (t.client.comm is not None or t.client.pid is not None):
        parts.insert(1, f"by {_process(t.client)}")
    return ", ".join(parts)


def _servers(t: Transaction) -> str:
    server = address(t.server.ip, t.server.port)
    if t.server.service is not None:
        server += f" ({_ascii(t.server.service)})"
    elif upstream.role(t.server):
        server += f" ({upstream.role(t.server)})"
    backend = t.backend
    if backend is None or (backend.ip, backend.port) == (t.server.ip, t.server.port):
        return f"to {server}"
    return f"to {server}, which is {_backend(backend)}"


def _header(bar_width: int, owner_width: int) -> str:
    return " ".join(
        [
            "",
            "AT".rjust(_TIME_WIDTH),
            "GAP".rjust(_TIME_WIDTH),
            "",
            "".ljust(bar_width),
            "HOP".ljust(_KIND_WIDTH),
            "DEVICE".ljust(_DEVICE_WIDTH),
            "WHERE".ljust(owner_width),
        ]
    ).rstrip()


def _row(hop: Hop, before: Hop | None, total_ns: int, bar_width: int, owner_width: int) -> str:
    at = "0" if before is None else duration(hop.t_ns)
    gap = "" if before is None else "+" + duration(hop.t_ns - before.t_ns)
    bar = _bar(hop.t_ns if before is None else before.t_ns, hop.t_ns, total_ns, bar_width)
    return " ".join(
        [
            "",
            at.rjust(_TIME_WIDTH),
            gap.rjust(_TIME_WIDTH + 1),
            bar,
            f"{_ARROWS[hop.direction]} {hop.kind}".ljust(_KIND_WIDTH),
            fit(_ascii(hop.ifname or "-"), _DEVICE_WIDTH),
            fit(_place(hop), owner_width).rstrip(),
        ]
    ).rstrip()


def _bar(from_ns: int, to_ns: int, total_ns: int, width: int) -> str:
    """The time between, where it is in the whole; at least a mark."""
    start = min(from_ns * width // total_ns, width - 1)
    end = max(-(-to_ns * width // total_ns), start + 1) if to_ns > from_ns else start + 1
    long_enough = (to_ns - from_ns) * width * 2 >= total_ns
    return (" " * start + ("█" * (min(end, width) - start) if long_enough else "╸")).ljust(width)


def _notes(hop: Hop, before: Hop | None, first: Hop) -> Iterator[str]:
    """What changed before this hop."""
    if hop.nat is not None and (hop.nat.dnat or hop.nat.snat):
        yield from _nat_words(hop.nat, hop.direction)
    elif before is None:
        yield f"from {address(*hop.src)} to {address(*hop.dst)}"
    else:
        same_way = before.direction == hop.direction
        expected = (before.src, before.dst) if same_way else (before.dst, before.src)
        if (hop.src, hop.dst) != expected:
            yield f"now from {address(*hop.src)} to {address(*hop.dst)}"
    if before is None and first.t_ns:
        yield f"first seen {duration(first.t_ns)} after the send"


def _nat_words(nat: Nat, direction: str) -> Iterator[str]:
    undone = " undone" if direction == "response" else ""
    for name, change in (("DNAT", nat.dnat), ("SNAT", nat.snat)):
        if change is not None:
            yield f"{name}{undone}: {_changed(*change)}"


def _changed(before: Address, after: Address) -> str:
    return f"{address(*before)} → {address(*after)}"


def _dropped(hop: Hop) -> str:
    where = "" if hop.location is None else f", in {_ascii(hop.location)}"
    reason = "the kernel gave no reason" if hop.reason is None else _ascii(hop.reason)
    return f"dropped: {reason}{where}"


def _note(text: str, width: int) -> list[str]:
    return _wrap(text, width, _NOTE_INDENT)


def _wrap(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _verdict(t: Transaction, hops: tuple[Hop, ...]) -> str:
    """How it ended, and where most of the time went, or where it was last seen."""
    if t.status == "answered":
        took = "" if t.latency_ns is None else f" after {duration(t.latency_ns)}"
        return f"{t.rcode or 'answered'}{took}{_longest_gap(t, hops)}"
    if t.problem is not None and t.status != "dropped":
        return f"no answer: {t.problem}"
    if not hops:
        return _UNANSWERED[t.status]
    return _unanswered(t, hops[-1])


def _unanswered(t: Transaction, last: Hop) -> str:
    if t.status == "dropped":
        at = "" if last.ifname is None else "at "
        return f"no answer: the {last.direction} was dropped {at}{_where(last)}"
    if t.status == "refused":
        to = _backend(t.backend) if t.backend is not None else address(t.server.ip, t.server.port)
        if last.kind == "drop":
            return f"no answer: nothing listens on {to}"
        return f"no answer: an ICMP error came back: {to} is unreachable, or nothing listens there"
    seen = f"last seen after {duration(last.t_ns)}, at {_at(last)}"
    return f"no answer in time: the {last.direction} was {seen}"


_UNANSWERED = {
    "timeout": "no answer in time",
    "dropped": "no answer: a packet was dropped",
    "refused": "no answer: an ICMP error came back",
}


def _longest_gap(t: Transaction, hops: tuple[Hop, ...]) -> str:
    total_ns = max(t.latency_ns or 0, hops[-1].t_ns if hops else 0)
    if len(hops) < 2 or not total_ns:
        return ""
    before, after = max(itertools.pairwise(hops), key=lambda pair: pair[1].t_ns - pair[0].t_ns)
    gap_ns = after.t_ns - before.t_ns
    blame = _blame(t, before, after)
    if before.kind == "receive" and before.direction == "query" and after.kind == "send":
        return f"; {100 * gap_ns // total_ns} % of it ({duration(gap_ns)}) in {blame}"
    return (
        f"; {100 * gap_ns // total_ns} % of it ({duration(gap_ns)}) between {_at(before)}"
        f" and {_at(after)}: {blame}"
    )


def _blame(t: Transaction, before: Hop, after: Hop) -> str:
    """What lies between two hops, as far as one node can see."""
    if before.direction == "query" and after.direction == "response":
        server = "the server" if t.backend is None else f"the server {_backend(t.backend)}"
        pod = None if t.backend is None else _owner(t.backend)
        if before.kind == "receive" or (pod is not None and before.owner == pod):
            waited = upstream.longest_wait(t)
            return f"{server}, {waited}" if waited else server
        return f"{server}, and the way to it and back"
    if before.direction != after.direction:
        return "a query that was sent again"
    way = "to the server" if after.direction == "query" else "back to the client"
    if after.kind == "receive" and after.direction == "response":
        return "the client, before it took the answer"
    if before.netns is not None and before.netns == after.netns:
        return f"this namespace's routing and filters, on the way {way}"
    return f"the way {way}"


def _at(hop: Hop) -> str:
    return f"{hop.kind} {_where(hop)}"


def _where(hop: Hop) -> str:
    if hop.ifname is None:
        return f"in {_place(hop)}"
    return _ascii(hop.ifname) + ("" if hop.owner is None else f" ({_ascii(hop.owner)})")


def _place(hop: Hop) -> str:
    if hop.owner is not None:
        return _ascii(hop.owner)
    return "-" if hop.netns is None else f"netns {hop.netns}"


def _who(client: Client) -> str:
    if client.pod is not None:
        return shorten(_ascii(f"{client.namespace or ''}/{client.pod}".removeprefix("/")), 60)
    return _process(client) if client.pid is not None or client.comm is not None else client.ip


def _process(client: Client) -> str:
    comm = _ascii(client.comm or "")
    return comm if client.pid is None else f"{comm}[{client.pid}]"


def _backend(backend: Backend) -> str:
    pod = _owner(backend)
    where = address(backend.ip, backend.port)
    return where if pod is None else f"{_ascii(pod)} ({where})"


def _owner(backend: Backend) -> str | None:
    if backend.pod is None:
        return None
    return f"{backend.namespace}/{backend.pod}" if backend.namespace else backend.pod


def _ascii(text: str) -> str:
    """As characters are counted here, not cells; what is no ASCII would be a forged name anyway."""
    return clean(text).encode("ascii", "backslashreplace").decode("ascii")
