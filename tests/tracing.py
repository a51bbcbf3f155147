# SPDX-License-Identifier: Apache-2.0
"""Runs the real `dnstrace` beside the real tools that tell whether it says the truth."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracer.lab import Lab

DNSTRACE = [sys.executable, "-m", "tracer"]


class Tracer:
    """A running `dnstrace --json`. What it said is there after `stop`."""

    def __init__(self, *arguments: str, output: Path, command: list[str] | None = None) -> None:
        self._path = output
        self._errors: list[str] = []
        with output.open("wb") as stdout:
            self.process = subprocess.Popen(
                [*(command or DNSTRACE), "--json", *arguments],
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._wait_until_armed()

    def _wait_until_armed(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._errors.append(line)
            if "tracing" in line:
                return
        self.process.wait()
        self.process.stderr.close()
        raise AssertionError(f"dnstrace did not start: {''.join(self._errors)}")

    def so_far(self) -> str:
        """What it has written by now."""
        return self._path.read_text()

    def stop(self, timeout_s: float = 120.0) -> Trace:
        """Ends it as Ctrl-C does, and returns what it said."""
        self.process.send_signal(signal.SIGINT)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 120.0) -> Trace:
        """Waits for its own end."""
        _, errors = self.process.communicate(timeout=timeout_s)
        self._errors.append(errors)
        assert self.process.returncode == 0, "".join(self._errors)
        return Trace(self._path, "".join(self._errors))


class Trace:
    """The JSON lines of one run, by event."""

    def __init__(self, path: Path, stderr: str) -> None:
        self.stderr = stderr
        events = [json.loads(line) for line in path.read_bytes().splitlines()]
        self.transactions: list[dict[str, Any]] = [e for e in events if e["event"] == "transaction"]
        self.lookups: list[dict[str, Any]] = [e for e in events if e["event"] == "lookup"]
        assert [e["event"] for e in events].index("summary") == len(events) - 1
        self.summary: dict[str, Any] = events[-1]

    def named(self, name: str) -> list[dict[str, Any]]:
        """The transactions of one question."""
        return [t for t in self.transactions if t["name"] == name]


@contextmanager
def tracing(*arguments: str, tmp_path: Path, command: list[str] | None = None) -> Iterator[Tracer]:
    """A tracer that is killed if the block does not stop it. `command`: how it is started."""
    fd, output = tempfile.mkstemp(dir=tmp_path, suffix=".jsonl")
    os.close(fd)
    tracer = Tracer(*arguments, output=Path(output), command=command)
    try:
        yield tracer
    finally:
        tracer.process.kill()
        tracer.process.wait()
        assert tracer.process.stderr
        tracer.process.stderr.close()


def let_finish(pid: int, patience_s: float = 60.0) -> None:
    """Until no thread of a process runs, or wants to: what woke it before, it is done with."""
    deadline_s, idle = time.monotonic() + patience_s, 0
    while idle < 2:  # of two threads, one may wake the other between the looks at them
        states = set()
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                states.add((task / "stat").read_text().rpartition(") ")[2][0])
        idle = 0 if states & {"R", "D"} else idle + 1
        assert time.monotonic() < deadline_s, f"process {pid} never rests"
        time.sleep(0.002)


class Exchange(NamedTuple):
    """One question and its answer, as tcpdump saw them on one device."""

    port: int  # of the client
    id: int
    name: str
    type: str
    rcode: str | None
    query_s: float
    latency_s: float | None
    server: str  # the address that was asked


@contextmanager
def capturing(
    lab: Lab, pod: str, tmp_path: Path, port: int = 53, device: str = "eth0"
) -> Iterator[Path]:
    """tcpdump of a port on a pod's device, complete when the block ends; port 0: of all."""
    path = tmp_path / f"{pod.replace('/', '-')}-{device}.pcap"
    argv = ["tcpdump", "-i", device, "-w", str(path), "-U", "--immediate-mode", "-Z", "root",
            "-B", "65536", *(["port", str(port)] if port else [])]  # fmt: skip
    tcpdump = lab.popen(pod, argv, stderr=subprocess.PIPE, text=True)
    assert tcpdump.stderr
    for line in tcpdump.stderr:
        if "listening on" in line:
            break
    try:
        yield path
    finally:
        let_finish(tcpdump.pid)  # what is on the device has woken it
        tcpdump.send_signal(signal.SIGINT)
        _, said = tcpdump.communicate(timeout=60)
        assert re.search(r"^0 packets dropped by kernel", said, re.MULTILINE), said


def exchanges(pcap: Path) -> list[Exchange]:
    """Queries and their answers in a capture of UDP over IPv4 or IPv6 on Ethernet.

    What is no whole DNS message with one question is left out, and later fragments with it.
    """
    queries: dict[tuple[bytes, int, int], Exchange] = {}
    done = []
    for time_s, frame in packets(pcap):
        message = _dns_message(frame)
        if message is None:
            continue
        source, target, sport, dport, dns_message = message
        question = dns_message.question[0]
        if dport == 53:
            query = Exchange(
                sport,
                dns_message.id,
                question.name.to_text(),
                dns.rdatatype.to_text(question.rdtype),
                None,
                time_s,
                None,
                str(ipaddress.ip_address(target)),
            )
            earlier = queries.pop((source, sport, dns_message.id), None)
            if earlier:
                done.append(earlier)
            queries[source, sport, dns_message.id] = query
        elif asked := queries.pop((target, dport, dns_message.id), None):
            rcode = dns.rcode.to_text(dns_message.rcode())
            done.append(asked._replace(rcode=rcode, latency_s=time_s - asked.query_s))
    return sorted([*done, *queries.values()], key=lambda exchange: exchange.query_s)


