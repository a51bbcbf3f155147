# SPDX-License-Identifier: Apache-2.0
"""Keeps a copy of some of the API server's objects: lists them once, then watches what changes.

    list, page by page ─▶ watch from there on ─▶ again from the last version seen, when it breaks
          ▲                                  │
          └── 410 Gone: too old to be told ──┘

What is watched, and how an object is cut down, is a Resource; a Reflector follows one in a thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import orjson

from tracer.cluster import objects
from tracer.cluster.api import RequestError, Silence, Stream
from tracer.cluster.api_source import one_line
from tracer.cluster.objects import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tracer.cluster.api import Connection
    from tracer.cluster.objects import Key

T = TypeVar("T")

_DELETED_MAX = 256
_DENIALS_BELIEVED = 4  # an API server that starts denies all until it has read who may do what
_LINE_MAX = 8 << 20  # etcd keeps objects of up to 1.5 MiB


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a Reflector is, in seconds.

    The server ends a watch after `watch_s`, and sends a bookmark each minute; without a word for
    `quiet_s`, it is asked anew. `denied_s` is until what was forbidden is tried again.
    """

    answer_s: float = 30.0
    watch_s: int = 300
    quiet_s: float = 75.0
    first_retry_s: float = 0.2
    last_retry_s: float = 10.0
    denied_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Resource(Generic[T]):
    """Objects of one kind. `read` cuts one down: None is not to be kept; it may raise Malformed.

    `label` says which of them the selector selects, for people. `cached` takes the list from the server's memory, all at once: for few of many objects.
    """

    name: str
    path: str
    read: Callable[[Mapping[str, Any]], T | None]
    selector: tuple[tuple[str, str], ...] = ()
    label: str = ""
    group: str = ""
    page: int = 100
    cached: bool = False

    @property
    def rule(self) -> str:
        """The RBAC rule that reading it takes."""
        return f'apiGroups: ["{self.group}"], resources: ["{self.name}"], verbs: ["list", "watch"]'


class Lines:
    """Bytes in pieces, as they come, to lines. A line that is too long is left out, and counted."""

    def __init__(self, at_most: int = _LINE_MAX) -> None:
        self.left_out = 0
        self._at_most = at_most
        self._begun = bytearray()
        self._skipping = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends."""
        *complete, rest = piece.split(b"\n")
        lines = []
        for part in complete:
            self._begun += part
            if not self._skipping and len(self._begun) <= self._at_most:
                lines.append(bytes(self._begun))
            elif not self._skipping:
                self.left_out += 1
            self._skipping = False
            self._begun = bytearray()
        self._begun += rest
        if len(self._begun) > self._at_most:
            self.left_out += not self._skipping
            self._skipping = True
        if self._skipping:
            self._begun.clear()
        return [line for line in lines if line.strip()]


class Backoff:
    """How long to wait after one more failure: longer each time, never the same for two clients."""

    def __init__(self, first_s: float, last_s: float, rng: Callable[[], float] = random.random):
        self._first_s, self._last_s, self._rng = first_s, last_s, rng
        self._failures = 0

    def next_s(self) -> float:
        """Seconds."""
        longest = min(self._last_s, self._first_s * (1 << min(self._failures, 30)))
        self._failures += 1
        return longest * (0.5 + self._rng() / 2)

    def reset(self) -> None:
        """It works again."""
        self._failures = 0


class _Gone(Exception):
    """The server no longer knows what has changed since the version that was asked from."""


def _until_silence(stream: Stream) -> Iterator[bytes]:
    """A server may well have nothing to tell. If it cannot any more, that shows when asked anew."""
    with suppress(Silence):
        yield from stream.pieces()


@dataclass(slots=True)
class Condition:
    """How a Reflector does. Times are monotonic seconds; `status` is HTTP's, of the last failure."""

    synced: bool = False
    contact_s: float | None = None
    failing_since_s: float | None = None
    error: str | None = None
    status: int | None = None
    requests: int = 0
    lists: int = 0
    malformed: int = 0

    @property
    def settled(self) -> bool:
        """All there is to know is known; or it is known that it cannot be."""
        return self.synced or self.status in (403, 404)


