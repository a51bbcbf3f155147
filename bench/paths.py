# SPDX-License-Identifier: Apache-2.0
"""Which replica answers: kube-proxy's rules roll dice per flow, and conntrack remembers the result.

dnsperf's sockets keep their ports from run to run, so their flows keep their replicas. Those that
went the wrong way are forgotten and rolled again until all are as wanted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from bench import load
from bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from bench.load import Settings
    from tracer.lab import Lab

Way = Literal["same-node", "cross-node", "both"]
DESCRIPTIONS: dict[Way, str] = {
    "same-node": "the replica on the same node, by its veth",
    "cross-node": "the replica on the other node, by both uplinks and its veth",
    "both": "for half of the sockets the replica on the same node, for half that on the other",
}
_ATTEMPTS = 40
_ASK_S = 0.1
_FLOW = re.compile(r"sport=(\d+) dport=53 src=([\d.]+) ")


def choose(lab: Lab, settings: Settings, queries: Path, way: Way) -> None:
    """Leads each of dnsperf's flows to the replica that `way` wants it to have."""
    node = lab.pod(load.CLIENT).node
    here = next(pod.ipv4 for pod in lab.dns_pods if pod.node == node)
    flows = ["conntrack", "-p", "udp", "--orig-src", lab.pod(load.CLIENT).ipv4]
    wanted = {
        settings.first_port + number: way == "same-node" or (way == "both" and number % 2 == 0)
        for number in range(settings.clients)
    }
    for _ in range(_ATTEMPTS):
        load.run(settings.lasting(_ASK_S), queries)
        listed = lab.node_exec(node, [*flows, "-L"], check=True).stdout
        local = {int(port): replica == here for port, replica in _FLOW.findall(listed)}
        wrong = [port for port, is_local in local.items() if wanted.get(port, is_local) != is_local]
        if not wrong and wanted.keys() <= local.keys():
            return
        for port in wrong:
            lab.node_exec(node, [*flows, "-D", "--orig-port-src", str(port)], check=True)
    raise BenchError(f"dnsperf's flows do not come to go {way}; look at `conntrack -L` on {node}")
