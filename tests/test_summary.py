# SPDX-License-Identifier: Apache-2.0
"""What a run amounts to, in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import START_NS, WEB, transaction
from tracer.show.summary import Histogram, Summary
from tracer.transaction import Lookup

NOTHING = {"ring_full": 0, "table_full": 0, "undecodable": 0, "filtered": 0}
MATCHED = {"responses": 0, "queries": 0}
WASTEFUL = Lookup(
    START_NS, WEB, "www.li-rui.top", (), 5, 8, 6, 3_100_000, 2_000_000, "NOERROR", None, (1,)
)


def test_summary_counts_what_there_was() -> None:
    summary = Summary()
    for number in range(1, 1001):
        summary.add(transaction(latency_ns=number * 10_000))
    summary.add(transaction(rcode="NXDOMAIN", latency_ns=None))
    summary.add(transaction(rcode=None))
    summary.add(transaction(rcode=None)._replace(status="dropped"))
    summary.add_lookup(WASTEFUL)
    summary.add_lookup(WASTEFUL._replace(wasted=0, wasted_ns=0))
    assert (summary.transactions, summary.lookups) == (1003, 2)
    assert summary.text(30_000_000_000, NOTHING, MATCHED).splitlines() == [
        "1,003 transactions in 30.0 s: 1,001 answered, 1 timed out, 1 dropped",
        "rcodes: NOERROR 1,000, NXDOMAIN 1",
        "latency of answers: p50 5.0 ms, p90 9.0 ms, p99 9.9 ms, max 10.0 ms",
        "search lists: 1 of 2 lookups wasted 6 queries and 2.0 ms",
    ]


def test_summary_of_nothing_is_one_line() -> None:
    assert Summary().text(1_500_000_000, NOTHING, MATCHED) == "0 transactions in 1.50 s"


LOSSES = {
    ("ring_full", 1_200): (
        "1,200 transactions lost, since they were read too slowly; filters help, and more"
        " CPU time for dnstrace"
    ),
    ("table_full", 1): (
        "1 query not followed, since too many were in flight; raise --max-in-flight"
    ),
    ("undecodable", 2): "2 DNS messages not readable",
    ("filtered", 3): "3 queries left out by the filters",
    ("devices", 1): "1 device not watched, so hops there are missing",
    ("something_else", 4_000): "something else: 4,000",
}  # fmt: skip


@pytest.mark.parametrize(("loss", "words"), LOSSES.items(), ids=str)
def test_loss_is_said_in_words(loss: tuple[str, int], words: str) -> None:
    text = Summary().text(0, {**NOTHING, loss[0]: loss[1]}, MATCHED)
    assert " ".join(text.split()) == f"0 transactions in 0 ns {words}"


def test_unmatched_is_said_in_words() -> None:
    assert Summary().text(0, {}, {"responses": 1, "queries": 2}).splitlines()[1:] == [
        "1 response without a query: it was asked before the start, or never",
        "2 queries still waiting at the end, and shown as unanswered",
    ]


def test_names_that_may_be_missing_are_told_even_of_nothing() -> None:
    why = "the API server has been unreachable for 9 s (refused): names may be out of date\x1b"
    text = Summary().text(0, {**NOTHING, "filtered": 2}, MATCHED, why)
    assert " ".join(text.split()) == (
        "0 transactions in 0 ns 2 queries left out by the filters names: the API server has been"
        " unreachable for 9 s (refused): names may be out of date\\x1b"
    )
    assert max(map(len, text.splitlines())) <= 80


def test_lines_fit_80_columns() -> None:
    every = {name: 10**12 for name, _ in LOSSES}
    text = Summary().text(10**18, every, {"responses": 10**12, "queries": 10**12})
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.fuzz
@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=200))
def test_percentiles_are_within_a_hundredth(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for percent in (50, 90, 99, 100):
        exact = values[-(-len(values) * percent // 100) - 1]
        found = histogram.percentile(percent)
        assert found is not None
        assert abs(found - exact) <= max(exact / 100, 0)
    assert histogram.max_ns == values[-1]


def test_memory_of_latencies_is_bounded() -> None:
    histogram = Histogram()
    for exponent in range(64):
        for step in range(1000):
            histogram.add((1 << exponent) + (step << exponent) // 1000)
    assert len(histogram._buckets) <= 64 * 128
    assert histogram.count == 64_000


def test_percentile_of_nothing_is_unknown() -> None:
    assert Histogram().percentile(50) is None
    histogram = Histogram()
    histogram.add(-5)
    assert histogram.percentile(50) == 0
