#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the file that `dnstrace --pods FILE` reads, on a node, from kubectl and the cgroup tree.

What kubectl lists has names and addresses. What tells the processes of a pod apart is found here:
a container's cgroup is the one that bears its id, and a pod's network namespace is that of a
process in there. Pods of other nodes have neither, and are named by their addresses.

Needs nothing but Python and kubectl, so that it runs on any node.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Object = dict[str, Any]

_KUBECTL = (
    "kubectl",
    "get",
    "pods,services,endpointslices,nodes",
    "--all-namespaces",
    "-o",
    "json",
)
_KUBECTL_TIMEOUT_S = 60
# cri-containerd-ID.scope, crio-ID.scope, docker-ID.scope, or the plain ID with driver cgroupfs.
_CONTAINER = re.compile(r"(?:(?P<runtime>.*)-)?(?P<id>[0-9a-f]{12,})(?:\.scope)?")
_MONITORS = ("crio-conmon", "libpod-conmon")  # they bear a container's id, but hold its monitor
_NETNS = re.compile(r"net:\[(\d+)\]")


class PodsFileError(Exception):
    """The file cannot be made. The message is one line: what is wrong, and the remedy."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    args = _arguments(argv)
    if args.watch is not None:
        return _watch(args)
    try:
        _write(_made(args), args.output)
    except PodsFileError as error:
        _say(str(error))
        return 1
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pods-file", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument("--watch", type=_seconds, metavar="SECONDS",
                        help="go on, and write it again whenever it changes")  # fmt: skip
    parser.add_argument("--input", metavar="FILE",
                        help="what kubectl said, instead of asking it ('-': stdin)")  # fmt: skip
    parser.add_argument("--node", default=os.uname().nodename, metavar="NAME",
                        help="this node's name (default: the host's)")  # fmt: skip
    parser.add_argument("--cgroup", metavar="DIR", help="the cgroup v2 mount (default: found)")
    parser.add_argument("--proc", default="/proc", metavar="DIR", help="(default: /proc)")
    args = parser.parse_args(argv)
    if args.watch is not None and (args.output is None or args.input is not None):
        parser.error("--watch needs --output, and asks kubectl itself")
    return args


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to wait")
    return seconds


def _watch(args: argparse.Namespace) -> int:
    """Until a signal ends it. What cannot be learned now is said once, and tried again."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    written = trouble = None
    while not stop.is_set():
        try:
            text = _made(args)
            if text != written:
                _write(text, args.output)
                written = text
            trouble = None
        except PodsFileError as error:
            if str(error) != trouble and not stop.is_set():
                trouble = str(error)
                _say(trouble)
        stop.wait(args.watch)
    return 0


def _made(args: argparse.Namespace) -> str:
    cgroup = args.cgroup or cgroup2_root(args.proc)
    if cgroup is None:
        _say_once("no cgroup v2 is mounted: pods are known by address only")
    content = pods_file(_listed(args.input), args.node, cgroup, args.proc)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _listed(path: str | None) -> list[Object]:
    """The objects that kubectl lists. Raises PodsFileError."""
    try:
        if path is None:
            # Its own warnings stay on stderr, for whoever reads that.
            said = subprocess.run(
                _KUBECTL, stdout=subprocess.PIPE, timeout=_KUBECTL_TIMEOUT_S, check=True
            ).stdout
        elif path == "-":
            said = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                said = file.read()
        items = json.loads(said)["items"]
    except subprocess.SubprocessError as error:
        raise PodsFileError(f"{error}: see that KUBECONFIG names a cluster that answers") from error
    except OSError as error:
        what = error.filename or path or "kubectl"
        raise PodsFileError(f"cannot use {what}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PodsFileError(
            f"this is no list that `kubectl get -o json` made: {error!r}"
        ) from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise PodsFileError("this is no list that `kubectl get -o json` made: odd items")
    return items


def _write(text: str, path: str | None) -> None:
    """Whole or not at all, because dnstrace may read it at any moment. Raises PodsFileError."""
    if path is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    directory = os.path.dirname(path) or "."
    try:
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".pods-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise PodsFileError(f"cannot write {path}: {error.strerror}") from error


def _say(text: str) -> None:
    sys.stderr.write(f"pods-file: {text}\n")


