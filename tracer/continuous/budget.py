# SPDX-License-Identifier: Apache-2.0
"""Keeps our own CPU time within a budget, by letting fewer transactions leave the kernel.

Histograms count all of them in any case. Ordinary transactions become fewer first, then those that
are slow or failed; what is not kept for that is counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracer.kernel.session import Keeping

_SHARE_MAX = 1 << 20
_WINDOW_S = 60.0
_COST_S = 150e-6  # what it takes at most to name, decode and write a transaction
_RELAX_BELOW = 0.5  # of the budget: then twice as many may leave


@dataclass(slots=True)
class Budget:
    """`share` is of one core, 0 to 1; `cpu_s()` what we have used since the start."""

    share: float
    asked: Keeping  # what the user wants to be kept, if it can be afforded
    cpu_s: Callable[[], float]
    keeping: Keeping = field(init=False)
    used: float = 0.0  # of one core, in the last minute
    _seen: deque[tuple[float, float]] = field(default_factory=deque)  # (when, CPU time by then)

    _left: int = 0

    def __post_init__(self) -> None:
        self.keeping = self.asked

    def look(self, now_s: float, left: int) -> Keeping:
        """What is to be kept from now on; to be called every few seconds.

        `left` is how many transactions have left the kernel since the start. Where they are not
        what takes the time, fewer of them would not help.
        """
        seen = self._seen
        if seen and now_s <= seen[-1][0]:
            return self.keeping
        seen.append((now_s, self.cpu_s()))
        fresh, self._left = left - self._left, left
        if len(seen) < 2:
            return self.keeping
        while len(seen) > 2 and seen[1][0] <= now_s - _WINDOW_S:
            seen.popleft()
        lately = _share(seen[-2], seen[-1])
        self.used = _share(seen[0], seen[-1])
        # What is written now and then takes more than its share for a moment.
        if min(lately, self.used) > self.share:
            taken = fresh * _COST_S / (seen[-1][0] - seen[-2][0])
            if taken > (lately - self.share) / 2:
                self.keeping = self._less()
        elif self.used < self.share * _RELAX_BELOW:
            self.keeping = self._more()
        return self.keeping

    def _less(self) -> Keeping:
        now = self.keeping
        if now.share and now.share < _SHARE_MAX:
            return replace(now, share=now.share * 2)
        if now.notable_share < _SHARE_MAX:
            return replace(now, notable_share=now.notable_share * 2)
        return now

    def _more(self) -> Keeping:
        now = self.keeping
        if now.notable_share > self.asked.notable_share:
            return replace(now, notable_share=now.notable_share // 2)
        if now.share > self.asked.share:
            return replace(now, share=max(self.asked.share, now.share // 2))
        return now


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])
