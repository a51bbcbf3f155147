# SPDX-License-Identifier: Apache-2.0
"""Recordings: what is written is there, whatever becomes of the tracer and of the disk."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pytest

from tracer.continuous.recorder import Recorder, RecorderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOSTILE = [
    "\x1b[31mred\x07", "<script>alert(1)</script>", "quote\"'`", "line\nfeed\r\0", "x" * 255,
    "naïve-☃", "[bold]markup[/]", "'; DROP TABLE x; --", "\ud800lone",
]  # fmt: skip
COUNTED = 4000


def recorder(directory: Path, **changes: Any) -> Recorder:
    told: list[str | None] = changes.pop("told", [])
    limits: dict[str, Any] = {"rotate_s": 3600.0, "size_max": 1 << 40, "age_max_s": 1e9, **changes}
    return Recorder(directory, "node-1", tell=told.append, **limits)


def transaction(number: int, name: str = "www.example.com.") -> dict[str, Any]:
    return {"time_ns": 1_795_761_504_029_546_227 + number, "name": name, "weight": 1, "id": number}


def rows(directory: Path, kind: str = "transactions", what: str = "*") -> list[tuple[Any, ...]]:
    files = str(directory / f"{kind}-*.parquet")
    with duckdb.connect() as database:
        return database.execute(f"SELECT {what} FROM read_parquet('{files}')").fetchall()


def test_what_is_written_is_in_files_once_it_is_closed(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.write("transactions", (transaction(n) for n in range(3)))
    one.write("coverage", [{"time_start_ns": 10**18, "time_end_ns": 10**18 + 1, "lost": {"a": 1}}])
    assert not list(tmp_path.glob("*.parquet"))
    one.close()
    assert rows(tmp_path, what="node, id, name, epoch_us(time)") == [
        ("node-1", n, "www.example.com.", 1_795_761_504_029_546) for n in range(3)
    ]
    assert rows(tmp_path, "coverage", "lost['a']") == [(1,)]
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {
        "transactions", "coverage", ".lock",
    }  # fmt: skip


def test_hostile_names_come_back_as_they_were(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.write("transactions", (transaction(n, name) for n, name in enumerate(HOSTILE)))
    one.close()
    found = [name for _, name in sorted(rows(tmp_path, what="id, name"))]
    assert found == [name.encode("utf-8", "replace").decode() for name in HOSTILE]


def test_node_of_any_name_makes_a_harmless_file_name(tmp_path: Path) -> None:
    directory = tmp_path / "it's"
    one = Recorder(
        directory, "../../etc/\n'x'\x1b", rotate_s=1, size_max=1 << 40, age_max_s=1e9,
        tell=lambda _: None,
    )  # fmt: skip
    one.write("transactions", [transaction(1)])
    one.close()
    (path,) = directory.glob("*.parquet")
    assert path.name.isprintable()
    assert not set(path.name) & set("/'\\ ")
    assert duckdb.read_parquet(str(path)).fetchall()[0][0] == "../../etc/\n'x'\x1b"


def test_files_replace_each_other_by_size_and_by_age(tmp_path: Path) -> None:
    one = recorder(tmp_path, size_max=40_000)
    for n in range(12):
        one.write("transactions", (transaction(n * 1000 + m, os.urandom(40).hex()) for m in range(100)))  # fmt: skip
        one.rotate()
        while one._converting or one._waiting:
            one.look()
            time.sleep(0.02)
    one.close()
    files = sorted(tmp_path.glob("*.parquet"))
    assert sum(path.stat().st_size for path in files) <= 40_000
    newest = max(rows(tmp_path, what="id"))[0]
    assert newest == 11_099
    stranger = tmp_path / "transactions.csv"
    stranger.write_text("somebody's")
    for path in files:
        os.utime(path, (0, 0))
    again = recorder(tmp_path, age_max_s=60.0)
    again.write("transactions", [transaction(1)])
    again.close()
    assert rows(tmp_path, what="id") == [(1,)]
    assert stranger.exists()


CRASHING = """
import sys, time
from pathlib import Path
from tracer.continuous.recorder import Recorder
one = Recorder(Path(sys.argv[1]), "node-1", rotate_s=0.2, size_max=1 << 40, age_max_s=1e9,
               tell=lambda said: print(said, file=sys.stderr))
n = 0
while True:
    one.write("transactions", [{"time_ns": n, "id": n, "weight": 1}])
    one.look()
    n += 1
    print(n, flush=True)
    time.sleep(0.001)
