# SPDX-License-Identifier: Apache-2.0
"""`dnstrace lab up|down|run|status`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from tracer.lab import shape, state, topology
from tracer.lab.commands import require_root
from tracer.lab.errors import FAILED, LabError
from tracer.lab.lab import DEFAULT_POD, Lab, enter, enter_node

EXAMPLES = """\
examples:
  dnstrace lab up                                  # two nodes, seven pods, two CoreDNS
  dnstrace lab up --node-local --dns-port 5353     # with a cache on each node; another port
  dnstrace lab run getent ahosts www.li-rui.top    # in pod sre/web-0
  dnstrace lab run --pod sre/worker-0 dig kube-dns.kube-system.svc.cluster.local
  dnstrace --pods /run/dnstrace-lab/pods.json      # trace it
  dnstrace lab up --api                            # and a real API server that knows them
  dnstrace lab down
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `lab` to its parser."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="lab_action", required=True, metavar="up|down|run|status")
    up = actions.add_parser("up", help="bring the cluster up")
    up.add_argument("--overlay", action="store_true", help="VXLAN between the nodes")
    up.add_argument(
        "--resolver",
        choices=("auto", "coredns", "unbound"),
        default="auto",
        help="the name servers (auto: CoreDNS, or unbound where it cannot be built)",
    )
    up.add_argument("--quiet-servers", action="store_true", help="no query logs (benchmarks)")
    up.add_argument(
        "--iptables",
        choices=("auto", "nft", "legacy", "both"),
        default="auto",
        help="how services are written (both: nft on node1, legacy on node2)",
    )
    up.add_argument(
        "--api",
        action="store_true",
        help="a Kubernetes API server that knows the cluster (built once, for minutes)",
    )
    up.add_argument(
        "--node-local",
        nargs="?",
        choices=tuple(shape.NODE_LOCAL),
        default="no",
        const="link-local",
        help="NodeLocal DNSCache on each node (link-local: pods ask 169.254.20.10; cluster-ip: they"
        " ask the DNS service's address, which the node answers itself)",
    )
    up.add_argument(
        "--dns-port",
        type=int,
        default=topology.DNS_PORT,
        metavar="PORT",
        help="where CoreDNS listens, behind port 53 of the service (as 5353 on OpenShift)",
    )
    actions.add_parser("down", help="remove all of it")
    actions.add_parser("status", help="what is up")
    run = actions.add_parser("run", help="run a command in a pod")
    place = run.add_mutually_exclusive_group()
    place.add_argument("--pod", default=DEFAULT_POD, metavar="NAMESPACE/POD")
    place.add_argument("--node", metavar="NODE", help="on a node instead of in a pod")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="CMD")


def main(args: argparse.Namespace) -> int:
    """Does what the arguments say; the exit status."""
    try:
        return {"up": _up, "down": _down, "status": _status, "run": _run}[args.lab_action](args)
    except LabError as error:
        print(f"dnstrace: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("dnstrace: interrupted: run `dnstrace lab down`", file=sys.stderr)
        return FAILED


def _up(args: argparse.Namespace) -> int:
    lab = Lab(
        overlay=args.overlay,
        resolver=args.resolver,
        quiet_servers=args.quiet_servers,
        iptables=args.iptables,
        api=args.api,
        node_local=args.node_local,
        dns_port=args.dns_port,
    )
    began = time.monotonic()
    fresh = lab.up()
    said = f"up in {time.monotonic() - began:.1f} s" if fresh else "already up"
    print(f"lab: {said}; pods in {state.PODS_FILE}", file=sys.stderr)
    if args.api:
        print(
            f"lab: API server: kubectl --kubeconfig {lab.kubeconfig} get pods -A", file=sys.stderr
        )
    return 0


def _down(_args: argparse.Namespace) -> int:
    said = "down" if Lab().down() else "was not up"
    print(f"lab: {said}", file=sys.stderr)
    return 0


def _status(_args: argparse.Namespace) -> int:
    current = state.load()
    if current is None:
        print("down" if not state.RUN_DIR.exists() else "half up: run `dnstrace lab down`")
        return FAILED
    dead = [process.name for process in current.processes if not process.alive()]
    options = current.options
    server = ""
    if current.api_port is not None:
        gone = "" if current.api_alive() else ", which does not run any more"
        server = f"; API server on port {current.api_port}{gone}"
    print(
        f"{'up' if not dead else 'damaged'}: {current.served_by},"
        f" {'VXLAN' if options.overlay else 'routed'} between the nodes{server}"
        + (f"; dead: {', '.join(dead)}" if dead else "")
    )
    for pod in current.pods:
        print(f"{pod.full_name:40} {pod.node.name:8} {' '.join(pod.ips)}")
    return FAILED if dead else 0


def _run(args: argparse.Namespace) -> int:
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise LabError("nothing to run: give a command, e.g. `dnstrace lab run dig example.com`")
    require_root()
    whole = [*(enter_node(args.node) if args.node else enter(args.pod)), *argv]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would keep that
    os.execv(whole[0], whole)  # noqa: S606 -- becomes the command, so there is no shell to want
