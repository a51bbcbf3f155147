# SPDX-License-Identifier: Apache-2.0
"""Cases: what is slow, dropped, refused or never answered."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.kernels import ask
from tests.kernels.world import Case, Check, NotOffered, Seen, World

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTSIDE = "172.18.0.53"
_KFREE_SKB_FORMAT = "events/skb/kfree_skb/format"


def _drop_by_rule(world: World, name: str) -> None:
    rule = f"FORWARD -s {world.lab.pod('sre/web-0').ipv4} -d {OUTSIDE} -j DROP"
    world.node("node1", f"iptables-nft -I {rule}")
    try:
        world.dig("sre/web-0", f"@{OUTSIDE}", "+time=1", name)
    finally:
        world.node("node1", f"iptables-nft -D {rule}")


def dropped(world: World) -> Check:
    """An iptables rule eats the query: the last hop is the drop, on the node where it happened."""
    name = "dropped.bench.example.com."
    _drop_by_rule(world, name)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["status"] == "dropped"
        assert t["latency_ns"] is None
        drop = t["hops"][-1]
        assert (drop["kind"], drop["owner"]) == ("drop", "node1")
        # The kernel's own name for where it happened, if it shows its symbols at all.
        assert drop["location"] is None or drop["location"] in _functions()

    return check


def _functions() -> set[str]:
    with open("/proc/kallsyms") as symbols:
        return {line.split()[2] for line in symbols}


def drop_reason(world: World) -> Check:
    """The reason is the kernel's."""
    for mount in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        format_file = Path(mount, _KFREE_SKB_FORMAT)
        if format_file.exists():
            if "reason" not in format_file.read_text():
                raise NotOffered("kfree_skb gives no reason (before 5.17)")
            break
    name = "reason.bench.example.com."
    _drop_by_rule(world, name)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["hops"][-1]["reason"] == "NETFILTER_DROP"

    return check


def refused(world: World) -> Check:
    """An ICMP port unreachable is told as such."""
    name = "closed.bench.example.com."
    world.dig("sre/web-0", f"@{world.lab.pod('sre/api-0').ipv4}", name)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["status"] == "refused"

    return check


def retried(world: World) -> Check:
    """The same query three times over one socket: three attempts, none answered."""
    name = "retry.lost.example.com."
    world.python("sre/web-0", ask.RETRIER, OUTSIDE, name, "3")

    def check(seen: Seen) -> None:
        assert [(t["attempt"], t["status"]) for t in seen.named(name)] == [
            (1, "timeout"), (2, "timeout"), (3, "timeout"),
        ]  # fmt: skip

    return check


def _netem(world: World, what: str, name: str, *arguments: str) -> None:
    """netem on the way out of node1, while web-0 asks the other node's replica itself."""
    world.lab.node_exec("node1", ["modprobe", "sch_netem"])
    world.offered("node1", f"tc qdisc add dev eth0 root netem {what}")
    try:
        world.dig("sre/web-0", f"@{world.replica('node2').ipv4}", *arguments, name)
    finally:
        world.node("node1", "tc qdisc del dev eth0 root")


def netem_delay(world: World) -> Check:
    """The path shows where the delay is: between the two nodes, on the way there."""
    name = "delayed.bench.example.com."
    _netem(world, "delay 400ms", name)

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        hops = t["hops"]
        gaps = {(_where(a), _where(b)): b["t_ns"] - a["t_ns"] for a, b in itertools.pairwise(hops)}
        slowest = max(gaps, key=lambda pair: gaps[pair])
        assert slowest == (
            ("egress", "query", "eth0", "node1"), ("ingress", "query", "eth0", "node2"),
        )  # fmt: skip
        left, arrived = (
            next(e.query_s for e in world.witnessed(pod) if (e.id, e.name) == (t["id"], name))
            for pod in ("sre/web-0", world.replica("node2").full_name)
        )
        assert 0.39e9 < gaps[slowest] <= (arrived - left) * 1e9 + 1e6

    return check


def _where(hop: Mapping[str, Any]) -> tuple[str, ...]:
    return hop["kind"], hop["direction"], hop["ifname"], hop["owner"]


def netem_loss(world: World) -> Check:
    """A packet that the queue loses is a drop at that device."""
    name = "lossy.bench.example.com."
    _netem(world, "loss 100%", name, "+time=1")

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert t["status"] == "dropped"
        assert [_where(hop) for hop in t["hops"][-2:]] == [
            ("egress", "query", "eth0", "node1"),
            ("drop", "query", "eth0", "node1"),
        ]

    return check


CASES = [
    Case("dropped by a rule: where", dropped),
    Case("dropped by a rule: the kernel's reason", drop_reason),
    Case("refused by ICMP", refused),
    Case("never answered, three attempts", retried),
    Case("netem delay: between the right two hops", netem_delay),
    Case("netem loss: a drop at the right device", netem_loss),
]
