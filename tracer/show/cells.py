# SPDX-License-Identifier: Apache-2.0
"""Text that fits where it is put: durations, names and columns, safe for any terminal.

Widths are terminal cells, which are not characters: pod names can come from a file, and need not
be what Kubernetes would allow. Nothing that a terminal would obey gets through `clean`.
"""

from __future__ import annotations

import functools

from rich.cells import cell_len, set_cell_size
from rich.style import Style

TEXT_MAX = 253  # of what others name: the longest DNS name that Kubernetes allows
ELLIPSIS = "…"
_ASCII = str.maketrans("→←…µ└┌│—━╸█✗", "><~u`,|-=-#x")
_REMEMBERED = 4096


def duration(ns: int | None) -> str:
    """At most three digits and a unit: 850 ns, 254 µs, 3.1 ms, 300 ms, 1.20 s."""
    if ns is None:
        return "-"
    if ns < 0:
        return "-" + duration(-ns)
    if ns < 999_500:
        if ns < 1_000:
            return f"{ns} ns"
        return f"{ns / 1e3:.1f} µs" if ns < 9_950 else f"{ns / 1e3:.0f} µs"
    if ns < 999_500_000:
        return f"{ns / 1e6:.1f} ms" if ns < 99_950_000 else f"{ns / 1e6:.0f} ms"
    s = ns / 1e9
    return f"{s:.2f} s" if s < 9.995 else f"{s:.1f} s" if s < 99.95 else f"{s:.0f} s"


def clean(text: str) -> str:
    """The text with all that is not printable as escapes, and not endless."""
    if text.isascii() and text.isprintable() and len(text) <= TEXT_MAX:
        return text
    text = printable(text[: TEXT_MAX + 1])
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 1] + ELLIPSIS


def printable(text: str) -> str:
    """The text, of any length, with all that is not printable as escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def address(ip: str, port: int) -> str:
    """ "ip:port", and "[ip]:port" for IPv6."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def fit(text: str, width: int) -> str:
    """Exactly `width` cells: padded, or shortened in the middle so that both ends remain."""
    if len(text) <= width and text.isascii():
        return text.ljust(width)
    return _fit(text, width)


def fit_name(name: str, width: int) -> str:
    """Exactly `width` cells, for a DNS name: its first labels and its zone remain."""
    if len(name) <= width:
        return name.ljust(width)
    return _shorten_name(name, width)


def shorten(text: str, width: int) -> str:
    """At most `width` cells, both ends kept."""
    return text if cell_len(text) <= width else _fit(text, width).rstrip()


def encodable(text: str, encoding: str) -> str:
    """The text, in ASCII where the encoding has no letters for what this package draws."""
    if text.isascii() or _draws(encoding):
        return text
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def ansi(style: str, *, color: bool) -> tuple[str, str]:
    """What turns a style on, and off again; nothing without colour."""
    if not color:
        return "", ""
    on, _, off = Style.parse(style).render("\n").partition("\n")
    return on, off


@functools.lru_cache(maxsize=8)
def _draws(encoding: str) -> bool:
    # A pod's name can have any letter, so only what has them all will do.
    return encoding.lower().replace("-", "").replace("_", "").startswith("utf")


@functools.lru_cache(maxsize=_REMEMBERED)
def _fit(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    head = (width - 1) // 2
    tail = width - 1 - head
    end = text[-tail:]
    while cell_len(end) > tail:
        end = end[1:]
    start = set_cell_size(text[: head + 1], head)
    return set_cell_size(start + ELLIPSIS + end, width)


@functools.lru_cache(maxsize=_REMEMBERED)
def _shorten_name(name: str, width: int) -> str:
    room = max(width // 3, 1)
    # From the label that fits into a third of the width, or the last characters where none does.
    start = name.find(".", len(name) - room - 1, len(name) - 1) + 1
    zone = name[start:] if start else name[-room:]
    return name[: width - 1 - len(zone)] + ELLIPSIS + zone


def _escape(c: str) -> str:
    return c.encode("unicode_escape", "backslashreplace").decode("ascii")
