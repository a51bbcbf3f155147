# SPDX-License-Identifier: Apache-2.0
"""The JSON lines, which scripts rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.samples import COREDNS, DNS_SERVICE, START_NS, WEB, transaction
from tracer.export import jsonl
from tracer.transaction import Client, Hop, Lookup, Nat

POD = "default/my-nginx-646554d7fd-fd4jp"


def lines(encoded: bytes) -> dict[str, Any]:
    assert encoded.endswith(b"\n")
    assert encoded.count(b"\n") == 1
    decoded: dict[str, Any] = json.loads(encoded)
    return decoded


def test_transaction_has_every_field_in_order() -> None:
    nat = Nat(dnat=(("10.96.0.10", 53), ("10.244.0.3", 53)))
    hops = (
        Hop("send", "query", 0, None, None, 7, ("10.244.2.3", 53100), ("10.96.0.10", 53), POD),
        Hop(
            "egress", "query", 40_000, 5, "eth0", 8, ("10.244.2.3", 53100), ("10.244.0.3", 53),
            "worker3", nat,
        ),
    )  # fmt: skip
    expected = {
        "event": "transaction",
        "time": "2023-11-26T08:56:34.195320000Z",
        "status": "answered",
        "id": 3112,
        "protocol": "udp",
        "name": "www.example.com.",
        "type": "A",
        "opcode": "QUERY",
        "rcode": "NOERROR",
        "flags": ["rd", "ra"],
        "answers": [{"name": "www.example.com.", "type": "A", "ttl": 30, "data": "93.184.216.34"}],
        "authority": [],
        "additional": [],
        "edns": None,
        "extended_error": None,
        "negative_ttl": None,
        "query_edns": None,
        "latency_ns": 7_400_000,
        "attempt": 1,
        "client": {
            "ip": "10.244.2.3",
            "port": 53100,
            "netns": 4026532246,
            "cgroup_id": 120,
            "pid": 4242,
            "comm": "dig",
            "namespace": "default",
            "pod": "my-nginx-646554d7fd-fd4jp",
            "container": "app",
            "node": "worker3",
        },
        "server": {"ip": "10.96.0.10", "port": 53, "service": "kube-system/kube-dns", "role": None},
        "backend": {
            "ip": "10.244.0.3",
            "port": 53,
            "namespace": "kube-system",
            "pod": "coredns-79c6f6447f-6f9xp",
        },
        "hops": [
            {
                "kind": "send",
                "direction": "query",
                "t_ns": 0,
                "ifname": None,
                "ifindex": None,
                "netns": 7,
                "src": "10.244.2.3:53100",
                "dst": "10.96.0.10:53",
                "owner": POD,
                "nat": None,
            },
            {
                "kind": "egress",
                "direction": "query",
                "t_ns": 40_000,
                "ifname": "eth0",
                "ifindex": 5,
                "netns": 8,
                "src": "10.244.2.3:53100",
                "dst": "10.244.0.3:53",
                "owner": "worker3",
                "nat": {"dnat": ["10.96.0.10:53", "10.244.0.3:53"]},
            },
        ],
        "upstream": None,
        "upstream_unsure": 0,
        "response_len": 49,
        "problem": None,
    }
    found = lines(jsonl.transaction(transaction(hops=hops)))
    assert json.dumps(found) == json.dumps(expected)


def test_unknown_is_null() -> None:
    silent = transaction(rcode=None, client=Client("192.0.2.1", 5), hops=())._replace(
        name=None, type=None, backend=None, server=DNS_SERVICE._replace(service=None)
    )
    found = lines(jsonl.transaction(silent))
    for field in ("name", "type", "rcode", "answers", "latency_ns", "backend", "response_len"):
        assert found[field] is None
    assert found["client"] == {
        "ip": "192.0.2.1", "port": 5, "netns": None, "cgroup_id": None, "pid": None, "comm": None,
        "namespace": None, "pod": None, "container": None, "node": None,
    }  # fmt: skip
    assert found["server"]["service"] is None
    assert (found["status"], found["hops"]) == ("timeout", [])


def test_addresses_of_ipv6_are_bracketed() -> None:
    hop = Hop("drop", "query", 0, 1, "lo", 1, ("fd00::1", 5), ("fd00::a", 53),
              nat=Nat(snat=(("fd00::1", 5), ("fd00::2", 6))))  # fmt: skip
    (found,) = lines(jsonl.transaction(transaction(hops=(hop,))))["hops"]
    assert (found["src"], found["dst"]) == ("[fd00::1]:5", "[fd00::a]:53")
    assert found["nat"] == {"snat": ["[fd00::1]:5", "[fd00::2]:6"]}


def test_only_a_drop_has_a_reason_and_a_location() -> None:
    passed = Hop("egress", "query", 0, 1, "lo", 1, ("192.0.2.1", 5), ("192.0.2.2", 53))
    dropped = passed._replace(kind="drop", t_ns=5, reason="NETFILTER_DROP", location="nf_hook_slow")
    first, second = lines(jsonl.transaction(transaction(hops=(passed, dropped))))["hops"]
    assert "reason" not in first
    assert (second["reason"], second["location"]) == ("NETFILTER_DROP", "nf_hook_slow")


def test_malformed_query_says_what_is_wrong() -> None:
    found = lines(jsonl.transaction(transaction()._replace(query=b"\0\1")))
    assert found["problem"] == "only 2 bytes of a DNS header"


def test_cut_response_says_how_much_there_is() -> None:
    whole = transaction()
    assert whole.response is not None
    found = lines(jsonl.transaction(whole._replace(response=whole.response[:40])))
    assert found["answers"] == []
    assert found["response_len"] == 49
    assert found["problem"] == "cut off after 40 of 49 bytes"


LOOKUP = Lookup(
    START_NS, WEB, "www.li-rui.top", ("sre.svc.cluster.local", "svc.cluster.local"), 5, 8, 6,
    3_100_000, 2_000_000, "NOERROR", "ask for www.li-rui.top.", (14770, 49422),
)  # fmt: skip


def test_lookup_has_every_field_in_order() -> None:
    found = lines(jsonl.lookup(LOOKUP))
    assert list(found) == [
        "event", "time", "client", "question", "search", "ndots", "queries", "wasted",
        "latency_ns", "wasted_ns", "status", "advice", "ids",
    ]  # fmt: skip
    assert found["search"] == ["sre.svc.cluster.local", "svc.cluster.local"]
    assert found["ids"] == [14770, 49422]
    assert (found["queries"], found["wasted"], found["wasted_ns"]) == (8, 6, 2_000_000)


@pytest.mark.parametrize(("ndots", "search"), [(None, None), (1, [])])
def test_empty_search_list_is_null_unless_it_is_known(
    ndots: int | None, search: list[str] | None
) -> None:
    assert lines(jsonl.lookup(LOOKUP._replace(search=(), ndots=ndots)))["search"] == search


def test_summary_has_every_field_in_order() -> None:
    encoded = jsonl.summary(
        transactions=1200,
        lookups=240,
        duration_ns=30_000_000_000,
        lost={"ring_full": 0, "table_full": 1, "undecodable": 0, "filtered": 0},
        unmatched={"responses": 2, "queries": 0},
    )
    assert encoded == (
        b'{"event":"summary","transactions":1200,"lookups":240,"duration_ns":30000000000,'
        b'"lost":{"ring_full":0,"table_full":1,"undecodable":0,"filtered":0},'
        b'"unmatched":{"responses":2,"queries":0},"problem":null}\n'
    )


TIMES = {
    0: "1970-01-01T00:00:00.000000000Z",
    1: "1970-01-01T00:00:00.000000001Z",
    1_700_988_994_195_320_000: "2023-11-26T08:56:34.195320000Z",
    1_709_251_199_999_999_999: "2024-02-29T23:59:59.999999999Z",
    1_709_251_200_000_000_000: "2024-03-01T00:00:00.000000000Z",
}


def test_times_have_nanoseconds_in_any_order() -> None:
    for time_ns in (*TIMES, *reversed(TIMES)):
        assert jsonl.rfc3339(time_ns) == TIMES[time_ns]


@pytest.mark.fuzz
@given(st.text(), st.text(st.characters(categories=["Cs"]), max_size=3))
def test_line_is_valid_whatever_a_process_calls_itself(text: str, surrogates: str) -> None:
    hostile = WEB._replace(comm=text + surrogates, pod=surrogates + text)
    found = lines(jsonl.transaction(transaction(client=hostile)))
    assert found["client"]["comm"] == text + "\ufffd" * len(surrogates)
    assert found["backend"]["pod"] == COREDNS.pod
