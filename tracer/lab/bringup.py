# SPDX-License-Identifier: Apache-2.0
"""Making the lab, step by step: namespaces, links, services, pods, servers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tracer.lab import (
    cgroups,
    coredns_build,
    entering,
    network,
    pods_file,
    servers,
    services,
    state,
    teardown,
    topology,
)
from tracer.lab.commands import find, in_netns, require, run
from tracer.lab.errors import LabError
from tracer.lab.state import Options, Process, State

UPSTREAM_SERVER = "upstream"
UPSTREAM_CGROUP = "system.slice/upstream.service"
RESTORE_TOOLS = {
    "auto": ("{}-restore", "{}-nft-restore", "{}-legacy-restore"),
    "nft": ("{}-nft-restore",),
    "legacy": ("{}-legacy-restore",),
}
# What --iptables asks of each node; any other answer is for all nodes.
PER_NODE = {"both": {"node1": "nft", "node2": "legacy"}}


def require_tools() -> None:
    tools = ["ip", "bridge", "nsenter", "unshare", "setsid", "mount", "iptables-restore"]
    require(tools)


def server_binary(resolver: str) -> tuple[str, Path]:
    """(kind of server, its binary) for --resolver auto, coredns or unbound."""
    if resolver != "unbound":
        try:
            return "coredns", coredns_build.binary()
        except LabError as error:
            if resolver == "coredns" or find("unbound") is None:
                raise
            print(f"lab: {error}; unbound serves instead", file=sys.stderr)
    require(["unbound"])
    return "unbound", _copied(Path(find("unbound") or "unbound"))


def _copied(program: Path) -> Path:
    """A copy elsewhere: AppArmor confines unbound by its path, to the system's own zones."""
    copy = coredns_build.cache_dir() / "unbound" / program.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.stat().st_mtime != program.stat().st_mtime:
        new = copy.with_name(f"{program.name}.{os.getpid()}")
        shutil.copy2(program, new)
        new.replace(copy)
    return copy


def bring_up(options: Options, server: tuple[str, Path], lock: int) -> None:
    """Makes the whole lab in an empty run directory; leaves it half made if it raises."""
    teardown.own(topology.namespaces())
    for directory in (state.LOGS, state.POD_FILES, state.SERVER_FILES, state.ENTER):
        directory.mkdir()
    mount = cgroups.mount(state.OWN_CGROUP_MOUNT)
    parent = mount / cgroups.PARENT
    for cgroup in (UPSTREAM_CGROUP, *(pod.cgroup for pod in topology.PODS)):
        cgroups.make(parent / cgroup)
    _write_pod_files()
    _make_network(options, lock)
    _make_services(options.iptables, lock)
    processes = _start_pods(parent)
    processes |= _start_servers(options, server, parent)
    state.write_whole(state.PODS_FILE, json.dumps(pods_file.content(), indent=1) + "\n")
    state.save(State(options, state.boot_id(), str(mount), server[0], tuple(processes.values())))


def _write_pod_files() -> None:
    """/etc files of each pod and node; also where `ip netns exec` looks for them."""
    teardown.NETNS_FILES.mkdir(exist_ok=True)
    for pod in topology.PODS:
        directory = state.POD_FILES / pod.file_name
        hostname = pod.node.name if pod.host_network else pod.name
        hosts = f"127.0.0.1 localhost\n::1 localhost\n{pod.ips[0]} {hostname}\n"
        _etc(directory, topology.resolv_conf(pod), hosts, hostname)
        if not pod.host_network:
            (teardown.NETNS_FILES / pod.netns).symlink_to(directory)
    for node in topology.NODES:
        directory = state.POD_FILES / node.name
        hosts = f"127.0.0.1 localhost\n::1 localhost\n{node.ips[0]} {node.name}\n"
        _etc(directory, topology.node_resolv_conf(), hosts, node.name)
        (teardown.NETNS_FILES / node.netns).symlink_to(directory)