"""


def test_nothing_that_was_written_before_a_kill_is_lost(tmp_path: Path) -> None:
    written = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHING, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for line in process.stdout:
            if int(line) >= 700:
                break
        process.kill()
        rest = process.stdout.read()
        process.wait()
        process.stdout.close()
        complete = [text for text in rest.splitlines(keepends=True) if text.endswith("\n")]
        written += int(complete[-1] if complete else line)
    # One that makes files of a journal outlives its tracer, and has it for itself meanwhile.
    deadline_s = time.monotonic() + 60
    recorder(tmp_path).close()
    while list(tmp_path.glob(".journal-*")) and time.monotonic() < deadline_s:
        time.sleep(0.1)
        recorder(tmp_path).close()
    found = len(rows(tmp_path, what="id"))
    # The last of each may have been written, but not told of.
    assert written <= found <= written + 3
    assert not list(tmp_path.glob(".journal-*"))
    assert not list(tmp_path.glob(".*.part"))


def test_line_that_was_cut_short_does_not_cost_the_others(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.write("transactions", (transaction(n) for n in range(5)))
    (journal,) = tmp_path.glob(".journal-*")
    with (journal / "transactions.jsonl").open("ab") as file:
        file.write(b'{"node": "node-1", "time_ns": 17957615')
    one.close()
    assert len(rows(tmp_path)) == 5


def test_two_at_once_in_one_directory_are_refused(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    with pytest.raises(RecorderError, match="another dnstrace records there"):
        recorder(tmp_path)
    first.close()
    recorder(tmp_path).close()


def test_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecorderError, match="give another directory"):
        recorder(tmp_path / "file" / "below")


@pytest.fixture
def small_disk(root: None, tmp_path: Path) -> Iterator[Path]:
    del root
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"none", str(disk).encode(), b"tmpfs", 0, b"size=1m") == 0
    yield disk
    assert libc.umount2(str(disk).encode(), 2) == 0


def remove(path: Path) -> None:
    """Whoever makes files of a journal removes the same."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def test_full_disk_stops_recording_and_nothing_else(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.continuous.recorder._RETRY_S", 0.2)
    told: list[str | None] = []
    one = recorder(small_disk, told=told)
    for n in range(COUNTED):
        one.write("transactions", [transaction(n, os.urandom(100).hex())])
        one.look()
    assert told[0] is not None
    assert "No space left on device" in told[0]
    assert one.problem is not None or told[1] is None  # or it was tried again since
    # Room again: it goes on by itself.
    for path in small_disk.glob("*"):
        if path.name != ".lock":
            remove(path)
    one.rotate()
    one.problem = told[0]
    one._retry_s = 0.0
    one.write("transactions", [transaction(1)])
    assert told[-1] is None
    one.close()
    assert len(rows(small_disk)) >= 1


def test_what_was_written_before_the_disk_was_full_is_not_lost(small_disk: Path) -> None:
    told: list[str | None] = []
    one = recorder(small_disk, told=told)
    one.write("histograms", [{"count": 7}], 7)
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    n = 0
    while one.problem is None:
        n += 1
        one.write("transactions", [transaction(n, os.urandom(1000).hex())], 1)
    assert one.write("histograms", [{"count": 2}], 2) is False
    given_up = one.given_up
    assert given_up == 3
    (small_disk / "filler").unlink()
    one.try_again()
    assert one.write("histograms", [{"count": 5}], 5) is True
    one.close()
    assert rows(small_disk, "histograms", "sum(count)") == [(12,)]
    assert one.given_up == given_up
    assert not list(small_disk.glob(".*part"))


