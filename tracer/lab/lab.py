# SPDX-License-Identifier: Apache-2.0
"""The lab as an object, for tests and benchmarks."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tracer.lab import bringup, cgroups, commands, entering, pods_file, state, teardown, topology
from tracer.lab.errors import LabError
from tracer.lab.state import Options, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

DEFAULT_POD = "sre/web-0"


@dataclass(frozen=True)
class RunningPod:
    """A pod as it runs. `netns` is an inode number, `cgroup` relative to the cgroup2 mount."""

    namespace: str
    name: str
    uid: str
    node: str
    ipv4: str
    ipv6: str
    host_network: bool
    netns: int
    netns_name: str
    veth: str | None
    pid: int
    container: str
    container_id: str
    cgroup: str
    cgroup_id: int

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"


class Lab:
    """The one lab of this machine, whoever brought it up; the arguments are for `up`."""

    def __init__(
        self,
        *,
        overlay: bool = False,
        resolver: str = "auto",
        quiet_servers: bool = False,
        iptables: str = "auto",
    ) -> None:
        self.options = Options(overlay, resolver, quiet_servers, iptables)

    def up(self) -> bool:
        """Brings the lab up; False if it already was, with the same options."""
        commands.require_root()
        bringup.require_tools()
        server = None
        while True:
            with state.locked() as lock:
                current = state.load()
                if current is not None and current.options == self.options and current.alive():
                    return False
                if any(state.RUN_DIR.iterdir()):
                    teardown.tear_down(lock)
                    continue
                if server is not None:
                    self._bring_up(server, lock)
                    return True
                state.RUN_DIR.rmdir()
            server = bringup.server_binary(self.options.resolver)

    def _bring_up(self, server: tuple[str, Path], lock: int) -> None:
        try:
            bringup.bring_up(self.options, server, lock)
        except BaseException as error:
            teardown.tear_down(lock)
            if isinstance(error, OSError):
                raise LabError(
                    f"the lab could not be made ({error}): see `dnstrace doctor`"
                ) from error
            raise

    def down(self) -> bool:
        """Removes the lab; False if there was none."""
        commands.require_root()
        if not state.RUN_DIR.exists():
            return False
        with state.locked() as lock:
            teardown.tear_down(lock)
        return True

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def state(self) -> State:
        """The lab that runs; LabError if none does."""
        found = state.load()
        if found is None or not found.alive():
            raise LabError("the lab is not up: run `dnstrace lab up`")
        return found

    @property
    def pods_file(self) -> Path:
        """The file for `dnstrace --pods`."""
        return state.PODS_FILE

    @property
    def cgroup_mount(self) -> Path:
        return Path(self.state.cgroup_mount)

    @property
    def pods(self) -> list[RunningPod]:
        current = self.state
        return [_running(current, pod) for pod in topology.PODS]

    @property
    def dns_pods(self) -> list[RunningPod]:
        """The two replicas behind the DNS service."""
        names = {pod.full_name for pod in topology.DNS_PODS}
        return [pod for pod in self.pods if pod.full_name in names]

    def pod(self, name: str) -> RunningPod:
        """The pod NAMESPACE/NAME; LabError if there is no such pod, or no lab."""
        return _running(self.state, _named(name))

    def popen(self, pod: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command in a pod; the options are Popen's. Its pid is the command's."""
        return subprocess.Popen([*enter(pod), *argv], **options)

    def run(
        self, pod: str, argv: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Runs a command in a pod to its end; text is captured unless the options say else."""
        return _run([*enter(pod), *argv], options)

    def node_exec(
        self, node: str, argv: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Runs a command on a node as the host would: its network, no pod's cgroup."""
        return _run([*enter_node(node), *argv], options)

    def query_log(self, server: str) -> Path:
        """The query log of "node1", "node2" (the replica there) or "upstream"."""
        name = server if server == bringup.UPSTREAM_SERVER else f"dns-{server}"
        return state.LOGS / f"{name}.log"


def enter(pod: str) -> list[str]:
    """What to put before a command line, so that it runs in pod NAMESPACE/NAME.

    The command gets the pod's cgroup, network, mounts and host name, and keeps pid and exit
    status. LabError if there is no such pod, or it no longer runs.
    """
    found = _named(pod)
    current = state.load()
    if current is None or not current.process(found.file_name).alive():
        raise LabError("the lab is not up: run `dnstrace lab up`")
    return entering.command(found.file_name)


def enter_node(node: str) -> list[str]:
    """What to put before a command line, so that it runs in a node's network namespace."""
    if node not in {known.name for known in topology.NODES}:
        raise LabError(f"no node {node}: there are {_listed(n.name for n in topology.NODES)}")
    if state.load() is None:
        raise LabError("the lab is not up: run `dnstrace lab up`")
    return [commands.find("ip") or "ip", "netns", "exec", topology.PREFIX + node]


def _named(name: str) -> topology.Pod:
    for pod in topology.PODS:
        if pod.full_name == name:
            return pod
    raise LabError(f"no pod {name}: there are {_listed(p.full_name for p in topology.PODS)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _run(argv: list[str], options: dict[str, Any]) -> subprocess.CompletedProcess[Any]:
    if not {"stdout", "stderr", "capture_output"} & options.keys():
        options = {"capture_output": True, "text": True, **options}
    return subprocess.run(argv, check=options.pop("check", False), **options)


def _running(current: State, pod: topology.Pod) -> RunningPod:
    cgroup = f"{cgroups.PARENT}/{pod.cgroup}"
    return RunningPod(
        namespace=pod.namespace,
        name=pod.name,
        uid=pod.uid,
        node=pod.node.name,
        ipv4=pod.ips[0],
        ipv6=pod.ips[1],
        host_network=pod.host_network,
        netns=pods_file.netns_inode(pod.netns),
        netns_name=pod.netns,
        veth=pod.veth,
        pid=current.process(pod.file_name).pid,
        container=pod.container,
        container_id=pod.container_id,
        cgroup=cgroup,
        cgroup_id=Path(current.cgroup_mount, cgroup).stat().st_ino,
    )
