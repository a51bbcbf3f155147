# SPDX-License-Identifier: Apache-2.0
"""Configuration of the name servers: the cluster's as kubeadm's Corefile has it, and outside.

A configuration is a set of files to put into one directory, and the command that serves it.
Both kinds of server read the same zone files and write one line per query to stdout or a log.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.lab import zones
from tracer.lab.topology import CLUSTER_DOMAIN, DNS_PORT, UPSTREAM_DNS_SERVICE, UPSTREAM_IPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tracer.lab.shape import Shape

CACHE_S = 30


@dataclass(frozen=True)
class Server:
    """Files by name, the argv that serves them from their directory, and what it then has open.

    `sockets`: in which table of /proc/PID/net which text says that it listens.
    """

    files: Mapping[str, str]
    argv: tuple[str, ...]
    sockets: Mapping[str, str]


def coredns(binary: Path, directory: Path, shape: Shape | None, *, quiet: bool) -> Server:
    """CoreDNS with the cluster's zones, or the outside's (None); `quiet` writes no query log."""
    log = [] if quiet else ["log"]
    if shape is not None:
        data = zones.cluster(shape.services)
        blocks = _cluster_blocks(data, shape.dns_port, log, directory)
    else:
        data = zones.outside()
        blocks = _outside_blocks(data, log, directory)
    files = {_zone_file(zone): text for zone, text in data.items()}
    files["Corefile"] = "\n".join(blocks)
    argv = (str(binary), "-conf", str(directory / "Corefile"))
    return Server(files, argv, _everywhere(shape.dns_port if shape else DNS_PORT))


def node_local(binary: Path, directory: Path, shape: Shape, *, quiet: bool) -> Server:
    """CoreDNS configured as node-cache is by its own manifest (nodelocaldns.yaml)."""
    corefile = "\n".join(_node_local_blocks(shape.node_local_ips, [] if quiet else ["log"]))
    argv = (str(binary), "-conf", str(directory / "Corefile"))
    return Server({"Corefile": corefile}, argv, _at(shape.node_local_ips[0], DNS_PORT))


def _everywhere(port: int) -> dict[str, str]:
    return dict.fromkeys(("udp6", "tcp6"), f":{port:04X} ")


def _at(ip: str, port: int) -> dict[str, str]:
    (number,) = struct.unpack("=I", socket.inet_aton(ip))
    return dict.fromkeys(("udp", "tcp"), f" {number:08X}:{port:04X} ")


def _node_local_blocks(ips: Sequence[str], log: list[str]) -> list[str]:
    # Its connections end before the replicas end them, which is after 10 s as well: a query may
    # otherwise meet the end of its connection.
    options = "force_tcp\n        expire 5s"
    cluster = f"forward . {UPSTREAM_DNS_SERVICE.ips[0]} {{\n        {options}\n    }}"
    bound = ["reload", "loop", f"bind {' '.join(ips)}"]
    first = "cache {\n        success 9984 30\n        denial 9984 5\n    }"
    health = f"health {ips[0]}:8080"
    metrics = "prometheus :9253"
    reverse = ("errors", *log, "cache 30", *bound, cluster, metrics)
    return [
        _block(CLUSTER_DOMAIN, "errors", *log, first, *bound, cluster, metrics, health),
        _block("in-addr.arpa", *reverse),
        _block("ip6.arpa", *reverse),
        _block(".", "errors", *log, "cache 30", *bound, "forward . /etc/resolv.conf", metrics),
    ]


def _cluster_blocks(
    data: Mapping[str, str], port: int, log: list[str], directory: Path
) -> list[str]:
    files = [
        f"file {directory / _zone_file(zone)} {zone} {{\n        reload 0\n    }}" for zone in data
    ]
    return [
        _block(
            ".",
            "errors",
            *log,
            "health {\n        lameduck 1s\n    }",
            "ready",
            *files,
            "forward . /etc/resolv.conf",
            f"cache {CACHE_S}",
            "loadbalance",
            port=port,
        )
    ]


def _outside_blocks(data: Mapping[str, str], log: list[str], directory: Path) -> list[str]:
    blocks = [
        _block(zones.LOST_ZONE, "errors", *log, "erratic {\n        drop 1\n    }"),
        _block(zones.REFUSED_ZONE, *log, _answer_code("REFUSED")),
        _block(zones.SERVFAIL_ZONE, *log, _answer_code("SERVFAIL")),
        _block("whoami.example.com.", *log, "whoami"),
    ]
    recursive = "header {\n        response set ra\n        response clear aa\n    }"
    for zone in data:
        slow = [f"delay {zones.SLOW_MS}ms"] if zone == zones.SLOW_ZONE else []
        file = f"file {directory / _zone_file(zone)} {zone} {{\n        reload 0\n    }}"
        blocks.append(_block(zone, "errors", *log, *slow, recursive, file))
    return blocks


def _answer_code(rcode: str) -> str:
    return f"template ANY ANY {{\n        rcode {rcode}\n    }}"


def _block(zone: str, *lines: str, port: int = DNS_PORT) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"{zone}:{port} {{\n{body}\n}}\n"


def unbound(binary: Path, directory: Path, shape: Shape | None, *, quiet: bool) -> Server:
    """The same out of unbound; it cannot be slow on purpose, nor fail with SERVFAIL."""
    data = zones.outside() if shape is None else zones.cluster(shape.services)
    port = DNS_PORT if shape is None else shape.dns_port
    server = [
        f"port: {port}",
        "interface: 0.0.0.0",
        "interface: ::0",
        "interface-automatic: yes",
        "access-control: 0.0.0.0/0 allow",
        "access-control: ::/0 allow",
        "do-daemonize: no",
        'chroot: ""',
        'username: ""',
        'pidfile: ""',
        f'directory: "{directory}"',
        "use-syslog: no",
        'logfile: ""',
        "module-config: iterator",
        "num-threads: 1",
        "so-reuseport: no",
        "verbosity: 0",
        "edns-buffer-size: 1232",
        f"cache-max-ttl: {CACHE_S}",
        f"log-queries: {'no' if quiet else 'yes'}",
    ]
    if shape is not None:
        server += ["do-not-query-localhost: no", *_without_default_zones()]
    else:
        server += [
            f'local-zone: "{zones.LOST_ZONE}" deny',
            f'local-zone: "{zones.REFUSED_ZONE}" refuse',
        ]
    parts = [_section("server", server), _section("remote-control", ["control-enable: no"])]
    parts += [_auth_zone(zone) for zone in data]
    if shape is not None:
        parts.append(_section("forward-zone", ['name: "."', f"forward-addr: {UPSTREAM_IPS[0]}"]))
    files = {_zone_file(zone): text for zone, text in data.items()}
    files["unbound.conf"] = "\n".join(parts)
    argv = (str(binary), "-d", "-c", str(directory / "unbound.conf"))
    return Server(files, argv, _everywhere(port))


def _auth_zone(zone: str) -> str:
    lines = [f'name: "{zone}"', f'zonefile: "{_zone_file(zone)}"']
    return _section("auth-zone", [*lines, "for-downstream: yes", "for-upstream: no"])


def _without_default_zones() -> list[str]:
    """unbound answers for private reverse zones itself unless told not to."""
    names = ["10.in-addr.arpa.", "d.f.ip6.arpa."]
    return [f'local-zone: "{name}" nodefault' for name in names]


def _section(name: str, lines: list[str]) -> str:
    return f"{name}:\n" + "".join(f"    {line}\n" for line in lines)


def _zone_file(zone: str) -> str:
    return f"{zone.rstrip('.') or 'root'}.zone"
