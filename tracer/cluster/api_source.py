# SPDX-License-Identifier: Apache-2.0
"""The way to the API server: where it is written down, and what it says there.

The `kubernetes` client reads configurations and authenticates, in a process of its own (see
kubeconfig.py).
"""

from __future__ import annotations

import base64
import os
import pwd
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from tracer.cluster import kubeconfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_SERVICE_AUTHORITY = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
# What installers leave on a node; the kubelet's own may read what is on its node.
_WELL_KNOWN = (
    "/etc/kubernetes/admin.conf",
    "/etc/rancher/k3s/k3s.yaml",
    "/etc/rancher/rke2/rke2.yaml",
    "/var/lib/k0s/pki/admin.conf",
    "/var/snap/microk8s/current/credentials/client.config",
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/kubeconfig",
)
_OPENED = "/dev/fd/"
_CONFIG_MAX = 16 << 20
_WORDS_MAX = 200


class ConfigError(Exception):
    """The configuration of a cluster cannot be used. One line: what is wrong, and where."""


def one_line(text: str) -> str:
    """Text of strangers, so that it can be shown within a line."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[:4096]).split())
    return words if len(words) <= _WORDS_MAX else words[: _WORDS_MAX - 1] + "…"


@dataclass(frozen=True, slots=True)
class ApiSource:
    """Where the way to an API server is written down.

    `paths` are kubeconfig files that complement each other; none is the pod's service account.
    `found` says how it was chosen.
    """

    paths: tuple[str, ...]
    context: str | None
    found: str

    def __str__(self) -> str:
        if not self.paths:
            return f"this pod's service account ({self.found})"
        context = f", context {one_line(self.context)}" if self.context else ""
        return f"{one_line(':'.join(self.paths))} ({self.found}{context})"


def find(
    kubeconfig: str | None = None,
    context: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> ApiSource | None:
    """Where kubectl would look, then where installers leave it; None if this host has nothing.

    Raises ConfigError if what was asked for by name is not there.
    """
    source = _find(kubeconfig, context, environ)
    if context is not None:
        if source is None or not source.paths:
            raise ConfigError(
                f"--context {one_line(context)} needs a kubeconfig: give --kubeconfig"
            )
        _check_context(source.paths, context)
    return source


def _find(
    kubeconfig: str | None, context: str | None, environ: Mapping[str, str]
) -> ApiSource | None:
    if kubeconfig is not None:
        path = os.path.abspath(kubeconfig)
        try:
            os.stat(path)  # not opened: what is in a pipe can be read only once
        except OSError as error:
            what = f"cannot read kubeconfig {kubeconfig}: {error.strerror}"
            raise ConfigError(one_line(what)) from error
        return ApiSource((path,), context, "--kubeconfig")
    named = [os.path.expanduser(path) for path in environ.get("KUBECONFIG", "").split(":") if path]
    paths = tuple(os.path.abspath(path) for path in named if os.path.isfile(path))
    if paths:
        return ApiSource(paths, context, "KUBECONFIG")
    if named:
        # Whoever wrote it means another cluster than one that is found elsewhere.
        raise ConfigError(one_line(f"no file is where KUBECONFIG says: {':'.join(named)}"))
    for home, whose in _homes(environ):
        path = os.path.join(home, ".kube/config")
        if os.path.isfile(path):
            return ApiSource((path,), context, whose)
    if environ.get("KUBERNETES_SERVICE_HOST") and os.path.isfile(_SERVICE_ACCOUNT):
        return ApiSource((), None, "KUBERNETES_SERVICE_HOST")
    for path in _WELL_KNOWN:
        if os.access(path, os.R_OK):
            return ApiSource((path,), context, "found on this node")
    return None


def _homes(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield environ.get("HOME") or os.path.expanduser("~"), "of this user"
    user = environ.get("SUDO_USER")
    if user and os.geteuid() == 0:
        with suppress(KeyError, ValueError):
            yield pwd.getpwnam(user).pw_dir, one_line(f"of {user}, by sudo")


def _check_context(paths: tuple[str, ...], context: str) -> None:
    """Raises ConfigError if no file has the context, or if one is no kubeconfig."""
    import yaml

    known: list[str] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = yaml.safe_load(file.read(_CONFIG_MAX))
            known += [str(entry["name"]) for entry in content.get("contexts") or ()]
        except OSError as error:
            raise ConfigError(one_line(f"cannot read {path}: {error.strerror}")) from error
        except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(one_line(f"{path} is not a kubeconfig")) from error
    if context not in known:
        have = f"; there are: {', '.join(known[:10])}" if known else ""
        raise ConfigError(one_line(f"there is no context {context} in {':'.join(paths)}{have}"))


@dataclass(frozen=True, slots=True)
class Way:
    """As in kubeconfig.FOUND; files as what is in them."""

    host: str
    authorization: str | None = None
    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    verify: bool = True
    server_name: str | None = None
    proxy: str | None = None


def read(source: ApiSource) -> Way:
    """What is written there. Raises ConfigError.

    May run a command, if the configuration says that one has the credentials.
    """
    if not source.paths:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{what}", "") for what in ("HOST", "PORT"))
        at = f"[{host}]" if ":" in host else host
        try:
            token = _read(_SERVICE_ACCOUNT).decode(errors="replace").strip()
            authority = _read(_SERVICE_AUTHORITY)
        except OSError as error:
            raise ConfigError(one_line(f"{source}: {error.filename}: {error.strerror}")) from error
        if not token or not authority.strip():
            raise ConfigError(one_line(f"{source}: the token or the certificate is empty"))
        return Way(f"https://{at}:{port or 443}", f"Bearer {token}", authority)
    command = [sys.executable, "-P", kubeconfig.__file__]
    command += [":".join(source.paths), source.context or "", str(source)]
    # What a shell has opened for us (`--kubeconfig <(…)`) is read there, once.
    opened = [int(path[len(_OPENED) :]) for path in source.paths if path.startswith(_OPENED)]
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, pass_fds=opened).stdout
        found = orjson.loads(said)
    except (OSError, subprocess.SubprocessError, orjson.JSONDecodeError) as error:
        raise ConfigError(one_line(f"{source} cannot be read: {error}")) from error
    if "error" in found:
        raise ConfigError(one_line(found["error"]))
    for name in ("authority", "certificate", "key"):
        found[name] = base64.b64decode(found[name]) if found[name] is not None else None
    return Way(**found)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_CONFIG_MAX)
