# SPDX-License-Identifier: Apache-2.0
"""What each stage of the user side costs per transaction: `.venv/bin/python -m bench.user_side`.

Best of several runs, in microseconds; a hit is a question or response seen before.
"""

from __future__ import annotations

import functools
import io
import itertools
import timeit
from typing import TYPE_CHECKING

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tests.samples import START_NS, transaction
from tracer import decode
from tracer.cluster.resolvconf import ResolvConf
from tracer.correlate.lookups import Lookups
from tracer.export import jsonl
from tracer.filters import Filters
from tracer.show import path
from tracer.show.live import LiveTable
from tracer.show.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracer.correlate.chain import Resolver
    from tracer.transaction import Transaction

RUNS = 5
CALLS = 20_000
NAME = "www.li-rui.top.sre.svc.cluster.local."


def query(name: str = NAME) -> bytes:
    return dns.message.make_query(name, "A").to_wire()


def response(name: str = NAME, answers: int = 1) -> bytes:
    message = dns.message.make_response(dns.message.make_query(name, "A", use_edns=True))
    message.flags |= dns.flags.RA
    addresses = [f"192.0.2.{number}" for number in range(answers)]
    message.answer.append(dns.rrset.from_text_list(name, 30, "IN", "A", addresses))
    return message.to_wire()


def no_such_name(name: str) -> bytes:
    message = dns.message.make_response(dns.message.make_query(name, "A"))
    message.set_rcode(dns.rcode.NXDOMAIN)
    soa = "ns.dns.example.com. hostmaster.example.com. 1 7200 1800 86400 30"
    message.authority.append(dns.rrset.from_text("example.com.", 30, "IN", "SOA", soa))
    return message.to_wire()


def alias(name: str) -> bytes:
    message = dns.message.make_response(dns.message.make_query(name, "A"))
    target = "edge.example.net."
    message.answer.append(dns.rrset.from_text(name, 30, "IN", "CNAME", target))
    message.answer.append(dns.rrset.from_text(target, 30, "IN", "A", "192.0.2.1"))
    return message.to_wire()


def random_names() -> Iterator[str]:
    for number in itertools.count():
        yield f"{number:08x}.bench.example.com."


def show(what: str, call: Callable[[], object]) -> None:
    best_s = min(timeit.repeat(call, number=CALLS, repeat=RUNS)) / CALLS
    print(f"{best_s * 1e6:8.2f} µs  {what}")


def cycle(call: Callable[[bytes], object], messages: list[bytes]) -> Callable[[], object]:
    """A call with another message each time."""
    following = iter(messages * (RUNS + 1))
    return lambda: call(next(following))


def decoding() -> None:
    asked = query()
    show("question, hit", lambda: decode.question(asked))
    names = random_names()
    fresh = [query(next(names)) for _ in range(CALLS)]
    show("question, miss", cycle(decode.question, fresh))
    answered = response()
    show("rcode", lambda: decode.rcode(answered, len(answered)))
    show("flags", lambda: decode.flags(0x8180))
    show("response, hit", lambda: decode.response(answered, len(answered)))
    for what, make in (("A", response), ("NXDOMAIN", no_such_name), ("alias", alias)):
        fresh = [make(next(names)) for _ in range(CALLS)]
        show(f"response, miss, {what}", cycle(lambda wire: decode.response(wire, len(wire)), fresh))


def exporting() -> None:
    t = transaction(NAME)
    show("JSON line, 8 hops", lambda: jsonl.transaction(t))
    without_hops = t._replace(make_hops=tuple)
    show("JSON line, no hops", lambda: jsonl.transaction(without_hops))


def showing() -> None:
    t = transaction(NAME)
    for what, width in (("piped", None), ("80 columns", 80), ("200 columns", 200)):
        table = LiveTable(io.StringIO(), width)
        show(f"live line, {what}", functools.partial(table.line, t))
    show("waterfall, 80 columns", lambda: path.render(t, 80))
    summary = Summary()
    show("summary's counts", lambda: summary.add(t))


def filtering() -> None:
    t = transaction(NAME)
    keep = Filters(namespaces=("default",), name="www.*", slower="5ms").predicate()
    show("three filters", lambda: keep(t))


def correlating() -> None:
    """Per transaction: all eight of a search-list flood, one after the other."""
    pod = ResolvConf((), ("sre.svc.cluster.local", "svc.cluster.local", "cluster.local"), 5)
    names = (*(f"www.li-rui.top.{domain}." for domain in pod.search), "www.li-rui.top.")
    flood = []
    for step, name in enumerate(names):
        for type_ in ("A", "AAAA"):
            rcode = "NOERROR" if name == names[-1] else "NXDOMAIN"
            data = ("192.0.2.1",) if type_ == "A" else ("2001:db8::1",)
            start_ns = START_NS + step * 600_000
            flood.append(
                transaction(name, type_, rcode, data=data, time_ns=start_ns, latency_ns=500_000)
            )
    lookups = Lookups()
    for what, resolver in (("known", pod), ("unknown", None)):
        following = itertools.cycle(flood)

        def feed(
            following: Iterator[Transaction] = following, to: Resolver | None = resolver
        ) -> None:
            lookups.feed(next(following), to, START_NS)

        show(f"lookups, search list {what}", feed)


if __name__ == "__main__":
    decoding()
    correlating()
    filtering()
    exporting()
    showing()
