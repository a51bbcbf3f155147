# SPDX-License-Identifier: Apache-2.0
"""A real kube-apiserver with its etcd: two processes on the host, as a control plane has them.

The API server listens on 127.0.0.1 of the host, because the tracer runs there; the pods cannot
reach it. There is neither a scheduler nor a controller, nor a kubelet: what these would write,
`cluster_objects` does. All data is in the run directory; a restart finds it again.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any

from tracer.lab import cgroups, entering, go_build, state, topology
from tracer.lab.commands import run
from tracer.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tracer.lab.state import Process

ETCD = "etcd"
SERVER = "kube-apiserver"
NAMES = (ETCD, SERVER)
DIRECTORY = state.RUN_DIR / "api"
ADMIN_KUBECONFIG = state.RUN_DIR / "admin.kubeconfig"
# The tracer's, as the ServiceAccount of deploy/rbac.yaml.
KUBECONFIG = state.RUN_DIR / "kubeconfig"
ISSUER = "https://kubernetes.default.svc"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0

_USUAL_PORT = 6443
_POLL_S = 0.05
_KEY = DIRECTORY / "server.key"
_CERTIFICATE = DIRECTORY / "server.crt"
_TOKENS = DIRECTORY / "tokens.csv"
# etcd wants a port in its addresses, of Unix sockets too; they are in the directory it runs in.
_CLIENTS = "unix://localhost:2379"
_PEERS = "unix://localhost:2380"
_SOCKET = DIRECTORY / "localhost:2379"
# They ask for what a controller makes: ServiceAccounts, PriorityClasses, and the like.
_WITHOUT_ADMISSION = (
    "ServiceAccount",
    "DefaultTolerationSeconds",
    "Priority",
    "StorageObjectInUseProtection",
    "RuntimeClass",
    "TaintNodesByCondition",
)


def prepare() -> int:
    """Makes the directory with key, certificate and the admin's kubeconfig; the port to use."""
    DIRECTORY.mkdir(mode=0o700)
    port = _free_port()
    subject = ["-subj", "/CN=kube-apiserver", "-addext", "subjectAltName=IP:127.0.0.1"]
    usage = ["-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-days", "3650"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    files = ["-keyout", str(_KEY), "-out", str(_CERTIFICATE)]
    run(["openssl", "req", "-x509", *kind, *subject, *usage, *files])
    token = secrets.token_hex(16)
    _write_secret(_TOKENS, f'{token},admin,admin,"system:masters"\n')
    write_kubeconfig(ADMIN_KUBECONFIG, port, token)
    return port


def write_kubeconfig(path: Path, port: int, token: str) -> None:
    """A kubeconfig for whom the token names; JSON is YAML too."""
    name = "dnstrace-lab"
    cluster = {
        "server": f"https://127.0.0.1:{port}",
        "certificate-authority-data": base64.b64encode(_CERTIFICATE.read_bytes()).decode(),
    }
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    _write_secret(path, json.dumps(content, indent=1) + "\n")


def start(port: int, parent: Path, flags: Iterable[str] = ()) -> dict[str, Process]:
    """Starts both below the lab's cgroup, `flags` being more for kube-apiserver; does not wait."""
    binary = str(go_build.binary(go_build.APISERVER))
    argvs = {ETCD: _etcd(), SERVER: [*_server(port), *flags]}
    commands = {}
    for name, argv in argvs.items():
        cgroup = _cgroup(parent, name)
        cgroups.make(cgroup)
        entering.write_script(name, entering.host_script(cgroup, DIRECTORY))
        commands[name] = [*entering.command(name), binary, name, *argv]
    return entering.start(commands)


def wait_until_ready(server: Process, port: int) -> None:
    """Returns when the API server says so; LabError if it ends, or needs more than 90 s."""
    token = _TOKENS.read_text().partition(",")[0]
    context = ssl.create_default_context(cafile=str(_CERTIFICATE))

    def ready(_pid: int) -> bool:
        connection = HTTPSConnection("127.0.0.1", port, timeout=STOP_TIMEOUT_S, context=context)
        try:
            connection.request("GET", "/readyz", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    entering.wait_until(server, ready, timeout_s=START_TIMEOUT_S, poll_s=_POLL_S)


def stop(processes: Iterable[Process]) -> None:
    """Kills the processes as a crash would; etcd loses nothing, since the kernel goes on."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        if process.alive():
            os.kill(process.pid, signal.SIGKILL)
        while process.alive():
            if time.monotonic() > deadline:
                raise LabError(f"{process.name} does not end: run `dnstrace lab down`")
            time.sleep(0.002)


def remove(parent: Path) -> None:
    """Kills what `start` has started, also where that raised; and removes their cgroups."""
    for name in NAMES:
        cgroups.remove(_cgroup(parent, name))


def compact() -> int:
    """Has etcd forget all but the newest state of everything; the revision it is at.

    The API server goes on serving older watches from its own cache, unless that is off:
    start it with `--watch-cache=false`, or with `--watch-cache-sizes=pods#0` for one kind.
    """
    # A change of our own comes last: of the change at the compacted revision itself, etcd forgets
    # only what was there before, which the API server tells watchers as an internal error (500).
    key = base64.b64encode(b"/dnstrace-lab/compacted").decode()
    revision = int(_etcd_call("put", {"key": key})["header"]["revision"])
    _etcd_call("compaction", {"revision": revision, "physical": True})
    return revision


def _cgroup(parent: Path, name: str) -> Path:
    return parent / f"system.slice/{name}.service"


def _etcd() -> list[str]:
    return [
        "--name=lab",
        f"--data-dir={DIRECTORY}/etcd",
        f"--listen-client-urls={_CLIENTS}",
        f"--advertise-client-urls={_CLIENTS}",
        f"--listen-peer-urls={_PEERS}",
        f"--initial-advertise-peer-urls={_PEERS}",
        f"--initial-cluster=lab={_PEERS}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _server(port: int) -> list[str]:
    return [
        f"--etcd-servers=unix://{_SOCKET}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        f"--tls-cert-file={_CERTIFICATE}",
        f"--tls-private-key-file={_KEY}",
        f"--token-auth-file={_TOKENS}",
        "--anonymous-auth=false",
        "--authorization-mode=RBAC",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={_CERTIFICATE}",
        f"--service-account-signing-key-file={_KEY}",
        f"--service-cluster-ip-range={','.join(topology.SERVICE_NETWORKS)}",
        f"--disable-admission-plugins={','.join(_WITHOUT_ADMISSION)}",
        "--profiling=false",
        "--goaway-chance=0",
        "--shutdown-delay-duration=0s",
        "--delete-collection-workers=8",
    ]


def _free_port() -> int:
    """The usual port of API servers, or the next that is free: none that a client gets by chance."""
    for port in range(_USUAL_PORT, _USUAL_PORT + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LabError(f"no port from {_USUAL_PORT} on is free: see `ss -lnt`")


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket; `host` is its path."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def _etcd_call(method: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = _UnixConnection("localhost", timeout=STOP_TIMEOUT_S)
    connection.host = str(_SOCKET)
    try:
        connection.request("POST", f"/v3/kv/{method}", json.dumps(body), {"Host": "localhost"})
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, HTTPException) as error:
        raise LabError(f"etcd does not answer ({error}): see {state.LOGS}/{ETCD}.log") from error
    finally:
        connection.close()
    if response.status != 200:
        raise LabError(f"etcd refused {method} ({text.strip()}): see {state.LOGS}/{ETCD}.log")
    found: dict[str, Any] = json.loads(text)
    return found
