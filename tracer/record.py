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


class Wanted(IntEnum):
    """enum wanted: bits of settings.wanted."""

    CGROUP = 1
    NETNS = 2
    PID = 4
    SERVER_SIDE = 8


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
        ("pad", "V4"),
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
