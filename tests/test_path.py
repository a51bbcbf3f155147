# SPDX-License-Identifier: Apache-2.0
"""One transaction as a waterfall of its hops."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.samples import COREDNS, HOPS, START_NS, WEB, transaction
from tracer.show.path import PathView, render
from tracer.transaction import Backend, Client, Hop, Lookup, Nat, Transaction

LOOKUP = Lookup(START_NS, WEB, "www.example.com", (), 1, 1, 0, 1, 0, "NOERROR", None, (1,))


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


def unanswered(status: str, *hops: Hop) -> Transaction:
    lost = transaction(rcode=None, hops=hops)
    match status:
        case "dropped":
            return lost._replace(status="dropped")
        case "refused":
            return lost._replace(status="refused")
        case _:
            return lost


def test_path_of_an_answered_query() -> None:
    """The way of the field report: out of the pod, DNAT on its node, to the other node, back."""
    shown = render(transaction(), 80).splitlines()
    assert re.fullmatch(
        r"www\.example\.com\. A default/my-nginx-646554d7fd-fd4jp {13}\d\d:\d\d:34\.195320",
        shown[0],
    )
    assert shown[1:] == [
        "  UDP, id 3112, by dig[4242], to 10.96.0.10:53 (kube-system/kube-dns), which is",
        "  kube-system/coredns-79c6f6447f-6f9xp (10.244.0.3:53)",
        "      AT     GAP               HOP       DEVICE          WHERE",
        "                  from 10.244.2.3:53100 to 10.96.0.10:53",
        "       0          ╸            → send    -               default/my-…4d7fd-fd4jp",
        "  2.0 µs  +2.0 µs ╸            → egress  eth0            default/my-…4d7fd-fd4jp",
        "  4.0 µs  +2.0 µs ╸            → ingress vethe281cb12    worker3",
        "                  DNAT: 10.96.0.10:53 → 10.244.0.3:53",
        "   40 µs   +36 µs ╸            → egress  eth0            worker3",
        "  7.3 ms  +7.3 ms ████████████ ← ingress eth0            worker3",
        "                  DNAT undone: 10.244.0.3:53 → 10.96.0.10:53",
        "  7.4 ms   +36 µs            ╸ ← egress  vethe281cb12    worker3",
        "  7.4 ms  +2.0 µs            ╸ ← ingress eth0            default/my-…4d7fd-fd4jp",
        "  7.4 ms   +40 µs            ╸ ← receive -               default/my-…4d7fd-fd4jp",
        "  answer: 93.184.216.34; TTL 30 s",
        "  NOERROR after 7.4 ms; 98 % of it (7.3 ms) between egress eth0 (worker3) and",
        "  ingress eth0 (worker3): the server kube-system/coredns-79c6f6447f-6f9xp",
        "  (10.244.0.3:53), and the way to it and back",
    ]


def test_wide_terminal_has_longer_bars_and_whole_owners() -> None:
    shown = render(transaction(), 140)
    assert "default/my-nginx-646554d7fd-fd4jp\n" in shown
    assert "█" * 30 in shown


QUERY = HOPS[0]


def at(t_ns: int, hop: Hop = QUERY, **changes: object) -> Hop:
    return hop._replace(t_ns=t_ns, **changes)  # type: ignore[arg-type]


BARS = {
    (0, 250, 500, 1000): ["╸", "███", "   ███", "      ██████"],
    (0, 1, 1000): ["╸", "╸", "████████████"],
    (0, 999, 1000): ["╸", "████████████", "           ╸"],
    (0, 0, 0): ["╸", "╸", "╸"],
}


@pytest.mark.parametrize(("times", "bars"), BARS.items(), ids=str)
def test_bars_follow_each_other_on_the_scale_of_the_whole(
    times: tuple[int, ...], bars: list[str]
) -> None:
    shown = render(transaction(hops=tuple(map(at, times))), 80)
    assert re.findall(r"^.{18}([ █╸]{12}) →", shown, re.MULTILINE) == [
        bar.ljust(12) for bar in bars
    ]


CHANGES = {
    "SNAT": (
        at(5, src=("172.18.0.3", 40000), nat=Nat(snat=(QUERY.src, ("172.18.0.3", 40000)))),
        "SNAT: 10.244.2.3:53100 → 172.18.0.3:40000",
    ),
    "IPv6": (
        at(5, nat=Nat(dnat=(("fd00::a", 53), ("fd00::3", 5353)))),
        "DNAT: [fd00::a]:53 → [fd00::3]:5353",
    ),
    "something else": (
        at(5, dst=("10.244.0.3", 53)),
        "now from 10.244.2.3:53100 to 10.244.0.3:53",
    ),
    "a response from elsewhere": (
        at(5, direction="response", src=("192.0.2.66", 53), dst=QUERY.src),
        "now from 192.0.2.66:53 to 10.244.2.3:53100",
    ),
}


@pytest.mark.parametrize(("hop", "words"), CHANGES.values(), ids=CHANGES)
def test_change_of_addresses_is_said_before_the_hop(hop: Hop, words: str) -> None:
    shown = render(transaction(hops=(QUERY, hop)), 80).splitlines()
    assert " " * 18 + words in shown
    assert "now from" not in render(transaction(hops=(QUERY, at(5))), 80)


ENDS = {
    "a drop": (
        unanswered(
            "dropped",
            QUERY,
            at(9, HOPS[2], kind="drop", reason="NETFILTER_DROP", location="nf_hook_slow"),
        ),
        [
            "dropped: NETFILTER_DROP, in nf_hook_slow",
            "no answer: the query was dropped at vethe281cb12 (worker3)",
        ],
    ),
    "a drop without a reason": (
        unanswered("dropped", QUERY, at(9, HOPS[6], kind="drop", ifname=None, owner=None)),
        [
            "dropped: the kernel gave no reason",
            "no answer: the response was dropped in netns 4026532246",
        ],
    ),
    "a time-out": (
        unanswered("timeout", *HOPS[:4]),
        ["no answer in time: the query was last seen after 40 µs, at egress eth0 (worker3)"],
    ),
    "a refusal": (
        unanswered("refused", *HOPS[:4]),
        [
            "no answer: an ICMP error came back: kube-system/coredns-79c6f6447f-6f9xp",
            "(10.244.0.3:53) is unreachable, or nothing listens there",
        ],
    ),
    "a refusal by the client's own namespace": (
        unanswered("refused", QUERY, at(9, kind="drop", reason="NO_SOCKET"))._replace(backend=None),
        ["dropped: NO_SOCKET", "no answer: nothing listens on 10.96.0.10:53"],
    ),
    "a refusal, no hops seen": (
        unanswered("refused"),
        ["no answer: an ICMP error came back"],
    ),
    "nothing seen": (unanswered("timeout"), ["no hops were seen", "no answer in time"]),
}


@pytest.mark.parametrize(("t", "said"), ENDS.values(), ids=ENDS)
def test_end_without_an_answer_is_explained(t: Transaction, said: list[str]) -> None:
    shown = " ".join(render(t, 120).split())
    for words in said:
        assert words in shown


def slow(before: Hop, after: Hop) -> Transaction:
    return transaction(hops=(at(0, before), at(1_000, after)))._replace(latency_ns=1_000)


BLAMED = {
    "the network and the server": (slow(HOPS[3], HOPS[4]), ", and the way to it and back"),
    "the server alone": (
        slow(at(0, HOPS[3], owner="kube-system/coredns-79c6f6447f-6f9xp"), HOPS[4]),
        "the server kube-system/coredns-79c6f6447f-6f9xp (10.244.0.3:53)",
    ),
    "a node's own work": (
        slow(HOPS[2], HOPS[3]),
        "this namespace's routing and filters, on the way to the server",
    ),
    "the way to the server": (slow(HOPS[1], HOPS[2]), ": the way to the server"),
    "the way back": (slow(HOPS[5], HOPS[6]), ": the way back to the client"),
    "the client": (slow(HOPS[6], HOPS[7]), "the client, before it took the answer"),
}


@pytest.mark.parametrize(("t", "blamed"), BLAMED.values(), ids=BLAMED)
def test_longest_gap_is_named(t: Transaction, blamed: str) -> None:
    shown = " ".join(render(t, 80).split())
    assert "NOERROR after 1.0 µs; 100 % of it (1.0 µs) between" in shown
    assert shown.endswith(blamed)


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        (COREDNS, "kube-system/coredns-79c6f6447f-6f9xp (10.244.0.3:53)"),
        (COREDNS._replace(namespace=None, pod=None), "10.244.0.3:53"),
    ],
    ids=["a pod", "an address"],
)
def test_time_between_the_servers_sockets_is_the_servers(backend: Backend, named: str) -> None:
    inside = slow(at(0, HOPS[3], kind="receive"), at(0, HOPS[4], kind="send"))
    shown = " ".join(render(inside._replace(backend=backend), 80).split())
    assert shown.endswith(f"NOERROR after 1.0 µs; 100 % of it (1.0 µs) in the server {named}")


def test_long_answer_takes_a_few_lines() -> None:
    texts = tuple(f'"{letter * 250}" "{letter * 250}"' for letter in "abcdefgh")
    shown = render(transaction(type_="TXT", data=texts), 80).splitlines()
    begin = next(n for n, line in enumerate(shown) if line.startswith("  answer: "))
    end = next(n for n, line in enumerate(shown) if line.startswith("  NOERROR "))
    assert end - begin <= 5
    said = " ".join(" ".join(shown[begin:end]).split())
    assert said.endswith("… +265 bytes, +7 records; TTL 30 s")


def test_client_is_named_as_well_as_it_is_known() -> None:
    assert " 192.0.2.1 " in render(transaction(client=Client("192.0.2.1", 5)), 80).splitlines()[0]
    process = WEB._replace(pod=None)
    assert " dig[4242] " in render(transaction(client=process), 80).splitlines()[0]


def test_colour_is_only_added() -> None:
    for t in (transaction(), ENDS["a drop"][0]):
        colored = render(t, 80, color=True)
        assert "\x1b[" in colored
        assert re.sub(r"\x1b\[[\d;]*m", "", colored) == render(t, 80)


def test_view_writes_a_batch_of_transactions_for_its_stream() -> None:
    stream = io.StringIO()
    PathView(stream, 80).write([transaction(), LOOKUP, transaction()])
    assert stream.getvalue() == (render(transaction(), 80) + "\n\n") * 2
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii")
    PathView(ascii_only).write([transaction()])
    assert "> egress  eth0" in raw.getvalue().decode("ascii")


hostile = st.text(max_size=300)


@pytest.mark.fuzz
@given(
    hostile, hostile, st.sampled_from([80, 100, 200]), st.lists(st.sampled_from(HOPS), max_size=6)
)
def test_hostile_names_do_not_break_lines(
    one: str, other: str, width: int, hops: list[Hop]
) -> None:
    named = [
        at(n * 1000, hop, owner=one, ifname=other, reason=one, location=other, kind=kind)
        for n, (hop, kind) in enumerate(zip(hops, ("drop", "egress", "drop") * 2, strict=False))
    ]
    t = transaction(
        client=WEB._replace(pod=one, namespace=other, comm=other), hops=tuple(named)
    )._replace(backend=COREDNS._replace(pod=one))
    shown = render(t, width)
    for line in shown.split("\n"):
        assert line.isprintable()
        assert cell_len(line) <= width
