# SPDX-License-Identifier: Apache-2.0
"""The user's filters as one function of a transaction. All of them must hold."""

from __future__ import annotations

import fnmatch
import functools
import ipaddress
import re
import shlex
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from tracer import decode
from tracer.cluster import selector
from tracer.decode.words import is_counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tracer.cluster.identities import Who
    from tracer.transaction import Backend, Client, Transaction

    Owner = Client | Backend | Who
    LabelsOf = Callable[[str | None, str | None], Mapping[str, str] | None]
    Predicate = Callable[[Transaction], bool]
    Side = Literal["client", "server"]

_OPTIONS = {"namespaces": "namespace", "pods": "pod"}  # where they are not called as here
COMM_LEN_MAX = 15  # TASK_COMM_LEN without the zero byte: the kernel cuts longer names
_UNITS_NS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000}  # fmt: skip
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(ns|us|µs|ms|s|m|h)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Filters:
    """What is asked for, as it is written on the command line.

    Namespaces and pods are those of the client, or with `side` "server" of who answered; one of
    several must match. Names of pods, containers, processes and questions are globs.
    """

    namespaces: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    selector: str | None = None
    container: str | None = None
    pid: int | None = None
    comm: str | None = None
    name: str | None = None
    type: str | None = None
    rcode: str | None = None
    failed: bool = False
    slower: str | None = None
    server: str | None = None
    backend: str | None = None
    side: Side = "client"

    @property
    def tear_lookups(self) -> bool:
        """Whether one application's queries may be kept in part, so that lookups make no sense."""
        of_transactions = (
            self.name, self.type, self.rcode, self.failed, self.slower, self.server, self.backend
        )  # fmt: skip
        return any(of_transactions) or self.side == "server"

    def spelled(self) -> str:
        """As on the command line; empty if nothing is filtered."""
        told = []
        for each in fields(self):
            value = getattr(self, each.name)
            option = f"--{_OPTIONS.get(each.name, each.name)}"
            if value is True:
                told.append(option)
            elif value != each.default:
                values = value if isinstance(value, tuple) else (value,)
                told += [f"{option} {shlex.quote(str(one))}" for one in values]
        return " ".join(told)

    @property
    def is_open(self) -> bool:
        """Whether nothing is filtered."""
        return self == Filters()

    def pods_wanted(self, labels_of: LabelsOf) -> Callable[[Owner], bool]:
        """Whether a pod is asked for, by its namespace, name and labels."""
        checks = []
        if self.namespaces:
            checks.append(_in_namespace(self.namespaces))
        if self.pods:
            checks.append(_of_pod(self.pods))
        if self.selector is not None:
            checks.append(_with_labels(self.selector, labels_of))
        return lambda owner: all(check(owner) for check in checks)

    def container_wanted(self) -> Callable[[Owner], bool] | None:
        """The same for containers; None if any will do."""
        return None if self.container is None else _of_container(self.container)

    def backend_wanted(self) -> Callable[[str | None, str], bool] | None:
        """Whether a pod (namespace, name) is the backend; None if none is asked for by name."""
        if self.backend is None or _backendip_named(self.backend) is not None:
            return None
        return _pod_glob(self.backend)

    def require_counted(self) -> None:
        """Raises ValueError if counts by type cannot tell what is asked for."""
        if self.type is not None and not is_counted(named := decode.type_named(self.type)):
            raise ValueError(
                f"--type {named}: rare types are counted together, under the type 'other'; "
                "dnstrace without 'continuous' traces them one by one"
            )

    def predicate(self, labels_of: LabelsOf = lambda _namespace, _pod: None) -> Predicate:
        """Whether a transaction is asked for. ValueError says which value makes no sense.

        `labels_of(namespace, pod)` are a pod's, None if they are not known.
        """
        checks = [
            make(value, self.side)
            for field, make in _MAKERS.items()
            if (value := getattr(self, field)) not in (None, (), False)
        ]
        if self.namespaces or self.pods or self.selector is not None:
            wanted = self.pods_wanted(labels_of)
            if self.side == "client":
                checks.append(lambda t: wanted(t.client))
            else:
                checks.append(lambda t: t.backend is not None and wanted(t.backend))
        container = self.container_wanted()
        if container is not None:
            checks.append(lambda t: container(t.client))
        if len(checks) == 1:
            return checks[0]
        return lambda t: all(check(t) for check in checks)


def has_failed(t: Transaction) -> bool:
    """Whether there was no answer, or one with an error code; NXDOMAIN is one."""
    return t.status != "answered" or t.rcode not in ("NOERROR", None)


