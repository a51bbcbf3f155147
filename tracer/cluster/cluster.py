# SPDX-License-Identifier: Apache-2.0
"""What a node's tracer knows of its cluster, kept up to date in the background.

Whoever traces never waits for the API server: what is known is asked for at any time, and names
come late rather than never. Of pods, only those on this machine's nodes are kept.

    nodes ─▶ which are this machine ─▶ pods of each
    services ─▶ which are for DNS ─▶ their endpoints, wherever those are
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tracer.cluster import node_name, objects
from tracer.cluster.api import Connection, RequestError
from tracer.cluster.api_source import ConfigError, one_line
from tracer.cluster.model import Endpoint, Inventory, Pod, Service
from tracer.cluster.node_name import Choice, Machine
from tracer.cluster.objects import KnownNode, KnownService, Malformed, Slice
from tracer.cluster.watch import Reflector, Resource, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sized

    from tracer.cluster.api_source import ApiSource
    from tracer.cluster.objects import Key

T = TypeVar("T")

_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_SERVICE_NAMES_MAX = 100  # in a label selector, which is part of a URL
_DNS_NAMESPACES = ("kube-system", "openshift-dns")
_NAMES_MAX = 10_000
_NAMES_PAGE = 500
_ASKED_S = 3.0  # patience with what somebody waits for
_LOOK_S = 10.0  # how often to see whether a node has become this machine's
_LOOK_AGAIN_S = 60.0  # the same once one is
_CONFIG_RETRY_S = 10.0
_CLOSE_S = 0.5
_TOLD_AFTER_S = 2.0  # a connection that breaks and is there again is nothing to speak of

_NODES = Resource("nodes", "/api/v1/nodes", objects.node, page=50)
_SERVICES = Resource("services", "/api/v1/services", objects.service, page=250)


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """How a resource is followed. `name` has the node's, for pods; `error` is one line.

    `contact_s` is how long ago the server said something of it, `failing_s` for how long it has
    not been possible to follow it; `status` is HTTP's, if that is why.
    """

    name: str
    synced: bool
    contact_s: float | None
    failing_s: float | None
    error: str | None
    status: int | None
    requests: int
    lists: int
    objects: int
    malformed: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """How much of the cluster is known, and from where. All text is one line.

    `why` is why those nodes are taken for this machine, or why none is. `problem` is what keeps
    names from being complete or current, None if nothing does.
    """

    source: str
    server: str | None
    nodes: tuple[str, ...]
    why: str
    resources: tuple[ResourceStatus, ...]
    requests: int
    problem: str | None
    text: str


class ClusterWatch:
    """Follows a cluster from `start` to `close`.

    `nodes` are those that somebody has named; without, those that have one of `local_addresses()`
    are this machine's. `version` grows whenever `inventory()` would differ.
    """

    def __init__(
        self,
        source: ApiSource,
        nodes: Collection[str],
        local_addresses: Callable[[], Collection[str]],
        *,
        timing: Timing | None = None,
    ) -> None:
        self.version = 0
        self._source = source
        self._asked = tuple(nodes)
        self._addresses = local_addresses
        self._timing = timing or Timing()
        self._machine = Machine.this()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._config_error: str | None = None
        self._settled = False
        self._choice = Choice((), "the cluster's nodes are not known yet")
        self._look_again_s = 0.0
        self._chosen_from: list[KnownNode] | None = None
        self._own_node: KnownNode | None = None  # where nodes may not be listed
        self._nodes: Reflector[KnownNode] | None = None
        self._services: Reflector[KnownService] | None = None
        self._pods: dict[str, Reflector[Pod]] = {}
        self._slices: Reflector[Slice] | None = None
        self._slice_names: tuple[str, ...] = ()
        self._slice_names_left: tuple[str, ...] = ()
        self._old_slices: dict[Key, Slice] = {}  # until those of other services are known as well
        self._left: list[Reflector[Any]] = []  # stopped
        self._built: tuple[int, Inventory] | None = None
        self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)

    def start(self) -> None:
        """Begins in the background; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Ends it within a second, whatever the server does."""
        self._stopping.set()
        self._wake.set()
        end_s = time.monotonic() + _CLOSE_S
        with self._lock:
            reflectors = [*self._reflectors(), *self._left]
        for reflector in reflectors:
            reflector.stop()
        alive = False
        for thread in (self._thread, *(reflector.thread for reflector in reflectors)):
            if thread.ident is not None:
                thread.join(max(0.0, end_s - time.monotonic()))
                alive = alive or thread.is_alive()
        if self._connection and not alive:
            self._connection.close()

    def inventory(self) -> Inventory:
        """What is known now."""
        with self._lock:
            if self._built is None or self._built[0] != self.version:
                self._built = (self.version, self._build())
            return self._built[1]

    def wait_synced(self, timeout_s: float) -> bool:
        """Waits until all is known that may be known; False if that takes too long, or never comes."""
        with self._news:
            return (
                self._news.wait_for(
                    lambda: self._settled or self._config_error is not None, timeout_s
                )
                and self._settled
            )

    def namespaces(self) -> list[str] | None:
        """All that there are, asked for now; None if that cannot be known."""
        return self._names("/api/v1/namespaces", _NAMES_MAX)

    def pods_in(self, namespace: str) -> list[str] | None:
        """Names of pods, on whatever node: the first few hundred; None if that cannot be known."""
        if not objects.is_name(namespace):
            return []
        return self._names(f"/api/v1/namespaces/{namespace}/pods", _NAMES_PAGE)

    def find_pods(self, name: str) -> list[Pod] | None:
        """The pods of that name, in whichever namespace; None if that cannot be known."""
        if not objects.is_name(name):
            return []
        query = {"fieldSelector": f"metadata.name={name}", "resourceVersion": "0"}
        try:
            return [objects.pod(raw) for raw in self._ask("/api/v1/pods", query)["items"]]
        except (RequestError, Malformed, LookupError, TypeError):
            return None

    def status(self) -> ClusterStatus:
        """How it goes."""
        with self._lock:
            now_s = time.monotonic()
            reflectors = list(self._reflectors())
            resources = tuple(_resource_status(reflector, now_s) for reflector in reflectors)
            server = self._connection.server if self._connection else None
            problem = self._problem(resources, server)
            return ClusterStatus(
                source=str(self._source),
                server=server,
                nodes=self._choice.names,
                why=self._choice.why,
                resources=resources,
                requests=self._connection.made if self._connection else 0,
                problem=problem,
                text=problem or self._summary(server),
            )

    # Those that make requests or call others are not under the lock; all else below is.

    def _run(self) -> None:
        if not self._connect():
            return
        with self._lock:
            self._nodes = self._follow(_NODES)
            self._services = self._follow(_SERVICES)
        while not self._stopping.is_set():
            self._wake.clear()
            self._look_up_own_node()
            self._choose_nodes()
            with self._news:
                if self._stopping.is_set():
                    return
                self._follow_pods()
                self._follow_endpoints()
                settled = self._all_settled()
                if settled != self._settled:
                    self._settled = settled
                    self._news.notify_all()
            self._wake.wait(_LOOK_S)

    def _connect(self) -> bool:
        """Until there is a configuration that can be used; False if stopped before."""
        while not self._stopping.is_set():
            try:
                connection = Connection(self._source)
            except ConfigError as error:
                with self._news:
                    self._config_error = str(error)
                    self._news.notify_all()
                self._stopping.wait(_CONFIG_RETRY_S)
                continue
            with self._news:
                self._connection, self._config_error = connection, None
                self._news.notify_all()
            return True
        return False

    def _follow(self, resource: Resource[T]) -> Reflector[T]:
        if self._connection is None:
            raise RuntimeError("not connected")
        reflector = Reflector(self._connection, resource, self._lock, self._changed, self._timing)
        if not self._stopping.is_set():
            reflector.start()
        return reflector

    def _leave(self, reflector: Reflector[Any]) -> None:
        reflector.stop()
        self._left = [left for left in self._left if left.thread.is_alive()] + [reflector]

    def _changed(self) -> None:
        self.version += 1
        self._wake.set()

    def _look_up_own_node(self) -> None:
        """The kubelet's credentials read its own node, though not the list of all."""
        name = self._machine.hostname
        if self._nodes is None or self._connection is None or self._own_node is not None:
            return
        if self._nodes.condition.status != 403 or not objects.is_name(name):
            return
        try:
            raw = self._connection.get(f"/api/v1/nodes/{name}", patience_s=_ASKED_S)
            known = objects.node(raw)
        except (RequestError, Malformed):
            return
        with self._lock:
            self._own_node = known
            self._changed()

    def _choose_nodes(self) -> None:
        with self._lock:
            known = self._known_nodes()
        now_s = time.monotonic()
        if known == self._chosen_from and now_s < self._look_again_s:
            return
        self._chosen_from = known
        choice = node_name.choose(self._asked, known, self._addresses, self._machine)
        self._look_again_s = now_s + (_LOOK_AGAIN_S if choice.names else _LOOK_S)
        if self._choice.names and not choice.names and known is not None:
            # An address that is away for a moment does not make the pods somebody else's.
            there = {entry.node.name for entry in known}
            if there.issuperset(self._choice.names):
                return
        self._choice = choice

    def _follow_pods(self) -> None:
        names = self._choice.names
        for name in [name for name in self._pods if name not in names]:
            self._leave(self._pods.pop(name))
            self._changed()
        for name in names:
            if name not in self._pods:
                self._pods[name] = self._follow(_pods_of(name))

    def _known_nodes(self) -> list[KnownNode] | None:
        if self._nodes is not None and self._nodes.condition.synced:
            return list(self._nodes.objects.values())
        return [self._own_node] if self._own_node else None

    def _follow_endpoints(self) -> None:
        if self._services is None or not self._services.condition.synced:
            return
        # The cluster's own first, should there be more than fit.
        services = sorted(
            (known.service for known in self._dns_services()),
            key=lambda service: (service.namespace not in _DNS_NAMESPACES, service.name),
        )
        names = tuple(dict.fromkeys(service.name for service in services))
        wanted, self._slice_names_left = names[:_SERVICE_NAMES_MAX], names[_SERVICE_NAMES_MAX:]
        if wanted == self._slice_names:
            if self._slices and self._slices.condition.synced and self._old_slices:
                self._old_slices = {}
            return
        if self._slices is not None:
            self._old_slices = self._slices.objects or self._old_slices
            self._leave(self._slices)
        self._slice_names = wanted
        self._slices = self._follow(_slices_of(wanted)) if wanted else None

    def _all_settled(self) -> bool:
        return (
            self._nodes is not None
            and self._nodes.condition.settled
            and self._services is not None
            and self._services.condition.settled
            and all(reflector.condition.settled for reflector in self._pods.values())
            and (self._slices is None or self._slices.condition.settled)
        )

    def _reflectors(self) -> Iterator[Reflector[Any]]:
        for reflector in (self._nodes, *self._pods.values(), self._services, self._slices):
            if reflector is not None:
                yield reflector

    def _dns_services(self) -> Iterator[KnownService]:
        for known in self._services.objects.values() if self._services else ():
            if known.service.dns:
                yield known

    def _build(self) -> Inventory:
        behind: dict[Key, list[Slice]] = {}
        slices = self._slices.objects if self._slices else {}
        if self._slices and not self._slices.condition.synced:
            slices = self._old_slices
        for part in slices.values():
            behind.setdefault(part.service, []).append(part)
        services = []
        endpoints: dict[Endpoint, None] = {}
        for known in self._services.objects.values() if self._services else ():
            service = known.service
            parts = behind.get((service.namespace, service.name), []) if service.dns else []
            if parts:
                service = _with_endpoints(known, parts)
                endpoints.update((e, None) for part in parts for e in part.endpoints)
            services.append(service)
        return Inventory(
            pods=tuple(pod for r in self._pods.values() for pod in r.objects.values()),
            services=tuple(services),
            nodes=tuple(known.node for known in self._known_nodes() or ()),
            endpoints=tuple(endpoints),
            gone=tuple(pod for r in self._pods.values() for pod in r.deleted),
        )

    def _problem(self, resources: tuple[ResourceStatus, ...], server: str | None) -> str | None:
        """What keeps names from being complete, and since when."""
        if self._config_error:
            return self._config_error
        told: list[str] = []
        failing = [r for r in resources if r.error and _worth_telling(r)]
        away = [r for r in failing if r.status is None]
        if away:
            told.append(_unreachable(away, server, known=any(r.synced for r in resources)))
        if any(r.status == 401 for r in failing):
            told.append(f"{server} does not accept the credentials of {self._source} (HTTP 401)")
        told += [f"{r.name}: {r.error}" for r in failing if r.status not in (None, 401)]
        told += self._problems_of_nodes()
        if self._slice_names_left:
            left = _count(self._slice_names_left, "DNS service")
            told.append(f"of {left} beyond {_SERVICE_NAMES_MAX}, the endpoints are not known")
        malformed = sum(r.malformed for r in resources)
        if malformed:
            told.append(
                f"{_count(range(malformed), 'malformed object')} of the API server left out"
            )
        return "; ".join(told) or None

    def wrong_nodes(self) -> str | None:
        """That a node which was named is not there; None: it is, or that is not known yet."""
        if not (self._asked and self._nodes is not None and self._nodes.condition.synced):
            return None
        return next(self._problems_of_nodes(), None)

    def _problems_of_nodes(self) -> Iterator[str]:
        known = self._known_nodes()
        if self._asked and self._nodes is not None and self._nodes.condition.synced:
            there = {entry.node.name for entry in known or ()}
            for name in self._asked:
                if name not in there:
                    shown = ", ".join(sorted(there)[:5])
                    yield one_line(f"the cluster has no node {name}; there are: {shown}")
        elif not self._choice.names and self._nodes is not None:
            if known is not None:
                yield self._choice.why
            elif self._nodes.condition.status == 403:
                yield "which node this is cannot be told; name it with --node"

    def _summary(self, server: str | None) -> str:
        if not self._settled:
            return f"{server or self._source}: not all is known yet"
        inventory = self.inventory()
        dns = sum(service.dns for service in inventory.services)
        return (
            f"{server} by {self._source}: {_count(inventory.pods, 'pod')} of "
            f"{', '.join(self._choice.names)} ({self._choice.why}), "
            f"{_count(inventory.services, 'service')}, {dns} for DNS with "
            f"{_count(inventory.endpoints, 'endpoint')}, {_count(inventory.nodes, 'node')}"
        )

    def _names(self, path: str, at_most: int) -> list[str] | None:
        names: list[str] = []
        query = {"limit": str(_NAMES_PAGE)}
        try:
            while len(names) < at_most:
                page = self._ask(path, query, accept=_METADATA_LIST)
                names += [objects.key(item)[1] for item in page.get("items") or ()]
                token = (page.get("metadata") or {}).get("continue")
                if not token:
                    break
                query["continue"] = str(token)
        except (RequestError, Malformed, AttributeError, TypeError):
            return None
        return names

    def _ask(
        self, path: str, query: dict[str, str] | None = None, accept: str = "application/json"
    ) -> Any:
        """For whom somebody waits. Raises RequestError."""
        with self._news:
            self._news.wait_for(lambda: self._connection or self._config_error, _ASKED_S)
            if self._connection is None:
                raise RequestError("not connected")
        return self._connection.get(path, query, accept=accept, patience_s=_ASKED_S)


