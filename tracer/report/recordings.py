# SPDX-License-Identifier: Apache-2.0
"""Recordings as tables of a database in memory: `transactions`, `histograms`, `coverage`.

The files stay where they are; DuckDB reads of them what a query asks for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracer.continuous.parquet import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from duckdb import DuckDBPyConnection

KINDS = ("transactions", "histograms", "coverage")
_LATER = {"by_server", "client_seen"}  # columns that the first recordings did not have
_MEMORY = "1GB"
_JOURNAL = re.compile(r"\.journal-(.*)-\d{8}T\d{9}Z", re.DOTALL)
_NAME = re.compile(r"(transactions|histograms|coverage)-.*\.parquet", re.DOTALL)
_TIMES = {"time_ns": ("time", "time_ns"), "time_start_ns": ("time_start",), "time_end_ns": ("time_end",)}  # fmt: skip
_WHEN = "BETWEEN TIMESTAMPTZ '1970-01-01' AND TIMESTAMPTZ '2200-01-01'"
_MOST = 1 << 48


def _within(*numbers: str, most: int = _MOST) -> str:
    """A condition: each is unknown, or neither negative nor more than can be."""
    return " AND ".join(f"coalesce({number}, 0) BETWEEN 0 AND {most}" for number in numbers)


# What whoever wrote them holds to; a row of anything else would spoil the sums of all.
_SOUND = {
    "transactions": f"time {_WHEN} AND time_ns > 0 AND {_within('weight', 'latency_ns')}",
    "histograms": f"time_start {_WHEN} AND time_end {_WHEN} "
    f"AND {_within('count', 'timed', 'max_ns')} AND {_within('sum_ns', most=1 << 62)} AND "
    f"len([b FOR b IN buckets IF NOT ({_within('b.lower_ns', 'b.upper_ns', 'b.count')})]) = 0",
    "coverage": f"time_start {_WHEN} AND time_end {_WHEN} "
    f"AND {_within('transactions', 'recorded', 'not_kept', 'skipped')}",
}


class RecordingError(Exception):
    """There is nothing to report on. The message says why and what to do."""


@dataclass(slots=True)
class Recordings:
    """What was found. `unreadable`: files that are no recordings or not whole, and why."""

    database: DuckDBPyConnection
    files: dict[str, list[Path]] = field(default_factory=dict)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    pending: set[str] = field(default_factory=set)  # nodes with more that is not complete yet

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """The result of a query."""
        return self.database.execute(sql, list(parameters)).fetchall()

    def close(self) -> None:
        """Gives the memory back."""
        self.database.close()


def load(paths: Sequence[Path], scratch: Path) -> Recordings:
    """Opens files, and all of directories. Raises RecordingError. `scratch`: for what is large."""
    import duckdb

    database = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": _MEMORY,
            "temp_directory": str(scratch),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    database.execute("SET TimeZone = 'UTC'")
    found = Recordings(database, {kind: [] for kind in KINDS})
    seen = set()
    for path in paths:
        found.pending |= _pending(path)
        for file in _files(path):
            where = os.path.realpath(file)
            if where not in seen:  # by two ways, it would count twice
                seen.add(where)
                _take(found, file)
    if not any(found.files.values()):
        database.close()
        raise RecordingError(_nothing(paths, found))
    for kind in KINDS:
        _make_view(found, kind)
    return found


def leave_out_damaged(found: Recordings) -> bool:
    """Reads all of every file, and leaves those out where that fails; whether there are any."""
    import duckdb

    before = len(found.unreadable)
    for kind in KINDS:
        for file in list(found.files[kind]):
            source = _read(file)
            try:
                found.rows(f"SELECT max(hash(each)) FROM {source} AS each")
            except (duckdb.Error, OSError) as error:
                found.files[kind].remove(file)
                found.unreadable.append((file, _short(error)))
        _make_view(found, kind)
    return len(found.unreadable) > before


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            return sorted(each for each in path.iterdir() if _NAME.fullmatch(each.name))
        path.stat()
    except OSError as error:
        raise RecordingError(
            f"{path}: {error.strerror}; give a recording, or a directory"
        ) from error
    return [path]


def _pending(path: Path) -> set[str]:
    """Nodes that write there, or did until they were killed."""
    try:
        names = [each.name for each in path.iterdir()] if path.is_dir() else []
    except OSError:
        return set()
    return {match[1] for name in names if (match := _JOURNAL.fullmatch(name))}


def _take(found: Recordings, file: Path) -> None:
    """Sorts a file by what it holds, whatever it is called."""
    import duckdb

    try:
        types = _types(found, f"SELECT * FROM {_read(file)}")
    except (duckdb.Error, OSError) as error:
        found.unreadable.append((file, _short(error)))
        return
    for kind in KINDS:
        expected = _types(found, _nothing_of(kind))
        if expected.keys() - _LATER <= types.keys():
            others = [name for name in expected if name in types and types[name] != expected[name]]
            if others:
                why = f"a recording, but {others[0]} is of another type than it should be"
                found.unreadable.append((file, why))
            elif (wrong := _what_is_wrong(found, kind, file)) is not None:
                found.unreadable.append((file, wrong))
            else:
                found.files[kind].append(file)
            return
    found.unreadable.append((file, "Parquet, but not a recording of dnstrace's"))


def _what_is_wrong(found: Recordings, kind: str, file: Path) -> str | None:
    """With a file of that kind's columns; None: nothing that would be noticed here."""
    import duckdb

    try:
        ((wrong,),) = found.rows(
            f"SELECT count(*) FILTER (NOT coalesce({_SOUND[kind]}, false)) FROM {_read(file)}"
        )
    except (duckdb.Error, OSError) as error:
        return _short(error)
    return f"a recording, but with impossible times or numbers in {wrong} rows" if wrong else None


