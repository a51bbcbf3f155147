# SPDX-License-Identifier: Apache-2.0
"""Starting processes inside pods: in the container's cgroup and the pod's namespaces.

For every pod there is a little shell script in the run directory. It joins the cgroup first, so
that even the shortest-lived command is seen in the right one, then the namespaces, and becomes
the command: same pid, same exit status, no interpreter but sh, a few milliseconds.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab.commands import netns_path
from tracer.lab.errors import LabError
from tracer.lab.state import ENTER, LOGS, OVERLAYS, Process, start_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tracer.lab.servers import Server
    from tracer.lab.topology import Pod

HOLDER = "pause"
START_TIMEOUT_S = 60.0
_POLL_S = 0.002

_OWN_FILES = """\
if [ -L /etc/resolv.conf ] || [ ! -e /etc/resolv.conf ]; then
  mkdir -p {overlay}/upper {overlay}/work
  mount -t overlay -o lowerdir=/etc,upperdir={overlay}/upper,workdir={overlay}/work overlay /etc
  rm -f /etc/resolv.conf
  : > /etc/resolv.conf
fi
for name in resolv.conf hosts hostname nsswitch.conf; do
  if [ -f {files}/$name ]; then mount --bind {files}/$name /etc/$name; fi
done
echo {hostname} > /proc/sys/kernel/hostname
exec {holder} -c 'read -r never' <> {holder}.wait
"""


def holder_script(pod: Pod, cgroup: Path, files: Path, holder: Path) -> str:
    """Makes the pod's mount and UTS namespaces and stays in them, doing nothing.

    Where the host's /etc/resolv.conf is a link, nothing can be mounted on it, so /etc becomes an
    overlay first. The holder is a shell under another name that reads from a FIFO in which nothing
    ever comes; `sleep` may be part of a program that goes by its name.
    """
    hostname = pod.node.name if pod.host_network else pod.name
    own = "set -e\n" + _OWN_FILES.format(
        files=files, overlay=OVERLAYS / pod.file_name, hostname=hostname, holder=holder
    )
    return _script(
        f"Holds pod {pod.full_name}.",
        cgroup,
        f"nsenter --net={netns_path(pod.netns)} -- unshare --mount --uts"
        f" --propagation private -- /bin/sh -c {shlex.quote(own)}",
    )


def enter_script(pod: Pod, cgroup: Path, holder: int) -> str:
    """Runs its arguments in the pod whose namespaces the process `holder` keeps."""
    return _script(
        f"Runs a command in pod {pod.full_name}.",
        cgroup,
        f"nsenter --net={netns_path(pod.netns)} --mount=/proc/{holder}/ns/mnt"
        f' --uts=/proc/{holder}/ns/uts --wdns="${{PWD:-/}}" -- "$@"',
    )


def outside_script(netns: str, cgroup: Path) -> str:
    """Runs its arguments in a network namespace without a pod."""
    title = f"Runs a command in {netns}."
    return _script(title, cgroup, f'nsenter --net={netns_path(netns)} -- "$@"')


def host_script(cgroup: Path, directory: Path) -> str:
    """Runs its arguments in the host's own namespaces, from a directory."""
    return _script("Runs a command on the host.", cgroup, f'env --chdir={directory} -- "$@"')


def _script(title: str, cgroup: Path, command: str) -> str:
    return f"#!/bin/sh\n# {title}\necho 0 > {cgroup}/cgroup.procs || exit 125\nexec {command}\n"


def write_script(name: str, text: str) -> None:
    path = ENTER / name
    path.write_text(text)
    path.chmod(0o755)


def command(name: str) -> list[str]:
    """The script of that name as the start of a command line; /run may be mounted noexec."""
    return ["/bin/sh", str(ENTER / name)]


def start(commands: Mapping[str, Iterable[str]]) -> dict[str, Process]:
    """Starts long-lived processes, each with its output in a log of its name.

    They are children of init, not ours: they outlive the caller and leave it no zombies.
    """
    lines = [
        f"setsid {shlex.join(argv)} </dev/null >>{LOGS / name}.log 2>&1 & echo $!"
        for name, argv in commands.items()
    ]
    result = subprocess.run(
        ["/bin/sh", "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True, check=True
    )
    processes = {}
    for name, pid in zip(commands, map(int, result.stdout.split()), strict=True):
        started = start_time(pid)
        if started is None:
            raise _ended(name)
        processes[name] = Process(name, pid, started)
    return processes


def wait_until_held(processes: Iterable[Process]) -> None:
    """Returns when each holder has its namespaces ready."""
    for process in processes:
        wait_until(process, _holds)


def wait_until_listening(processes: Mapping[str, Process], served: Mapping[str, Server]) -> None:
    """Returns when each server, by name, has its UDP and TCP sockets."""
    for name, process in processes.items():
        wait_until(process, partial(_listens, sockets=served[name].sockets))


def _holds(pid: int) -> bool:
    return _read(pid, "comm").strip() == HOLDER


def _listens(pid: int, sockets: Mapping[str, str]) -> bool:
    return all(socket in _read(pid, f"net/{table}") for table, socket in sockets.items())


def wait_until(
    process: Process,
    ready: Callable[[int], bool],
    *,
    timeout_s: float = START_TIMEOUT_S,
    poll_s: float = _POLL_S,
) -> None:
    """Returns when `ready` says so of the pid; LabError if the process ends, or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not ready(process.pid):
        if not process.alive():
            raise _ended(process.name)
        if time.monotonic() > deadline:
            raise LabError(f"{process.name} is not ready after {timeout_s:.0f} s: try again")
        time.sleep(poll_s)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _ended(name: str) -> LabError:
    try:
        said = (LOGS / f"{name}.log").read_text().strip().splitlines()
    except OSError:
        said = []
    why = said[-1] if said else "it said nothing"
    return LabError(f"{name} ended at once ({why}): run `dnstrace lab down`, then `up` again")
