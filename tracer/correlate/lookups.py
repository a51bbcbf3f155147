# SPDX-License-Identifier: Apache-2.0
"""Groups transactions into what applications asked for, with what was wasted on the way.

Transactions come as they complete. A lookup is handed on as soon as nothing can follow, else some
time after its last answer: a short gap as a rule, and the time after which libraries ask again
where one of two address families has not been heard of.

Whatever fits no lookup begins one, so a doubt makes two lookups, never a wrong count: every
transaction with a name is in exactly one. Tables are bounded; what is evicted is handed on as far
as it came, and counted.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

from tracer.correlate.chain import ADDRESSES, Chain, asked

if TYPE_CHECKING:
    from tracer.correlate.chain import Asked, Resolver
    from tracer.transaction import Client, Lookup, Transaction

GAP_NS = 1_000_000_000
RETRY_NS = 5_000_000_000  # resolv.conf's default `timeout`
OPEN_MAX = 8_192
CLIENTS_MAX = 4_096
CANDIDATES_MAX = 4
_TICK_NS = 100_000_000
_FAMILIES_KNOWN_AFTER = 64

_ClientKey = tuple[int, int] | str


class _Asker:
    """A process, or an address where no process is known: its lookups by their first label."""

    __slots__ = ("address_queries", "families", "open")

    def __init__(self) -> None:
        self.open: dict[str, dict[int, Chain]] = {}
        self.families: set[str | None] = set()
        self.address_queries = 0

    def count(self, query: Asked) -> None:
        if query.kind == ADDRESSES:
            self.families.add(query.type)
            self.address_queries += 1

    @property
    def one_family(self) -> bool:
        """Whether it asks for A only, or AAAA only, as far as one can tell."""
        return len(self.families) < 2 and self.address_queries >= _FAMILIES_KNOWN_AFTER


class Lookups:
    """The lookups of all clients. Times are since 1970; `evicted` counts those cut short."""

    def __init__(
        self, gap_ns: int = GAP_NS, retry_ns: int = RETRY_NS, open_max: int = OPEN_MAX
    ) -> None:
        self.evicted = 0
        self._gap_ns = gap_ns
        self._retry_ns = retry_ns
        self._open_max = open_max
        self._askers: OrderedDict[_ClientKey, _Asker] = OrderedDict()
        # Chains in the order that they began, and by the tick after which they are over.
        self._open: OrderedDict[int, Chain] = OrderedDict()
        self._due: dict[int, dict[int, Chain]] = {}
        self._tick = 0

    def __len__(self) -> int:
        return len(self._open)

    def feed(self, t: Transaction, resolver: Resolver | None, now_ns: int) -> list[Lookup]:
        """Takes in a transaction that is reported now; returns the lookups that are over."""
        over = self.expire(now_ns) if now_ns // _TICK_NS != self._tick else []
        if t.name is None:
            return over
        text = t.name.removesuffix(".")
        query = asked(t, text, now_ns)
        asker = self._asker(t.client)
        asker.count(query)
        chain = self._find(asker, query)
        if chain is not None:
            chain.add(query)
            self._forget_due(chain)
        else:
            chain = Chain(t.client, text, query, resolver)
            self._begin(asker, chain)
        if chain.is_complete(one_family=asker.one_family):
            over.append(self._end(chain))
        else:
            self._set_due(asker, chain)
        while len(self._open) > self._open_max:
            self.evicted += 1
            over.append(self._end(next(iter(self._open.values()))))
        return over

    def expire(self, now_ns: int) -> list[Lookup]:
        """The lookups that nothing has been added to for long enough."""
        self._tick = now_ns // _TICK_NS
        over = []
        for tick in sorted(tick for tick in self._due if tick < self._tick):
            over += [self._end(chain) for chain in list(self._due[tick].values())]
        return over

    def flush(self) -> list[Lookup]:
        """All that are open, as far as they came."""
        return [self._end(chain) for chain in list(self._open.values())]

    def _asker(self, client: Client) -> _Asker:
        key = _key(client)
        asker = self._askers.get(key)
        if asker is not None:
            self._askers.move_to_end(key)
            return asker
        asker = self._askers[key] = _Asker()
        while len(self._askers) > CLIENTS_MAX:
            # What it has open stays open, and ends by its time; it is only not added to.
            self._askers.popitem(last=False)
        return asker

    def _find(self, asker: _Asker, query: Asked) -> Chain | None:
        alike = asker.open.get(_first_label(query.name), {})
        fitting = [
            (fit, chain)
            for chain in itertools.islice(reversed(alike.values()), CANDIDATES_MAX)
            if (fit := chain.fit(query, self._gap_ns, self._retry_ns)) is not None
        ]
        if len(fitting) < 2:
            return fitting[0][1] if fitting else None
        return min(fitting, key=lambda found: (found[0], found[1].distance_ns(query)))[1]

    def _begin(self, asker: _Asker, chain: Chain) -> None:
        self._open[id(chain)] = chain
        asker.open.setdefault(_first_label(chain.names[0]), {})[id(chain)] = chain

    def _end(self, chain: Chain) -> Lookup:
        del self._open[id(chain)]
        self._forget_due(chain)
        asker = self._askers.get(_key(chain.client))
        if asker is not None:
            label = _first_label(chain.names[0])
            # An asker that was forgotten and came again does not know it.
            alike = asker.open.get(label, {})
            alike.pop(id(chain), None)
            if not alike:
                asker.open.pop(label, None)
        return chain.conclude()

    def _set_due(self, asker: _Asker, chain: Chain) -> None:
        due_ns = chain.end_ns + self._gap_ns
        if not asker.one_family and chain.lacks_family():
            due_ns += self._retry_ns
        chain.due = due_ns // _TICK_NS
        self._due.setdefault(chain.due, {})[id(chain)] = chain

    def _forget_due(self, chain: Chain) -> None:
        chains = self._due.get(chain.due)
        if chains is not None:
            chains.pop(id(chain), None)
            if not chains:
                del self._due[chain.due]


def _key(client: Client) -> _ClientKey:
    if client.netns is not None and client.pid is not None:
        return client.netns, client.pid
    return client.ip


def _first_label(name: str) -> str:
    return name.partition(".")[0]
