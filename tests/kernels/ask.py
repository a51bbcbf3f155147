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
time.sleep(1)
"""
)

# argv: server, name, tries. Two processes, each on a CPU of its own, send A and AAAA over one new
# socket at the same moment, again and again. Prints the ports. No socket is closed before all had
# time for their answers.
RACERS = (
    _QUERY
    + r"""
import mmap
gate = mmap.mmap(-1, 8)
late = []
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
        own.close()
    except OSError:
        late.append(own)
if late:
    time.sleep(2)
for own in late:
    own.settimeout(0)
    try:
        own.recv(512); own.recv(512)
    except OSError: pass
"""
)

# Not a client: a network card whose driver leaves only headers beside the packet's head (a tap with
# IFF_NAPI_FRAGS), and a server behind it. argv: device, how many A records each name's answer has.
# Prints a line once it serves. 10.9.9.1 is the card's address, 10.9.9.2 the server's.
CARD = r"""
import fcntl, os, struct, subprocess, sys
device, answers = sys.argv[1], int(sys.argv[2])
os.makedirs("/dev/net", exist_ok=True)
if not os.path.exists("/dev/net/tun"):
    os.mknod("/dev/net/tun", 0o20600, os.makedev(10, 200))
card = os.open("/dev/net/tun", os.O_RDWR)
TAP, NO_PI, NAPI, NAPI_FRAGS = 2, 0x1000, 0x10, 0x20
flags = TAP | NO_PI | NAPI | NAPI_FRAGS
fcntl.ioctl(card, 0x400454CA, struct.pack("16sH22x", device.encode(), flags))
for command in (
    f"ip link set {device} address 02:00:00:00:00:01 up",
    f"ip addr add 10.9.9.1/24 dev {device}",
    f"ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev {device}",
):
    subprocess.run(command.split(), check=True)
print("serves", flush=True)

def checksum(header):
    total = sum(struct.unpack("!10H", header))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF

def frame(payload, offset, more):
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 77, more << 13 | offset // 8, 64, 17, 0,
                     bytes([10, 9, 9, 2]), asker)
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return b"\x02\0\0\0\0\1\x02\0\0\0\0\2\x08\0" + ip + payload

while True:
    got = os.read(card, 2000)
    if got[12:14] != b"\x08\0" or got[23] != 17 or got[36:38] != b"\0\x35":
        continue
    asker, query = got[26:30], got[42:]
    end = query.index(b"\0", 12) + 5
    response = query[:2] + struct.pack("!5H", 0x8180, 1, answers, 0, 0) + query[12:end]
    for i in range(answers):
        response += b"\xc0\x0c" + struct.pack("!HHIH4B", 1, 1, 60, 4, 1, 1, i >> 8, i & 255)
    udp = b"\0\x35" + got[34:36] + struct.pack("!HH", 8 + len(response), 0) + response
    first = frame(udp[:1480], 0, len(udp) > 1480)
    os.writev(card, [first[:42], first[42:]])
    if len(udp) > 1480:
        os.write(card, frame(udp[1480:], 1480, False))
"""
