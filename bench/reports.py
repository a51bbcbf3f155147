# SPDX-License-Identifier: Apache-2.0
"""What a report over many recordings takes: `python -m bench.reports [--transactions 10000000]`.

DuckDB itself makes the recordings, as many nodes would have them; nothing of this needs root.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

_FILES = 10
_TRANSACTIONS = """
COPY (SELECT 'node-' || {file} AS node,
    TIMESTAMP '2026-11-27 06:00:00' AT TIME ZONE 'UTC' + INTERVAL (i % 3600) SECOND AS time,
    1795759200000000000 + i * 1000 AS time_ns, 'sample' AS kept, 1::BIGINT AS weight,
    CASE WHEN i % 500 = 0 THEN 'timeout' ELSE 'answered' END AS status, (i % 65536)::INTEGER AS id,
    'udp' AS protocol, 'n' || i % 5000 || '.example.com.' AS name, 'A' AS type,
    CASE WHEN i % 500 = 0 THEN NULL WHEN i % 10 = 0 THEN 'NXDOMAIN' ELSE 'NOERROR' END AS rcode,
    ['rd', 'ra'] AS flags, [{{'name': 'n.', 'type': 'A', 'ttl': 30::BIGINT, 'data': '192.0.2.1'}}] AS answers,
    CASE WHEN i % 500 <> 0 THEN (exp(12 + 2 * random() + 2 * random()))::BIGINT END AS latency_ns,
    1::INTEGER AS attempt, 75::INTEGER AS response_len, NULL::VARCHAR AS problem,
    {{'ip': '10.244.1.10', 'port': 5::INTEGER, 'netns': 1::BIGINT, 'cgroup_id': 1::BIGINT, 'pid': 1::BIGINT,
      'comm': 'app', 'namespace': 'ns-' || i % 20, 'pod': 'pod-' || i % 300, 'container': 'app',
      'node': 'node-' || {file}}} AS client,
    {{'ip': '10.96.0.10', 'port': 53::INTEGER, 'service': 'kube-system/kube-dns', 'role': 'cluster'}} AS server,
    {{'ip': '10.244.2.2', 'port': 53::INTEGER, 'namespace': 'kube-system', 'pod': 'coredns-' || i % 4}} AS backend,
    [{{'kind': k, 'direction': 'query', 't_ns': 0::BIGINT, 'ifname': 'eth0', 'ifindex': 2::BIGINT,
       'netns': 1::BIGINT, 'src': '10.244.1.10:5', 'dst': '10.96.0.10:53', 'owner': 'node1',
       'nat': {{'dnat': NULL::VARCHAR[], 'snat': NULL::VARCHAR[]}}, 'reason': NULL::VARCHAR,
       'location': NULL::VARCHAR}} for k in ['send', 'ingress', 'egress', 'receive']] AS hops,
    {{'application_send': 1000::BIGINT, 'node': 2000::BIGINT, 'network': 3000::BIGINT,
      'server_queue': 1000::BIGINT, 'server': 50000::BIGINT, 'upstream': NULL::BIGINT,
      'return': 3000::BIGINT, 'wake_up': 1000::BIGINT, 'remote': NULL::BIGINT}} AS stages
  FROM range({file} * {number}, ({file} + 1) * {number}) AS r(i))
TO '{path}' (FORMAT parquet, COMPRESSION zstd)
"""


def main() -> int:
    """Makes the recordings, reports on them, and prints what that took."""
    parser = argparse.ArgumentParser(prog="python -m bench.reports", description=__doc__)
    parser.add_argument("--transactions", type=int, default=10_000_000)
    parser.add_argument("--make", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return _make(args.make, args.transactions // _FILES)
    with tempfile.TemporaryDirectory() as scratch:
        # Not here: a child's peak is never below its parent's.
        command = [sys.executable, "-m", "bench.reports", "--transactions", str(args.transactions)]
        subprocess.run([*command, "--make", scratch], check=True)
        size = sum(path.stat().st_size for path in Path(scratch).iterdir())
        print(f"{args.transactions:,} transactions in {_FILES} files, {size / (1 << 20):,.0f} MiB")
        for arguments in ([], ["--name", "n1*"], ["--html", f"{scratch}/page.html"]):
            began_s = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "tracer", "report", *arguments, scratch],
                stdout=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            took_s = time.monotonic() - began_s
            what = " ".join(["report", *arguments[:1]])
            print(
                f"{what:<14} {took_s:6.1f} s, CPU {usage.ru_utime + usage.ru_stime:6.1f} s, "
                f"peak RSS {usage.ru_maxrss / 1024:,.0f} MiB"
            )
            if process.returncode:
                return process.returncode
    return 0


def _make(directory: Path, number: int) -> int:
    for file in range(_FILES):
        path = directory / f"transactions-node-{file}-20261127T060000000Z.parquet"
        duckdb.sql(_TRANSACTIONS.format(file=file, number=number, path=path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
