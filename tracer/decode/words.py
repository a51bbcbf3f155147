# SPDX-License-Identifier: Apache-2.0
"""Numbers and bytes in DNS's own words, and back."""

from __future__ import annotations

import functools
import struct

import dns.edns
import dns.exception
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype

# Types that are counted by name; others, of which there may be as many as a client likes, are
# counted together (type_class in bpf/latency.h).
COUNTED_TYPES = (1, 2, 5, 6, 12, 15, 16, 28, 33, 64, 65)
_ABBREVIATIONS = {
    "DNSKEY": "DNSKEY",
    "DNSSEC": "DNSSEC",
    "DS": "DS",
    "NSEC": "NSEC",
    "NSEC3": "NSEC3",
    "NXDOMAIN": "NXDOMAIN",
    "RRSIGS": "RRSIGs",
    "BEFORE": "before",
    "TO": "to",
}


def is_counted(type_: str) -> bool:
    """Whether a type, by its mnemonic, is counted by name."""
    return type_ in map(type_text, COUNTED_TYPES)


def type_named(text: str) -> str:
    """A type's mnemonic as questions and answers have it: "aaaa" is "AAAA", "TYPE1" is "A"."""
    try:
        return type_text(dns.rdatatype.from_text(text))
    except (dns.exception.DNSException, ValueError):
        raise ValueError(f"{text!r} is not a DNS type, such as A, AAAA or TYPE65280") from None


def rcode_named(text: str) -> str:
    """A response code's mnemonic as transactions have it: "nxdomain" and "3" are "NXDOMAIN"."""
    number = text.upper().removeprefix("RCODE")
    try:
        return rcode_text(dns.rcode.from_text(number))
    except (dns.exception.DNSException, ValueError):
        raise ValueError(f"{text!r} is not a response code, such as NXDOMAIN or SERVFAIL") from None


@functools.lru_cache(maxsize=1024)
def type_text(type_: int) -> str:
    """ "A", "TYPE65280"."""
    return dns.rdatatype.to_text(dns.rdatatype.RdataType(type_))


@functools.lru_cache(maxsize=1024)
def class_text(class_: int) -> str:
    """ "IN", "CLASS9"."""
    return dns.rdataclass.to_text(dns.rdataclass.RdataClass(class_))


@functools.lru_cache(maxsize=1024)
def rcode_text(value: int) -> str:
    """ "NXDOMAIN", "RCODE12"."""
    text = dns.rcode.to_text(dns.rcode.Rcode(value))
    return f"RCODE{value}" if text.isdigit() else text


@functools.lru_cache(maxsize=16)
def opcode_text(value: int) -> str:
    """ "QUERY", "OPCODE15"."""
    text = dns.opcode.to_text(dns.opcode.Opcode(value))
    return f"OPCODE{value}" if text.isdigit() else text


@functools.lru_cache(maxsize=1024)
def option_text(code: int) -> str | None:
    """An EDNS option's name, as "NSID"; None where it is not known."""
    text = dns.edns.OptionType.to_text(code)
    return None if text.isdigit() else text


@functools.lru_cache(maxsize=1024)
def extended_error_text(code: int) -> str | None:
    """The name of an extended error's code (RFC 8914), as "DNSSEC Bogus"; None: not known."""
    text = dns.edns.EDECode.to_text(code)
    if text.isdigit():
        return None
    return " ".join(_ABBREVIATIONS.get(word) or word.capitalize() for word in text.split("_"))


def printable(text: str) -> str:
    """In presentation format: what is not ASCII, or not to be printed, as \\DDD for each byte."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if " " <= c <= "~" else _escaped(c.encode("utf-8", "surrogatepass")) for c in text
    )


def string_text(data: bytes) -> str:
    """Bytes as a string in presentation format, without quotes."""
    return "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\{b:03d}" for b in data)


def prose(data: bytes) -> str:
    """UTF-8 for people, in any language: only what is not to be printed as \\DDD for each byte."""
    return "".join(
        c if c.isprintable() else _escaped(c.encode("utf-8", "surrogateescape"))
        for c in data.decode("utf-8", "surrogateescape")
    )


def problem_text(error: Exception) -> str:
    """dnspython's own description of what is malformed."""
    if type(error) in (dns.exception.FormError, struct.error):
        return "goes beyond the end of the message"
    words = " ".join(str(error).split()).rstrip(".")
    return words[:1].lower() + words[1:] if not words.startswith("DNS") else words


def _escaped(data: bytes) -> str:
    return "".join(f"\\{b:03d}" for b in data)
