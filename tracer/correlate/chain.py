# SPDX-License-Identifier: Apache-2.0
"""One lookup in the making: the queries that a resolver library sent for one name, as they come.

A library asks for a name in steps. Each step is a name: what the application asked for with a
domain of the search list behind it, or as it is. A name with fewer dots than ndots is tried with
the search list first, any other as it is first. At each step there are one or two queries, A and
AAAA, and what is unanswered is asked again, what is truncated by TCP. The next step comes when
nothing was found, and only then.

From a single name nobody can tell where the search list's part begins: `a.b.c` with search list
`b.c c` is `a` or `a.b` or `a.b.c`. So a chain keeps all `stems` that its names leave possible; one
that shares none with it belongs to another lookup.

Without the resolver's configuration, a search list is guessed from names of Kubernetes' form
(`….NAMESPACE.svc.ZONE`), and from a name that is asked for after the same with more behind it was
not found.
"""

from __future__ import annotations

import enum
import functools
import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tracer.transaction import Lookup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.transaction import Client, Transaction

MEMBERS_MAX = 256
RETRY_MIN_NS = 200_000_000  # no library asks again sooner, so these are two lookups
SKEW_NS = 100_000  # by which times of one client may be wrong against each other
ADDRESSES = "A+AAAA"

_KUBERNETES = re.compile(r".+?\.([^.]+\.svc\.(?!.*\.svc\.)[^.]+\..+)")
_NO_RECORDS = b"\0\0"


class Resolver(Protocol):
    """What resolv.conf says about the names that are asked for."""

    @property
    def search(self) -> tuple[str, ...]: ...

    @property
    def ndots(self) -> int: ...


class Outcome(enum.Enum):
    """What an application's resolver library makes of an answer."""

    DATA = "data"
    EMPTY = "the name exists, without data of this type"
    NXDOMAIN = "there is no such name"
    TRUNCATED = "ask again by TCP"
    FAILED = "another code: ask again, or elsewhere"
    NONE = "no answer"


_UNSETTLED = (Outcome.NONE, Outcome.FAILED, Outcome.TRUNCATED)


class Fit(enum.IntEnum):
    """How a query continues a chain, the most certain first."""

    AGAIN = 0  # the same question once more
    PAIR = 1  # the other address family
    NEXT = 2  # the next name


class Asked(NamedTuple):
    """What a chain keeps of a transaction. `name` is in small letters, without final dot."""

    name: str
    type: str | None
    dns_id: int
    port: int
    edns: bool
    start_ns: int
    end_ns: int  # where unknown: of an answer its start, of none the time of giving up
    latency_ns: int | None
    outcome: Outcome
    rcode: str | None

    @property
    def kind(self) -> str | None:
        """What is asked for together: addresses of both families, or any other type."""
        return ADDRESSES if self.type in ("A", "AAAA") else self.type


def asked(t: Transaction, name: str, now_ns: int) -> Asked:
    """What a chain keeps of a transaction that is reported now."""
    outcome = _outcome(t)
    if t.latency_ns is not None:
        end_ns = t.time_ns + t.latency_ns
    else:
        end_ns = t.time_ns if outcome is not Outcome.NONE else max(now_ns, t.time_ns)
    return Asked(
        name.lower(),
        t.type,
        t.dns_id or 0,
        t.client.port,
        t.query[10:12] != _NO_RECORDS,
        t.time_ns,
        end_ns,
        t.latency_ns,
        outcome,
        t.rcode,
    )


def _outcome(t: Transaction) -> Outcome:
    if t.status != "answered" or t.rcode is None:
        return Outcome.NONE
    if "tc" in t.flags:
        return Outcome.TRUNCATED
    if t.rcode == "NXDOMAIN":
        return Outcome.NXDOMAIN
    if t.rcode != "NOERROR":
        return Outcome.FAILED
    if t.response is not None and t.response[6:8] == _NO_RECORDS:
        return Outcome.EMPTY
    return Outcome.DATA


