# SPDX-License-Identifier: Apache-2.0
"""Making the lab, step by step: namespaces, links, services, pods, servers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab import (
    cgroups,
    cluster_objects,
    control_plane,
    entering,
    go_build,
    network,
    node_local,
    pods_file,
    sandbox,
    servers,
    services,
    shape,
    state,
    teardown,
    topology,
)
from tracer.lab.commands import find, in_netns, require, run
from tracer.lab.errors import LabError
from tracer.lab.state import Options, Process, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tracer.lab.shape import Shape
    from tracer.lab.topology import Pod

UPSTREAM_SERVER = "upstream"
UPSTREAM_CGROUP = "system.slice/upstream.service"
RESTORE_TOOLS = {
    "auto": ("{}-restore", "{}-nft-restore", "{}-legacy-restore"),
    "nft": ("{}-nft-restore",),
    "legacy": ("{}-legacy-restore",),
}
# What --iptables asks of each node; any other answer is for all nodes.
PER_NODE = {"both": {"node1": "nft", "node2": "legacy"}}


def require_tools(options: Options) -> None:
    tools = ["ip", "bridge", "nsenter", "unshare", "setsid", "mount", "iptables-restore"]
    require([*tools, "openssl"] if options.api else tools)


def server_binary(resolver: str) -> tuple[str, Path]:
    """(kind of server, its binary) for --resolver auto, coredns or unbound."""
    if resolver != "unbound":
        try:
            return "coredns", go_build.binary(go_build.COREDNS)
        except LabError as error:
            if resolver == "coredns" or find("unbound") is None:
                raise
            print(f"lab: {error}; unbound serves instead", file=sys.stderr)
    require(["unbound"])
    return "unbound", _copied(Path(find("unbound") or "unbound"))


def _copied(program: Path) -> Path:
    """A copy elsewhere: AppArmor confines unbound by its path, to the system's own zones."""
    copy = go_build.cache_dir() / "unbound" / program.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.stat().st_mtime != program.stat().st_mtime:
        new = copy.with_name(f"{program.name}.{os.getpid()}")
        shutil.copy2(program, new)
        new.replace(copy)
    return copy


def bring_up(options: Options, server: tuple[str, Path], lock: int) -> None:
    """Makes the whole lab in an empty run directory; leaves it half made if it raises."""
    cluster = shape.of(options)
    if cluster.node_local_ips and server[0] != "coredns":
        raise LabError("a cache on each node is a CoreDNS: leave out --resolver unbound")
    teardown.own(topology.namespaces())
    for directory in (state.LOGS, state.POD_FILES, state.SERVER_FILES, state.ENTER):
        directory.mkdir()
    mount = cgroups.mount(state.OWN_CGROUP_MOUNT)
    parent = mount / cgroups.PARENT
    # First, for it takes the longest to be ready.
    port = control_plane.prepare() if options.api else None
    control = {} if port is None else control_plane.start(port, parent)
    cgroups.make(parent / UPSTREAM_CGROUP)
    _write_node_files()
    _make_network(options, lock)
    if cluster.node_local_ips:
        node_local.make_devices(cluster.node_local_ips, lock)
    _make_services(options.iptables, cluster, lock)
    pods = sandbox.make(cluster.pods, parent, options, lock=lock)
    servers_started = _start_servers(options, cluster, server, parent)
    write_pods_file(cluster.pods, options)
    if port is not None:
        control_plane.wait_until_ready(control[control_plane.SERVER], port)
        _make_objects(port, cluster)
    processes = (*pods.values(), *servers_started.values(), *control.values())
    state.save(State(options, state.boot_id(), str(mount), server[0], processes, port))


def write_pods_file(pods: Iterable[Pod], options: Options) -> None:
    text = json.dumps(pods_file.content(pods, shape.of(options).services), indent=1) + "\n"
    state.write_whole(state.PODS_FILE, text)


def _make_objects(port: int, cluster: Shape) -> None:
    """What the API server tells of the lab, and the tracer's way to it."""
    from kubernetes.client import ApiException

    try:
        with cluster_objects.connect(control_plane.ADMIN_KUBECONFIG) as api:
            cluster_objects.create_topology(api, cluster)
            token = cluster_objects.grant_tracer(api)
    except ApiException as error:
        raise LabError(f"the API server refused an object ({error.body}): try again") from error
    control_plane.write_kubeconfig(control_plane.KUBECONFIG, port, token)


