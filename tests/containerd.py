# SPDX-License-Identifier: Apache-2.0
"""A real containerd with its CRI plugin, in namespaces of its own that vanish with it.

It is spoken to as kubelet does, with the few messages that are needed written by hand; the numbers
are those of k8s.io/cri-api/pkg/apis/runtime/v1/api.proto.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

_IMAGE = "dnstrace.test/busybox:1"
_SERVICE = "/runtime.v1.RuntimeService/"
_READY_S = 120.0
_CALL_S = 60.0
_NODE = 2  # NamespaceMode

_CONFIG = """\
version = 2
root = "{own}/root"
state = "{host}/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{own}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{own}/cni"
"""
_CNI = {
    "cniVersion": "0.4.0",
    "name": "dnstrace",
    "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.99.0.0/24"}}],
}
# What containerd, its shims and CNI write in fixed places is gone with the mount namespace.
_INSIDE = """\
set -e
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
ip link set lo up
exec containerd --config "$1"
"""


@dataclass(frozen=True)
class PodConfig:
    """What kubelet asks for."""

    namespace: str
    name: str
    uid: str
    cgroup_parent: str
    log_directory: str
    host_network: bool = False

    def message(self) -> bytes:
        options = _field(1, _number(1, _NODE)) if self.host_network else b""
        linux = _field(1, self.cgroup_parent) + _field(2, options)
        metadata = _field(1, self.name) + _field(2, self.uid) + _field(3, self.namespace)
        return (
            _field(1, metadata)
            + _field(2, "" if self.host_network else self.name)
            + _field(3, self.log_directory)
            + _field(8, linux)
        )


class Cri:
    """The runtime's service, as far as it is needed."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{socket}")

    def run_sandbox(self, pod: PodConfig) -> str:
        """The id of the sandbox."""
        return self._call("RunPodSandbox", _field(1, pod.message()))

    def run_container(self, sandbox: str, pod: PodConfig, name: str, *command: str) -> str:
        """The id of the container, which is running by then."""
        config = (
            _field(1, _field(1, name))
            + _field(2, _field(1, _IMAGE))
            + b"".join(_field(3, word) for word in command)
            + _field(11, f"{name}/0.log")
        )
        request = _field(1, sandbox) + _field(2, config) + _field(3, pod.message())
        container = self._call("CreateContainer", request)
        self._call("StartContainer", _field(1, container))
        return container

    def remove_sandbox(self, sandbox: str) -> None:
        """And what is in it."""
        self._call("StopPodSandbox", _field(1, sandbox))
        self._call("RemovePodSandbox", _field(1, sandbox))

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, request: bytes) -> str:
        """The first field of the answer, an id, if it has any."""
        answer: bytes = self._channel.unary_unary(_SERVICE + method)(
            request, timeout=_CALL_S, wait_for_ready=True
        )
        return answer[2 : 2 + answer[1]].decode() if answer else ""


@contextmanager
def running(own: Path, host: Path) -> Iterator[Cri]:
    """containerd; `own` is its directory, `host` stands for the root of the node's files."""
    (own / "cni").mkdir(parents=True)
    (own / "cni" / "10-dnstrace.conflist").write_text(json.dumps(_CNI))
    config = own / "config.toml"
    config.write_text(_CONFIG.format(own=own, host=host, image=_IMAGE))
    _write_image(own / "image.tar")
    with (own / "containerd.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", _INSIDE, "sh", str(config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    cri = Cri(own / "containerd.sock")
    try:
        _import_image(own, process)
        yield cri
    finally:
        cri.close()
        # It is the first process of its pid namespace: all others end with it.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for pid in map(int, children.split()):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def _import_image(own: Path, process: subprocess.Popen[bytes]) -> None:
    command = ["ctr", "--address", str(own / "containerd.sock"), "--namespace", "k8s.io",
               "images", "import", "--snapshotter", "native", str(own / "image.tar")]  # fmt: skip
    deadline = time.monotonic() + _READY_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log = (own / "containerd.log").read_text()[-2000:]
            raise RuntimeError(f"containerd does not work here: {done.stderr}\n{log}")
        time.sleep(0.1)


def _write_image(path: Path) -> None:
    """An image of busybox, as `docker save` writes it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for file in ("/bin/busybox", *_libraries("/bin/busybox")):
            tar.add(os.path.realpath(file), file.lstrip("/"))
        for name in ("sh", "sleep", "true", "cat"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Cmd": ["/bin/sleep", "3600"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()],
            },
        }
    ).encode()
    manifest = json.dumps(
        [{"Config": "config.json", "RepoTags": [_IMAGE], "Layers": ["layer.tar"]}]
    ).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("layer.tar", layer.getvalue()),
            ("config.json", config),
            ("manifest.json", manifest),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _libraries(program: str) -> list[str]:
    """Those that it is linked to, and what loads them."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [word for word in listing.split() if word.startswith("/")]


def _field(number: int, value: str | bytes) -> bytes:
    """A member that is text or a message; left out if empty, as protobuf does."""
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content if content else b""


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
