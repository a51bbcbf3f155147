# SPDX-License-Identifier: Apache-2.0
"""Requests to the API server.

What comes back is handed on as bytes: the `kubernetes` client's model objects would take a hundred
kilobytes per pod.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import orjson

from tracer.cluster import api_source
from tracer.cluster.api_source import ConfigError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import urllib3

    from tracer.cluster.api_source import ApiSource, Way

_ERROR_BODY_MAX = 64 << 10
_BODY_MAX = 128 << 20
_PIECE = 64 << 10
_PATIENCE_S = 30.0
# A peer that is gone is noticed within 25 s, even where it owes no answer.
_KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class RequestError(Exception):
    """No answer, or one that says no: `status` is HTTP's, None if there was none. One line."""

    def __init__(self, words: str, status: int | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(one_line(words))
        self.status = status
        self.retry_after_s = retry_after_s


class Silence(RequestError):
    """Nothing came for as long as one was ready to wait."""


class Connection:
    """Requests to an API server, from any thread. `made` counts them.

    Credentials that the server no longer takes are read again, and so is whom to trust, where the
    server is not trusted any more.
    """

    _pool: urllib3.PoolManager

    def __init__(self, source: ApiSource) -> None:
        self.made = 0
        self._source = source
        self._lock = threading.Lock()
        self._files: list[int] = []
        self._loaded = 0  # how often
        self._load()

    @property
    def server(self) -> str:
        """The API server's URL."""
        return one_line(self._way.host)

    def get(
        self,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        accept: str = "application/json",
        patience_s: float = _PATIENCE_S,
    ) -> Any:
        """What the server has there, parsed. Raises RequestError."""
        with self.stream(path, query, accept=accept, patience_s=patience_s) as stream:
            body = stream.rest()
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{self.server} does not answer in JSON: {error}") from error

    @contextmanager
    def stream(
        self,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        accept: str = "application/json",
        patience_s: float = _PATIENCE_S,
    ) -> Iterator[Stream]:
        """The bytes of an answer, as they come. Raises RequestError, in the block too.

        Patience is for each piece of it; to connect, a part of it must do.
        """
        import urllib3

        loaded = self._loaded
        value = self._way.authorization
        authorization = {"Authorization": value} if value else {}
        try:
            with _in_words(self.server, patience_s):
                self.made += 1
                response = self._pool.request(
                    "GET",
                    self._way.host + path,
                    fields=query,
                    headers={"Accept": accept, "User-Agent": "dnstrace", **authorization},
                    timeout=urllib3.Timeout(connect=min(patience_s, 5.0), read=patience_s),
                    preload_content=False,
                    retries=False,
                    redirect=False,
                )
        except RequestError as error:
            if isinstance(error.__cause__, urllib3.exceptions.SSLError):
                self._load_again(loaded)
            raise
        try:
            stream = Stream(response, self.server, patience_s)
            if response.status == 401:
                self._load_again(loaded)
            if response.status != 200:
                raise _refusal(stream, response.status, response.headers)
            yield stream
        finally:
            # Of what was not read to the end, the connection cannot be used again.
            with suppress(OSError, urllib3.exceptions.HTTPError):
                response.close()

    def close(self) -> None:
        """No requests may be made any more."""
        self._pool.clear()
        _close(self._files)

    def _load_again(self, loaded: int) -> None:
        """Reads the configuration again, unless another thread has done so since."""
        with self._lock:
            if self._loaded == loaded:
                with suppress(ConfigError):  # what there was may be taken again later
                    self._load()

    def _load(self) -> None:
        way = api_source.read(self._source)
        files: list[int] = []
        try:
            pool = _pool(way, files)
        except (ImportError, OSError, ValueError) as error:  # of a proxy's URL; of a full disk
            _close(files)
            raise ConfigError(one_line(f"{self._source}: {error}")) from error
        if self._loaded:
            self._pool.clear()  # what is in use is closed by whoever uses it
        self._way, self._pool = way, pool
        self._loaded += 1
        _close(self._files)
        self._files = files


def _pool(way: Way, files: list[int]) -> urllib3.PoolManager:
    """`files` takes the descriptors that it needs. Raises ImportError, OSError, ValueError."""
    import urllib3

    settings: dict[str, Any] = {
        "cert_reqs": "CERT_REQUIRED" if way.verify else "CERT_NONE",
        "ca_certs": _in_memory("authority", way.authority, files),
        "cert_file": _in_memory("certificate", way.certificate, files),
        "key_file": _in_memory("key", way.key, files),
        "socket_options": list(_KEEPALIVE),
        "maxsize": 16,
    }
    if way.server_name:
        settings["server_hostname"] = way.server_name
    if not way.verify:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    if way.proxy is None:
        return urllib3.PoolManager(**settings)
    if way.proxy.startswith("socks"):
        from urllib3.contrib.socks import SOCKSProxyManager

        return SOCKSProxyManager(way.proxy, **settings)
    return urllib3.ProxyManager(way.proxy, **settings)


def _in_memory(name: str, content: bytes | None, files: list[int]) -> str | None:
    """A path for TLS, which takes keys from files only: none is on disk if we are killed."""
    if content is None:
        return None
    kept = os.memfd_create(f"dnstrace-{name}")
    files.append(kept)
    os.write(kept, content)
    return f"/proc/self/fd/{kept}"


class Stream:
    """An answer's bytes."""

    def __init__(self, response: Any, server: str, patience_s: float) -> None:
        self._response = response
        self._server = server
        self._patience_s = patience_s

    def pieces(self) -> Iterator[bytes]:
        """Each as soon as it is there. Raises RequestError."""
        pieces = self._response.stream(_PIECE, decode_content=False)
        while True:
            with _in_words(self._server, self._patience_s):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def rest(self, at_most: int = _BODY_MAX) -> bytes:
        """All of it. Raises RequestError if that is more than one should take."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > at_most:
                raise RequestError(f"an answer is larger than {at_most >> 20} MiB")
        return bytes(body)

    def cut(self) -> None:
        """Ends it, for whoever waits for its next piece in another thread."""
        with suppress(OSError, ValueError, RuntimeError, AttributeError):
            self._response.shutdown()


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


@contextmanager
def _in_words(server: str, patience_s: float) -> Iterator[None]:
    """Turns what may go wrong with a connection into RequestError."""
    import urllib3

    try:
        yield
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as error:
        raise Silence(f"no answer within {patience_s:g} s") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise RequestError(_words(error, server)) from error
    except (ValueError, AttributeError) as error:  # of a socket that was closed meanwhile, or a URL
        raise RequestError(f"the connection to {server} broke: {error}") from error


def _words(error: BaseException, server: str) -> str:
    """What an error of a connection means. The reason is in one of its causes."""
    import urllib3

    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            break
        words = _meaning(seen, server)
        if words:
            return words
        seen = seen.__cause__ or seen.__context__ or _reason(seen)
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return f"no answer from {server}"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection broke"
    return f"{type(error).__name__}: {error}"


def _meaning(error: BaseException, server: str) -> str | None:
    import ssl

    import urllib3

    words = None
    match error:
        case ssl.SSLCertVerificationError():
            words = f"{server} is not trusted: {error.verify_message or error.reason}"
        case ssl.SSLError():
            words = f"TLS with {server} failed: {error.reason or error}"
        case urllib3.exceptions.NameResolutionError() | socket.gaierror():
            words = f"the name of {server} cannot be resolved"
        case OSError() if error.errno is not None and error.errno in errno.errorcode:
            words = os.strerror(error.errno).lower()
    return words


def _reason(error: BaseException) -> BaseException | None:
    """urllib3 puts the cause into an attribute, or among the arguments."""
    for held in (getattr(error, "reason", None), *error.args):
        if isinstance(held, BaseException):
            return held
    return None


def _refusal(stream: Stream, status: int, headers: Mapping[str, str]) -> RequestError:
    """The server's own words, if it has some."""
    message = ""
    with suppress(RequestError, orjson.JSONDecodeError):
        body = orjson.loads(stream.rest(_ERROR_BODY_MAX))
        if isinstance(body, dict) and isinstance(body.get("message"), str):
            message = body["message"]
    after = headers.get("Retry-After", "")
    retry_after_s = float(after) if after.isascii() and after.isdigit() and len(after) < 4 else 0.0
    return RequestError(f"HTTP {status}{': ' + message if message else ''}", status, retry_after_s)