def _dns_message(frame: bytes) -> tuple[bytes, bytes, int, int, dns.message.Message] | None:
    """(source, target, source port, target port, message)"""
    ip = frame[14:]
    if frame[12:14] == b"\x08\x00":
        header, protocol, source, target = (ip[0] & 15) * 4, ip[9], ip[12:16], ip[16:20]
        if struct.unpack("!H", ip[6:8])[0] & 0x1FFF:
            return None
    else:
        header, protocol, source, target = 40, ip[6], ip[8:24], ip[24:40]
    if protocol != socket.IPPROTO_UDP:
        return None
    sport, dport = struct.unpack("!HH", ip[header : header + 4])
    try:
        message = dns.message.from_wire(
            ip[header + 8 :], ignore_trailing=True, question_only=True, continue_on_error=True
        )
    except dns.exception.DNSException:
        return None
    return (source, target, sport, dport, message) if message.question else None


class TcpMessage(NamedTuple):
    """One DNS message over TCP, as tcpdump saw it on one device."""

    server: str
    port: int  # of the client
    id: int
    name: str
    is_response: bool
    complete_s: float  # when the last of its bytes was there


def tcp_messages(pcap: Path) -> list[TcpMessage]:
    """The whole messages in a capture, put together byte by byte.

    Where a connection's SYN is not in it, what is must begin with a message.
    """
    streams: dict[tuple[bytes, bytes, bytes, bool], dict[int, tuple[int, float]]] = {}
    begins: dict[tuple[bytes, bytes, bytes, bool], int] = {}
    for time_s, frame in packets(pcap):
        ip = frame[14:]
        if frame[12:14] == b"\x08\x00":
            header, protocol, ip_len = (ip[0] & 15) * 4, ip[9], int.from_bytes(ip[2:4])
            ends = ip[12:16], ip[16:20]
        else:
            header, protocol, ip_len = 40, ip[6], 40 + int.from_bytes(ip[4:6])
            ends = ip[8:24], ip[24:40]
        if protocol != socket.IPPROTO_TCP:
            continue
        tcp = ip[header:ip_len]
        back = int.from_bytes(tcp[:2]) == 53
        key = (ends[back], ends[not back], tcp[2 * back : 2 * back + 2], back)
        seq = int.from_bytes(tcp[4:8])
        if tcp[13] & 2:
            begins[key] = seq + 1
        stream = streams.setdefault(key, {})
        data = tcp[(tcp[12] >> 4) * 4 :]
        if data:
            begins.setdefault(key, seq)
        for number, byte in enumerate(data):
            stream.setdefault((seq + number - begins[key]) % 2**32, (byte, time_s))
    found = []
    for (_, server, port, back), stream in streams.items():
        at = 0
        while at + 1 in stream:
            span = range(at + 2, at + 2 + (stream[at][0] << 8 | stream[at + 1][0]))
            if any(n not in stream for n in span):
                break
            message = dns.message.from_wire(
                bytes(stream[n][0] for n in span), question_only=True, ignore_trailing=True
            )
            found.append(
                TcpMessage(
                    str(ipaddress.ip_address(server)),
                    int.from_bytes(port),
                    message.id,
                    message.question[0].name.to_text(),
                    back,
                    max(stream[n][1] for n in (at, at + 1, *span)),
                )
            )
            at = span.stop
    return found


def packets(pcap: Path) -> Iterator[tuple[float, bytes]]:
    """(seconds, frame) of a classic pcap file."""
    data = pcap.read_bytes()
    (magic,) = struct.unpack("=I", data[:4])
    assert magic == 0xA1B2C3D4
    at = 24
    while at < len(data):
        seconds, micros, length, _ = struct.unpack("=IIII", data[at : at + 16])
        yield seconds + micros / 1e6, data[at + 16 : at + 16 + length]
        at += 16 + length


def conntrack_backends(lab: Lab, node: str) -> dict[tuple[str, int], str]:
    """(client address, client port) to who answers it, as `conntrack -L` says."""
    listed = lab.node_exec(node, ["conntrack", "-L", "-p", "udp", "--dport", "53"]).stdout
    backends = {}
    for line in listed.splitlines():
        sources = re.findall(r"src=(\S+)", line)
        ports = re.findall(r"sport=(\d+)", line)
        if len(sources) == 2:
            backends[sources[0], int(ports[0])] = sources[1]
    return backends


def our_programs() -> list[str]:
    """Names of loaded BPF programs that are dnstrace's."""
    listed = json.loads(subprocess.check_output(["bpftool", "--json", "prog", "list"]))
    return [p["name"] for p in listed if p.get("name", "").startswith("dnstrace")]


def our_links() -> int:
    """How many BPF links attach dnstrace's programs."""
    programs = json.loads(subprocess.check_output(["bpftool", "--json", "prog", "list"]))
    ours = {p["id"] for p in programs if p.get("name", "").startswith("dnstrace")}
    links = json.loads(subprocess.check_output(["bpftool", "--json", "link", "list"]))
    return sum(link["prog_id"] in ours for link in links)


def soon_gone(found: Callable[[], object]) -> bool:
    """Whether nothing is found any more: what a process held, the kernel frees after its end."""
    deadline_s = time.monotonic() + 60
    while found():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True
