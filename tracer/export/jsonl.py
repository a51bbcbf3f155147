# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object per transaction and lookup, and a summary as the last one.

Names, types and meanings are fixed, and scripts rely on them: fields are added, never changed.
Unknown is null. Every line is valid UTF-8, whatever a process or pod calls itself.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import orjson

from tracer import decode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tracer.decode import Edns, Response
    from tracer.transaction import (
        Address,
        Answer,
        Backend,
        Client,
        Hop,
        Lookup,
        Nat,
        Server,
        Transaction,
    )

NS_PER_S = 1_000_000_000

_SURROGATE = re.compile("[\ud800-\udfff]")

_PLACES_MAX = 4096

_NO_RESPONSE = dict.fromkeys(
    ("answers", "authority", "additional", "edns", "extended_error", "negative_ttl")
)

_RESPONSES_MAX = 1024
_RESPONSE_LEN_MAX = 16 << 10  # of what is remembered

_responses: dict[int, tuple[Response, dict[str, Any]]] = {}
_seconds: dict[int, str] = {}
_places: dict[tuple[str | None, int | None, int | None, str | None], tuple[str, str]] = {}


def transaction(t: Transaction) -> bytes:
    """One line for a query and what became of it, with hops, answers, and what it caused."""
    return _line(transaction_object(t))


def transaction_object(t: Transaction) -> dict[str, Any]:
    """The same as an object."""
    response = None
    problem = t.problem or decode.question(t.query).problem
    if t.response is not None:
        response = decode.response(t.response, t.response_len or len(t.response))
        problem = problem or response.problem
    backend = t.backend
    upstream = t.upstream
    return {
        "event": "transaction",
        "time": rfc3339(t.time_ns),
        "status": t.status,
        "id": t.dns_id,
        "protocol": t.protocol,
        "name": t.name,
        "type": t.type,
        "opcode": decode.opcode(t.query),
        "rcode": t.rcode,
        "flags": t.flags,
        **(_NO_RESPONSE if response is None else _response(response)),
        "query_edns": _edns(decode.query_edns(t.query)),
        "latency_ns": t.latency_ns,
        "attempt": t.attempt,
        "client": _client(t.client),
        "server": _server(t.server),
        "backend": None if backend is None else _backend(backend),
        "hops": _hops(t.hops),
        "upstream": None if upstream is None else [transaction_object(one) for one in upstream],
        "upstream_unsure": t.upstream_unsure,
        "response_len": t.response_len,
        "problem": problem,
    }


def lookup(found: Lookup) -> bytes:
    """One line for what an application asked for, and all that this took."""
    # A resolver configuration always says ndots, so without it an empty list is not known to be so.
    search_known = found.search or found.ndots is not None
    return _line(
        {
            "event": "lookup",
            "time": rfc3339(found.time_ns),
            "client": _client(found.client),
            "question": found.question,
            "search": found.search if search_known else None,
            "ndots": found.ndots,
            "queries": found.queries,
            "wasted": found.wasted,
            "latency_ns": found.latency_ns,
            "wasted_ns": found.wasted_ns,
            "status": found.status,
            "advice": found.advice,
            "ids": found.ids,
        }
    )


def summary(
    *,
    transactions: int,
    lookups: int,
    duration_ns: int,
    lost: Mapping[str, int],
    unmatched: Mapping[str, int],
    problem: str | None = None,
) -> bytes:
    """The last line of a run: how much there was, and how complete it is.

    `problem`: why names may be missing or out of date.
    """
    return _line(
        {
            "event": "summary",
            "transactions": transactions,
            "lookups": lookups,
            "duration_ns": duration_ns,
            "lost": dict(lost),
            "unmatched": dict(unmatched),
            "problem": problem,
        }
    )


def rfc3339(time_ns: int) -> str:
    """A time since 1970 as UTC with nanoseconds: "2023-11-26T08:56:34.195320000Z"."""
    second, ns = divmod(time_ns, NS_PER_S)
    text = _seconds.get(second)
    if text is None:
        _seconds.clear()  # times come roughly in order, so an old second is seldom asked for again
        text = _seconds[second] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{text}.{ns:09d}Z"


