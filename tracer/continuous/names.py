# SPDX-License-Identifier: Apache-2.0
"""The names that are asked for most, in little room however many there are.

Estimated from what leaves the kernel. Which names these are is decided by what was asked of late;
what is told of each is since it was first among the candidates.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_CANDIDATES = 8  # for each name that is told
_FRESH_MAX = 4096  # names of one interval
_STAYS = 0.98  # of what was asked before, in each interval: at 10 s, half in six minutes


class TopNames:
    """`most` is how many names are told at most, 0: none. Names are in small letters."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._fresh: Counter[str] = Counter()
        self._lately: dict[str, float] = {}
        self._totals: dict[str, int] = {}

    def add(self, name: str, weight: int) -> None:
        """So many transactions asked for it. What finds no room in an interval is not counted."""
        name = name.lower()
        if name in self._fresh or len(self._fresh) < _FRESH_MAX:
            self._fresh[name] += weight

    def turn(self) -> Mapping[str, int]:
        """Ends an interval. Of the names that are asked for most: how many transactions."""
        lately = {name: _STAYS * score for name, score in self._lately.items()}
        for name, count in self._fresh.items():
            lately[name] = lately.get(name, 0.0) + count
        best = sorted(lately, key=lately.__getitem__, reverse=True)[: self.most * _CANDIDATES]
        self._lately = {name: lately[name] for name in best}
        self._totals = {name: self._totals.get(name, 0) + self._fresh[name] for name in best}
        self._fresh.clear()
        return {name: self._totals[name] for name in best[: self.most]}
