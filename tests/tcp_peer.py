# SPDX-License-Identifier: Apache-2.0
"""DNS over TCP from both ends, run inside pods: `tcp_peer.py serve|ask …`.

Clients print what they asked and got as JSON, so that what the tracer says can be compared.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
import time
from typing import Any

_LINGER = struct.pack("ii", 1, 0)
_PAUSE_S = 0.005  # so that a tracer that must share its CPU can read all of it


def query(name: str, number: int, kind: int = 1) -> bytes:
    """A query, without its length."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    header = struct.pack("!6H", number, 0x0100, 1, 0, 0, 0)
    return header + labels + b"\0" + struct.pack("!HH", kind, 1)


def framed(*messages: bytes) -> bytes:
    """As they stand in a stream."""
    return b"".join(struct.pack("!H", len(message)) + message for message in messages)


def answer_to(message: bytes, size: int) -> bytes:
    """A response of that many bytes, if it can be: one record of a private type fills it."""
    end = message.index(b"\0", 12) + 5
    head = message[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0) + message[12:end]
    data = max(1, size - len(head) - 12)
    return head + b"\xc0\x0c" + struct.pack("!HHIH", 65280, 1, 30, data) + b"x" * data


async def serve(address: str) -> None:
    """Answers by the first label: late-MS, size-BYTES, reset, close, void, or anything else."""

    async def one(message: bytes, writer: asyncio.StreamWriter) -> None:
        what, _, number = message[13 : 13 + message[12]].decode().partition("-")
        if what == "late":
            await asyncio.sleep(int(number) / 1000)
        if what == "void":
            return
        response = framed(answer_to(message, int(number) if what == "size" else 100))
        if what == "reset":
            half = framed(answer_to(message, 20_000))[:9000]
            writer.write(half)
            await writer.drain()
            await asyncio.sleep(0.1)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            writer.transport.abort()
            return
        if what == "close":
            writer.close()
            return
        writer.write(response)
        await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks = []
        try:
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                message = await reader.readexactly(length)
                tasks.append(asyncio.create_task(one(message, writer)))
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = await asyncio.start_server(connected, address, 53, family=family, backlog=1024)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


class Client:
    """One connection."""

    def __init__(self, address: str, port: int = 0, timeout_s: float = 10.0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.settimeout(timeout_s)
        if port:
            self.socket.bind(("", port))
        self.socket.connect((address, 53))
        self.port = self.socket.getsockname()[1]
        self._reader = self.socket.makefile("rb")
        self._sent: dict[int, tuple[str, int]] = {}
        self.got: list[dict[str, Any]] = []

    def send(self, names: list[str], first: int, cut: str = "") -> None:
        """Asks all in one segment, or however it is to be cut."""
        messages = [query(name, first + n) for n, name in enumerate(names)]
        for n, name in enumerate(names):
            self._sent[first + n] = (name, time.monotonic_ns())
        data = framed(*messages)
        if cut == "length":
            parts = [part for m in messages for part in (framed(m)[:2], m)]
        elif cut == "bytes":
            parts = [data[i : i + 1] for i in range(len(data))]
        else:
            parts = [data]
        for part in parts:
            self.socket.sendall(part)
            if len(parts) > 1:
                time.sleep(0.002)

    def receive(self, number: int) -> None:
        """Takes as many answers; less, if the connection ends."""
        for _ in range(number):
            try:
                head = self._reader.read(2)
                if len(head) < 2:
                    return
                message = self._reader.read(int.from_bytes(head, "big"))
            except OSError:
                return
            name, sent_ns = self._sent[int.from_bytes(message[:2], "big")]
            self.got.append(
                {
                    "id": int.from_bytes(message[:2], "big"),
                    "name": name,
                    "len": len(message),
                    "port": self.port,
                    "ns": time.monotonic_ns() - sent_ns,
                }
            )


def ask(address: str, how: str, names: list[str]) -> list[dict[str, Any]]:
    """Asks over one connection, or one for each with `each`."""
    got = []
    if how == "each":
        for n, name in enumerate(names):
            client = Client(address)
            client.send([name], n + 1)
            client.receive(1)
            client.socket.close()
            got += client.got
            time.sleep(_PAUSE_S)
        return got
    if how == "same-port":
        first = Client(address)
        second = Client(names.pop(0), first.port)
        for n, name in enumerate(names):
            for offset, client in enumerate((first, second)):
                client.send([name], 10 * n + offset + 1)
                client.receive(1)
        return first.got + second.got
    client = Client(address)
    if how == "lines":
        for n, line in enumerate(sys.stdin):
            client.send([line.strip()], n + 1)
            client.receive(1)
            print(line.strip(), flush=True)
        return client.got
    if how == "one-by-one":
        for n, name in enumerate(names):
            client.send([name], n + 1)
            client.receive(1)
        return client.got
    client.send(names, 1, how)
    if how == "half":
        client.socket.shutdown(socket.SHUT_WR)
    client.receive(len(names))
    return client.got


def main() -> None:
    """Does what the command line says."""
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2]))
    else:
        _, _, address, how, *names = sys.argv
        if len(names) == 1 and "*" in names[0]:
            name, _, count = names[0].partition("*")
            names = [name.replace("%", str(n)) for n in range(int(count))]
        print(json.dumps({"pid": os.getpid(), "got": ask(address, how, names)}), flush=True)


if __name__ == "__main__":
    main()
