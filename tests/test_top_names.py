# SPDX-License-Identifier: Apache-2.0
"""The names that are asked for most, against a count of all that was asked."""

from __future__ import annotations

import random
from collections import Counter

from tracer.continuous import top_names
from tracer.continuous.top_names import TopNames


def test_the_most_asked_are_told_however_many_names_there_are() -> None:
    """By Zipf's law, among as many names that are asked for once."""
    dice = random.Random(7)  # noqa: S311 - for a test
    top = TopNames(10)
    asked = Counter[str]()
    told = dict[str, int]()
    for interval in range(50):
        drawn = dice.choices(range(1, 2001), [1 / n for n in range(1, 2001)], k=2000)
        for number in drawn:
            name = f"n{number}.example."
            top.add(name if number % 2 else name.upper(), 3)
            top.add(f"once-{interval}-{dice.random()}.example.", 3)
            asked[name] += 3
        told = dict(top.turn())
    assert set(told) == {f"n{n}.example." for n in range(1, 11)}
    assert all(0.9 * asked[name] <= count <= asked[name] for name, count in told.items())


def test_what_is_asked_no_more_gives_way() -> None:
    top = TopNames(1)
    for _ in range(10):
        top.add("old.example.", 100)
    assert top.turn() == {"old.example.": 1000}
    for _ in range(200):
        top.add("new.example.", 30)
        told = top.turn()
    assert told == {"new.example.": 6000}


def test_totals_never_fall_while_a_name_is_told() -> None:
    dice = random.Random(3)  # noqa: S311 - for a test
    top = TopNames(5)
    before = dict[str, int]()
    for _ in range(200):
        for _ in range(50):
            top.add(f"n{dice.randrange(20)}.example.", 1)
        told = dict(top.turn())
        assert len(told) <= 5
        assert all(told[name] >= before[name] for name in told.keys() & before)
        before = told


def test_what_comes_once_is_never_told() -> None:
    """Each name that is told is a new series, wherever it is scraped to."""
    top = TopNames(10)
    told = set[str]()
    for interval in range(500):
        for number in range(20):
            top.add(f"n{number % 5}.example.", 100)
            top.add(f"{interval}-{number}.example.", 100)
        told |= top.turn().keys()
    assert told == {f"n{number}.example." for number in range(5)}


def test_flood_of_names_does_not_hide_those_that_are_known() -> None:
    top = TopNames(2)
    for interval in range(100):
        for number in range(2 * top_names._FRESH_MAX if interval else 0):
            top.add(f"{interval}-{number}.example.", 1)
        for name in ("a.example.", "b.example."):
            for _ in range(5):
                top.add(name, 10)
        told = top.turn()
        assert told == dict.fromkeys(("a.example.", "b.example."), 50 * (interval + 1))


def test_room_is_bounded() -> None:
    top = TopNames(3)
    for interval in range(3):
        for number in range(3 * top_names._FRESH_MAX):
            top.add(f"{interval}-{number}.example.", 1)
        assert len(top._fresh) <= top_names._FRESH_MAX + 3 * top_names._CANDIDATES
        assert not top.turn()
        assert len(top._candidates) == 3 * top_names._CANDIDATES
