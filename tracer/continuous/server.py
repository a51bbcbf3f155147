# SPDX-License-Identifier: Apache-2.0
"""Metrics over HTTP, for whoever comes.

`/metrics`, `/healthz` (the tracing thread makes headway) and `/readyz` (programs are attached).
"""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tracer.continuous import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tracer.continuous.metrics import Figures

_AT_ONCE = 32  # requests; one more, and the oldest is cut off
_THREADS_MAX = 2 * _AT_ONCE
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_REQUEST_S = 10.0


class Server:
    """Answers scrapes and probes in threads of its own. Raises OSError if it cannot listen."""

    def __init__(self, host: str, port: int, figures: Figures) -> None:
        from prometheus_client.exposition import choose_encoder

        def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if environ.get("REQUEST_METHOD") != "GET":
                start("405 Method Not Allowed", [("Allow", "GET")])
                return []
            accept = environ.get("HTTP_ACCEPT", "")
            if path == "/metrics" and native.is_asked_for(accept):
                start("200 OK", [("Content-Type", native.CONTENT_TYPE)])
                return [figures.rendered(native.CONTENT_TYPE, figures.protobuf)]
            if path == "/metrics":
                # Not as it is asked for: each way to say it would be rendered anew.
                is_open = "application/openmetrics-text" in accept
                encode, content_type = choose_encoder(_OPENMETRICS if is_open else "")
                start("200 OK", [("Content-Type", content_type)])
                return [figures.rendered(content_type, lambda: figures.text(encode))]
            if path == "/healthz":
                return _answer(start, figures.problem())
            if path == "/readyz":
                ready = figures.is_ready()
                return _answer(start, None if ready else figures.problem() or "not tracing yet")
            start("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"/metrics, /healthz, /readyz\n"]

        self._server = make_server(
            host, port, application, _Server6 if ":" in host else _Server, handler_class=_Handler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens: another than asked for if that was 0."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S  # a client that says nothing does not keep a thread for ever

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._thread_room = threading.BoundedSemaphore(_THREADS_MAX)
        self._open: dict[int, Any] = {}  # sockets, the oldest first
        self._open_lock = threading.Lock()
        super().__init__(*arguments, **more)

    def server_bind(self) -> None:
        """Without asking the DNS for our own name, which may be what is broken."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own. Where there are too many, whoever has taken longest has to go:
        a probe is answered even if others say nothing, or a byte every few seconds."""
        if not self._thread_room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._open_lock:
            if len(self._open) >= _AT_ONCE:
                oldest = self._open.pop(next(iter(self._open)))
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[id(request)] = request
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started just now
            self._done_with(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives the room back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._done_with(request)

    def _done_with(self, request: Any) -> None:
        with self._open_lock:
            self._open.pop(id(request), None)
        self._thread_room.release()

    def handle_error(self, *_: object) -> None:
        """Whoever asked has gone."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _answer(start: Callable[..., Any], problem: str | None) -> list[bytes]:
    status = "503 Service Unavailable" if problem else "200 OK"
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{problem or 'ok'}\n".encode()]
