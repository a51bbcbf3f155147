# SPDX-License-Identifier: Apache-2.0
"""What this host lets a tracer do: privileges, lockdown, and the namespaces it runs in."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tracer.kernel import netns


class Capability(NamedTuple):
    """Its number in include/uapi/linux/capability.h, and what cannot be done without it."""

    bit: int
    lost: str


CAPABILITIES = {
    "CAP_NET_ADMIN": Capability(12, "neither devices nor cgroups can be attached to"),
    "CAP_SYS_PTRACE": Capability(19, "network namespaces of other users' pods may not be found"),
    "CAP_SYS_ADMIN": Capability(21, "other network namespaces cannot be entered, nor kprobes be "
                                "had where kernel.perf_event_paranoid is above 2"),
    "CAP_SYSLOG": Capability(34, "drops have no kernel symbol"),
    "CAP_PERFMON": Capability(38, "no program may read kernel memory, unless CAP_SYS_ADMIN is there"),
    "CAP_BPF": Capability(39, "no program may be loaded, unless CAP_SYS_ADMIN is there"),
}  # fmt: skip
# The first namespaces of the system have fixed inode numbers (include/uapi/linux/nsfs.h).
_FIRST_CGROUP, _FIRST_PID = 0xEFFFFFFB, 0xEFFFFFFC
_KTHREADD = 2  # in the first pid namespace, and the first network namespace
_LOCKDOWN = Path("/sys/kernel/security/lockdown")


def missing_capabilities() -> list[str]:
    """Names of those in CAPABILITIES that this process lacks (/proc/self/status)."""
    held = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
    return [name for name, known in CAPABILITIES.items() if not held >> known.bit & 1]


def may_trace() -> bool:
    """Whether this process may load the programs: as root, or with the two capabilities for it."""
    missing = missing_capabilities()
    return "CAP_SYS_ADMIN" not in missing or not {"CAP_BPF", "CAP_PERFMON"} & set(missing)


def locked_down() -> bool:
    """Whether programs may not read kernel memory (kernel_lockdown(7), confidentiality)."""
    try:
        return "[confidentiality]" in _LOCKDOWN.read_text()
    except OSError:  # no lockdown here, or securityfs is not mounted
        return False


class Confinement(NamedTuple):
    """What cannot be seen from inside a container, and what to do about it in a pod's manifest."""

    what: str
    fix: str


def confinement() -> list[Confinement]:
    """What keeps this process from seeing the whole node."""
    found = []
    if _namespace("pid") != _FIRST_PID:
        found.append(
            Confinement(
                "in a pid namespace of its own: of processes outside, neither network namespace "
                "nor resolv.conf is found",
                "hostPID: true",
            )
        )
    elif _namespace("net") != (_namespace("net", _KTHREADD) or _namespace("net")):
        found.append(
            Confinement(
                "in a network namespace of its own: the node's devices are watched only if two "
                "pods or more have theirs there",
                "hostNetwork: true",
            )
        )
    root = netns.cgroup2_root()
    if _namespace("cgroup") != _FIRST_CGROUP and root and not netns.whole_cgroup2(root):
        found.append(
            Confinement(
                f"in a cgroup namespace of its own: {root} has this container's cgroups only",
                "mount the host's /sys/fs/cgroup",
            )
        )
    return found


def _namespace(kind: str, pid: int | None = None) -> int | None:
    """The inode number of a process's namespace, this one's by default; None if it is hidden."""
    try:
        return os.stat(f"/proc/{pid or 'self'}/ns/{kind}").st_ino
    except OSError:
        return None


def raise_limits() -> None:
    """Room for a descriptor per link, and before 5.11 (d5299b67dd59) for locked memory."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    # Refused without CAP_SYS_RESOURCE; what then lacks says so itself.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    except (ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