@functools.cache
def _say_once(text: str) -> None:
    """For what is as true each time that the file is made anew."""
    _say(text)


def pods_file(items: list[Object], node: str, cgroup: str | None, proc: str) -> Object:
    """The file's content, of what kubectl listed. `node` is the name of this one."""
    pods = [item for item in items if item.get("kind") == "Pod" and not _is_over(item)]
    wanted = {found["id"] for pod in pods for found in _containers(pod)}
    groups = container_cgroups(cgroup, wanted) if cgroup else {}
    host_netns = netns_of(proc, 1)
    local = _Local(cgroup or "", groups, proc, host_netns)
    nodes = [_node(item, node, host_netns) for item in items if item.get("kind") == "Node"]
    if not any(entry.get("netns") for entry in nodes):
        _say_once(f"none of the nodes is this one ({node}): give --node NAME")
    endpoints = _endpoints(items)
    return {
        "pods": [_pod(item, local) for item in pods],
        "services": [
            _service(item, endpoints) for item in items if item.get("kind") == "Service"
        ],
        "nodes": nodes,
    }  # fmt: skip


class _Local:
    """What this node knows of the containers that it runs."""

    def __init__(
        self, root: str, groups: dict[str, str], proc: str, host_netns: int | None
    ) -> None:
        self._root, self._groups, self._proc = root, groups, proc
        self._host_netns = host_netns

    def cgroup(self, container_id: str) -> str | None:
        """Relative to the mount."""
        return self._groups.get(container_id)

    def netns(self, groups: list[str], *, host_network: bool) -> int | None:
        """The network namespace of a pod, by the processes of its containers."""
        if host_network:
            return self._host_netns if groups else None
        for group in groups:
            for pid in _pids(os.path.join(self._root, group)):
                found = netns_of(self._proc, pid)
                # One that entered the node's namespace does not tell the pod's.
                if found is not None and found != self._host_netns:
                    return found
        return None