def look_until(one: Recorder, is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s
        one.look()
        time.sleep(0.05)


def test_failed_conversion_is_tried_again_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    one = recorder(tmp_path, told=told)
    one.write("transactions", [transaction(1)])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    one.rotate()
    one.write("transactions", [transaction(2)])
    look_until(one, lambda: bool(told))
    assert told[0] is not None
    assert "tried again later" in told[0]
    monkeypatch.undo()
    one._convert_s = 0.0  # a minute later
    one.write("transactions", [transaction(3)])
    look_until(one, lambda: one.problem is None)
    one.close()
    assert sorted(rows(tmp_path, what="id")) == [(1,), (2,), (3,)]
    assert (one.rows, one.given_up) == (3, 0)


def test_journal_that_no_file_can_be_made_of_is_left_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.continuous.recorder._RETRY_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told: list[str | None] = []
    one = recorder(tmp_path, told=told)
    one.write("transactions", [transaction(1)])
    one.rotate()
    look_until(one, lambda: not one._waiting and not one._converting)
    one.write("transactions", [transaction(2)])
    began_s = time.monotonic()
    one.close()
    assert time.monotonic() - began_s < 5
    assert not list(tmp_path.glob("*.parquet"))
    assert one.given_up == 0
    assert len(list(tmp_path.glob(".journal-*"))) == 2
    monkeypatch.undo()
    recorder(tmp_path).close()
    assert sorted(rows(tmp_path, what="id")) == [(1,), (2,)]
    assert list(tmp_path.glob(".journal-*")) == []


def test_journals_that_are_left_count_among_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.continuous.recorder._RETRY_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    one = recorder(tmp_path, size_max=3000)
    for n in range(8):
        one.write("transactions", [transaction(n, "x" * 1000)])
        one.rotate()
        look_until(one, lambda: not one._waiting and not one._converting)
    one._make_room()
    assert 1 <= len(list(tmp_path.glob(".journal-*"))) < 3
    one.close()


def test_nothing_is_imported_from_where_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    for module in ("duckdb", "resource", "tracer"):
        (tmp_path / "cwd" / f"{module}.py").write_text("open('imported', 'w').close()")
    code = (
        "import sys, time; from pathlib import Path; from tests.test_recorder import *; "
        f"one = recorder(Path({str(tmp_path / 'rec')!r})); "
        "one.write('transactions', [transaction(1)]); one.close()"
    )
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert len(rows(tmp_path / "rec")) == 1
    assert not (tmp_path / "cwd" / "imported").exists()


def test_what_is_being_converted_is_not_ended_with_the_process_group(tmp_path: Path) -> None:
    """As Ctrl-C does, and systemd where it is not told otherwise."""
    one = recorder(tmp_path)
    for n in range(5000):
        one.write("transactions", [transaction(n)])
    one.rotate()
    assert one._converting
    assert os.getpgid(one._converting[0].pid) != os.getpgid(0)
    one.close()
    assert len(rows(tmp_path)) == 5000


def test_what_is_given_up_is_counted(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for anything else."""
    monkeypatch.setattr("tracer.continuous.recorder._RETRY_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    tmp_path = small_disk
    one = recorder(tmp_path)
    one.write("transactions", [transaction(1), transaction(2)])
    one.write("histograms", [{"count": 20}, {"count": 30}], 50)
    one.rotate()
    one.write("transactions", [transaction(3)])
    look_until(one, lambda: one.given_up > 0)
    monkeypatch.undo()
    one.close()
    assert one.given_up == 50
    assert rows(tmp_path, what="id") == [(3,)]


def test_directory_that_goes_away_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.continuous.recorder._RETRY_S", 0.0)
    told: list[str | None] = []
    one = recorder(tmp_path / "gone", told=told)
    one.write("transactions", [transaction(1)])
    shutil.rmtree(tmp_path / "gone")
    one.rotate()
    deadline_s = time.monotonic() + 30
    while one.given_up < 2 and time.monotonic() < deadline_s:
        one.write("histograms", [{"count": 1}], 1)
        one.look()
        time.sleep(0.1)
    one.close()
    assert one.given_up >= 2
    assert told[0] is not None


def test_part_that_cannot_be_removed_keeps_no_journal_from_being_converted(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    one.write("transactions", [transaction(1)])
    for file in one._files.values():  # as the kernel does, of a process that is killed
        file.close()
    os.close(one._lock or 0)
    (journal,) = tmp_path.glob(".journal-*")
    stem = journal.name.removeprefix(".journal-")
    (tmp_path / f".other-{stem}.parquet.part").mkdir()
    recorder(tmp_path).close()
    assert len(rows(tmp_path)) == 1


def test_converter_that_outlived_its_tracer_is_left_to_it(tmp_path: Path) -> None:
    """The tracer alone was killed; the next one starts meanwhile, again and again."""
    for delay_s in (0.0, 0.2, 0.4, 0.6):
        directory = tmp_path / str(delay_s)
        one = recorder(directory)
        for n in range(20_000):
            one.write("transactions", [transaction(n)])
        one.rotate()
        os.close(one._lock or 0)  # as the kernel does, of a process that is killed
        time.sleep(delay_s)
        assert one._converting
        recorder(directory).close()
        one._converting[0].communicate()
        recorder(directory).close()
        assert len(rows(directory)) == 20_000
        assert not list(directory.glob(".*part"))
        assert not list(directory.glob(".journal-*"))
