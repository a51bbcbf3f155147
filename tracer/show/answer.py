# SPDX-License-Identifier: Apache-2.0
"""What an answer says, in a few words: where aliases lead, or for how long there is none, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tracer import decode
from tracer.show.cells import clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.decode import Response
    from tracer.transaction import Answer, Transaction

_REMEMBERED = 1024
_REMEMBERED_LEN_MAX = 512  # longer responses are seldom the same
_OPCODE = 0x78  # its bits in the third byte; none of them are set in a query
_ALIASES_MAX = 16  # shown of one chain
_VALUES_MAX = 8  # shown of one answer, where there is room
_VALUES_LEN_MAX = 240  # of them together: about three lines
# Of the options those that say something of who answered, and for whom.
_TOLD_OPTIONS = {"NSID": "the server calls itself", "ECS": "for clients in"}

_shown: dict[tuple[bytes, str | None, str | None], str] = {}


class _Chain(NamedTuple):
    """Where the name leads, and what is found there."""

    aliases: list[str]
    values: list[str]
    ttl: int | None  # of the record that is forgotten first


def short(t: Transaction) -> str:
    """For a column: "→ a.b. → 192.0.2.1 +2", "SOA 30 s"; nothing where there is nothing to say."""
    response, query = t.response, t.query
    text = ""
    if response is not None:
        key = response[2:], t.name, t.type
        whole = len(response) == t.response_len
        known = _shown.get(key) if whole else None
        text = _short(t) if known is None else known
        if known is None and whole and len(response) <= _REMEMBERED_LEN_MAX:
            if len(_shown) >= _REMEMBERED:
                _shown.clear()
            _shown[key] = text
    if len(query) > 2 and query[2] & _OPCODE:
        return f"{decode.opcode(query)} {text}".rstrip()
    return text


def long(t: Transaction) -> Iterator[str]:
    """For a paragraph: a line for each thing that there is to say, in ASCII but for arrows and dots."""
    found = _decoded(t)
    if found is None:
        return
    aliases, values, ttl = _chain(t, found)
    if values or aliases:
        shown = _listed(values) or "nothing"
        way = [t.name or "-", *aliases, shown] if aliases else [shown]
        yield f"answer: {' → '.join(way)}" + ("" if ttl is None else f"; TTL {ttl} s")
    if "tc" in t.flags:
        yield "truncated: the client has to ask again, by TCP"
    referral = _referral(found)
    if referral:
        yield f"no answer, but whom to ask: {referral}"
    if found.negative_ttl is not None:
        zone = next(record.name for record in found.authority if record.type == "SOA")
        yield f"that there is none may be remembered for {found.negative_ttl} s (SOA of {zone})"
    if found.extended_error is not None:
        code, name, text = found.extended_error
        why = f"extended error {code}" + (f", {name}" if name else "")
        yield _ascii(f"{why}: {text}" if text else why)
    if found.edns is not None:
        for _, name, data in found.edns.options:
            if name in _TOLD_OPTIONS and data:
                yield f"{_TOLD_OPTIONS[name]} {data}"
    if found.problem is not None:
        yield f"the response is not whole, or not sound: {found.problem}"


def _listed(values: list[str]) -> str:
    """As many as there is room for; of one that is too long by itself, its beginning."""
    shown: list[str] = []
    room = _VALUES_LEN_MAX
    for value in values[:_VALUES_MAX]:
        if len(value) > room and shown:
            break
        beyond = len(value) - room
        shown.append(f"{value[:room]}… +{beyond:,} bytes" if beyond > 0 else value)
        room -= len(value)
    more = len(values) - len(shown)
    if more:
        shown.append(f"+{more} record{'' if more == 1 else 's'}")
    return ", ".join(shown)


def _short(t: Transaction) -> str:
    parts = []
    found = _decoded(t)
    if found is not None:
        aliases, values, _ = _chain(t, found)
        if values or aliases:
            more = f" +{len(values) - 1}" if len(values) > 1 else ""
            way = " → ".join([*aliases, *values[:1]])
            parts.append(f"→ {way}{more}" if aliases else way + more)
        if "tc" in t.flags:
            parts.append("truncated")
        if found.extended_error is not None:
            code, name, text = found.extended_error
            why = name or f"extended error {code}"
            parts.append(f"{why}: {text}" if text else why)
        referral = _referral(found)
        if referral:
            parts.append(f"NS {referral}")
        if found.negative_ttl is not None:
            parts.append(f"SOA {found.negative_ttl} s")
        if not parts and found.problem is not None:
            parts.append(found.problem)
    return clean("; ".join(parts))


def _decoded(t: Transaction) -> Response | None:
    if t.response is None:
        return None
    return decode.response(t.response, t.response_len or len(t.response))


def _chain(t: Transaction, found: Response) -> _Chain:
    """Follows aliases from the question's name; the order of the records is not relied upon."""
    answers = found.answers
    if not answers:
        return _Chain([], [], None)
    ttl = min(record.ttl for record in answers)
    if t.type == "CNAME":
        return _Chain([], [record.data for record in answers if record.type == "CNAME"], ttl)
    left = {record.name.lower(): record.data for record in answers if record.type == "CNAME"}
    aliases: list[str] = []
    at = (t.name or "").lower()
    while at in left and len(aliases) < _ALIASES_MAX:
        aliases.append(left.pop(at))
        at = aliases[-1].lower()
    values = [record.data for record in answers if record.type == t.type]
    if not values:
        values = [_typed(record) for record in answers if record.type not in ("CNAME", "RRSIG")]
    return _Chain(aliases, values or ([] if aliases else [_typed(answers[0])]), ttl)


def _typed(record: Answer) -> str:
    return f"{record.type} {record.data}"


def _referral(found: Response) -> str | None:
    """RFC 2308, section 2.1.2: neither an answer nor an SOA record, but name servers."""
    if found.answers or found.negative_ttl is not None or found.problem is not None:
        return None
    servers = [record.data for record in found.authority if record.type == "NS"]
    if not servers or any(record.type == "SOA" for record in found.authority):
        return None
    return servers[0] + (f" +{len(servers) - 1}" if len(servers) > 1 else "")


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
