# SPDX-License-Identifier: Apache-2.0
"""Services balanced at the socket, as Cilium does it without kube-proxy.

BPF programs on the lab's own cgroup give `connect` and `sendmsg` one of the service's endpoints in
place of its address, before there is any packet; `recvmsg` and `getpeername` say the service's
address again, so that the application never learns of it. No packet has the service's address, so
no rule and no conntrack entry has either.

BCC compiles in a process of its own, which holds the programs: they are gone when it ends. A link
to a cgroup is always what BPF_F_ALLOW_MULTI asks for: programs of others there run too.
"""

from __future__ import annotations

import ipaddress
import json
import os
import struct
import subprocess
import sys
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from tracer.kernel import bpf
from tracer.kernel import compile as compiling
from tracer.lab import cgroups, topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tracer.lab import Lab

_MOST_ENDPOINTS = 4
_PLACE = struct.Struct("=16s2s2x")  # struct place


class _ProgramType(IntEnum):
    """What only tests load."""

    CGROUP_SOCK_ADDR = 18


class _Attach(IntEnum):
    """enum bpf_attach_type, as far as only tests attach there."""

    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30


PROGRAMS = {
    "to_endpoint4": (_Attach.CGROUP_INET4_CONNECT, _Attach.CGROUP_UDP4_SENDMSG),
    "to_endpoint6": (_Attach.CGROUP_INET6_CONNECT, _Attach.CGROUP_UDP6_SENDMSG),
    "from_endpoint4": (_Attach.CGROUP_UDP4_RECVMSG, _Attach.CGROUP_INET4_GETPEERNAME),
    "from_endpoint6": (_Attach.CGROUP_UDP6_RECVMSG, _Attach.CGROUP_INET6_GETPEERNAME),
}

# An IPv4 address is kept as an IPv6 socket has it, ::ffff:a.b.c.d.
SOURCE = """
struct place {
	u32 ip[4];
	u32 port; /* network byte order, in the first two bytes */
};

struct endpoints {
	u32 count;
	struct place at[MOST_ENDPOINTS];
};

struct asked_of {
	u64 socket;
	struct place endpoint;
	u32 padding;
};

BPF_HASH(services, struct place, struct endpoints, 64);
BPF_TABLE("lru_hash", struct asked_of, struct place, services_asked, 16384);

static __always_inline bool choose(struct bpf_sock_addr *ctx, struct place *place)
{
	struct asked_of asked = { .socket = bpf_get_socket_cookie(ctx) };
	struct endpoints *endpoints = services.lookup(place);
	u32 number;

	if (!endpoints || !endpoints->count)
		return false;
	number = bpf_get_prandom_u32() % endpoints->count;
	if (number >= MOST_ENDPOINTS)
		return false;
	asked.endpoint = endpoints->at[number];
	services_asked.update(&asked, place);
	*place = asked.endpoint;
	return true;
}

static __always_inline bool service_of(struct bpf_sock_addr *ctx, struct place *place)
{
	struct asked_of asked = { .socket = bpf_get_socket_cookie(ctx), .endpoint = *place };
	struct place *service = services_asked.lookup(&asked);

	if (!service)
		return false;
	*place = *service;
	return true;
}

static __always_inline int rewrite4(struct bpf_sock_addr *ctx, bool to_endpoint)
{
	struct place place = { .ip = { 0, 0, MAPPED, ctx->user_ip4 }, .port = ctx->user_port };

	if (to_endpoint ? choose(ctx, &place) : service_of(ctx, &place)) {
		ctx->user_ip4 = place.ip[3];
		ctx->user_port = place.port;
	}
	return 1;
}

static __always_inline int rewrite6(struct bpf_sock_addr *ctx, bool to_endpoint)
{
	struct place place = { .port = ctx->user_port };

	place.ip[0] = ctx->user_ip6[0];
	place.ip[1] = ctx->user_ip6[1];
	place.ip[2] = ctx->user_ip6[2];
	place.ip[3] = ctx->user_ip6[3];
	if (to_endpoint ? choose(ctx, &place) : service_of(ctx, &place)) {
		ctx->user_ip6[0] = place.ip[0];
		ctx->user_ip6[1] = place.ip[1];
		ctx->user_ip6[2] = place.ip[2];
		ctx->user_ip6[3] = place.ip[3];
		ctx->user_port = place.port;
	}
	return 1;
}

int to_endpoint4(struct bpf_sock_addr *ctx)
{
	return rewrite4(ctx, true);
}

int to_endpoint6(struct bpf_sock_addr *ctx)
{
	return rewrite6(ctx, true);
}

int from_endpoint4(struct bpf_sock_addr *ctx)
{
	return rewrite4(ctx, false);
}

int from_endpoint6(struct bpf_sock_addr *ctx)
{
	return rewrite6(ctx, false);
}
"""