def cgroup2_root(proc: str) -> str | None:
    """Where the cgroup v2 tree is mounted, the whole one if there are several."""
    roots = []
    with contextlib.suppress(OSError), open(f"{proc}/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fields = left.split()
            if right.startswith("cgroup2 ") and fields[3] == "/":
                roots.append(fields[4])
    return next((root for root in roots if _is_whole(root)), roots[0] if roots else None)


def _is_whole(root: str) -> bool:
    """Whether it is not just a cgroup namespace's part: the root of all has inode number 1."""
    try:
        return os.stat(root).st_ino == 1
    except OSError:
        return False


def container_cgroups(root: str, wanted: set[str]) -> dict[str, str]:
    """Container id to cgroup, relative to the mount; only of those here."""
    found: dict[str, str] = {}
    for directory, below, _ in os.walk(root):
        for name in below:
            match = _CONTAINER.fullmatch(name)
            if match and match["id"] in wanted and match["runtime"] not in _MONITORS:
                # Whatever a container nests below its own cgroup is part of it: the first counts.
                found.setdefault(match["id"], os.path.relpath(os.path.join(directory, name), root))
    return found


def netns_of(proc: str, pid: int) -> int | None:
    """The inode number of a process's network namespace; None if it has gone."""
    try:
        match = _NETNS.fullmatch(os.readlink(f"{proc}/{pid}/ns/net"))
    except OSError:
        return None
    return int(match[1]) if match else None


def _pids(group: str) -> Iterator[int]:
    """The processes of a cgroup and of those below, the oldest first as a rule."""
    for directory, below, _ in os.walk(group):
        below.sort()
        try:
            with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
                pids = sorted(int(line) for line in file.read().split())
        except (OSError, ValueError):  # gone meanwhile, or a threaded cgroup
            continue
        yield from (pid for pid in pids if pid)  # 0 is a process of another PID namespace


def _is_over(pod: Object) -> bool:
    """A pod that has ended keeps its address in the API, while another may have it already."""
    return _part(pod, "status").get("phase") in {"Succeeded", "Failed"}


def _pod(pod: Object, local: _Local) -> Object:
    metadata, spec, status = (_part(pod, name) for name in ("metadata", "spec", "status"))
    host_network = spec.get("hostNetwork") is True
    containers = []
    for container in _containers(pod):
        cgroup = local.cgroup(container["id"])
        containers.append({**container, "cgroup": cgroup} if cgroup else container)
    entry = {
        "namespace": metadata.get("namespace") or "default",
        "name": metadata.get("name") or "",
        "uid": metadata.get("uid") or "",
        "node": spec.get("nodeName") or "",
        "host_network": host_network,
        "ips": _ips([status.get("podIP"), *(ip.get("ip") for ip in _list(status, "podIPs"))]),
        "labels": _labels(metadata),
        "dns_policy": spec.get("dnsPolicy") or "ClusterFirst",
        "containers": containers,
    }
    groups = [c["cgroup"] for c in containers if "cgroup" in c]
    netns = local.netns(groups, host_network=host_network)
    return {**entry, "netns": netns} if netns else entry


def _containers(pod: Object) -> list[Object]:
    """Name and id of those that run; what has not started yet has no id."""
    status = _part(pod, "status")
    kinds = ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses")
    found = []
    for container in (container for kind in kinds for container in _list(status, kind)):
        _, _, container_id = str(container.get("containerID") or "").partition("://")
        if container_id and "running" in _part(container, "state"):
            found.append({"name": container.get("name") or "", "id": container_id})
    return found


def _service(service: Object, endpoints: dict[tuple[str, str], list[str]]) -> Object:
    metadata, spec = _part(service, "metadata"), _part(service, "spec")
    balancer = _part(_part(service, "status"), "loadBalancer")
    namespace, name = metadata.get("namespace") or "default", metadata.get("name") or ""
    ports = {port.get("port") for port in _list(spec, "ports")}
    return {
        "namespace": namespace,
        "name": name,
        "ips": _ips(
            [
                spec.get("clusterIP"),
                *_strings(spec, "clusterIPs"),
                *_strings(spec, "externalIPs"),
                *(ingress.get("ip") for ingress in _list(balancer, "ingress")),
            ]
        ),
        "ports": sorted(port for port in ports if isinstance(port, int)),
        "endpoints": sorted(set(endpoints.get((namespace, name), []))),
    }


def _endpoints(items: list[Object]) -> dict[tuple[str, str], list[str]]:
    """(namespace, service) to the addresses behind it that take queries."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in items:
        if item.get("kind") != "EndpointSlice":
            continue
        metadata = _part(item, "metadata")
        service = _part(metadata, "labels").get("kubernetes.io/service-name")
        if not service:
            continue
        addresses = found.setdefault((metadata.get("namespace") or "default", service), [])
        for endpoint in _list(item, "endpoints"):
            if _part(endpoint, "conditions").get("ready") is not False:  # unknown counts as ready
                addresses += _ips(_strings(endpoint, "addresses"))
    return found


def _node(item: Object, this: str, host_netns: int | None) -> Object:
    metadata = _part(item, "metadata")
    name = str(metadata.get("name") or "")
    hostname = _part(metadata, "labels").get("kubernetes.io/hostname")
    addresses = _list(_part(item, "status"), "addresses")
    entry = {"name": name, "ips": _ips([address.get("address") for address in addresses])}
    names = {str(known).lower() for known in (name, hostname) if known}
    if host_netns and this.lower() in names:
        return {**entry, "netns": host_netns}
    return entry


def _labels(metadata: Object) -> dict[str, str]:
    return {str(key): str(value) for key, value in _part(metadata, "labels").items()}


def _ips(texts: list[Any]) -> list[str]:
    """Those that are addresses ("None" and names are not), once each."""
    found: dict[str, None] = {}
    for text in texts:
        with contextlib.suppress(ValueError):
            if isinstance(text, str):
                found[str(ipaddress.ip_address(text))] = None
    return list(found)


def _part(entry: Object, name: str) -> Object:
    """An object in an object; an empty one where the API leaves it out."""
    part = entry.get(name)
    return part if isinstance(part, dict) else {}


def _list(entry: Object, name: str) -> list[Object]:
    """The objects in a list that the API may leave out."""
    values = entry.get(name)
    return (
        [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
    )


def _strings(entry: Object, name: str) -> list[str]:
    values = entry.get(name)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


if __name__ == "__main__":
    sys.exit(main())
