# SPDX-License-Identifier: Apache-2.0
"""Traffic that is not DNS: `python -m bench.traffic udp|tcp serve|send ADDRESS PORT SECONDS`.

Small messages, so that there are many packets: they pass the tracer's hooks like any others.
"""

from __future__ import annotations

import socket
import sys
import time

_MESSAGE = bytes(200)


def serve_udp(address: str, port: int, seconds: float) -> int:
    """Takes datagrams; how many."""
    end = time.monotonic() + seconds
    count = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        server.settimeout(0.2)
        print("ready", flush=True)
        while time.monotonic() < end:
            try:
                server.recv(2048)
            except TimeoutError:
                continue
            count += 1
    return count


def send_udp(address: str, port: int, seconds: float) -> int:
    """Sends datagrams; how many."""
    end = time.monotonic() + seconds
    count = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        while time.monotonic() < end:
            client.send(_MESSAGE)
            count += 1
    return count


def serve_tcp(address: str, port: int, seconds: float) -> int:
    """Answers each message of one connection; how many."""
    count = 0
    with socket.create_server((address, port)) as server:
        server.settimeout(seconds)
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while message := connection.recv(2048):
                connection.sendall(message)
                count += 1
    return count


def send_tcp(address: str, port: int, seconds: float) -> int:
    """Sends messages over one connection and waits for the answer to each; how many."""
    end = time.monotonic() + seconds
    count = 0
    with socket.create_connection((address, port), timeout=seconds) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while time.monotonic() < end:
            client.sendall(_MESSAGE)
            if not client.recv(2048):
                break
            count += 1
    return count


_ROLES = {
    ("udp", "serve"): serve_udp,
    ("udp", "send"): send_udp,
    ("tcp", "serve"): serve_tcp,
    ("tcp", "send"): send_tcp,
}


if __name__ == "__main__":
    _, transport, role, address, port, seconds = sys.argv
    print(_ROLES[transport, role](address, int(port), float(seconds)))