def _pods_of(node: str) -> Resource[Pod]:
    escaped = node.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")
    selector = (("fieldSelector", f"spec.nodeName={escaped}"),)
    return Resource("pods", "/api/v1/pods", objects.pod, selector, label=node, cached=True)


def _slices_of(names: tuple[str, ...]) -> Resource[Slice]:
    return Resource(
        "endpointslices",
        "/apis/discovery.k8s.io/v1/endpointslices",
        objects.endpoint_slice,
        (("labelSelector", f"kubernetes.io/service-name in ({','.join(names)})"),),
        group="discovery.k8s.io",
    )


def _with_endpoints(known: KnownService, parts: list[Slice]) -> Service:
    names = {name for name, _ in known.dns_ports}
    ports = dict.fromkeys(number for part in parts for name, number in part.ports if name in names)
    addresses = dict.fromkeys(e.ip for part in parts for e in part.endpoints if e.ready)
    return replace(
        known.service,
        endpoints=tuple(addresses),
        target_ports=tuple(ports) or known.service.target_ports,
    )


def _resource_status(reflector: Reflector[Any], now_s: float) -> ResourceStatus:
    condition, resource = reflector.condition, reflector.resource
    return ResourceStatus(
        name=f"{resource.name} of {resource.label}" if resource.label else resource.name,
        synced=condition.synced,
        contact_s=_since(condition.contact_s, now_s),
        failing_s=_since(condition.failing_since_s, now_s),
        error=condition.error,
        status=condition.status,
        requests=condition.requests,
        lists=condition.lists,
        objects=len(reflector.objects),
        malformed=condition.malformed,
    )


def _since(then_s: float | None, now_s: float) -> float | None:
    return None if then_s is None else now_s - then_s


def _worth_telling(resource: ResourceStatus) -> bool:
    return (
        not resource.synced
        or resource.status is not None
        or (resource.failing_s or 0.0) >= _TOLD_AFTER_S
    )


def _unreachable(away: list[ResourceStatus], server: str | None, *, known: bool) -> str:
    longest = max(away, key=lambda r: r.failing_s or 0.0)
    for_s = longest.failing_s or 0.0
    if known:
        since = f"has been unreachable for {for_s:.0f} s"
        return f"the API server {since} ({longest.error}): names may be out of date"
    return f"the API server {server} cannot be reached ({longest.error}): pods are not known yet"


def _count(what: Sized, name: str) -> str:
    return f"{len(what)} {name}{'' if len(what) == 1 else 's'}"
