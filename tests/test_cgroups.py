# SPDX-License-Identifier: Apache-2.0
"""A hierarchy of cgroups as it changes, by each way that the kernel tells of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tracer.cluster import cgroup_handles, cgroups
from tracer.cluster.cgroup_events import Missed
from tracer.cluster.cgroups import CgroupTree, Change
from tracer.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WAYS = {"fanotify": ("fanotify",), "inotify": ("inotify",), "walking": ()}


class Clock:
    """Seconds, as a test sets them."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def top(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of the test's own; gone afterwards, with all below."""
    request.getfixturevalue("root")
    root = netns.cgroup2_root()
    if root is None:
        pytest.fail(f"no cgroup v2 here: {netns.cgroup2_fix()}", pytrace=False)
    directory = root / f"dnstrace-test-{os.getpid()}"
    directory.mkdir()
    yield directory
    for path, _, _ in os.walk(directory, topdown=False):
        os.rmdir(path)


@pytest.fixture(params=_WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tree(top: Path, way: str, clock: Clock) -> Iterator[CgroupTree]:
    made = CgroupTree(top, watch_by=_WAYS[way], clock=clock)
    made.start()
    if way == "fanotify" and made.watched_by != way:
        made.close()
        pytest.skip("this kernel's cgroup file systems have no fanotify: Linux 6.6 is needed")
    yield made
    made.close()


def changes(tree: CgroupTree, clock: Clock) -> set[Change]:
    clock.now += 2.0
    return set(tree.poll())


def remove(*directories: Path) -> None:
    for directory in directories:
        directory.rmdir()


def test_each_way_is_what_was_asked_for(tree: CgroupTree, way: str) -> None:
    assert tree.watched_by == way


def test_what_was_there_before_is_found(top: Path, way: str) -> None:
    (top / "a" / "b").mkdir(parents=True)
    tree = CgroupTree(top, watch_by=_WAYS[way])
    found = {change.path: change.cgroup_id for change in tree.start()}
    tree.close()
    assert found == {path: os.stat(f"{top}{path}").st_ino for path in ("/", "/a", "/a/b")}


def test_what_is_made_and_removed_is_told(tree: CgroupTree, top: Path, clock: Clock) -> None:
    (top / "a" / "b").mkdir(parents=True)
    a, b = (top / "a").stat().st_ino, (top / "a" / "b").stat().st_ino
    assert changes(tree, clock) == {Change(a, "/a", made=True), Change(b, "/a/b", made=True)}
    (top / "a" / "b" / "c").mkdir()
    c = (top / "a" / "b" / "c").stat().st_ino
    assert changes(tree, clock) == {Change(c, "/a/b/c", made=True)}
    remove(top / "a" / "b" / "c", top / "a" / "b")
    assert changes(tree, clock) == {
        Change(c, "/a/b/c", made=False),
        Change(b, "/a/b", made=False),
    }
    assert changes(tree, clock) == set()
    assert tree.path(a) == "/a"
    assert tree.path(b) is None


def test_name_that_is_taken_again_is_another_cgroup(
    tree: CgroupTree, top: Path, clock: Clock
) -> None:
    (top / "a").mkdir()
    first = (top / "a").stat().st_ino
    changes(tree, clock)
    (top / "a").rmdir()
    (top / "a").mkdir()
    second = (top / "a").stat().st_ino
    told = changes(tree, clock)
    assert {Change(first, "/a", made=False), Change(second, "/a", made=True)} <= told
    assert (tree.path(first), tree.path(second)) == (None, "/a")


@pytest.mark.parametrize("way", ["fanotify"], indirect=True)
def test_what_came_and_went_unseen_is_told(tree: CgroupTree, top: Path, clock: Clock) -> None:
    (top / "a" / "b").mkdir(parents=True)
    a, b = (top / "a").stat().st_ino, (top / "a" / "b").stat().st_ino
    remove(top / "a" / "b", top / "a")
    assert changes(tree, clock) == {
        Change(number, path, made)
        for number, path in ((a, "/a"), (b, "/a/b"))
        for made in (True, False)
    }
    assert tree.path(a) is None


def test_what_is_above_the_number_of_watches_is_found_by_walking(
    top: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_WATCHES_MAX", 2)
    (top / "a").mkdir()
    (top / "b").mkdir()
    tree = CgroupTree(top, watch_by=("inotify",), clock=clock)
    tree.start()
    assert tree.watched_by == "inotify, walking"
    for name in ("a", "b"):
        (top / name / "c").mkdir()
    found = changes(tree, clock)
    tree.close()
    assert {change.path for change in found} == {"/a/c", "/b/c"}


@pytest.mark.parametrize("way", ["fanotify", "inotify"], indirect=True)
def test_lost_events_are_made_up_for_by_a_walk_a_second(
    tree: CgroupTree, top: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missed() -> None:
        raise Missed

    (top / "a").mkdir()
    assert tree._watcher
    with monkeypatch.context() as patch:
        patch.setattr(tree._watcher, "read", missed)
        clock.now += 0.5
        assert tree.poll() == []
    clock.now += 1.0
    assert "/a" in {change.path for change in tree.poll()}
    assert tree.overflows == 1


def test_cgroup_is_found_by_its_id_alone(tree: CgroupTree, top: Path) -> None:
    """Before any event was read, and without a walk."""
    (top / "a").mkdir()
    number = (top / "a").stat().st_ino
    if tree.watched_by == "walking":
        assert tree._mount is not None
    assert tree.find(number) == [Change(number, "/a", made=True)]
    assert tree.find(number) == []


def test_cgroup_is_found_by_a_walk_where_handles_are_not_allowed(
    tree: CgroupTree, top: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_mount: int, _cgroup_id: int) -> str:
        raise PermissionError

    monkeypatch.setattr(cgroup_handles, "path_of", refused)
    (top / "a").mkdir()
    number = (top / "a").stat().st_ino
    clock.now += 2.0
    assert Change(number, "/a", made=True) in tree.find(number)
    assert tree.find(number + 1) == []


def test_id_of_no_cgroup_is_not_found(tree: CgroupTree) -> None:
    assert tree.find(2**63) == []


def test_number_of_cgroups_is_bounded(
    tree: CgroupTree, top: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_CGROUPS_MAX", 2)
    (top / "a").mkdir()
    (top / "b").mkdir()
    assert len(changes(tree, clock)) == 1
    assert tree.ignored
    for name in ("a", "b"):
        (top / name).rmdir()
    changes(tree, clock)
    (top / "c").mkdir()
    assert {change.path for change in changes(tree, clock) if change.made} == {"/c"}


def test_directory_that_is_no_cgroup_is_not_marked_for_fanotify(tmp_path: Path) -> None:
    """It would tell of everything on that file system."""
    tree = CgroupTree(tmp_path)
    tree.start()
    assert tree.watched_by == "inotify"
    tree.close()


def test_missing_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        CgroupTree(tmp_path / "nothing").start()
