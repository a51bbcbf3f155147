# SPDX-License-Identifier: Apache-2.0
"""Names and resource records, in presentation format.

Names of ordinary characters, and the data that is in nearly every message, are read here; all else
is read by dnspython, which takes five times as long and more.
"""

from __future__ import annotations

import socket
import struct

import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.wire

from tracer.decode.words import printable, type_text
from tracer.transaction import Answer

POINTER = 0xC0
RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data

_NAME_WIRE_MAX = 255
_TTL_MAX = 0x7FFF_FFFF
_SOA_NUMBERS = struct.Struct("!5I")
# Those that presentation format writes as they are.
_PLAIN = bytes(c for c in range(0x21, 0x7F) if c not in b'"().;\\@$')
# Others have no data formats of their own. dnspython keeps a table entry for each pair of class
# and type it ever meets, which the sender must not be able to fill.
_CLASSES = {dns.rdataclass.IN, dns.rdataclass.CH, dns.rdataclass.HS}
# As plain numbers, since enums are slow to look up.
_IN = int(dns.rdataclass.IN)
_A = int(dns.rdatatype.A)
_AAAA = int(dns.rdatatype.AAAA)
_SOA = int(dns.rdatatype.SOA)
_NAMES = frozenset(map(int, (dns.rdatatype.CNAME, dns.rdatatype.NS, dns.rdatatype.PTR)))
_ANY_CLASS = {dns.rdatatype.TSIG, dns.rdatatype.TKEY}  # which say nothing of any class


def read_record(message: bytes, at: int, names: dict[int, str]) -> tuple[Answer, int, bool]:
    """The record, where the next begins, and whether its data is what its type says."""
    name, at = read_name(message, at, names)
    type_, class_, ttl, data_len = RECORD.unpack_from(message, at)
    at += RECORD.size
    end = at + data_len
    if end > len(message):
        raise dns.exception.FormError
    data = _usual_data(message, at, end, type_, class_, names)
    whole = True
    if data is None:
        data, whole = _data(message, at, end, type_, class_)
    if ttl > _TTL_MAX:  # RFC 2181, section 8
        ttl = 0
    return Answer(name, type_text(type_), ttl, data), end, whole


def read_name(message: bytes, start: int, names: dict[int, str]) -> tuple[str, int]:
    """The name that begins at `start`, and where it ends. `names` are those read before."""
    size = len(message)
    labels = []
    at = start
    length = message[at] if at < size else POINTER
    while 0 < length < 64 and at + 1 + length < size:
        at += 1 + length
        labels.append(message[at - length : at])
        length = message[at]
    target = -1
    rest: str | None = "."
    end = at + 1
    if length >= POINTER and end < size:
        target = (length & 0x3F) << 8 | message[end]
        end += 1
        if target < start:
            rest = names.get(target) or _uncompressed(message, target, names)
        else:
            rest = None
        if rest is not None and not labels:
            return rest, end
    elif length:
        rest = None
    # A name without escapes has as many characters as bytes, but for the root's.
    if (
        rest is None
        or at - start + len(rest) + (rest != ".") > _NAME_WIRE_MAX
        or "\\" in rest
        or b"".join(labels).translate(None, _PLAIN)
    ):
        parser = dns.wire.Parser(message, start)
        text = dns.name.from_wire_parser(parser).to_text()
        end = parser.current
        if target >= 0 and not labels:
            names[target] = text
    else:
        head = b".".join(labels).decode("ascii")
        text = f"{head}." if rest == "." else f"{head}.{rest}"
    names[start] = text
    return text, end


def _uncompressed(message: bytes, start: int, names: dict[int, str]) -> str | None:
    """A name within another that was read before; None where it goes on elsewhere."""
    at = start
    while 0 < message[at] < 64 and at + 1 + message[at] < len(message):
        at += 1 + message[at]
    return None if message[at] else read_name(message, start, names)[0]


def _usual_data(
    message: bytes, at: int, end: int, type_: int, class_: int, names: dict[int, str]
) -> str | None:
    """None of other data, and of what is malformed."""
    if class_ != _IN:
        return None
    if type_ == _A:
        return socket.inet_ntoa(message[at:end]) if end - at == 4 else None
    if type_ == _AAAA:
        return socket.inet_ntop(socket.AF_INET6, message[at:end]) if end - at == 16 else None
    if type_ not in _NAMES and type_ != _SOA:
        return None
    try:
        text, at = read_name(message, at, names)
        if type_ == _SOA:
            mailbox, at = read_name(message, at, names)
            numbers = _SOA_NUMBERS.unpack_from(message, at)
            text = f"{text} {mailbox} {' '.join(map(str, numbers))}"
            at += _SOA_NUMBERS.size
    except (dns.exception.DNSException, struct.error):
        return None
    return text if at == end else None


def _data(message: bytes, at: int, end: int, type_: int, class_: int) -> tuple[str, bool]:
    whole = True
    known = class_ in _CLASSES or (class_ == dns.rdataclass.ANY and type_ in _ANY_CLASS)
    if known and not type_text(type_).startswith("TYPE"):
        try:
            parser = dns.wire.Parser(message, at)
            with parser.restrict_to(end - at):
                rdata = dns.rdata.from_wire_parser(
                    dns.rdataclass.RdataClass(class_), dns.rdatatype.RdataType(type_), parser
                )
            return printable(rdata.to_text()), True
        except Exception:  # noqa: BLE001 - whatever a type's own code makes of hostile data
            whole = False
    return f"\\# {end - at} {message[at:end].hex()}".rstrip(), whole
