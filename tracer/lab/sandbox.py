# SPDX-License-Identifier: Apache-2.0
"""The pods' sandboxes, as a node's runtime makes them: cgroup, namespaces, link, holder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab import cgroups, entering, network, shape, state, teardown, topology
from tracer.lab.commands import in_netns, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracer.lab.state import Options, Process
    from tracer.lab.topology import Pod


def make(pods: Sequence[Pod], parent: Path, options: Options, *, lock: int) -> dict[str, Process]:
    """Makes the pods' sandboxes below the lab's cgroup; the holders by `Pod.file_name`.

    The namespaces must be written down as owned; the nodes' links must be there.
    """
    resolver = shape.of(options).resolver
    for pod in pods:
        cgroups.make(parent / pod.cgroup)
        _write_files(pod, resolver)
    names = [pod.netns for pod in pods if not pod.host_network]
    add = "".join(f"netns add {name}\n" for name in names)
    run(["ip", "-batch", "-"], stdin=add, keep_fd=lock)
    for name in names:
        run(in_netns(name, ["/bin/sh", "-c", network.SYSCTLS]), keep_fd=lock)
    for name, lines in network.pod_batches(pods, overlay=options.overlay):
        run(["ip", "-n", name, "-batch", "-"], stdin="\n".join(lines) + "\n", keep_fd=lock)
    return _hold(pods, parent)


def remove(pod: Pod, parent: Path, lock: int) -> None:
    """Ends all that runs in a pod, and takes its sandbox away."""
    cgroups.remove((parent / pod.cgroup).parent)
    if not pod.host_network:
        # As network plugins do: the node's end goes at once, not whenever the namespace does.
        run(["ip", "-n", pod.netns, "link", "del", network.UPLINK], keep_fd=lock)
        run(["ip", "netns", "del", pod.netns], keep_fd=lock)
        (teardown.NETNS_FILES / pod.netns).unlink()
    (state.ENTER / pod.file_name).unlink()
    (state.ENTER / _holder_name(pod)).unlink()
    for directory in (state.POD_FILES, state.OVERLAYS):
        if (directory / pod.file_name).exists():
            shutil.rmtree(directory / pod.file_name)


def _write_files(pod: Pod, resolver: str) -> None:
    """The pod's files in /etc; also where `ip netns exec` looks for them."""
    directory = state.POD_FILES / pod.file_name
    hostname = pod.node.name if pod.host_network else pod.name
    write_etc(directory, topology.resolv_conf(pod, resolver), pod.ips[0], hostname)
    if not pod.host_network:
        (teardown.NETNS_FILES / pod.netns).symlink_to(directory)


def write_etc(directory: Path, resolv_conf: str, ip: str, hostname: str) -> None:
    """The files in /etc of a pod or a node, in a new directory."""
    directory.mkdir()
    (directory / "resolv.conf").write_text(resolv_conf)
    hosts = f"127.0.0.1 localhost\n::1 localhost\n{ip} {hostname}\n"
    nsswitch = "passwd: files\ngroup: files\nhosts: files dns\n"
    files = {"hosts": hosts, "hostname": hostname + "\n", "nsswitch.conf": nsswitch}
    for name, text in files.items():
        if Path("/etc", name).is_file():  # else there is nothing to mount it on
            (directory / name).write_text(text)


def _hold(pods: Sequence[Pod], parent: Path) -> dict[str, Process]:
    holder = state.RUN_DIR / entering.HOLDER
    if not holder.is_symlink():
        holder.symlink_to("/bin/sh")
        os.mkfifo(f"{holder}.wait")
    commands = {}
    for pod in pods:
        files = state.POD_FILES / pod.file_name
        text = entering.holder_script(pod, parent / pod.cgroup, files, holder)
        entering.write_script(_holder_name(pod), text)
        commands[pod.file_name] = entering.command(_holder_name(pod))
    started = entering.start(commands)
    entering.wait_until_held(started.values())
    for pod in pods:
        pid = started[pod.file_name].pid
        text = entering.enter_script(pod, parent / pod.cgroup, pid)
        entering.write_script(pod.file_name, text)
    return started


def _holder_name(pod: Pod) -> str:
    return f"hold_{pod.file_name}"
