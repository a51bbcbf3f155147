# SPDX-License-Identifier: Apache-2.0
"""The live view: one line per transaction, for people and for pipes."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.samples import DNS_SERVICE, START_NS, WEB, transaction
from tracer.show.cells import clean, duration, fit, fit_name
from tracer.show.live import LiveTable
from tracer.transaction import Backend, Client, Lookup, Transaction

WIDTHS = (80, 81, 99, 100, 120, 132, 140, 200, 300)
EXPANSION = "www.li-rui.top.sre.svc.cluster.local."
WASTEFUL = Lookup(
    START_NS, WEB, "www.li-rui.top", ("sre.svc.cluster.local",), 5, 8, 6, 3_100_000, 2_000_000,
    "NOERROR", "ask for www.li-rui.top. (with a final dot) or set dnsConfig ndots:1; 6 of 8 queries"
    " were search-list misses", (1, 2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)


def piped() -> LiveTable:
    return LiveTable(io.StringIO())


def on_terminal(width: int = 80) -> LiveTable:
    return LiveTable(io.StringIO(), width)


def test_line_on_a_terminal_of_80_columns() -> None:
    table = on_terminal()
    assert table.header() == (
        "TIME     CLIENT       NAME                 TYPE  SERVER         STATUS   LATENCY"
    )
    assert table.line(transaction(EXPANSION, rcode="NXDOMAIN")).endswith(
        " defau…-fd4jp www.li-rui.to…local. A     →cored…f-6f9xp NXDOMAIN  7.4 ms"
    )


def test_line_into_a_pipe_has_all_values_in_full() -> None:
    fields = piped().line(transaction(EXPANSION, rcode="NXDOMAIN")).split()
    assert fields[1:] == [
        "default/my-nginx-646554d7fd-fd4jp", "dig[4242]", EXPANSION, "A",
        "10.96.0.10→coredns-79c6f6447f-6f9xp", "udp", "1", "NXDOMAIN", "7.4", "ms",
    ]  # fmt: skip
    assert re.fullmatch(r"\d\d:\d\d:34\.195", fields[0])


def test_columns_in_a_pipe_stay_where_they_are() -> None:
    table = piped()
    shown = [
        table.header(),
        table.line(transaction()),
        table.line(transaction("a.", rcode=None, client=Client("192.0.2.1", 5))),
        table.line(transaction()._replace(name=None, type=None, backend=None)),
    ]
    for column in ("NAME", "TYPE", "SERVER", "PROTO", "STATUS"):
        at = shown[0].index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in shown)
    end = shown[0].index("LATENCY") + len("LATENCY")
    assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in shown)


@pytest.mark.parametrize("width", WIDTHS)
def test_line_and_header_are_as_wide_as_the_terminal(width: int) -> None:
    table = on_terminal(width)
    assert cell_len(table.header()) == width
    for t in (transaction(), transaction(EXPANSION, rcode=None), transaction("x" * 63 + ".")):
        assert cell_len(table.line(t)) == width


def test_wide_terminal_shows_process_attempt_and_hops() -> None:
    header = on_terminal(200).header()
    assert header.split() == [
        "TIME", "CLIENT", "PROCESS", "NAME", "TYPE", "SERVER", "PROTO", "TRY", "HOPS", "STATUS",
        "LATENCY", "ANSWER",
    ]  # fmt: skip
    assert " dig[4242] " in on_terminal(200).line(transaction())


CLIENTS = {
    "namespace and pod": (WEB, "default/my-nginx-646554d7fd-fd4jp"),
    "pod": (WEB._replace(namespace=None), "my-nginx-646554d7fd-fd4jp"),
    "container": (WEB._replace(pod=None), "app"),
    "process": (WEB._replace(pod=None, container=None), "dig[4242]"),
    "process without a name": (WEB._replace(pod=None, container=None, comm=None), "[4242]"),
    "process without a number": (WEB._replace(pod=None, container=None, pid=None), "dig"),
    "address": (Client("fd00::1", 5), "fd00::1"),
    "spaces": (Client("fd00::1", 5, comm="Web Content", pid=1), "Web_Content[1]"),
}


@pytest.mark.parametrize(("client", "shown"), CLIENTS.values(), ids=CLIENTS)
def test_client_is_named_as_well_as_it_is_known(client: Client, shown: str) -> None:
    line = on_terminal(80).line(transaction(client=client))
    start, _, end = line.split()[1].partition("…")
    assert shown.replace("_", " ").startswith(start)
    assert shown.endswith(end)


@pytest.mark.parametrize("client", [client for client, _ in CLIENTS.values()], ids=CLIENTS)
def test_address_is_shown_where_the_process_has_a_column_of_its_own(client: Client) -> None:
    client_cell, process_cell = piped().line(transaction(client=client)).split()[1:3]
    if client.pod is None and client.container is None:
        assert client_cell == client.ip
    assert client_cell != process_cell


SERVERS = {
    "no NAT": (Backend("10.96.0.10", 53), "10.96.0.10"),
    "another address": (Backend("10.244.0.3", 53), "10.96.0.10→10.244.0.3"),
    "another port": (Backend("10.244.0.3", 5353), "10.96.0.10→10.244.0.3:5353"),
    "IPv6": (Backend("fd00::3", 5353), "10.96.0.10→[fd00::3]:5353"),
    "a pod": (Backend("10.244.0.3", 53, "kube-system", "coredns-x"), "10.96.0.10→coredns-x"),
    "nobody": (None, "10.96.0.10"),
}


@pytest.mark.parametrize(("backend", "shown"), SERVERS.values(), ids=SERVERS)
def test_server_is_followed_by_who_answered(backend: Backend | None, shown: str) -> None:
    assert piped().line(transaction()._replace(backend=backend)).split()[5] == shown


STATUSES: dict[str, Transaction] = {
    "NOERROR": transaction(),
    "NXDOMAIN": transaction(rcode="NXDOMAIN"),
    "NODATA": transaction("www.example.com.", "AAAA", data=()),
    "TC": transaction()._replace(flags=("tc", "rd")),
    "timeout": transaction(rcode=None),
    "dropped": transaction(rcode=None)._replace(status="dropped"),
    "refused": transaction(rcode=None)._replace(status="refused"),
    "REFUSED": transaction(rcode="REFUSED"),
    "BADCOOKIE": transaction(rcode="NOERROR")._replace(rcode="BADCOOKIE"),
}


@pytest.mark.parametrize(("status", "t"), STATUSES.items(), ids=STATUSES)
def test_status_says_what_came_of_it(status: str, t: Transaction) -> None:
    assert piped().line(t).split()[8] == status


def test_colour_is_only_added() -> None:
    plain = LiveTable(io.StringIO(), 80, color=False)
    colored = LiveTable(io.StringIO(), 80, color=True)
    for t in (*STATUSES.values(), transaction(latency_ns=2_000_000_000)):
        assert re.sub(r"\x1b\[[\d;]*m", "", colored.line(t)) == plain.line(t)
    assert "\x1b[" in colored.line(STATUSES["NXDOMAIN"])
    assert "\x1b[" in colored.line(transaction(latency_ns=2_000_000_000))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_colour_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in LiveTable(Terminal()).line(STATUSES["timeout"])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in LiveTable(Terminal()).line(STATUSES["timeout"])


def test_pipe_gets_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" not in piped().line(STATUSES["timeout"])


def test_header_comes_once_into_a_pipe() -> None:
    stream = io.StringIO()
    table = LiveTable(stream)
    for _ in range(3):
        table.write([transaction()] * 100)
    written = stream.getvalue().splitlines()
    assert len(written) == 301
    assert [line.startswith("TIME") for line in written].count(True) == 1


def test_header_comes_again_when_it_has_scrolled_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "24")
    stream = Terminal()
    table = LiveTable(stream, color=False)
    table.write([transaction()] * 44)
    written = stream.getvalue().splitlines()
    headers = [number for number, line in enumerate(written) if line.startswith("TIME")]
    assert headers == [0, 23]


def test_nothing_is_written_for_nothing() -> None:
    stream = io.StringIO()
    LiveTable(stream).write([])
    assert stream.getvalue() == ""


def test_wasteful_lookup_is_one_line_in_a_pipe() -> None:
    assert piped().lookup(WASTEFUL) == (
        "  └ www.li-rui.top: 8 queries, 6 wasted by ndots:5 (2.0 ms) — ask for www.li-rui.top."
        " (with a final dot) or set dnsConfig ndots:1; 6 of 8 queries were search-list misses"
    )


def test_wasteful_lookup_fits_a_terminal() -> None:
    shown = on_terminal().lookup(WASTEFUL._replace(question="a" * 63 + ".example.com"))
    assert shown is not None
    assert all(cell_len(line) <= 80 for line in shown.splitlines())
    assert shown.splitlines()[0].startswith("  └ aaaaaaa")
    assert "8 queries, 6 wasted by ndots:5 (2.0 ms)" in shown.splitlines()[0]


def test_lookup_without_waste_is_shown_if_there_is_advice() -> None:
    assert piped().lookup(WASTEFUL._replace(wasted=0, advice=None)) is None
    lossy = WASTEFUL._replace(wasted=0, queries=4, latency_ns=5_003_149_139, advice="AAAA was lost")
    assert piped().lookup(lossy) == "  └ www.li-rui.top: 4 queries, 5.00 s — AAAA was lost"


def test_stream_that_knows_only_ascii_gets_only_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    LiveTable(stream).write([transaction(client=WEB._replace(pod="pöd")), WASTEFUL])
    assert b"10.96.0.10>coredns" in raw.getvalue()
    assert b"p\\xf6d" in raw.getvalue()


@pytest.mark.fuzz
@given(st.text(st.characters(), max_size=300), st.sampled_from(WIDTHS))
def test_hostile_names_neither_break_lines_nor_columns(text: str, width: int) -> None:
    hostile = transaction(client=WEB._replace(pod=text, comm=text))._replace(
        backend=Backend("10.244.0.3", 53, text, text), server=DNS_SERVICE._replace(service=text)
    )
    line = on_terminal(width).line(hostile)
    assert cell_len(line) == width
    assert line.isprintable()
    assert len(piped().line(hostile).split()) == 12


DURATIONS = {
    None: "-",
    0: "0 ns",
    999: "999 ns",
    1_000: "1.0 µs",
    9_949: "9.9 µs",
    9_950: "10 µs",
    254_000: "254 µs",
    999_499: "999 µs",
    999_500: "1.0 ms",
    3_100_000: "3.1 ms",
    99_949_999: "99.9 ms",
    99_950_000: "100 ms",
    999_499_999: "999 ms",
    999_500_000: "1.00 s",
    1_204_000_000: "1.20 s",
    9_995_000_000: "10.0 s",
    120_000_000_000: "120 s",
    -254_000: "-254 µs",
}


@pytest.mark.parametrize(("ns", "shown"), DURATIONS.items(), ids=str)
def test_duration_has_three_digits_and_a_unit(ns: int | None, shown: str) -> None:
    assert duration(ns) == shown


NAMES = {
    30: "www.li-rui.top.sre.svc.…local.",
    20: "www.li-rui.to…local.",
    36: "www.li-rui.top.sre.svc.cluste…local.",
    37: EXPANSION,
    40: EXPANSION + "   ",
}


@pytest.mark.parametrize(("width", "shown"), NAMES.items())
def test_long_name_keeps_its_first_label_and_its_zone(width: int, shown: str) -> None:
    assert fit_name(EXPANSION, width) == shown


@pytest.mark.fuzz
@given(st.text(max_size=80), st.integers(5, 60))
def test_text_is_fitted_to_exactly_its_cells(text: str, width: int) -> None:
    assert cell_len(fit(clean(text), width)) == width


@pytest.mark.fuzz
@given(st.text(st.sampled_from("ab.\\"), max_size=80), st.integers(5, 60))
def test_name_is_fitted_to_exactly_its_cells(name: str, width: int) -> None:
    assert cell_len(fit_name(name, width)) == width


def test_text_to_obey_is_shown_as_escapes() -> None:
    assert clean("\x1b[2Ja\nb\u202ec\udc80[red]") == r"\x1b[2Ja\nb\u202ec\udc80[red]"
    assert len(clean("x" * 10_000)) == 253
