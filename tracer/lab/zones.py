# SPDX-License-Identifier: Apache-2.0
"""What the cluster's and the outside's name servers know, as zone files.

Both CoreDNS and unbound read them. Everything else under cluster.local, and everything else in
the world, does not exist: NXDOMAIN with an SOA.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from tracer.lab.topology import CLUSTER_DOMAIN, DNS_SERVICE, Service

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TTL_S = 30
SERVICE_DOMAIN = f"svc.{CLUSTER_DOMAIN}."
REVERSE_ZONES = (
    "96.10.in-addr.arpa.",
    "244.10.in-addr.arpa.",
    "6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa.",
    "4.4.2.0.0.1.0.0.0.0.d.f.ip6.arpa.",
)
SLOW_ZONE = "slow.example.com."
SLOW_MS = 300
LOST_ZONE = "lost.example.com."
REFUSED_ZONE = "refused.example.com."
SERVFAIL_ZONE = "servfail.example.com."
BIG_STRINGS = 16
CROWD = 20  # IPv6 addresses of one name: more than fit into an answer without EDNS

_OUTSIDE = {
    "example.com.": [
        ("@", "A", "93.184.216.34"),
        ("@", "AAAA", "2606:2800:220:1:248:1893:25c8:1946"),
        ("@", "MX", "10 mail.example.com."),
        ("@", "TXT", '"v=spf1 -all"'),
        ("www", "A", "93.184.216.34"),
        ("www", "AAAA", "2606:2800:220:1:248:1893:25c8:1946"),
        ("mail", "A", "93.184.216.35"),
        ("v4only", "A", "93.184.216.36"),
        ("alias", "CNAME", "chain1"),
        ("chain1", "CNAME", "chain2"),
        ("chain2", "CNAME", "www"),
        ("elsewhere", "CNAME", "www.li-rui.top."),
        ("dangling", "CNAME", "nowhere"),
        ("_sip._udp", "SRV", "10 5 5060 www"),
        ("big", "TXT", " ".join(f'"{n:03d} {"dnstrace " * 27}"' for n in range(BIG_STRINGS))),
        ("crowd", "A", "192.0.2.1"),
        *(("crowd", "AAAA", f"2001:db8::{n}") for n in range(1, CROWD + 1)),
        ("*.bench", "A", "198.51.100.1"),
        ("*.bench", "AAAA", "2001:db8:b::1"),
    ],
    SLOW_ZONE: [
        ("@", "A", "93.184.216.37"),
        ("@", "AAAA", "2606:2800:220:1::37"),
        ("*", "A", "93.184.216.37"),
        ("*", "AAAA", "2606:2800:220:1::37"),
    ],
    "li-rui.top.": [
        ("@", "A", "203.0.113.10"),
        ("@", "AAAA", "2001:db8::10"),
        ("www", "CNAME", "@"),
    ],
    "ycwu314.top.": [
        ("@", "A", "203.0.113.11"),
        ("@", "AAAA", "2001:db8::11"),
        ("www", "CNAME", "@"),
    ],
    ".": [],
}

Record = tuple[str, str, str]


def cluster(services: Iterable[Service]) -> dict[str, str]:
    """Zone name (absolute) to zone file, for the cluster's own servers."""
    forward: list[Record] = []
    reverse: dict[str, list[Record]] = {zone: [] for zone in REVERSE_ZONES}
    for service in services:
        host = f"{service.name}.{service.namespace}.{SERVICE_DOMAIN}"
        forward += [(host, *_address(ip)) for ip in service.ips]
        for port in service.ports:
            forward.append(
                (f"_{port.name}._{port.protocol}.{host}", "SRV", f"0 100 {port.number} {host}")
            )
        named = [(ip, host) for ip in service.ips]
        for ip, endpoint in _endpoint_names(service, host):
            forward.append((endpoint, *_address(ip)))
            named.append((ip, endpoint))
        for ip, owner in named:
            pointer = ipaddress.ip_address(ip).reverse_pointer + "."
            for zone, records in reverse.items():
                if pointer.endswith("." + zone):
                    records.append((pointer, "PTR", owner))
    forward.append((f"dns-version.{CLUSTER_DOMAIN}.", "TXT", '"1.1.0"'))
    forward.append((f"ns.dns.{CLUSTER_DOMAIN}.", "A", DNS_SERVICE.ips[0]))
    zones = {f"{CLUSTER_DOMAIN}.": forward, **reverse}
    soa = f"ns.dns.{CLUSTER_DOMAIN}. hostmaster.{CLUSTER_DOMAIN}. 1 7200 1800 86400 {TTL_S}"
    return {zone: _text(zone, soa, records) for zone, records in zones.items()}


def outside() -> dict[str, str]:
    """Zone name (absolute) to zone file, for the resolver outside the cluster."""
    return {zone: _text(zone, _outside_soa(zone), records) for zone, records in _OUTSIDE.items()}


def _outside_soa(zone: str) -> str:
    if zone == ".":
        return "a.root-servers.net. nstld.verisign-grs.com. 2025010100 1800 900 604800 60"
    return f"ns.{zone} hostmaster.{zone} 2025010100 7200 3600 1209600 60"


def _address(ip: str) -> tuple[str, str]:
    return ("AAAA" if ":" in ip else "A"), ip


def _endpoint_names(service: Service, host: str) -> Iterator[tuple[str, str]]:
    for pair in service.endpoints:
        for ip in pair:
            yield ip, f"{ip.replace('.', '-').replace(':', '-')}.{host}"


def _text(zone: str, soa: str, records: Iterable[Record]) -> str:
    lines = [f"$ORIGIN {zone}", f"$TTL {TTL_S}", f"@ IN SOA {soa}"]
    lines += [f"{owner} IN {kind} {data}" for owner, kind, data in records]
    return "\n".join(lines) + "\n"
