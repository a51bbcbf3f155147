# SPDX-License-Identifier: Apache-2.0
"""Running the host's tools: each failure becomes one line that names the command."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from tracer.lab.errors import HOST_LACKS, LabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PACKAGES: Mapping[str, str] = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "iptables-restore": "iptables",
    "ip6tables-restore": "iptables",
    "mount": "mount",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "setsid": "util-linux",
    "unshare": "util-linux",
    "unbound": "unbound",
}

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def find(tool: str) -> str | None:
    """Absolute path of a tool, also looked for where only root's PATH leads; None if absent."""
    return shutil.which(tool) or shutil.which(tool, path=_SYSTEM_PATH)


def require(tools: Iterable[str]) -> None:
    """Raises LabError (status 3) that names every missing tool's package."""
    missing = [tool for tool in tools if find(tool) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(tool, tool) for tool in missing}))
        raise LabError(
            f"the lab needs {', '.join(missing)}: apt install {packages}", status=HOST_LACKS
        )


def require_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root", status=HOST_LACKS)


def run(argv: Sequence[str], *, stdin: str | None = None, keep_fd: int | None = None) -> str:
    """Runs a tool to its end and returns its stdout; LabError with its last words if it fails.

    `keep_fd` stays open in the tool, which thereby holds the lab's lock as long as it runs.
    """
    result = subprocess.run(
        [find(argv[0]) or argv[0], *argv[1:]],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        text=True,
        pass_fds=() if keep_fd is None else (keep_fd,),
        env={**os.environ, "LC_ALL": "C"},
    )
    if result.returncode != 0:
        words = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        last = words[0].strip() if words else f"exit status {result.returncode}"
        raise LabError(f"`{' '.join(argv)}` failed: {last}; see `dnstrace doctor`")
    return result.stdout


def in_netns(name: str, argv: Sequence[str]) -> list[str]:
    """The command inside a named network namespace, all else unchanged."""
    return ["nsenter", f"--net={netns_path(name)}", "--", *argv]


def netns_path(name: str) -> str:
    return f"/run/netns/{name}"
