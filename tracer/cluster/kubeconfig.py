# SPDX-License-Identifier: Apache-2.0
"""Reads kubeconfig files, in a process of its own: `python kubeconfig.py PATHS CONTEXT TITLE`.

The `kubernetes` client does it, which takes 20 MiB that a tracer would keep for months. What it
finds goes to stdout as one JSON object: either `error`, one line, or the rest of FOUND.
"""

from __future__ import annotations

import base64
import json
import logging
import signal
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Strings, or null: files' content as base64, `authorization` as the header, `proxy` as a URL.
FOUND = ("host", "authorization", "authority", "certificate", "key", "server_name", "proxy")
_FILES = {"authority": "ssl_ca_cert", "certificate": "cert_file", "key": "key_file"}
_CONFIG_MAX = 16 << 20


class _Heard(logging.Handler):
    """Keeps what the client says of credentials; else it would print that, and go on without."""

    words = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.words = record.getMessage()


@contextmanager
def _listening() -> Iterator[_Heard]:
    log, heard = logging.getLogger(), _Heard(logging.ERROR)
    log.addHandler(heard)
    try:
        yield heard
    finally:
        log.removeHandler(heard)


def read(paths: str, context: str | None, title: str) -> dict[str, Any]:
    """What the files say, or what is wrong with them; `title` is what they are called."""
    import yaml
    from kubernetes import config
    from kubernetes.client import Configuration
    from kubernetes.client.rest import should_bypass_proxies

    configuration: Any = Configuration()
    configuration.host = ""
    # The client takes what is in a file for granted; it need not be a kubeconfig at all.
    try:
        with tempfile.TemporaryDirectory(prefix="dnstrace-") as directory:
            with _listening() as heard:
                config.load_kube_config(
                    paths, context, configuration, persist_config=False, temp_file_path=directory
                )
            files = {name: _content(getattr(configuration, at)) for name, at in _FILES.items()}
        bearer = configuration.auth_settings().get("BearerToken") or {}
    except config.ConfigException as error:
        return {"error": f"{title}: {error}"}
    except OSError as error:
        return {"error": f"{title}: {error.filename or ''} {error.strerror}"}
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        return {"error": f"{title} is not a kubeconfig: {error}"}
    if heard.words:
        return {"error": f"{title} gives no credentials: {heard.words}"}
    host = str(configuration.host)
    if not host.startswith(("https://", "http://")):
        return {"error": f"{title} names no server"}
    proxy = configuration.proxy
    if proxy and should_bypass_proxies(host, configuration.no_proxy or ""):
        proxy = None
    return {
        **files,
        "host": host,
        "authorization": str(bearer["value"]).strip() if bearer.get("value") else None,
        "verify": bool(configuration.verify_ssl),
        "server_name": configuration.tls_server_name,
        "proxy": proxy,
    }


def _content(path: object) -> str | None:
    if not path:
        return None
    with open(str(path), "rb") as file:
        return base64.b64encode(file.read(_CONFIG_MAX)).decode()


def main() -> None:
    """Says what it found. Ends quietly when it is told to, and leaves no files then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        found = read(sys.argv[1], sys.argv[2] or None, sys.argv[3])
    except Exception as error:  # noqa: BLE001 - whatever it is, the tracer must hear of it
        found = {"error": f"{sys.argv[3]}: {type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
