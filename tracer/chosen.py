# SPDX-License-Identifier: Apache-2.0
"""Whose queries are asked for: what the kernel is told of them, and what if there are none.

The kernel lets in whom it knows to be wanted, and whom it does not know: a pod's first query comes
before anybody has heard of the pod. What turns out to be unwanted is left out in user space, and
the kernel is told.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.cluster.cluster import ClusterWatch
from tracer.kernel.session import Selection
from tracer.show.cells import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tracer.cluster.identities import Identities
    from tracer.cluster.sources import Source
    from tracer.filters import Filters

_REFUSED_MAX = 65_536
_NEAR = 3
_SHOWN = 10
_GLOB = re.compile(r"[*?\[]")


class NobodyChosen(Exception):
    """There is no such namespace or pod. The message is one line."""


class Chosen:
    """What the command line asks for, among who is known. `ports` are those it names, if any."""

    def __init__(
        self, filters: Filters, ports: Iterable[int], identities: Identities, source: Source
    ) -> None:
        self._filters = filters
        self._ports = tuple(ports)
        self._identities = identities
        self._source = source
        self._refused: dict[int, bool] = {}
        self._was_early = False  # when looked, the cluster had not told all yet
        self._pod_wanted = filters.pods_wanted(identities.labels)
        self._container_wanted = filters.container_wanted()

    @property
    def by_pods(self) -> bool:
        """Whether pods are chosen, and by who asks."""
        filters = self._filters
        chosen = filters.namespaces or filters.pods or filters.selector or filters.container
        return bool(chosen) and filters.side == "client"

    def selection(self) -> Selection:
        """What the kernel itself can filter by; the rest is filtered afterwards."""
        filters = self._filters
        ports = self._ports or self._identities.dns_ports()
        if not self.by_pods:
            server_side = filters.side == "server"
            return Selection(ports=ports, pid=filters.pid, server_side=server_side)
        netns, cgroups = self._identities.verdicts(self._pod_wanted, self._container_wanted)
        return Selection(
            ports=ports,
            pods=True,
            netns=netns,
            cgroups=self._refused | cgroups,
            pid=filters.pid,
        )

    def refuse(self, cgroup_id: int) -> bool:
        """That a query of this cgroup was not asked for. Whether the kernel should be told."""
        if not self.by_pods or cgroup_id in self._refused:
            return False
        if not self._identities.is_hosts(cgroup_id):
            return False
        if len(self._refused) >= _REFUSED_MAX:
            self._refused.clear()
        self._refused[cgroup_id] = False
        return True

    def check(self, say: Callable[[str], None]) -> None:
        """Looks whether there is who was asked for. Raises NobodyChosen."""
        filters = self._filters
        if filters.pid is not None and not Path(f"/proc/{filters.pid}").is_dir():
            raise NobodyChosen(f"there is no process {filters.pid}")
        wrong = self._source.wrong_nodes() if isinstance(self._source, ClusterWatch) else None
        if wrong is not None:
            raise NobodyChosen(wrong)
        self._check_backend(say)
        if not (filters.namespaces or filters.pods or filters.selector):
            return
        if isinstance(self._source, ClusterWatch):
            if not self._source.wait_synced(0.0):
                if self._source.problem() is None:
                    say("the API server has not told all yet")
                say("the pods that are asked for are traced once they are known")
                self._was_early = True
                return
            self._check_against_api(self._source, say)
            return
        if not self._identities.known_pods():
            raise NobodyChosen(
                "--namespace, --pod and --selector need to know the pods: "
                f"{self._source.problem() or 'give --kubeconfig, or --pods FILE'}"
            )
        for namespace in filters.namespaces:
            self._check_namespace(namespace, {pod[0] for pod in self._identities.known_pods()})
        for glob in filters.pods:
            if not self._identities.matching(filters.namespaces, [glob]):
                raise NobodyChosen(f"no pod is called {_shown(glob)}{self._near_pod(glob)}")
        self._check_traceable(say)

    def may_be_known(self) -> bool:
        """Whether the cluster, which had not told all when `check` looked, has done so by now."""
        if not self._was_early or not isinstance(self._source, ClusterWatch):
            return False
        # A server that is just starting refuses what it will allow.
        return self._source.wait_synced(0.0) and self._source.problem() is None

    def say_late(self, say: Callable[[str], None]) -> None:
        """Says what `check` could not, when all is learned; costs no request."""
        self._was_early = False
        if isinstance(self._source, ClusterWatch):
            self._say_if_nobody(self._source, say)

    def _check_backend(self, say: Callable[[str], None]) -> None:
        """Says that no pod is known by this name; one may come, so tracing goes on."""
        wanted = self._filters.backend_wanted()
        if wanted is None:
            return
        if isinstance(self._source, ClusterWatch) and not self._source.wait_synced(0.0):
            return  # of which the source tells itself
        known = self._identities.known_pods()
        known |= {
            (one.namespace, one.pod)
            for one in self._identities.inventory.endpoints
            if one.namespace and one.pod
        }
        if not any(wanted(*pod) for pod in known):
            name = self._filters.backend or ""
            near = _near(name.rpartition("/")[2], sorted({pod for _, pod in known}))
            say(f"--backend: no pod that is known is called {_shown(name)} yet{near}")

    def _check_against_api(self, cluster: ClusterWatch, say: Callable[[str], None]) -> None:
        filters = self._filters
        if filters.namespaces:
            known = cluster.namespaces()
            for namespace in filters.namespaces if known is not None else ():
                self._check_namespace(namespace, known or ())
        for name in filters.pods:
            if self._identities.matching(filters.namespaces, [name]):
                continue
            if not _GLOB.search(name):
                self._check_pod(cluster, name)
            say(f"no pod on this node is called {_shown(name)} yet: waiting for one")
        if not filters.pods:
            self._say_if_nobody(cluster, say)

    def _say_if_nobody(self, cluster: ClusterWatch, say: Callable[[str], None]) -> None:
        if not any(map(self._is_wanted, self._identities.known_pods())):
            nodes = ", ".join(map(clean, cluster.status().nodes)) or "unknown"
            say(f"no pod that was asked for is on this node ({nodes}) yet: waiting for one")

    def _is_wanted(self, pod: tuple[str, str]) -> bool:
        from tracer.cluster.identities import Who

        return self._pod_wanted(Who(*pod))

    def _check_namespace(self, namespace: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        if namespace not in names:
            raise NobodyChosen(
                f"there is no namespace {_shown(namespace)}{_near(namespace, names)}"
            )

    def _check_pod(self, cluster: ClusterWatch, name: str) -> None:
        """A pod that is not on this node may be on another one."""
        namespace, _, short = name.rpartition("/")
        places = [namespace] if namespace else list(self._filters.namespaces)
        found = cluster.find_pods(short)
        if found is None:
            return
        for pod in found:
            if places and pod.namespace not in places:
                continue
            if pod.node is None or pod.node in cluster.status().nodes:
                return
            raise NobodyChosen(
                f"pod {clean(pod.full_name)} is on node {clean(pod.node)}, "
                "not on this one: run dnstrace there"
            )
        if not places:
            raise NobodyChosen(
                f"no pod on this node is called {_shown(name)}{self._near_pod(name)}"
            )
        names = [pod for place in places for pod in cluster.pods_in(place) or ()]
        where = f"namespace {places[0]} has" if len(places) == 1 else "these namespaces have"
        raise NobodyChosen(f"{clean(where)} no pod {_shown(short)}{_near(short, names)}")

    def _near_pod(self, name: str) -> str:
        wanted = self._filters.namespaces
        pods = self._identities.known_pods()
        return _near(name, sorted({pod for ns, pod in pods if not wanted or ns in wanted}))

    def _check_traceable(self, say: Callable[[str], None]) -> None:
        """That the chosen pods can be told from others; of some that cannot, a line to say so."""
        if not self.by_pods:
            return
        chosen = self._identities.matching(self._filters.namespaces, self._filters.pods)
        lost = [clean(name) for name in self._identities.untraceable(chosen)]
        if not lost:
            return
        names = ", ".join(lost[:_NEAR])
        names += f" and {len(lost) - _NEAR} more" if len(lost) > _NEAR else ""
        line = f"neither network namespace nor cgroup is known here of {names}"
        if len(lost) == len(chosen):
            raise NobodyChosen(
                f"{line}: give 'netns' or 'cgroup' in the pods file, "
                "or leave --namespace and --pod out"
            )
        say(f"{line}: not traced")


def _shown(name: str) -> str:
    return repr(clean(name))


def _near(name: str, known: Iterable[str]) -> str:
    names = [clean(other) for other in known]
    near = difflib.get_close_matches(name, names, n=_NEAR)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return f"; there are: {', '.join(names[:_SHOWN])}" if names else "; there are none"
