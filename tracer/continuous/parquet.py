# SPDX-License-Identifier: Apache-2.0
"""Makes Parquet files of a journal, in a process of its own: `python -m tracer.continuous.parquet
JOURNAL DIRECTORY`.

DuckDB takes more memory than all the rest of the tracer, and gives it back by going away. A file
has its name once it is complete and on disk.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import sys
import time
from pathlib import Path

MEMORY_LIMIT = "256MB"
PART = ".part"
_ROW_GROUP = 100_000
_PATIENCE_S = 30.0

# Columns of each kind of journal, as they are written; names are those of the files (see README.md).
_CLIENT = (
    "STRUCT(ip VARCHAR, port INTEGER, netns BIGINT, cgroup_id BIGINT, pid BIGINT, comm VARCHAR, "
    "namespace VARCHAR, pod VARCHAR, container VARCHAR, node VARCHAR)"
)
_HOP = (
    "STRUCT(kind VARCHAR, direction VARCHAR, t_ns BIGINT, ifname VARCHAR, ifindex BIGINT, "
    "netns BIGINT, src VARCHAR, dst VARCHAR, owner VARCHAR, "
    "nat STRUCT(dnat VARCHAR[], snat VARCHAR[]), reason VARCHAR, location VARCHAR)"
)
_STAGES = (
    "STRUCT(application_send BIGINT, node BIGINT, network BIGINT, server_queue BIGINT, "
    "server BIGINT, upstream BIGINT, return BIGINT, wake_up BIGINT, remote BIGINT)"
)
COLUMNS = {
    "transactions": {
        "node": "VARCHAR",
        "time_ns": "BIGINT",
        "kept": "VARCHAR",
        "weight": "BIGINT",
        "client_seen": "BOOLEAN",
        "by_server": "BOOLEAN",
        "status": "VARCHAR",
        "id": "INTEGER",
        "protocol": "VARCHAR",
        "name": "VARCHAR",
        "type": "VARCHAR",
        "rcode": "VARCHAR",
        "flags": "VARCHAR[]",
        "answers": "STRUCT(name VARCHAR, type VARCHAR, ttl BIGINT, data VARCHAR)[]",
        "latency_ns": "BIGINT",
        "attempt": "INTEGER",
        "response_len": "INTEGER",
        "problem": "VARCHAR",
        "client": _CLIENT,
        "server": "STRUCT(ip VARCHAR, port INTEGER, service VARCHAR, role VARCHAR)",
        "backend": "STRUCT(ip VARCHAR, port INTEGER, namespace VARCHAR, pod VARCHAR)",
        "hops": f"{_HOP}[]",
        "stages": _STAGES,
    },
    "histograms": {
        "node": "VARCHAR",
        "time_start_ns": "BIGINT",
        "time_end_ns": "BIGINT",
        "stage": "VARCHAR",
        "client_namespace": "VARCHAR",
        "client_pod": "VARCHAR",
        "client_container": "VARCHAR",
        "server_ip": "VARCHAR",
        "server_port": "INTEGER",
        "service": "VARCHAR",
        "server_role": "VARCHAR",
        "backend_ip": "VARCHAR",
        "backend_namespace": "VARCHAR",
        "backend_pod": "VARCHAR",
        "type": "VARCHAR",
        "rcode": "VARCHAR",
        "status": "VARCHAR",
        "protocol": "VARCHAR",
        "client_seen": "BOOLEAN",
        "by_server": "BOOLEAN",
        "count": "BIGINT",
        "timed": "BIGINT",
        "sum_ns": "BIGINT",
        "max_ns": "BIGINT",
        "buckets": "STRUCT(lower_ns BIGINT, upper_ns BIGINT, count BIGINT)[]",
    },
    "coverage": {
        "node": "VARCHAR",
        "time_start_ns": "BIGINT",
        "time_end_ns": "BIGINT",
        "transactions": "BIGINT",
        "recorded": "BIGINT",
        "not_kept": "BIGINT",
        "skipped": "BIGINT",
        "sample": "BIGINT",
        "lost": "MAP(VARCHAR, BIGINT)",
        "unmatched": "MAP(VARCHAR, BIGINT)",
        "problem": "VARCHAR",
    },
}


def journal_file(journal: Path, kind: str) -> Path:
    """Where a kind's lines are."""
    return journal / f"{kind}.jsonl"


def convert(journal: Path, directory: Path) -> None:
    """Writes `KIND-NAME.parquet` of a journal called `.journal-NAME`, and removes it.

    Waits for another process that is at it, which may have outlived the tracer that started it.
    Raises OSError or duckdb.Error; then the journal is still there.
    """
    at_it = _lock_in_time(journal)
    if at_it is None:
        return  # that other process is done with it
    import duckdb

    stem = journal.name.removeprefix(".journal-")
    database = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY_LIMIT,
            "threads": 1,
            "temp_directory": str(journal / "spill"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    with database:
        for kind, columns in COLUMNS.items():
            source = journal_file(journal, kind)
            if not source.exists() or not source.stat().st_size:
                continue
            target = directory / f"{kind}-{stem}.parquet"
            part = directory / f".{target.name}{PART}"
            chosen = ", ".join(_column(name) for name in columns)
            # The last line of a run that was killed may be cut short: a row of nothing.
            try:
                database.execute(
                    f"COPY (SELECT {chosen} FROM read_json(?, format = 'newline_delimited', "  # noqa: S608
                    f"columns = {_struct(columns)}, ignore_errors = true, "
                    "hive_partitioning = false, maximum_object_size = 67108864) "
                    f"WHERE node IS NOT NULL) TO '{_quoted(part)}' (FORMAT parquet, "
                    f"COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP})",
                    [str(source)],
                )
                _settle(part, target)
            finally:
                part.unlink(missing_ok=True)
    shutil.rmtree(journal)
    os.close(at_it)


def _lock_in_time(journal: Path) -> int | None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return lock(journal)
        except BlockingIOError as error:
            if time.monotonic() > deadline_s:
                raise BlockingIOError(
                    f"another process is at it for {_PATIENCE_S:.0f} s"
                ) from error
        time.sleep(0.05)


def lock(journal: Path) -> int | None:
    """A descriptor that says that a journal is being converted, while it is open.

    None: the journal is gone. Raises BlockingIOError if somebody else has it.
    """
    try:
        descriptor = os.open(journal, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(journal):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _column(name: str) -> str:
    """Times are microseconds since 1970 in Parquet's own type, in UTC."""
    if name == "time_ns":
        return f'{_time("time_ns")} AS "time", time_ns'
    if name in {"time_start_ns", "time_end_ns"}:
        return f"{_time(name)} AS {name.removesuffix('_ns')}"
    return f'"{name}"'


def _time(name: str) -> str:
    return f"CAST(make_timestamp({name} // 1000) AS TIMESTAMP) AT TIME ZONE 'UTC'"


def _struct(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"'{name}': '{type_}'" for name, type_ in columns.items()) + "}"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _settle(part: Path, target: Path) -> None:
    """On disk, then under its name."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    """Converts one journal; the reason why not is the last line on stderr."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - whatever it is, the tracer must hear of it
        print(str(error).splitlines()[0] if str(error) else type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
