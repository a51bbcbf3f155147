# SPDX-License-Identifier: Apache-2.0
"""What a report says, as plain data; all times are nanoseconds, and None is unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

SHARES = (0.5, 0.9, 0.99, 0.999)


@dataclass(slots=True)
class Times:
    """A distribution. `quantiles` are those of SHARES; None where there are too few to tell."""

    count: int = 0
    sum_ns: int = 0
    max_ns: int | None = None
    quantiles: tuple[int | None, ...] = (None,) * len(SHARES)
    octaves: tuple[tuple[int, int], ...] = ()  # (exponent of two that is below, count), for drawing


@dataclass(slots=True)
class Group:
    """What is counted under one name; `name` None: unknown.

    `recorded`: how many transactions the count is estimated from; None: it is counted.
    """

    name: str | None
    count: int
    failed: int
    times: Times
    recorded: int | None = None
    is_estimated: bool = False


@dataclass(slots=True)
class Failure:
    """Transactions that failed alike."""

    count: int
    client: str | None
    question: str | None
    status: str
    rcode: str | None
    reason: str | None  # the kernel's, of a drop
    place: str | None  # of a drop


@dataclass(slots=True)
class Heat:
    """Transactions by time and by latency: `counts[column][row]`."""

    starts: list[datetime] = field(default_factory=list)
    seconds: float = 0.0  # of a column
    octaves: list[int] = field(default_factory=list)  # half powers of two: 2 ** (n / 2) ns
    counts: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class Coverage:
    """How complete the data is."""

    transactions: int = 0
    recorded: int = 0
    not_kept: int = 0
    skipped: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, int] = field(default_factory=dict)
    # Node, from, to, and how many transactions of that time are known all the same.
    gaps: list[tuple[str, datetime, datetime, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # file, why
    pending: list[str] = field(default_factory=list)  # nodes with recordings that are not complete
    files: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is known to be missing."""
        missing = self.gaps, self.pending, self.unreadable, self.skipped
        return not any(missing) and not self.lost.keys() - {"filtered"}

    @property
    def has_each(self) -> bool:
        """Whether every transaction that was counted is known by itself."""
        return not (self.not_kept or self.skipped or self.gaps)


@dataclass(slots=True)
class Report:
    """All of it. `by` maps "pod", "name", "server", "backend", "type", "rcode" to groups."""

    start: datetime | None
    end: datetime | None
    nodes: list[str]
    filters: str  # as on the command line
    namespaces: list[str]  # where nothing was found: those of clients that the recordings have
    counted: bool  # from histograms: all transactions; else estimated from those that were kept
    stages_counted: bool  # the same of the stages
    transactions: int
    by_servers: int  # more of them, which DNS servers asked and which are in no other figure
    clients_unseen: int  # of the transactions: their client's own socket was not
    statuses: dict[str, int]
    total: Times
    stages: dict[str, Times]
    by: dict[str, list[Group]]
    slowest: list[dict[str, Any]]
    failures: list[Failure]
    heat: Heat
    coverage: Coverage