def duration_ns(text: str) -> int:
    """ "5ms", "1.5s", "200us" or "2m" in nanoseconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time; write a number with ns, us, ms, s or m: 5ms")
    number, unit = match.groups()
    whole, _, fraction = number.partition(".")
    unit_ns = _UNITS_NS[unit]
    return int(whole) * unit_ns + int(fraction.ljust(9, "0")) * unit_ns // 1_000_000_000


def _in_namespace(wanted: tuple[str, ...]) -> Callable[[Owner], bool]:
    if not all(wanted):
        raise ValueError("a namespace has a name")
    return lambda owner: owner.namespace in wanted


def _of_pod(globs: tuple[str, ...]) -> Callable[[Owner], bool]:
    matches = [_pod_glob(glob) for glob in globs]

    def of_pod(owner: Owner) -> bool:
        pod = owner.pod
        return pod is not None and any(match(owner.namespace, pod) for match in matches)

    return of_pod


def _with_labels(text: str, labels_of: LabelsOf) -> Callable[[Owner], bool]:
    fits = selector.parse(text)

    def with_labels(owner: Owner) -> bool:
        labels = labels_of(owner.namespace, owner.pod)
        return labels is not None and fits(labels)

    return with_labels


def _of_pid(pid: int) -> Predicate:
    return lambda t: t.client.pid == pid


def _of_container(pattern: str) -> Callable[[Owner], bool]:
    match = _glob("container", pattern)

    def of_container(owner: Owner) -> bool:
        container = getattr(owner, "container", None)  # of who answers it is not known
        return container is not None and match(container)

    return of_container


def _of_process(pattern: str) -> Predicate:
    match = _glob("comm", pattern[:COMM_LEN_MAX] if not re.search(r"[*?\[]", pattern) else pattern)
    return lambda t: t.client.comm is not None and match(t.client.comm)


def _named(pattern: str) -> Predicate:
    lower = pattern.lower()
    match = _glob("name", lower.removesuffix(".") or lower)

    @functools.lru_cache(maxsize=4096)
    def matches(name: str) -> bool:
        lower = name.lower()
        return match(lower.removesuffix(".") or lower)

    return lambda t: t.name is not None and matches(t.name)


def _of_type(text: str) -> Predicate:
    type_ = decode.type_named(text)
    return lambda t: t.type == type_


def _with_rcode(text: str) -> Predicate:
    rcode = decode.rcode_named(text)
    return lambda t: t.rcode == rcode


def _slower(text: str) -> Predicate:
    """Who got no answer has waited longer than anybody; a refusal is no wait."""
    at_least_ns = duration_ns(text)

    def slower(t: Transaction) -> bool:
        if t.latency_ns is None:
            return t.status in ("timeout", "dropped")
        return t.latency_ns >= at_least_ns

    return slower


def _sent_to(text: str) -> Predicate:
    ip = ip_named("server", text)
    return lambda t: t.server.ip == ip


def _backendip_named(text: str) -> str | None:
    """None: it is a pod's name."""
    try:
        return ip_named("backend", text)
    except ValueError:
        if ":" in text or re.fullmatch(r"[\d.]+", text):
            raise
    return None


def _answered_by(text: str) -> Predicate:
    ip = _backendip_named(text)
    if ip is not None:
        return lambda t: t.backend is not None and t.backend.ip == ip
    match = _pod_glob(text)

    def answered_by(t: Transaction) -> bool:
        backend = t.backend
        return (
            backend is not None
            and backend.pod is not None
            and match(backend.namespace, backend.pod)
        )

    return answered_by


def _pod_glob(pattern: str) -> Callable[[str | None, str], bool]:
    """A pod's name, or "namespace/name"."""
    match = _glob("pod", pattern)
    if "/" not in pattern:
        return lambda _, pod: match(pod)
    return lambda namespace, pod: match(f"{namespace}/{pod}")


def _glob(what: str, pattern: str) -> Callable[[str], bool]:
    if not pattern:
        raise ValueError(f"{what} is empty; write a name or a pattern such as 'web-*'")
    matches = re.compile(fnmatch.translate(pattern)).match
    return lambda text: matches(text) is not None


def ip_named(what: str, text: str) -> str:
    """An address as transactions have it: IPv4 is that, even mapped into IPv6. Raises ValueError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{what} {text!r} is not an IP address") from None
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


_MAKERS: dict[str, Callable[[Any, Side], Predicate]] = {
    "pid": lambda value, _: _of_pid(value),
    "comm": lambda value, _: _of_process(value),
    "name": lambda value, _: _named(value),
    "type": lambda value, _: _of_type(value),
    "rcode": lambda value, _: _with_rcode(value),
    "failed": lambda _, __: has_failed,
    "slower": lambda value, _: _slower(value),
    "server": lambda value, _: _sent_to(value),
    "backend": lambda value, _: _answered_by(value),
}
