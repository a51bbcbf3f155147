# SPDX-License-Identifier: Apache-2.0
"""How complete it is what continuous mode tells: what was lost on the way, and what was spared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tracer.record import Counter as Count
from tracer.run import losses

if TYPE_CHECKING:
    from tracer.connections import Connections
    from tracer.continuous.budget import Budget
    from tracer.continuous.recorder import Recorder
    from tracer.kernel.session import Session
    from tracer.run import Totals
    from tracer.tally import Tally


@dataclass(slots=True)
class Coverage:
    """Since the start. Where no transaction is to leave the kernel, none is spared.

    `own_not_kept` and `own_skipped` are of transactions that the kernel does not end: ordinary
    ones, and others.
    """

    session: Session
    connections: Connections
    tally: Tally
    recorder: Recorder | None
    budget: Budget
    own_not_kept: int = 0
    own_skipped: int = 0
    _told: dict[str, int] = field(default_factory=dict)  # by the interval before

    def losses(self, totals: Totals) -> tuple[dict[str, int], dict[str, int]]:
        """What was seen but is in no transaction, and messages without their counterpart."""
        totals.connections = self.connections.lost
        lost, unmatched = losses(self.session, totals)
        counters = self.session.counters()
        lost["series"] = counters[Count.SERIES_FULL] + self.tally.overflowed
        lost["buckets"] = counters[Count.BUCKETS_FULL] + self.tally.untimed
        lost["recordings"] = self.recorder.given_up if self.recorder else 0
        del lost["lookups"], lost["upstream"]  # which this mode does not have
        return lost, unmatched

    def spared(self) -> tuple[int, int]:
        """How many transactions did not leave the kernel: ordinary ones, and others."""
        if not self.budget.asked.any:
            return 0, 0
        counters = self.session.counters()
        return (
            counters[Count.NOT_KEPT] + self.own_not_kept,
            counters[Count.SKIPPED] + self.own_skipped,
        )

    def record(
        self,
        recorder: Recorder,
        totals: Totals,
        interval_ns: tuple[int, int],
        transactions: int,
        problem: str | None,
    ) -> None:
        """Writes what has come to it in an interval (start, end; since 1970)."""
        lost, unmatched = self.losses(totals)
        not_kept, skipped = self.spared()
        now = {
            "recorded": recorder.rows,
            "not_kept": not_kept,
            "skipped": skipped,
            **{f"lost {kind}": number for kind, number in lost.items()},
            **{f"unmatched {kind}": number for kind, number in unmatched.items()},
        }
        fresh = {name: number - self._told.get(name, 0) for name, number in now.items()}
        row = {
            "time_start_ns": interval_ns[0],
            "time_end_ns": interval_ns[1],
            "transactions": transactions,
            "recorded": fresh["recorded"],
            "not_kept": fresh["not_kept"],
            "skipped": fresh["skipped"],
            "sample": self.budget.keeping.share,
            "lost": {kind: fresh[f"lost {kind}"] for kind in lost},
            "unmatched": {kind: fresh[f"unmatched {kind}"] for kind in unmatched},
            "problem": problem,
        }
        is_told = recorder.write("coverage", [row])
        # What was lost is told later where it could not be told now.
        self._told |= {
            name: number
            for name, number in now.items()
            if is_told or not name.startswith(("lost ", "unmatched "))
        }
