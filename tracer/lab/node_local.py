# SPDX-License-Identifier: Apache-2.0
"""What NodeLocal DNSCache puts on a node beside its server: a device, and rules past conntrack.

The device carries the addresses that the cache listens on, so that they are the node's own. It
is left down, as node-cache leaves it: local addresses need no more. The rules are those that
node-cache writes, in the order in which it leaves them. In iptables mode it listens on the DNS
service's address too; as conntrack does not see the packets, no rule of the service's does either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.lab.commands import run
from tracer.lab.errors import LabError
from tracer.lab.topology import DNS_PORT, NODES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEVICE = "nodelocaldns"
HEALTH_PORT = 8080
# A kernel without dummy devices has bridges, and one without ports is no different here.
_DEVICE_TYPES = ("dummy", "bridge")


def make_devices(ips: Sequence[str], lock: int) -> None:
    """The device on each node, with the addresses."""
    for node in NODES:
        _make_device(node.netns, lock)
        for ip in ips:
            run(["ip", "-n", node.netns, "addr", "add", f"{ip}/32", "dev", DEVICE], keep_fd=lock)


def _make_device(netns: str, lock: int) -> None:
    failure = None
    for kind in _DEVICE_TYPES:
        try:
            run(["ip", "-n", netns, "link", "add", "name", DEVICE, "type", kind], keep_fd=lock)
            return
        except LabError as error:
            failure = failure or error
    raise failure or LabError(f"no {DEVICE} on {netns}")


def restore_input(ips: Sequence[str]) -> str:
    """Input for iptables-restore in a node's namespace; empty without addresses."""
    if not ips:
        return ""
    raw = [rule for ip in reversed(ips) for rule in _raw(ip)]
    accepted = [rule for ip in reversed(ips) for rule in _filter(ip)]
    lines = ["*raw", ":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]", *raw, "COMMIT"]
    lines += ["*filter", ":INPUT ACCEPT [0:0]", ":FORWARD ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"]
    return "\n".join([*lines, *accepted, "COMMIT", ""])


def _raw(ip: str) -> Iterator[str]:
    comment = '-m comment --comment "NodeLocal DNS Cache: skip conntrack"'
    yield from (
        f"-A {chain} {match} {comment} -j NOTRACK"
        for chain, match in (
            ("OUTPUT", f"-s {ip}/32 -p tcp -m tcp --sport {HEALTH_PORT}"),
            ("OUTPUT", f"-d {ip}/32 -p tcp -m tcp --dport {HEALTH_PORT}"),
            ("OUTPUT", f"-d {ip}/32 -p udp -m udp --dport {DNS_PORT}"),
            ("OUTPUT", f"-d {ip}/32 -p tcp -m tcp --dport {DNS_PORT}"),
            ("OUTPUT", f"-s {ip}/32 -p udp -m udp --sport {DNS_PORT}"),
            ("OUTPUT", f"-s {ip}/32 -p tcp -m tcp --sport {DNS_PORT}"),
            ("PREROUTING", f"-d {ip}/32 -p udp -m udp --dport {DNS_PORT}"),
            ("PREROUTING", f"-d {ip}/32 -p tcp -m tcp --dport {DNS_PORT}"),
        )
    )


def _filter(ip: str) -> Iterator[str]:
    comment = '-m comment --comment "NodeLocal DNS Cache: allow DNS traffic"'
    yield from (
        f"-A {chain} {match} {comment} -j ACCEPT"
        for chain, match in (
            ("OUTPUT", f"-s {ip}/32 -p udp -m udp --sport {DNS_PORT}"),
            ("OUTPUT", f"-s {ip}/32 -p tcp -m tcp --sport {DNS_PORT}"),
            ("INPUT", f"-d {ip}/32 -p udp -m udp --dport {DNS_PORT}"),
            ("INPUT", f"-d {ip}/32 -p tcp -m tcp --dport {DNS_PORT}"),
        )
    )
