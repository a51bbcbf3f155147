# SPDX-License-Identifier: Apache-2.0
"""A kube-apiserver with its etcd in a directory of its own, for tests of what it tells.

Nothing but these two: objects are written as users, kubelets and controllers would write them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any

from tracer.lab import go_build

if TYPE_CHECKING:
    from pathlib import Path

ADMIN, TRACER, NOBODY = "admin-token", "tracer-token", "nobody-token"
KUBELET = "kubelet-token"
_START_TIMEOUT_S = 90.0
_WITHOUT_ADMISSION = (
    "ServiceAccount,DefaultTolerationSeconds,Priority,StorageObjectInUseProtection,RuntimeClass,"
    "TaintNodesByCondition"
)


class ApiServer:
    """A control plane in `directory`. What is in it outlives `stop`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._binary = str(go_build.binary(go_build.APISERVER))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._local = threading.local()
        self._connections: list[HTTPSConnection] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._key, self._certificate = directory / "server.key", directory / "server.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-noenc", "-days", "2", "-subj", "/CN=kube-apiserver",
             "-addext", "subjectAltName=IP:127.0.0.1",
             "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
             "-keyout", str(self._key), "-out", str(self._certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        self._tokens = directory / "tokens.csv"
        self._tokens.write_text(
            f'{ADMIN},admin,admin,"system:masters"\n{TRACER},tracer,tracer\n{NOBODY},nobody,nobody\n'
            f"{KUBELET},kubelet,kubelet\n"
        )
        self._context = ssl.create_default_context(cafile=str(self._certificate))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def kubeconfig(self, token: str, name: str = "kubeconfig", **user: str) -> Path:
        """A kubeconfig for whose token it is; it may be written again."""
        authority = base64.b64encode(self._certificate.read_bytes()).decode()
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {"server": self.url, "certificate-authority-data": authority},
                }
            ],
            "users": [{"name": "test", "user": user or {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path = self._directory / name
        path.write_text(json.dumps(content))
        return path

    def start(self, *flags: str) -> None:
        """Returns when it is ready."""
        run = self._directory
        self._spawn("etcd", [
            "--name=test", f"--data-dir={run}/etcd", "--log-level=warn", "--unsafe-no-fsync",
            "--listen-client-urls=unix://localhost:2379",
            "--advertise-client-urls=unix://localhost:2379",
            "--listen-peer-urls=unix://localhost:2380",
            "--initial-advertise-peer-urls=unix://localhost:2380",
            "--initial-cluster=test=unix://localhost:2380",
        ])  # fmt: skip
        self._spawn("kube-apiserver", [
            f"--etcd-servers=unix://{run}/localhost:2379", "--bind-address=127.0.0.1",
            f"--secure-port={self.port}", "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={self._certificate}", f"--tls-private-key-file={self._key}",
            f"--client-ca-file={self._certificate}",
            f"--token-auth-file={self._tokens}", "--anonymous-auth=false",
            "--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._certificate}",
            f"--service-account-signing-key-file={self._key}",
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--disable-admission-plugins={_WITHOUT_ADMISSION}",
            "--profiling=false", "--shutdown-delay-duration=0s", *flags,
        ])  # fmt: skip
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._ready():
            if (
                self._processes["kube-apiserver"].poll() is not None
                or time.monotonic() > deadline_s
            ):
                log = (run / "kube-apiserver.log").read_text()[-2000:]
                raise AssertionError(f"kube-apiserver does not start: {log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills both; etcd loses nothing."""
        for connection in self._connections:
            connection.close()
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._processes.clear()

    def freeze(self) -> None:
        """It keeps its connections, and says nothing any more."""
        self._processes["kube-apiserver"].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._processes["kube-apiserver"].send_signal(signal.SIGCONT)

    def call(
        self, method: str, path: str, body: object = None, kind: str = "application/json"
    ) -> Any:
        """An administrator's request."""
        text = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": kind}
        for last in (False, True):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = HTTPSConnection(
                    "127.0.0.1", self.port, timeout=30, context=self._context
                )
                self._local.connection = connection
                self._connections.append(connection)
            try:
                connection.request(method, path, text, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
                break
            except (OSError, HTTPException):
                connection.close()
                self._local.connection = None
                if last:
                    raise
        assert response.status < 300, f"{method} {path}: {answer}"
        return answer

    def create(self, path: str, body: object) -> Any:
        return self.call("POST", path, body)

    def patch(self, path: str, body: object) -> Any:
        return self.call("PATCH", path, body, "application/merge-patch+json")

    def delete(self, path: str) -> Any:
        return self.call("DELETE", f"{path}?gracePeriodSeconds=0")

    def compact(self) -> None:
        """Has etcd forget all but the newest state."""
        revision = self._etcd("range", {"key": "AA=="})["header"]["revision"]
        self._etcd("compaction", {"revision": revision, "physical": True})

    def _spawn(self, name: str, flags: list[str]) -> None:
        with open(self._directory / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [self._binary, name, *flags], cwd=self._directory, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
                # A test run that is killed leaves nothing behind.
                preexec_fn=_die_with_parent,  # noqa: PLW1509
            )  # fmt: skip

    def _ready(self) -> bool:
        with suppress(OSError, HTTPException, ValueError):
            connection = HTTPSConnection("127.0.0.1", self.port, timeout=5, context=self._context)
            try:
                connection.request("GET", "/readyz", headers={"Authorization": f"Bearer {ADMIN}"})
                return connection.getresponse().status == 200
            finally:
                connection.close()
        return False

    def _etcd(self, method: str, body: object) -> Any:
        connection = HTTPConnection("localhost")
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect(str(self._directory / "localhost:2379"))
            connection.sock = unix
            connection.request("POST", f"/v3/kv/{method}", json.dumps(body))
            return json.loads(connection.getresponse().read())


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setpgid(0, 0)  # Ctrl-C is for pytest, which then stops them


def pod(namespace: str, name: str, node: str, **spec: object) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": name.partition("-")[0]}},
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": "pause"}], **spec},
    }  # fmt: skip


def running(*ips: str, container_id: str = "c0ffee") -> dict[str, Any]:
    return {
        "status": {
            "phase": "Running",
            "podIP": ips[0],
            "podIPs": [{"ip": ip} for ip in ips],
            "containerStatuses": [
                {"name": "app", "image": "pause", "imageID": "", "ready": True, "restartCount": 0,
                 "containerID": f"containerd://{container_id}"}
            ],
        }
    }  # fmt: skip


def service(
    namespace: str, name: str, ip: str, *ports: tuple[str, int, str, Any]
) -> dict[str, Any]:
    """`ports` are name, number, protocol and target."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "clusterIP": ip,
            "ports": [
                {"name": name, "port": number, "protocol": protocol, "targetPort": target}
                for name, number, protocol, target in ports
            ],
        },
    }  # fmt: skip


def endpoint_slice(
    namespace: str, name: str, of_service: str, ports: dict[str, int], *endpoints: dict[str, Any]
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "labels": {"kubernetes.io/service-name": of_service},
        },
        "addressType": "IPv4",
        "ports": [{"name": n, "port": p, "protocol": "UDP"} for n, p in ports.items()],
        "endpoints": list(endpoints),
    }


def node(name: str, *ips: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object, and its status, which is written apart."""
    addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
    addresses.append({"type": "Hostname", "address": name})
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
    return body, {"status": {"addresses": addresses}}
