# SPDX-License-Identifier: Apache-2.0
"""bpf/record.h as NumPy dtypes: what the kernel sends, field for field.

Host byte order, but `dns_id`, `response_flags` and ports are in network byte order. Addresses are
16 bytes, IPv4 mapped into IPv6. tests/test_record.py compares sizes and offsets with the C.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

MAX_HOPS = 20
MAX_FLOWS = 4
QUERY_BYTES = 272
RESPONSE_SMALL = 320
RESPONSE_LARGE = 4096
FRAGMENT_CHUNK = 256
SEGMENT_BYTES = 256


class HopKind(IntEnum):
    """enum hop_kind."""

    SEND = 1
    INGRESS = 2
    EGRESS = 3
    RECEIVE = 4
    DROP = 5


class Status(IntEnum):
    """enum status."""

    OPEN = 0
    ANSWERED = 1
    TIMEOUT = 2
    REFUSED = 3
    DROPPED = 4  # of series alone: that of a slot is told by its last hop


class Counter(IntEnum):
    """enum counter: positions in the per-CPU table of counters."""

    STARTED = 0
    EMITTED = 1
    RING_FULL = 2
    TABLE_FULL = 3
    FILTERED = 4
    UNDECODABLE = 5
    UNMATCHED_RESPONSES = 6
    PREEMPTED = 7
    HOPS_LOST = 8
    SEGMENTS_LOST = 9
    CONNECTIONS_FULL = 10
    NOT_KEPT = 11
    SKIPPED = 12
    SERIES_FULL = 13
    BUCKETS_FULL = 14


class Stage(IntEnum):
    """enum stage: the parts of a transaction's way, in order, and all of it."""

    APPLICATION_SEND = 0
    NODE = 1
    NETWORK = 2
    SERVER_QUEUE = 3
    SERVER = 4
    UPSTREAM = 5
    RETURN = 6
    WAKE_UP = 7
    REMOTE = 8
    TOTAL = 9


class SeriesKind(IntEnum):
    """enum series_kind."""

    OF_QUESTIONS = 0
    OF_STAGES = 1


class BackendKnown(IntEnum):
    """enum backend."""

    UNKNOWN = 0
    KNOWN = 1
    AS_ASKED = 2
    OVERFLOW = 3  # who was asked is not told, for lack of room


class Wanted(IntEnum):
    """enum wanted: bits of settings.wanted."""

    PODS = 1
    PID = 4
    SERVER_SIDE = 8


class Verdict(IntEnum):
    """enum verdict: whether the queries of a cgroup or a network namespace are wanted."""

    UNKNOWN = 0
    WANTED = 1
    UNWANTED = 2


FLOW = np.dtype(
    [
        ("client_addr", "V16"),
        ("server_addr", "V16"),
        ("client_port", ">u2"),
        ("server_port", ">u2"),
        ("pad", "u4"),
    ]
)

HOP = np.dtype(
    [
        ("t_ns", "u8"),
        ("ifindex", "u4"),
        ("netns", "u4"),
        ("drop_reason", "u4"),
        ("kind", "u1"),
        ("direction", "u1"),
        ("flow", "u1"),
        ("pad", "u1"),
    ]
)

TRANSACTION = np.dtype(
    [
        ("start_ns", "u8"),
        ("end_ns", "u8"),
        ("cgroup_id", "u8"),
        ("server_cgroup_id", "u8"),
        ("drop_location", "u8"),
        ("netns", "u4"),
        ("pid", "u4"),
        ("question_hash", "u4"),
        ("generation", "u4"),
        ("query_len", "u2"),
        ("query_captured", "u2"),
        ("response_len", "u2"),
        ("response_captured", "u2"),
        ("dns_id", ">u2"),
        ("response_flags", ">u2"),
        ("status", "u1"),
        ("attempt", "u1"),
        ("nhops", "u1"),
        ("nflows", "u1"),
        ("hops_lost", "u1"),
        ("variant", "u1"),
        ("family", "u1"),
        ("question_ok", "u1"),
        ("protocol", "u1"),
        ("balanced", "u1"),
        ("type", "u2"),
        ("by_server", "u1"),
        ("pad", "V7"),
        ("weight", "u4"),
        ("upstream_us", "u4"),
        ("comm", "V16"),
        ("flows", FLOW, MAX_FLOWS),
        ("hops", HOP, MAX_HOPS),
        ("query", "V272"),
    ],
    align=True,
)

SMALL_RECORD = np.dtype([("transaction", TRANSACTION), ("response", f"V{RESPONSE_SMALL}")])
LARGE_RECORD = np.dtype(
    [
        ("transaction", TRANSACTION),
        ("response", f"V{RESPONSE_LARGE}"),
        ("beyond", f"V{FRAGMENT_CHUNK}"),
    ]
)

SEGMENT = np.dtype(
    [
        ("t_ns", "u8"),
        ("connection", "u8"),
        ("cgroup_id", "u8"),
        ("socket_cgroup_id", "u8"),
        ("drop_location", "u8"),
        ("client_netns", "u4"),
        ("pid", "u4"),
        ("ifindex", "u4"),
        ("netns", "u4"),
        ("drop_reason", "u4"),
        ("seq", "u4"),
        ("len", "u4"),
        ("captured", "u2"),
        ("kind", "u1"),
        ("direction", "u1"),
        ("tcp_flags", "u1"),
        ("family", "u1"),
        ("unreachable", "u1"),
        ("pad", "V5"),
        ("comm", "V16"),
        ("asked", FLOW),
        ("flow", FLOW),
    ],
    align=True,
)
SEGMENT_RECORD = np.dtype([("segment", SEGMENT), ("payload", f"V{SEGMENT_BYTES}")])

SERIES_KEY = np.dtype(
    [
        ("cgroup_id", "u8"),
        ("server_cgroup_id", "u8"),
        ("client_addr", "V16"),
        ("server_addr", "V16"),
        ("backend_addr", "V16"),
        ("netns", "u4"),
        ("server_port", ">u2"),
        ("backend_port", ">u2"),
        ("kind", "u1"),
        ("type", "u1"),
        ("rcode", "u1"),
        ("status", "u1"),
        ("backend", "u1"),
        ("protocol", "u1"),
        ("by_server", "u1"),
        ("pad", "u1"),
    ],
    align=True,
)
SERIES = np.dtype(
    [
        ("id", "u8"),
        ("last_ns", "u8"),
        ("count", "u8"),
        ("sum_ns", "u8", len(Stage)),
        ("max_ns", "u8", len(Stage)),
    ],
    align=True,
)
BUCKET_KEY = np.dtype([("id", "u8"), ("stage", "u2"), ("bucket", "u2"), ("pad", "u4")], align=True)
