# SPDX-License-Identifier: Apache-2.0
"""The names that are asked for most, in little room however many there are.

Estimated from what leaves the kernel. Which names these are is decided by what was asked of late;
what is told of each is since it has been among the candidates without a break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_CANDIDATES = 8  # for each name that is told
_SEEN_MIN = 3  # before a name is told: each new one is a new series wherever it is scraped to
_FRESH_MAX = 4096  # names of one interval that were no candidates
_STAYS = 0.98  # of what was asked before, in each interval: at 10 s, half in six minutes


@dataclass(slots=True)
class _Candidate:
    """Of one name: what was asked of late, all since it is a candidate, and how often it was seen."""

    lately: float = 0.0
    total: int = 0
    seen: int = 0


class TopNames:
    """`most` is how many names are told at most, 0: none. Names are in small letters."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._fresh: dict[str, list[int]] = {}  # (transactions, how often seen) in this interval
        self._candidates: dict[str, _Candidate] = {}

    def add(self, name: str, weight: int) -> None:
        """So many transactions asked for it. A new name that finds no room is not counted."""
        name = name.lower()
        found = self._fresh.get(name)
        if found is not None:
            found[0] += weight
            found[1] += 1
        elif name in self._candidates or len(self._fresh) < _FRESH_MAX:
            self._fresh[name] = [weight, 1]

    def turn(self) -> Mapping[str, int]:
        """Ends an interval. Of the names that are asked for most: how many transactions."""
        candidates = self._candidates
        for one in candidates.values():
            one.lately *= _STAYS
        for name, (count, seen) in self._fresh.items():
            one = candidates.setdefault(name, _Candidate())
            one.lately += count
            one.total += count
            one.seen += seen
        self._fresh.clear()
        best = sorted(candidates, key=lambda name: candidates[name].lately, reverse=True)
        self._candidates = {name: candidates[name] for name in best[: self.most * _CANDIDATES]}
        told = [name for name, one in self._candidates.items() if one.seen >= _SEEN_MIN]
        return {name: self._candidates[name].total for name in told[: self.most]}