def _write_node_files() -> None:
    """/etc files of each node, where `ip netns exec` looks for them."""
    teardown.NETNS_FILES.mkdir(exist_ok=True)
    for node in topology.NODES:
        directory = state.POD_FILES / node.name
        sandbox.write_etc(directory, topology.node_resolv_conf(), node.ips[0], node.name)
        (teardown.NETNS_FILES / node.netns).symlink_to(directory)


def _make_network(options: Options, lock: int) -> None:
    """The wire, the nodes and the world outside; the pods come later."""
    names = (topology.FABRIC, topology.UPSTREAM, *(node.netns for node in topology.NODES))
    add = "".join(f"netns add {name}\n" for name in names)
    run(["ip", "-batch", "-"], stdin=add, keep_fd=lock)
    for name, script in network.sysctl_scripts():
        run(in_netns(name, ["/bin/sh", "-c", script]), keep_fd=lock)
    for name, lines in network.link_batches(overlay=options.overlay):
        run(["ip", "-n", name, "-batch", "-"], stdin="\n".join(lines) + "\n", keep_fd=lock)
    if options.overlay:
        for node in topology.NODES:
            entries = "\n".join(network.forwarding_entries(node)) + "\n"
            run(["bridge", "-n", node.netns, "-batch", "-"], stdin=entries, keep_fd=lock)


def _make_services(wanted: str, cluster: Shape, lock: int) -> None:
    rules = {family: services.restore_input(cluster.services, family) for family in (4, 6)}
    rules[4] += node_local.restore_input(cluster.node_local_ips)
    for node in topology.NODES:
        variant = PER_NODE.get(wanted, {}).get(node.name, wanted)
        _restore(node, rules, RESTORE_TOOLS[variant], lock)


def _restore(
    node: topology.Node, rules: Mapping[int, str], patterns: tuple[str, ...], lock: int
) -> None:
    """Both families, with the first variant of iptables that takes the rules."""
    failure = LabError("no iptables here: apt install iptables", status=3)
    for pattern in patterns:
        tools = {4: pattern.format("iptables"), 6: pattern.format("ip6tables")}
        if not all(find(tool) for tool in tools.values()):
            continue
        try:
            for family, tool in tools.items():
                argv = in_netns(node.netns, [find(tool) or tool])
                run(argv, stdin=rules[family], keep_fd=lock)
            return
        except LabError as error:
            failure = error
    raise failure


def _start_servers(
    options: Options, cluster: Shape, server: tuple[str, Path], parent: Path
) -> dict[str, Process]:
    kind, binary = server
    make = servers.coredns if kind == "coredns" else servers.unbound
    outside = entering.outside_script(topology.UPSTREAM, parent / UPSTREAM_CGROUP)
    entering.write_script(UPSTREAM_SERVER, outside)
    scripts = {UPSTREAM_SERVER: UPSTREAM_SERVER}
    served = {}
    quiet = options.quiet_servers
    served[UPSTREAM_SERVER] = make(binary, _directory(UPSTREAM_SERVER), None, quiet=quiet)
    for pod in cluster.pods:
        if pod.app == topology.DNS_APP:
            name = f"dns-{pod.node.name}"
            served[name] = make(binary, _directory(name), cluster, quiet=quiet)
        elif pod.app == topology.NODE_LOCAL_APP:
            name = f"node-local-{pod.node.name}"
            served[name] = servers.node_local(binary, _directory(name), cluster, quiet=quiet)
        else:
            continue
        scripts[name] = pod.file_name
    commands = {}
    for name, plan in served.items():
        for file, text in plan.files.items():
            (_directory(name) / file).write_text(text)
        commands[name] = [*entering.command(scripts[name]), *plan.argv]
    started = entering.start(commands)
    entering.wait_until_listening(started, served)
    return started


def _directory(server: str) -> Path:
    directory = state.SERVER_FILES / server
    directory.mkdir(exist_ok=True)
    return directory
