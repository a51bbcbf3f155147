# SPDX-License-Identifier: Apache-2.0
"""Keeps our own CPU time within a budget, by letting fewer transactions leave the kernel.

Histograms count all of them in any case. Ordinary transactions become fewer first, but in a storm of
failures those that are slow or failed do; what is not kept for that is counted.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracer.kernel.session import Keeping

_SHARE_MAX = 1 << 20
_WINDOW_S = 60.0
_COST_S = 400e-6  # what it takes to name, decode and write a transaction, on a slow machine
_STEPS_MAX = 6  # times two, at once
_RELAX_BELOW = 0.5  # of the budget: then twice as many may leave
_WORTH_IT = 0.1  # of the budget: what takes less is not what to save at


@dataclass(slots=True)
class Budget:
    """`share` is of one core, 0 to 1; `cpu_s()` what we have used since the start."""

    share: float
    asked: Keeping  # what the user wants to be kept, if it can be afforded
    cpu_s: Callable[[], float]
    keeping: Keeping = field(init=False)
    used: float = 0.0  # of one core, in the last minute
    _seen: deque[tuple[float, float]] = field(default_factory=deque)  # (when, CPU time by then)

    _left: tuple[int, int] = (0, 0)  # ordinary and notable transactions by then

    def __post_init__(self) -> None:
        self.keeping = self.asked

    def look(self, now_s: float, ordinary: int, notable: int) -> Keeping:
        """What is to be kept from now on; to be called every few seconds.

        `ordinary` and `notable` (slow or failed) are how many transactions have left the kernel
        since the start. Where they are not what takes the time, fewer of them would not help.
        """
        seen = self._seen
        if seen and now_s <= seen[-1][0]:
            return self.keeping
        seen.append((now_s, self.cpu_s()))
        fresh, self._left = (ordinary - self._left[0], notable - self._left[1]), (ordinary, notable)
        if len(seen) < 2:
            return self.keeping
        while len(seen) > 2 and seen[1][0] <= now_s - _WINDOW_S:
            seen.popleft()
        lately = _share(seen[-2], seen[-1])
        self.used = _share(seen[0], seen[-1])
        # What is written now and then takes more than its share for a moment.
        if min(lately, self.used) > self.share:
            taken = sum(fresh) * _COST_S / (seen[-1][0] - seen[-2][0])
            enough = max(min((lately - self.share) / 2, self.share), self.share * _WORTH_IT)
            if taken > enough:
                self.keeping = self._less(lately / self.share, *fresh)
        elif self.used < self.share * _RELAX_BELOW:
            self.keeping = self._more()
        return self.keeping

    def _less(self, times: float, ordinary: int, notable: int) -> Keeping:
        """By so many times, of those that there are more of: fewer of others would not help."""
        factor = 1 << min(max(1, math.ceil(math.log2(times))), _STEPS_MAX)
        now = self.keeping
        if 0 < now.share < _SHARE_MAX and ordinary >= notable:
            return replace(now, share=min(now.share * factor, _SHARE_MAX))
        if now.notable_share:
            return replace(now, notable_share=min(now.notable_share * factor, _SHARE_MAX))
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