class Chain:
    """A lookup that may still go on. `text` is the first name with its case kept."""

    __slots__ = (
        "client", "due", "end_ns", "found", "kind", "members", "names", "ndots", "search",
        "start_ns", "stems", "suffixes", "text",
    )  # fmt: skip

    def __init__(self, client: Client, text: str, first: Asked, resolver: Resolver | None) -> None:
        self.client = client
        self.text = text
        self.kind = first.kind
        self.search = None if resolver is None else resolver.search
        self.ndots = None if resolver is None else resolver.ndots
        self.suffixes = _guess(first.name) if self.search is None else _suffixes(self.search)
        self.stems = _stems(first.name, self.suffixes)
        self.names = [first.name]
        self.members = [first]
        self.found = first.outcome is Outcome.DATA
        self.start_ns = first.start_ns
        self.end_ns = first.end_ns
        self.due = 0  # for whoever keeps the time

    def fit(self, query: Asked, gap_ns: int, retry_ns: int) -> Fit | None:
        """How the query continues this chain, None if it does not."""
        late_ns = query.start_ns - self.end_ns - gap_ns
        if (
            query.kind != self.kind
            or query.end_ns < self.start_ns - gap_ns
            or len(self.members) >= MEMBERS_MAX
        ):
            return None
        if late_ns > 0:
            sent_again = late_ns <= retry_ns and self.lacks_family() and self._sends_again(query)
            return Fit.AGAIN if sent_again else None
        if query.name in self.names:
            same = [m for m in self.members if m.name == query.name]
            twins = [m for m in same if m.type == query.type]
            if not twins:
                return Fit.PAIR
            return Fit.AGAIN if _is_retry(query, twins, same) else None
        if self.found or any(
            m.end_ns - SKEW_NS > query.start_ns
            for m in self.members
            if m.outcome is not Outcome.NONE
        ):
            return None
        return Fit.NEXT if self._stems_after(query.name) else None

    def add(self, query: Asked) -> None:
        """Takes in a query that fits."""
        if query.name not in self.names:
            self.stems = self._stems_after(query.name)
            self.names.append(query.name)
        self.members.append(query)
        self.found = self.found or query.outcome is Outcome.DATA
        self.start_ns = min(self.start_ns, query.start_ns)
        self.end_ns = max(self.end_ns, query.end_ns)

    def distance_ns(self, query: Asked) -> tuple[bool, int]:
        """Sorts chains that a query fits alike: the same socket is near, then the nearest time."""
        nearest = min(
            min(abs(query.start_ns - m.start_ns), abs(query.start_ns - m.end_ns))
            for m in self.members
        )
        return all(m.port != query.port for m in self.members), nearest

    def lacks_family(self) -> bool:
        """Whether the last name was asked for in one address family, and others were not."""
        if self.kind != ADDRESSES:
            return False
        *before, last = (
            len({m.type for m in self.members if m.name == name}) for name in self.names[-2:]
        )
        return last == 1 and before != [1]

    def is_complete(self, *, one_family: bool) -> bool:
        """Whether nothing can follow. `one_family`: the client never asks for both."""
        last = {m.type: m.outcome for m in self.members if m.name == self.names[-1]}
        if any(outcome in _UNSETTLED for outcome in last.values()):
            return False
        if self.kind == ADDRESSES and len(last) == 1 and not one_family:
            return False
        if self._goes_on_again(len(last)):
            return False
        return self.found or (
            self.search is not None
            and len(self.stems) == 1
            and len(self.names) == len({*self.suffixes, ""})
        )

    def _goes_on_again(self, families: int) -> bool:
        """Whether one family was sent again: glibc does that with both."""
        if families < 2 or len(self.members) <= families:
            return False
        sent = Counter((m.type, m.dns_id) for m in self.members if m.name == self.names[-1])
        return len({type_ for (type_, _), times in sent.items() if times > 1}) == 1

    def conclude(self) -> Lookup:
        """What it all amounts to."""
        stem = self._stem()
        if len(self.members) == 1:
            return self._conclude_alone(self.text[: len(stem)], self.members[0])
        final = self._final(stem)
        useful = [m for m in self.members if m.name == final]
        wasted = len(self.members) - len(useful)
        wasted_ns = min(m.start_ns for m in useful) - self.start_ns if wasted else 0
        if wasted and wasted_ns <= 0:  # it went on after the answer that there is
            wasted_ns = max(0, self.end_ns - max(m.end_ns for m in useful))
        question = self.text[: len(stem)]
        search = self.search
        if search is None:
            search = tuple(name[len(stem) + 1 :] for name in self.names if len(name) > len(stem))
        return Lookup(
            time_ns=self.start_ns,
            client=self.client,
            question=question,
            search=search,
            ndots=self.ndots,
            queries=len(self.members),
            wasted=wasted,
            latency_ns=self._latency_ns(useful),
            wasted_ns=wasted_ns,
            status=_status(useful),
            advice="; ".join(self._advice(question, final, wasted)) or None,
            ids=tuple(m.dns_id for m in sorted(self.members, key=lambda m: m.start_ns)),
        )

    def _conclude_alone(self, question: str, only: Asked) -> Lookup:
        """The same for a single query, which is what there is most of."""
        return Lookup(
            self.start_ns,
            self.client,
            question,
            self.search or (),
            self.ndots,
            1,
            0,
            only.latency_ns,
            0,
            _status(self.members),
            None,
            (only.dns_id,),
        )

    def _sends_again(self, query: Asked) -> bool:
        """Whether this is an answered query once more: with the other family's answer missing,
        glibc sends both again, and the loss is reported only after that.
        """
        return any(
            (m.name, m.type, m.dns_id, m.port) == (query.name, query.type, query.dns_id, query.port)
            for m in self.members
        )

    def _stems_after(self, name: str) -> set[str]:
        """The stems that are left if this name comes next."""
        last = self.names[-1]
        shared = {
            stem
            for stem in self.stems & _stems(name, self.suffixes)
            if self._place(name, stem) > self._place(last, stem)
        }
        if shared or self.search is not None:
            return shared
        if all(known.startswith(f"{name}.") for known in self.names):
            return {name}
        if len(self.names) > 1 and len(self.stems) == 1:
            (stem,) = self.stems
            return self.stems if name.startswith(f"{stem}.") and last != stem else set()
        return set()

    def _place(self, name: str, stem: str) -> int:
        """Where a name stands in the order that the names of a stem are asked for."""
        suffix = name[len(stem) :]
        if self.search is None or self.ndots is None:
            return -suffix.count(".")
        if not suffix and stem.count(".") >= self.ndots:
            return -1
        return self.suffixes.index(suffix) if suffix in self.suffixes else len(self.suffixes)

    def _stem(self) -> str:
        """What the application asked for, as far as it can be told."""
        name = self.names[0]
        if len(self.names) > 1:
            asked_as_it_is = [stem for stem in self.stems if stem in self.names]
            return min(asked_as_it_is or self.stems, key=len)
        if self.search is None or self.ndots is None or not self.suffixes or not self.found:
            return name
        # Found with the first domain of the search list, or asked for in full: tools that ask for
        # names in full use EDNS, or ask for one type.
        short = name.removesuffix(self.suffixes[0])
        families = {m.type for m in self.members}
        by_library = len(families) == 2 or not any(m.edns for m in self.members)
        return short if short and short.count(".") < self.ndots and by_library else name

    def _final(self, stem: str) -> str:
        """The name whose answer the application got."""
        for member in self.members:
            if member.outcome is Outcome.DATA:
                return member.name
        return stem if stem in self.names else self.names[-1]

    def _latency_ns(self, useful: list[Asked]) -> int | None:
        """Unknown where a question stayed without an answer: nobody sees the client give up."""
        last = {m.type: m for m in sorted(useful, key=lambda m: m.start_ns)}
        if any(m.latency_ns is None for m in last.values()):
            return None
        return max(m.end_ns for m in self.members if m.latency_ns is not None) - self.start_ns

    def _advice(self, question: str, final: str, wasted: int) -> Iterator[str]:
        if wasted:
            yield self._how_to_ask(question, final)
            yield f"{wasted} of {len(self.members)} queries were search-list misses"
        lost = {m.type for m in self.members if m.outcome is Outcome.NONE}
        if (
            self.kind == ADDRESSES
            and len(lost) == 1
            and any(m.type not in lost for m in self.members)
        ):
            yield (
                f"{lost.pop()} was lost and the other address family was not, which may be"
                " conntrack's race: set the option single-request-reopen or run NodeLocal DNSCache"
            )

    def _how_to_ask(self, question: str, final: str) -> str:
        dots = question.count(".")
        if self.found and len(final) > len(question):
            return f"ask for {question}{final[len(question) :]}. (with a final dot)"
        if not self.found and not dots:
            return f"{question} is nowhere in the search list, so check the name and the namespace"
        ndots = " or set dnsConfig ndots:1" if dots and self.names[0] != question.lower() else ""
        return f"ask for {question}. (with a final dot){ndots}"


