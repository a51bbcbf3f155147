# SPDX-License-Identifier: Apache-2.0
"""Clients that do what no command does, as programs for a pod's Python."""

# A query (header, one question) as bytes: query(id, name, type).
_QUERY = r"""
import os, socket, struct, sys, time
def query(number, name, kind=1):
    labels = b"".join(bytes([len(l)]) + l.encode() for l in name.strip(".").split("."))
    return struct.pack("!6H", number, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(4)
"""

# argv: server, name, seconds to wait before the answer is taken. Prints the time of all in ns.
LATE_TAKER = (
    _QUERY
    + r"""
began = time.monotonic_ns()
s.sendto(query(7001, sys.argv[2]), (sys.argv[1], 53))
time.sleep(float(sys.argv[3]))
s.recv(512)
print(time.monotonic_ns() - began)
"""
)

# argv: server, how many. Each query is from a process of its own, and has its pid in its name.
BURST = (
    _QUERY
    + r"""
for i in range(int(sys.argv[2])):
    if (pid := os.fork()) == 0:
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.settimeout(4)
        own.sendto(query(i, f"p{os.getpid()}.burst.bench.example.com"), (sys.argv[1], 53))
        try: own.recv(512)
        except OSError: pass
        os._exit(0)
    os.waitpid(pid, 0)
    print(pid)
"""
)

# argv: server, name, how often. The same query over one socket.
RETRIER = (
    _QUERY
    + r"""
for i in range(int(sys.argv[3])):
    s.sendto(query(7002, sys.argv[2]), (sys.argv[1], 53))
    time.sleep(0.2)
"""
)

# argv: server, then packets in hex.
RAW = (
    _QUERY
    + r"""
for packet in sys.argv[2:]:
    s.sendto(bytes.fromhex(packet), (sys.argv[1], 53))
    time.sleep(0.01)
"""
)

# argv: server, name, tries. Two processes, each on a CPU of its own, send A and AAAA over one new
# socket at the same moment, again and again. Prints the ports.
RACERS = (
    _QUERY
    + r"""
import mmap
gate = mmap.mmap(-1, 8)
for i in range(int(sys.argv[3])):
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own.bind(("", 0))
    gate[0:2] = b"\0\0"
    a, aaaa = (query(7100 + 2 * i + (kind == 28), f"r{i}.{sys.argv[2]}", kind) for kind in (1, 28))
    if (pid := os.fork()) == 0:
        os.sched_setaffinity(0, {1})
        gate[0] = 1
        while not gate[1]: pass
        own.sendto(aaaa, (sys.argv[1], 53))
        os._exit(0)
    os.sched_setaffinity(0, {0})
    while not gate[0]: pass
    gate[1] = 1
    own.sendto(a, (sys.argv[1], 53))
    os.waitpid(pid, 0)
    print(own.getsockname()[1])
    own.settimeout(0.2)
    try:
        own.recv(512); own.recv(512)
    except OSError: pass
    own.close()
"""
)