Place = tuple[str, int]


@contextmanager
def socket_lb(
    lab: Lab, services: Sequence[topology.Service] = (topology.DNS_SERVICE,)
) -> Iterator[Path]:
    """Balances these services in all of the lab's cgroups, and no others; gives the topmost.

    The endpoints are those of the lab's rules, the servers' port included.
    """
    cgroup = lab.cgroup_mount / cgroups.PARENT
    wanted = json.dumps(dict(_named(lab, services)))
    argv = [sys.executable, "-m", "tests.socket_lb", str(cgroup)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stderr
        holder.stdin.write(wanted + "\n")
        holder.stdin.flush()
        said = holder.stdout.readline()
        if said != "balancing\n":
            holder.stdin.close()
            raise AssertionError(f"socket load balancing did not start: {holder.stderr.read()}")
        try:
            yield cgroup
        finally:
            holder.stdin.close()  # which ends it


def _named(lab: Lab, services: Sequence[topology.Service]) -> Iterator[tuple[str, list[Place]]]:
    for service in services:
        for version, ip in enumerate(service.ips):
            for number in {port.number for port in service.ports}:
                endpoints = [(pair[version], lab.options.dns_port) for pair in service.endpoints]
                yield f"{ip} {number}", endpoints


def _place(ip: str, port: int) -> bytes:
    address = ipaddress.ip_address(ip)
    if address.version == 4:
        return _PLACE.pack(b"\0" * 10 + b"\xff\xff" + address.packed, port.to_bytes(2, "big"))
    return _PLACE.pack(address.packed, port.to_bytes(2, "big"))


def _hold(cgroup: str) -> None:
    """Attaches the programs, then stays until its input ends."""
    from bcc import BPF
    from bcc.libbcc import lib

    wanted: dict[str, list[Place]] = json.loads(sys.stdin.readline())
    compiling._prepare_environment(os.uname().machine)
    (mapped,) = struct.unpack("=I", b"\0\0\xff\xff")
    macros = {
        **compiling._kernel_macros(),
        "MOST_ENDPOINTS": _MOST_ENDPOINTS,
        "MAPPED": mapped,
    }
    flags = [
        "-Wno-unknown-warning-option",
        *(f"-D{name}={value}" for name, value in macros.items()),
    ]
    module = BPF(text=SOURCE.encode(), cflags=flags)
    services = lib.bpf_table_fd(module.module, b"services")
    for service, endpoints in wanted.items():
        ip, port = service.split()
        places = b"".join(_place(*endpoint) for endpoint in endpoints)
        value = struct.pack("=I", len(endpoints)) + places.ljust(
            _PLACE.size * _MOST_ENDPOINTS, b"\0"
        )
        bpf.map_update(services, _place(ip, int(port)), value)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    for name, attaches in PROGRAMS.items():
        code = module.dump_func(name.encode())
        for attach in attaches:
            program = bpf.program_load(_ProgramType.CGROUP_SOCK_ADDR, code, name, attach)  # type: ignore[arg-type]
            bpf.link_create(program, directory, attach)  # type: ignore[arg-type]
    print("balancing", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _hold(sys.argv[1])
