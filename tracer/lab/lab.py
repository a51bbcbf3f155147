# SPDX-License-Identifier: Apache-2.0
"""The lab as an object, for tests and benchmarks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tracer.lab import (
    bringup,
    cgroups,
    changes,
    cluster_objects,
    commands,
    control_plane,
    entering,
    go_build,
    pods_file,
    state,
    teardown,
    topology,
)
from tracer.lab.errors import LabError
from tracer.lab.state import Options, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from kubernetes.client import ApiClient

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
        api: bool = False,
        node_local: str = "no",
        dns_port: int = topology.DNS_PORT,
    ) -> None:
        self.options = Options(
            overlay=overlay,
            resolver=resolver,
            quiet_servers=quiet_servers,
            iptables=iptables,
            api=api,
            node_local=node_local,
            dns_port=dns_port,
        )
        self._client: ApiClient | None = None

    def up(self) -> bool:
        """Brings the lab up; False if it already was, with the same options."""
        commands.require_root()
        bringup.require_tools(self.options)
        server = None
        while True:
            with state.locked() as lock:
                current = state.load()
                if current is not None and current.options == self.options and current.whole():
                    return False
                self._disconnect()
                if any(state.RUN_DIR.iterdir()):
                    if current and current.alive() and current.options != self.options:
                        said = "lab: replaces the one that was up, which had other options"
                        print(said, file=sys.stderr)
                    teardown.tear_down(lock)
                    continue
                if server is not None:
                    self._bring_up(server, lock)
                    return True
                state.RUN_DIR.rmdir()
            server = bringup.server_binary(self.options.resolver)
            if self.options.api:
                go_build.binary(go_build.APISERVER)

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
        self._disconnect()
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
        return [_running(current, pod) for pod in current.pods]

    @property
    def dns_pods(self) -> list[RunningPod]:
        """The two replicas behind the DNS service."""
        names = {pod.full_name for pod in topology.DNS_PODS}
        return [pod for pod in self.pods if pod.full_name in names]

    def pod(self, name: str) -> RunningPod:
        """The pod NAMESPACE/NAME; LabError if there is no such pod, or no lab."""
        current = self.state
        return _running(current, _named(name, current.pods))

    def add_pod(
        self,
        namespace: str,
        name: str,
        node: str = "node1",
        *,
        app: str | None = None,
        labels: Mapping[str, str] | None = None,
        container: str = "app",
        host_network: bool = False,
        number: int = 0,
    ) -> RunningPod:
        """Starts one more pod, and has the API server know it if there is one.

        `number` is the last part of its addresses; a free one if 0. `app` is its label, by
        default its name.
        """
        policy = "ClusterFirstWithHostNet" if host_network else "ClusterFirst"
        pod = topology.Pod(
            *(namespace, name, _node(node), number, app or name, container, policy, host_network),
            more_labels=tuple((labels or {}).items()),
        )
        with state.locked() as lock:
            new = changes.add_pod(self.state, pod, self._api_if_any(), lock)
            state.save(new)
        return _running(new, new.added[-1])

    def remove_pod(self, name: str) -> None:
        """Ends a pod NAMESPACE/NAME that `add_pod` started; nothing of it is left."""
        with state.locked() as lock:
            current = self.state
            pod = _named(name, current.pods)
            state.save(changes.remove_pod(current, pod, self._api_if_any(), lock))

    @property
    def kubeconfig(self) -> Path:
        """For the tracer: who reads it may do what deploy/rbac.yaml grants, and no more."""
        return control_plane.KUBECONFIG

    @property
    def api(self) -> ApiClient:
        """The administrator's client, the same until the lab goes down; LabError without --api."""
        if self.state.api_port is None:
            raise LabError("the lab has no API server: run `dnstrace lab up --api`")
        if self._client is None:
            self._client = cluster_objects.connect(control_plane.ADMIN_KUBECONFIG)
        return self._client

    def stop_api(self) -> None:
        """Kills the API server as a crash would; the rest of the lab goes on."""
        with state.locked():
            state.save(changes.stop_api(self.state))

    def start_api(self, *flags: str) -> None:
        """Starts it again, same port and data, and waits for it; `flags` are kube-apiserver's."""
        with state.locked():
            current = self.state
            if not changes.api_processes(current):
                state.save(changes.start_api(current, flags))

    def compact(self) -> int:
        """Has etcd forget the past, as it does every five minutes; the revision it is at."""
        return control_plane.compact()

    def _api_if_any(self) -> ApiClient | None:
        return None if self.state.api_port is None else self.api

    def _disconnect(self) -> None:
        client: Any = self._client  # which has no types itself
        if client is not None:
            client.close()
        self._client = None

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
        """The query log of "node1", "node2" (the replica there), "upstream", or "node-local-node1"."""
        nodes = {node.name for node in topology.NODES}
        name = f"dns-{server}" if server in nodes else server
        return state.LOGS / f"{name}.log"


def enter(pod: str) -> list[str]:
    """What to put before a command line, so that it runs in pod NAMESPACE/NAME.

    The command gets the pod's cgroup, network, mounts and host name, and keeps pid and exit
    status. LabError if there is no such pod, or it no longer runs.
    """
    current = state.load()
    found = _named(pod, topology.PODS if current is None else current.pods)
    if current is None or not current.process(found.file_name).alive():
        raise LabError("the lab is not up: run `dnstrace lab up`")
    return entering.command(found.file_name)


def enter_node(node: str) -> list[str]:
    """What to put before a command line, so that it runs in a node's network namespace."""
    netns = _node(node).netns
    if state.load() is None:
        raise LabError("the lab is not up: run `dnstrace lab up`")
    return [commands.find("ip") or "ip", "netns", "exec", netns]


def _node(name: str) -> topology.Node:
    for node in topology.NODES:
        if node.name == name:
            return node
    raise LabError(f"no node {name}: there are {_listed(n.name for n in topology.NODES)}")


def _named(name: str, pods: Sequence[topology.Pod]) -> topology.Pod:
    for pod in pods:
        if pod.full_name == name:
            return pod
    raise LabError(f"no pod {name}: there are {_listed(p.full_name for p in pods)}")


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