def address(where: Address) -> str:
    """ "ip:port", and "[ip]:port" for IPv6."""
    ip, port = where
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _response(response: Response) -> dict[str, Any]:
    """What a response adds to its line; encoded already where it comes again and again."""
    # What is remembered holds on to its response, so nothing else can have that one's id.
    known = _responses.get(id(response))
    if known is not None:
        return known[1]
    answers, authority, additional, edns, error, negative_ttl, _ = response
    fields: dict[str, Any] = {
        "answers": _records(answers),
        "authority": _records(authority),
        "additional": _records(additional),
        "edns": _edns(edns),
        "extended_error": error and {"code": error.code, "name": error.name, "text": error.text},
        "negative_ttl": negative_ttl,
    }
    size = 0
    for name, value in fields.items():
        if value:
            # What orjson returns has room for 4 KiB at least, and is to be kept.
            encoded = bytes(memoryview(orjson.dumps(value)))
            size += len(encoded)
            fields[name] = orjson.Fragment(encoded)
    if size <= _RESPONSE_LEN_MAX:
        if len(_responses) >= _RESPONSES_MAX:
            _responses.clear()
        _responses[id(response)] = response, fields
    return fields


def _records(records: tuple[Answer, ...]) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": type_, "ttl": ttl, "data": data}
        for name, type_, ttl, data in records
    ]


def _edns(edns: Edns | None) -> dict[str, Any] | None:
    if edns is None:
        return None
    version, udp_size, do, options = edns
    return {
        "version": version,
        "udp_size": udp_size,
        "do": do,
        "options": [{"code": code, "name": name, "data": data} for code, name, data in options],
    }


def _client(client: Client) -> dict[str, Any]:
    ip, port, netns, cgroup_id, pid, comm, namespace, pod, container, node = client
    return {
        "ip": ip,
        "port": port,
        "netns": netns,
        "cgroup_id": cgroup_id,
        "pid": pid,
        "comm": comm,
        "namespace": namespace,
        "pod": pod,
        "container": container,
        "node": node,
    }


def _server(server: Server) -> dict[str, Any]:
    return {
        "ip": server.ip,
        "port": server.port,
        "service": server.service,
        "role": server.role,
    }


def _backend(backend: Backend) -> dict[str, Any]:
    ip, port, namespace, pod = backend
    return {"ip": ip, "port": port, "namespace": namespace, "pod": pod}


def _hops(hops: tuple[Hop, ...]) -> orjson.Fragment:
    """The list of hops. Put together from text, since it is the most of a line by far.

    Only what comes out of the kernel as a number, an address or one of our own words is written
    as it is; names go through the encoder, once for each place.
    """
    addresses: dict[Address, str] = {}
    texts = []
    for (
        kind,
        direction,
        t_ns,
        ifindex,
        ifname,
        netns,
        src,
        dst,
        owner,
        nat,
        reason,
        location,
    ) in hops:
        place = (ifname, ifindex, netns, owner)
        named = _places.get(place)
        if named is None:
            if len(_places) >= _PLACES_MAX:
                _places.clear()
            named = _places[place] = (
                _members({"ifname": ifname, "ifindex": ifindex, "netns": netns}),
                _members({"owner": owner}),
            )
        source = addresses.get(src)
        if source is None:
            source = addresses[src] = address(src)
        target = addresses.get(dst)
        if target is None:
            target = addresses[dst] = address(dst)
        changed = "null" if nat is None else orjson.dumps(_nat(nat)).decode()
        end = "" if kind != "drop" else "," + _members({"reason": reason, "location": location})
        texts.append(
            f'{{"kind":"{kind}","direction":"{direction}","t_ns":{t_ns},{named[0]},'
            f'"src":"{source}","dst":"{target}",{named[1]},"nat":{changed}{end}}}'
        )
    return orjson.Fragment(f"[{','.join(texts)}]".encode())


def _members(fields: dict[str, Any]) -> str:
    """The members of an object, without its braces."""
    return _line(fields)[1:-2].decode()


def _nat(nat: Nat) -> dict[str, list[str]] | None:
    changed = {
        which: [address(before_after[0]), address(before_after[1])]
        for which, before_after in (("dnat", nat.dnat), ("snat", nat.snat))
        if before_after is not None
    }
    return changed or None


def _line(fields: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a string with a lone surrogate: bytes that were not UTF-8
        return orjson.dumps(_utf8(fields), option=orjson.OPT_APPEND_NEWLINE)


def _utf8(value: Any) -> Any:
    """The same with every lone surrogate, which UTF-8 cannot say, replaced."""
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case dict():
            return {_utf8(key): _utf8(item) for key, item in value.items()}
        case list() | tuple():
            return [_utf8(item) for item in value]
        case _:
            return value