def _nothing(paths: Sequence[Path], found: Recordings) -> str:
    if found.unreadable:
        file, why = found.unreadable[0]
        more = f" (and {len(found.unreadable) - 1} more)" if len(found.unreadable) > 1 else ""
        return f"{file}: {why}{more}; nothing to report on"
    where = ", ".join(map(str, paths))
    return (
        f"{where}: no complete recording there yet; a running 'dnstrace continuous' completes what "
        "it has when it gets SIGHUP"
    )


def _make_view(found: Recordings, kind: str) -> None:
    files = found.files[kind]
    source = f"SELECT * FROM {_read(*files)}" if files else _nothing_of(kind)
    missing = _LATER & _types(found, _nothing_of(kind)).keys() - _types(found, source).keys()
    if missing:
        added = ", ".join(f'CAST(NULL AS {COLUMNS[kind][name]}) AS "{name}"' for name in missing)
        source = f"SELECT *, {added} FROM ({source})"
    found.database.execute(f"CREATE OR REPLACE VIEW {kind} AS {source}")


def _read(*files: Path) -> str:
    """Columns are those in the files: none from directories that are called NAME=VALUE."""
    listed = ", ".join(f"'{_quoted(_glob_free(file))}'" for file in files)
    return f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"


def _nothing_of(kind: str) -> str:
    """A query for no rows with a kind's columns."""
    columns = []
    for name, type_ in COLUMNS[kind].items():
        for column in _TIMES.get(name, (name,)):
            as_type = type_ if column == name else "TIMESTAMPTZ"
            columns.append(f'CAST(NULL AS {as_type}) AS "{column}"')
    return f"SELECT {', '.join(columns)} WHERE false"


def _types(found: Recordings, query: str) -> dict[str, str]:
    return {name: type_ for name, type_, *_ in found.rows(f"DESCRIBE {query}")}


def _glob_free(path: Path) -> str:
    """So that brackets and stars in a name are just these."""
    return re.sub(r"([*?\[])", r"[\1]", os.path.abspath(path))


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