def _is_retry(query: Asked, twins: list[Asked], same: list[Asked]) -> bool:
    """Whether a question is asked once more in the same lookup, and not in another one."""
    if any(m.dns_id == query.dns_id for m in twins) and any(
        m.outcome in (Outcome.NONE, Outcome.TRUNCATED) for m in (*same, query)
    ):
        # What is sent again keeps its id; what is asked anew has another. With one family's
        # answer truncated, glibc asks for both again.
        return True
    last = twins[-1]
    if last.outcome is Outcome.NONE:
        return query.start_ns - last.start_ns >= RETRY_MIN_NS
    if last.outcome in _UNSETTLED:
        return query.start_ns >= last.end_ns
    # That a query was not answered is reported after the answer to a later one.
    return query.outcome is Outcome.NONE and twins[0].start_ns - query.start_ns >= RETRY_MIN_NS


def _status(useful: list[Asked]) -> str:
    outcomes = {m.outcome: m.rcode for m in useful}
    if Outcome.DATA in outcomes or Outcome.EMPTY in outcomes:
        return "NOERROR"
    for outcome in (Outcome.NXDOMAIN, Outcome.TRUNCATED, Outcome.FAILED):
        rcode = outcomes.get(outcome)
        if rcode is not None:
            return rcode
    return "TIMEOUT"


def _stems(name: str, suffixes: tuple[str, ...]) -> set[str]:
    """What may have been asked for where this name is seen on the wire."""
    stems = {name}
    for suffix in suffixes:
        if suffix and name.endswith(suffix) and len(name) > len(suffix):
            stems.add(name[: -len(suffix)])
    return stems


@functools.lru_cache(maxsize=1024)
def _suffixes(search: tuple[str, ...]) -> tuple[str, ...]:
    """What is put behind a name: nothing, for the root."""
    return tuple(dict.fromkeys(f".{domain.lower()}".rstrip(".") for domain in search))


def _guess(name: str) -> tuple[str, ...]:
    """The search list that Kubernetes gives the pods of the last namespace in the name."""
    match = _KUBERNETES.fullmatch(name)
    if match is None:
        return ()
    namespace, _, zone = match[1].partition(".svc.")
    return (f".{namespace}.svc.{zone}", f".svc.{zone}", f".{zone}")
