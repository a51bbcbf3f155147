# SPDX-License-Identifier: Apache-2.0
"""The services as kube-proxy writes them in iptables mode, ready for iptables-restore.

A packet to a service's address passes KUBE-SERVICES, its service's KUBE-SVC-…, and one of the
KUBE-SEP-… by probability, which rewrites the destination. What does not come from a pod is
marked on the way and masqueraded in KUBE-POSTROUTING. The chains' names are hashed as kube-proxy
hashes them, so they are the ones known from real clusters.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from tracer.lab.topology import POD_NETWORKS, Port, Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MARK = "0x4000"


def restore_input(services: Sequence[Service], family: int) -> str:
    """Input for iptables-restore (`family` 4) or ip6tables-restore (6) in a node's namespace."""
    rules = [
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
        "-A POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT",
        f"-A KUBE-MARK-MASQ -j MARK --set-xmark {MARK}/{MARK}",
        f"-A KUBE-POSTROUTING -m mark ! --mark {MARK}/{MARK} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --set-xmark {MARK}/0x0",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
        f"-A IP-MASQ-AGENT -d {POD_NETWORKS[family == 6]} -j RETURN",
        "-A IP-MASQ-AGENT -j MASQUERADE",
    ]
    for service in services:
        for port in service.ports:
            rules.extend(_port_rules(service, port, family))
    chains = dict.fromkeys(rule.split()[1] for rule in rules)
    built_in = ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")
    declared = [f":{chain} ACCEPT [0:0]" for chain in built_in]
    declared += [f":{chain} - [0:0]" for chain in chains if chain not in built_in]
    return "\n".join(["*nat", *declared, *rules, "COMMIT", ""])


def _port_rules(service: Service, port: Port, family: int) -> Iterator[str]:
    version = family == 6
    address = f"{service.ips[version]}/{128 if version else 32}"
    name = f"{service.namespace}/{service.name}:{port.name}"
    match = f"-d {address} -p {port.protocol} -m {port.protocol} --dport {port.number}"
    chain = "KUBE-SVC-" + chain_hash(name + port.protocol)
    yield f'-A KUBE-SERVICES {match} -m comment --comment "{name} cluster IP" -j {chain}'
    yield f"-A {chain} ! -s {POD_NETWORKS[version]} {match} -j KUBE-MARK-MASQ"
    endpoints = [pair[version] for pair in service.endpoints]
    for position, endpoint in enumerate(endpoints):
        target = f"[{endpoint}]:{port.target}" if version else f"{endpoint}:{port.target}"
        sep = "KUBE-SEP-" + chain_hash(name + port.protocol + target)
        left = len(endpoints) - position
        chance = f"-m statistic --mode random --probability {1 / left:.11f} " if left > 1 else ""
        yield f'-A {chain} -m comment --comment "{name} -> {target}" {chance}-j {sep}'
        yield f"-A {sep} -s {endpoint} -j KUBE-MARK-MASQ"
        yield f"-A {sep} -p {port.protocol} -m {port.protocol} -j DNAT --to-destination {target}"


def chain_hash(text: str) -> str:
    """The 16 letters with which kube-proxy makes a chain's name out of what it is for."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]
