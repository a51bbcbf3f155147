# SPDX-License-Identifier: Apache-2.0
"""Puts what a server asked itself, to answer a query, under that query.

A query is because of another one if the server sends it for the same question, after that one came
and before its answer left, and no other query could be the reason. Where several clients ask a
server the same at once, others could; then it is counted as unsure with each, and is nobody's.

What a server asks is over before its answer leaves, as a rule, and recorded before it. So a
transaction waits here for one more reading of what was recorded. Tables are bounded.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from tracer.transaction import Served, Transaction

ROOT_CGROUP = 1  # where everybody is on hosts with cgroup v1 alone, so that it tells nobody
QUERIES_MAX = 4096  # that servers sent
ASKED_MAX = 16_384  # that servers were asked
ANSWERED_KEPT_NS = 2_000_000_000  # an answer, for comparison with those that come after it
# Who takes longer than this may wait for somebody who has not answered yet.
SLOW_NS = 50_000_000
NOT_YET = "not answered when the client's own answer left"

_Who = tuple[Literal["cgroup", "netns"], int]
_Key = tuple[str, str | None, _Who]  # name in small letters, type, and who asks or answers


@dataclass(slots=True)
class _Sent:
    """A query that a server may have sent because of another."""

    key: _Key
    until_ns: int  # when to forget it
    transaction: Transaction


@dataclass(slots=True)
class _Received:
    """A query that a server was asked. No more is kept of it than comparisons need."""

    key: _Key
    until_ns: int
    number: int
    served: Served

    def could_cause(self, query: Transaction) -> bool:
        """Whether the server may have sent `query` to answer this one."""
        if query.time_ns < self.served.received_ns:
            return False
        if self.served.answered_ns is None:
            return True
        return query.time_ns + (query.latency_ns or 0) <= self.served.answered_ns


_E = TypeVar("_E", _Sent, _Received)


class _Table(Generic[_E]):
    """Entries by their key, oldest first."""

    def __init__(self) -> None:
        self._by_key: dict[_Key, deque[_E]] = {}
        self._by_age: deque[_E] = deque()

    def add(self, entry: _E) -> None:
        self._by_key.setdefault(entry.key, deque()).append(entry)
        self._by_age.append(entry)

    def of(self, key: _Key) -> Iterable[_E]:
        return self._by_key.get(key, ())

    def forget(self, now_ns: int, at_most: int) -> int:
        """Lets go of what is too old or too much; returns how many of the latter."""
        evicted = 0
        while self._by_age and (self._by_age[0].until_ns <= now_ns or len(self._by_age) > at_most):
            entry = self._by_age.popleft()
            evicted += entry.until_ns > now_ns
            alike = self._by_key[entry.key]
            alike.popleft()
            if not alike:
                del self._by_key[entry.key]
        return evicted


class Upstream:
    """Times are since 1970. `memory_ns`: how long a server may take over an answer.

    `shared_netns` are network namespaces of more than one service, as the node's own is: only a
    cgroup tells there who asks. `keep` makes of a transaction what can be kept at little cost.
    `evicted` counts queries that a server sent, forgotten too early.
    """

    def __init__(
        self,
        memory_ns: int,
        shared_netns: Iterable[int] = (),
        keep: Callable[[Transaction], Transaction] = lambda t: t,
    ) -> None:
        self.evicted = 0
        self._memory_ns = memory_ns
        self._shared_netns = set(shared_netns)
        self._sent: _Table[_Sent] = _Table()
        self._answered: _Table[_Received] = _Table()
        self._unanswered: _Table[_Received] = _Table()
        self._keep = keep
        self._fresh: list[tuple[Transaction, _Received, _Sent | None]] = []
        self._due: list[tuple[Transaction, _Received, _Sent | None]] = []
        self._numbers = itertools.count(1)

    def feed(
        self,
        transactions: Iterable[Transaction],
        servers: Container[int],
        now_ns: int,
        *,
        in_order: bool = False,
    ) -> list[Transaction]:
        """Takes in what was recorded; returns what need not wait for anything.

        Where a query was seen at its server, `upstream` is empty as yet.

        `servers` are the cgroups that have been asked anything yet; what others ask is because of
        nothing. `in_order`: all that was recorded before has been fed before.
        """
        ready = []
        for t in transactions:
            sent = self._remember_sent(t, servers, now_ns)
            key = _received(t, self._shared_netns)
            if key is None or t.served is None:
                ready.append(t)
                continue
            if in_order and not _is_slow(t.served) and not self._has_sent(key, t.served):
                # Nor can it be the reason for what is answered later, so it is not remembered.
                ready.append(t)
                continue
            received = _Received(key, now_ns, next(self._numbers), t.served)
            if t.served.answered_ns is not None:
                received.until_ns += ANSWERED_KEPT_NS
                self._answered.add(received)
            else:
                received.until_ns += self._memory_ns
                self._unanswered.add(received)
            self._fresh.append((t, received, sent))
        return ready

    def wants_in_flight(self) -> bool:
        """Whether the next `resolve` can do better if it knows what is in flight."""
        return any(
            _is_slow(received.served) or self._has_sent(received.key, received.served)
            for _, received, _ in (*self._due, *self._fresh)
        )

    def resolve(self, now_ns: int, in_flight: Iterable[Transaction] = ()) -> list[Transaction]:
        """What had been fed when this was last called, with its upstream.

        `in_flight` are queries that waited for an answer after that call, and before the reading
        that was fed since.
        """
        due, self._due, self._fresh = self._due, self._fresh, []
        resolved = []
        if due:
            waiting = list(in_flight)
            # Whom others waited for comes first.
            for t, received, sent in sorted(due, key=lambda one: one[0].time_ns, reverse=True):
                made = self._resolve(t, received, waiting)
                if sent is not None:
                    sent.transaction = self._keep(made)
                resolved.append(made)
            resolved.sort(key=_end_ns)
        self.evicted += self._sent.forget(now_ns, QUERIES_MAX)
        self._answered.forget(now_ns, ASKED_MAX)
        self._unanswered.forget(now_ns, ASKED_MAX)
        return resolved

    def flush(self, now_ns: int) -> list[Transaction]:
        """All that still waits."""
        return [*self.resolve(now_ns), *self.resolve(now_ns)]

    def _remember_sent(self, t: Transaction, servers: Container[int], now_ns: int) -> _Sent | None:
        cgroup_id = t.client.cgroup_id
        if cgroup_id not in (None, ROOT_CGROUP) and cgroup_id not in servers:
            return None
        key = _asked(t)
        if key is None:
            return None
        sent = _Sent(key, now_ns + self._memory_ns, self._keep(t))
        self._sent.add(sent)
        return sent

    def _resolve(
        self, t: Transaction, received: _Received, waiting: list[Transaction]
    ) -> Transaction:
        mine = []
        unsure = 0
        for query in self._sent_by_server(received, waiting):
            if not received.could_cause(query):
                continue
            if self._has_other_cause(received, query, waiting):
                unsure += 1
            else:
                mine.append(query)
        mine.sort(key=lambda query: query.time_ns)
        return t._replace(upstream=tuple(mine), upstream_unsure=unsure)

    def _sent_by_server(
        self, received: _Received, waiting: Iterable[Transaction] = ()
    ) -> Iterator[Transaction]:
        """The queries for the same question that the server of this one sent."""
        keys = list(self._keys(received.key, received.served))
        for key in keys:
            yield from (sent.transaction for sent in self._sent.of(key))
        for query in waiting:
            if _asked(query) in keys:
                yield query._replace(problem=query.problem or NOT_YET)

    def _has_sent(self, key: _Key, served: Served) -> bool:
        """Whether that server has sent anything for the same question since."""
        return any(
            sent.transaction.time_ns >= served.received_ns
            for one in self._keys(key, served)
            for sent in self._sent.of(one)
        )

    def _keys(self, key: _Key, served: Served) -> Iterator[_Key]:
        """What the server's own queries for the same question may stand under."""
        yield key
        if key[2][0] == "cgroup" and served.netns and served.netns not in self._shared_netns:
            yield key[0], key[1], ("netns", served.netns)

    def _has_other_cause(
        self, received: _Received, query: Transaction, waiting: list[Transaction]
    ) -> bool:
        """Whether another query to that server may be the reason for one that it sent."""
        for table in (self._answered, self._unanswered):
            for other in table.of(received.key):
                if other.number != received.number and other.could_cause(query):
                    return True
        return any(
            t.served is not None
            and _received(t, self._shared_netns) == received.key
            and _Received(received.key, 0, 0, t.served).could_cause(query)
            for t in waiting
        )


def _asked(t: Transaction) -> _Key | None:
    """By whom what is asked; None: it cannot be told."""
    client = t.client
    if t.name is None:
        return None
    if client.cgroup_id and client.cgroup_id != ROOT_CGROUP:
        return t.name.lower(), t.type, ("cgroup", client.cgroup_id)
    return (t.name.lower(), t.type, ("netns", client.netns)) if client.netns else None


def _received(t: Transaction, shared_netns: set[int]) -> _Key | None:
    """From whom what is asked; None: it was not seen at a server, or at one that cannot be told."""
    served = t.served
    if served is None or t.name is None:
        return None
    if served.cgroup_id and served.cgroup_id != ROOT_CGROUP:
        return t.name.lower(), t.type, ("cgroup", served.cgroup_id)
    if served.netns and served.netns not in shared_netns:
        return t.name.lower(), t.type, ("netns", served.netns)
    return None


def _is_slow(served: Served) -> bool:
    return served.answered_ns is None or served.answered_ns - served.received_ns >= SLOW_NS


def _end_ns(t: Transaction) -> int:
    return t.time_ns + (t.latency_ns or 0)