def _etc(directory: Path, resolv_conf: str, hosts: str, hostname: str) -> None:
    directory.mkdir()
    (directory / "resolv.conf").write_text(resolv_conf)
    nsswitch = "passwd: files\ngroup: files\nhosts: files dns\n"
    files = {"hosts": hosts, "hostname": hostname + "\n", "nsswitch.conf": nsswitch}
    for name, text in files.items():
        if Path("/etc", name).is_file():  # else there is nothing to mount it on
            (directory / name).write_text(text)


def _make_network(options: Options, lock: int) -> None:
    add = "".join(f"netns add {name}\n" for name in topology.namespaces())
    run(["ip", "-batch", "-"], stdin=add, keep_fd=lock)
    for name, script in network.sysctl_scripts():
        run(in_netns(name, ["/bin/sh", "-c", script]), keep_fd=lock)
    for name, lines in network.link_batches(overlay=options.overlay):
        run(["ip", "-n", name, "-batch", "-"], stdin="\n".join(lines) + "\n", keep_fd=lock)
    if options.overlay:
        for node in topology.NODES:
            entries = "\n".join(network.forwarding_entries(node)) + "\n"
            run(["bridge", "-n", node.netns, "-batch", "-"], stdin=entries, keep_fd=lock)


def _make_services(wanted: str, lock: int) -> None:
    for node in topology.NODES:
        variant = PER_NODE.get(wanted, {}).get(node.name, wanted)
        _make_services_of(node, RESTORE_TOOLS[variant], lock)


def _make_services_of(node: topology.Node, patterns: tuple[str, ...], lock: int) -> None:
    """Both families, with the first variant of iptables that takes the rules."""
    failure = LabError("no iptables here: apt install iptables", status=3)
    for pattern in patterns:
        tools = {4: pattern.format("iptables"), 6: pattern.format("ip6tables")}
        if not all(find(tool) for tool in tools.values()):
            continue
        try:
            for family, tool in tools.items():
                rules = services.restore_input(topology.SERVICES, family)
                run(in_netns(node.netns, [find(tool) or tool]), stdin=rules, keep_fd=lock)
            return
        except LabError as error:
            failure = error
    raise failure


def _start_pods(parent: Path) -> dict[str, Process]:
    holder = state.RUN_DIR / entering.HOLDER
    holder.symlink_to("/bin/sh")
    os.mkfifo(f"{holder}.wait")
    commands = {}
    for pod in topology.PODS:
        files = state.POD_FILES / pod.file_name
        script = f"hold_{pod.file_name}"
        text = entering.holder_script(pod, parent / pod.cgroup, files, holder)
        entering.write_script(script, text)
        commands[pod.file_name] = entering.command(script)
    started = entering.start(commands)
    entering.wait_until_held(started.values())
    for pod in topology.PODS:
        pid = started[pod.file_name].pid
        text = entering.enter_script(pod, parent / pod.cgroup, pid)
        entering.write_script(pod.file_name, text)
    return started


def _start_servers(options: Options, server: tuple[str, Path], parent: Path) -> dict[str, Process]:
    kind, binary = server
    make = servers.coredns if kind == "coredns" else servers.unbound
    outside = entering.outside_script(topology.UPSTREAM, parent / UPSTREAM_CGROUP)
    entering.write_script(UPSTREAM_SERVER, outside)
    scripts = {UPSTREAM_SERVER: UPSTREAM_SERVER}
    for pod in topology.DNS_PODS:
        scripts[f"dns-{pod.node.name}"] = pod.file_name
    commands = {}
    for name, script in scripts.items():
        directory = state.SERVER_FILES / name
        directory.mkdir()
        plan = make(binary, directory, cluster=name != UPSTREAM_SERVER, quiet=options.quiet_servers)
        for file, text in plan.files.items():
            (directory / file).write_text(text)
        commands[name] = [*entering.command(script), *plan.argv]
    started = entering.start(commands)
    entering.wait_until_listening(started.values())
    return started
