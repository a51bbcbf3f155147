# SPDX-License-Identifier: Apache-2.0
"""Cases: messages that are large, cut, or not what they should be."""

from __future__ import annotations

import struct
import subprocess
import sys

from tests.kernels import ask
from tests.kernels.clients import SERVICE
from tests.kernels.world import Case, Check, NotOffered, Seen, World

NEW_DEVICE = "pages.example.com."  # of the names that are asked for by way of a device just made


def fragments(world: World) -> Check:
    """A response that needs three fragments is one transaction with all of its answer."""
    name = "bIg.eXaMpLe.cOm."
    world.dig("sre/web-0", "+bufsize=4096", name, "TXT")

    def check(seen: Seen) -> None:
        (t,) = seen.named(name)
        assert (t["rcode"], t["status"], t["problem"]) == ("NOERROR", "answered", None)
        assert t["response_len"] > 3000
        assert sum(len(answer["data"]) for answer in t["answers"]) > 2500

    return check


def truncated(world: World) -> Check:
    """The part over UDP says that it was cut; the retry over TCP disturbs nothing."""
    name = "BIG.example.com."
    argv = ["dig", "+tries=1", "+time=4", "+noedns", name, "TXT"]
    assert "ANSWER: 1" in world.lab.run("sre/web-0", argv).stdout

    def check(seen: Seen) -> None:
        (t,) = [t for t in seen.named(name) if t["protocol"] == "udp"]
        assert t["status"] == "answered"
        assert "tc" in t["flags"]

    return check


def malformed_packets() -> dict[int, bytes]:
    """DNS packets that strangers might send, by the id that each has; below 9000: no id fits."""
    question = b"\3bad\7example\3com\0\0\1\0\1"

    def header(number: int, questions: int = 1) -> bytes:
        return struct.pack("!6H", number, 0x100, questions, 0, 0, 0)

    return {
        1: b"",
        2: b"\0",
        3: header(9003)[:7],
        9004: header(9004, 0),
        9005: header(9005) + question[:9],
        9006: header(9006) + b"\xc0\x0c\0\1\0\1",
        9007: header(9007) + b"\x50" + b"a" * 80 + b"\0\0\1\0\1",
        9008: header(9008) + (b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1",
        9009: header(9009) + b"\x0b\x1b]0;pwned\x07\0\0\1\0\1",
        9010: struct.pack("!6H", 9010, 0x8180, 1, 0, 0, 0) + question,
        **{
            9000 + length: (header(9000 + length) + question).ljust(length, b"\0")
            for length in (*range(248, 256), *range(504, 512))
        },
    }


def malformed(world: World) -> Check:
    """Each is counted or shown, and the good queries before and after stay."""
    packets = malformed_packets()
    world.dig("sre/web-0", "before.bench.example.com.")
    pid, _ = world.python("sre/web-0", ask.RAW, SERVICE, *[p.hex() for p in packets.values()])
    world.dig("sre/web-0", "after.bench.example.com.")

    def check(seen: Seen) -> None:
        assert seen.named("before.bench.example.com.")
        assert seen.named("after.bench.example.com.")
        assert "Traceback" not in seen.trace.stderr
        told = {t["id"]: t for t in seen.by_process(pid)}
        for number in (9004, 9005, 9006, 9007, 9008):
            assert told[number]["name"] is None
            assert told[number]["problem"]
        for number, packet in packets.items():
            if number > 9100:
                assert told[number]["name"] == "bad.example.com.", len(packet)
        assert told[9009]["name"].isprintable()
        assert 9010 not in told
        # What is no DNS at all is counted at each socket that sent or got it.
        assert seen.trace.summary["lost"]["undecodable"] >= 3

    return check


def in_pages(world: World) -> Check:
    """A response of which the driver left only headers beside the packet's head, and one of two."""
    small, large = "pages.example.com.", "more.pages.example.com."
    told: dict[str, int] = {small: 5, large: 130}
    world.lab.node_exec("node1", ["modprobe", "tun"])
    for name, answers in told.items():
        argv = [sys.executable, "-I", "-S", "-c", ask.CARD, "card0", str(answers)]
        card = world.popen_on_node("node1", argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert card.stdout
        assert card.stderr
        try:
            if not card.stdout.readline():
                raise NotOffered(f"a tap: {card.stderr.read().decode().strip().splitlines()[-1]}")
            world.dig("sre/web-0", "@10.9.9.2", "+bufsize=4096", name)
        finally:
            card.kill()
            card.communicate()

    def check(seen: Seen) -> None:
        for name, answers in told.items():
            (t,) = seen.named(name)
            assert (t["status"], t["rcode"], t["problem"]) == ("answered", "NOERROR", None)
            expected = [f"1.1.{i >> 8}.{i & 255}" for i in range(answers)]
            assert [answer["data"] for answer in t["answers"]] == expected

    return check


CASES = [
    Case("4 KB answer in fragments", fragments),
    Case("answers that a driver put into pages", in_pages),
    Case("truncated answer, then TCP (the UDP part)", truncated),
    Case("malformed packets between good ones", malformed),
]
