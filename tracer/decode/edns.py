# SPDX-License-Identifier: Apache-2.0
"""What a message says of EDNS (RFC 6891), and of errors in its options (RFC 8914)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import dns.edns
import dns.exception
import dns.name
import dns.wire
from dns.edns import OptionType

from tracer.decode.records import RECORD
from tracer.decode.words import extended_error_text, option_text, prose, string_text

if TYPE_CHECKING:
    from collections.abc import Callable

OPT_START = b"\0\0\x29"  # root name, type OPT

_OPTION = struct.Struct("!HH")
_DO = 0x8000
_COOKIE_LENS = {8, *range(16, 41)}  # the client's alone, and with the server's


class Option(NamedTuple):
    """`name` is None where the code is not known, and `data` then in hex."""

    code: int
    name: str | None
    data: str


class ExtendedError(NamedTuple):
    """Why, in the server's words. `text` is None where it has none."""

    code: int
    name: str | None
    text: str | None


class Edns(NamedTuple):
    """The OPT record of a message."""

    version: int
    udp_size: int
    do: bool
    options: tuple[Option, ...] = ()


class Opt(NamedTuple):
    """An OPT record as read, and what is in it."""

    edns: Edns
    extended_error: ExtendedError | None
    problem: str | None


def read_opt(message: bytes, at: int) -> tuple[Opt, int]:
    """The OPT record at `at`, and where the next record begins."""
    _, udp_size, ttl, data_len = RECORD.unpack_from(message, at + 1)
    at += 1 + RECORD.size
    end = at + data_len
    if end > len(message):
        raise dns.exception.FormError
    edns = Edns(ttl >> 16 & 0xFF, udp_size, bool(ttl & _DO))
    return (Opt(edns, None, None) if at == end else _with_options(edns, message[at:end])), end


def _with_options(edns: Edns, data: bytes) -> Opt:
    options: list[Option] = []
    error = problem = None
    at = 0
    while at < len(data):
        start = at + _OPTION.size
        code, size = _OPTION.unpack_from(data, at) if start <= len(data) else (0, len(data))
        at = start + size
        if at > len(data):
            problem = problem or "EDNS options go beyond the end of their record"
            break
        value = data[start:at]
        option, whole = _option(code, value)
        options.append(option)
        if not whole:
            problem = problem or f"malformed EDNS option {option.name}"
        elif error is None and code == OptionType.EDE:
            error = _extended_error(value)
    return Opt(edns._replace(options=tuple(options)), error, problem)


def _option(code: int, value: bytes) -> tuple[Option, bool]:
    name = option_text(code)
    read = _READERS.get(code)
    if read is not None:
        try:
            return Option(code, name, read(value)), True
        except Exception:  # noqa: BLE001 - whatever dnspython makes of hostile data
            return Option(code, name, value.hex()), False
    return Option(code, name, value.hex()), True


def _extended_error(value: bytes) -> ExtendedError:
    code = int.from_bytes(_of_len(value[:2], 2), "big")
    # "The EXTRA-TEXT field may be null-terminated" by some: RFC 8914, section 2.
    text = prose(value[2:].rstrip(b"\0"))
    return ExtendedError(code, extended_error_text(code), text or None)


def _error_words(value: bytes) -> str:
    code, name, text = _extended_error(value)
    words = f"{code} {name}" if name else str(code)
    return f"{words}: {text}" if text else words


def _subnet(value: bytes) -> str:
    """As "192.0.2.0/24/0", the last being the scope."""
    parser = dns.wire.Parser(value)
    subnet = dns.edns.ECSOption.from_wire_parser(OptionType.ECS, parser)
    if parser.remaining() or not isinstance(subnet, dns.edns.ECSOption):
        raise dns.exception.FormError
    return f"{subnet.address}/{subnet.srclen}/{subnet.scopelen}"


def _cookie(value: bytes) -> str:
    if len(value) not in _COOKIE_LENS:
        raise dns.exception.FormError
    return f"{value[:8].hex()} {value[8:].hex()}".rstrip()


def _keepalive(value: bytes) -> str:
    """In units of 100 ms; a client says nothing."""
    return f"{int.from_bytes(_of_len(value, 2), 'big') / 10:.1f} s" if value else ""


def _expire(value: bytes) -> str:
    return f"{int.from_bytes(_of_len(value, 4), 'big')} s" if value else ""


def _name(value: bytes) -> str:
    """Never compressed, since there is nothing before it that it could point to."""
    parser = dns.wire.Parser(value)
    name = dns.name.from_wire_parser(parser)
    if parser.remaining():
        raise dns.exception.FormError
    return name.to_text()


def _numbers(value: bytes) -> str:
    return " ".join(map(str, value))


def _of_len(value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise dns.exception.FormError
    return value


_READERS: dict[int, Callable[[bytes], str]] = {
    OptionType.NSID: string_text,
    OptionType.DAU: _numbers,
    OptionType.DHU: _numbers,
    OptionType.N3U: _numbers,
    OptionType.ECS: _subnet,
    OptionType.EXPIRE: _expire,
    OptionType.COOKIE: _cookie,
    OptionType.KEEPALIVE: _keepalive,
    OptionType.PADDING: lambda value: f"{len(value)} bytes",
    OptionType.CHAIN: _name,
    OptionType.EDE: _error_words,
    OptionType.REPORTCHANNEL: _name,
}