@dataclass
class Reflector(Generic[T]):
    """Follows a resource until it is stopped. `objects` may be read under `lock`, and those that
    were `deleted` last.

    `changed` is called, under the lock too, whenever they differ or are known for the first time.
    """

    connection: Connection
    resource: Resource[T]
    lock: threading.RLock
    changed: Callable[[], None]
    timing: Timing = field(default_factory=Timing)
    objects: dict[Key, T] = field(default_factory=dict)
    condition: Condition = field(default_factory=Condition)
    deleted: deque[T] = field(default_factory=lambda: deque(maxlen=_DELETED_MAX))

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._version: str | None = None
        self._relist = False
        self._denials = 0
        self._stream: Stream | None = None
        self._backoff = Backoff(self.timing.first_retry_s, self.timing.last_retry_s)
        self.thread = threading.Thread(
            target=self._run, name=f"watch {self.resource.name}", daemon=True
        )

    def start(self) -> None:
        """Returns at once."""
        self.thread.start()

    def stop(self) -> None:
        """Returns at once. A thread that a server keeps waiting ends when its patience does."""
        self._stopping.set()
        stream = self._stream
        if stream is not None:
            stream.cut()

    def _run(self) -> None:
        while not self._stopping.is_set():
            wait_s = 0.0
            try:
                if self._version is None:
                    self._list()
                self._watch()
            except _Gone:
                self._version, self._relist = None, True
                wait_s = self._backoff.next_s()  # a server that says so each time is not to be hit
            except RequestError as error:
                wait_s = self._failed(error)
            except Exception as error:  # noqa: BLE001 - names would go stale without a word
                fault = RequestError(f"a fault of dnstrace: {type(error).__name__}: {error}")
                wait_s = self._failed(fault)
            self._stopping.wait(wait_s)

    def _failed(self, error: RequestError) -> float:
        """Takes note of it; how many seconds to wait."""
        condition = self.condition
        if self._stopping.is_set():
            return 0.0
        with self.lock:
            if condition.failing_since_s is None:
                condition.failing_since_s = time.monotonic()
            condition.status = error.status
            condition.error = self._told(error)
            if not condition.synced and condition.settled:
                self.changed()
        self._denials = self._denials + 1 if error.status in (403, 404) else 0
        wait_s = max(self._backoff.next_s(), error.retry_after_s)
        return max(wait_s, self.timing.denied_s) if self._denials >= _DENIALS_BELIEVED else wait_s

    def _told(self, error: RequestError) -> str:
        """Its words, with what can be done."""
        if error.status == 401:
            return "the credentials are not accepted (HTTP 401)"
        if error.status == 403:
            return f"not allowed; the RBAC rule that is missing: {self.resource.rule}"
        if error.status == 404:
            return f"this API server has no {self.resource.name} ({self.resource.path})"
        return str(error)

    def _heard(self) -> None:
        """The server has answered."""
        condition = self.condition
        condition.contact_s = time.monotonic()
        if condition.failing_since_s is not None:
            with self.lock:
                condition.failing_since_s = condition.error = condition.status = None
            self._denials = 0

    def _list(self) -> None:
        """Learns all of them anew. Raises RequestError."""
        found: dict[Key, T] = {}
        query = {"limit": str(self.resource.page), **dict(self.resource.selector)}
        if self.resource.cached and not self._relist:
            query["resourceVersion"] = "0"
        more = True
        while more:
            if self._stopping.is_set():
                raise RequestError("stopped")
            try:
                page = self._get(query)
            except RequestError as error:
                if error.status == 410 and "continue" in query:
                    raise _Gone from error  # it took too long
                raise
            metadata = page.get("metadata") if isinstance(page, dict) else None
            if not isinstance(metadata, dict):
                raise RequestError(f"what {self.resource.path} gives is no list")
            items = page.get("items")
            for raw in items if isinstance(items, list) else ():
                self._read_into(found, raw)
            version = metadata.get("resourceVersion")
            token = metadata.get("continue")
            more = isinstance(token, str) and token != ""
            query["continue"] = str(token)
            query.pop("resourceVersion", None)
        with self.lock:
            differs = not self.condition.synced or self.objects != found
            self.objects = found
            self.condition.synced = True
            self._version = version if isinstance(version, str) and version else None
            self.condition.lists += 1
            self._relist = False
            if differs:
                self.changed()
        if self._version is None:
            raise RequestError(f"what {self.resource.path} gives has no resourceVersion")

    def _get(self, query: Mapping[str, str]) -> Any:
        self.condition.requests += 1
        page = self.connection.get(self.resource.path, query, patience_s=self.timing.answer_s)
        self._heard()
        return page

    def _watch(self) -> None:
        """Takes in changes until the server ends it. Raises RequestError or _Gone."""
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version or "",
            # Not all of a cluster's clients at once.
            "timeoutSeconds": str(int(self.timing.watch_s * (1 + random.random()))),  # noqa: S311
            **dict(self.resource.selector),
        }
        began_s = time.monotonic()
        self.condition.requests += 1
        try:
            with self.connection.stream(
                self.resource.path, query, patience_s=self.timing.quiet_s
            ) as stream:
                self._stream = stream
                self._heard()
                self._follow(stream)
        except RequestError as error:
            if error.status == 410:
                raise _Gone from error
            raise
        finally:
            self._stream = None
        if time.monotonic() - began_s < 1.0:  # nobody ends a watch that soon, but broken proxies
            raise RequestError("the watch was ended at once")

    def _follow(self, stream: Stream) -> None:
        lines = Lines()
        if self._stopping.is_set():
            return
        for piece in _until_silence(stream):
            self._heard()
            for line in lines.feed(piece):
                self._take(line)
            if lines.left_out:
                # What it said is not known, so neither is what holds now.
                self.condition.malformed += lines.left_out
                raise _Gone
            if self._stopping.is_set():
                return

    def _take(self, line: bytes) -> None:
        """One event. Raises _Gone or RequestError."""
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"the watch does not speak JSON: {error}") from error
        kind = event.get("type") if isinstance(event, dict) else None
        raw = event.get("object") if isinstance(event, dict) else None
        if kind is None or not isinstance(raw, dict):
            self.condition.malformed += 1
            return
        if kind == "ERROR":
            code = raw.get("code")
            if code == 410:
                raise _Gone
            raise RequestError(f"the watch was ended: {one_line(str(raw.get('message')))}")
        if kind in ("ADDED", "MODIFIED"):
            self._change(raw)
        elif kind == "DELETED":
            self._delete(raw)
        self._backoff.reset()
        metadata = raw.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if isinstance(version, str) and version:
            self._version = version

    def _change(self, raw: dict[str, Any]) -> None:
        with self.lock:
            try:
                key = objects.key(raw)
                value = self.resource.read(raw)
            except Malformed:
                self.condition.malformed += 1
                return
            if value == self.objects.get(key):
                return
            if value is None:
                del self.objects[key]
            else:
                self.objects[key] = value
            self.changed()

    def _delete(self, raw: dict[str, Any]) -> None:
        with self.lock:
            try:
                known = self.objects.pop(objects.key(raw), None)
            except Malformed:
                self.condition.malformed += 1
                return
            if known is not None:
                self.deleted.append(known)
                self.changed()

    def _read_into(self, found: dict[Key, T], raw: Any) -> None:
        try:
            key = objects.key(raw)
            value = self.resource.read(raw)
        except Malformed:
            self.condition.malformed += 1
            return
        if value is not None:
            found[key] = value
