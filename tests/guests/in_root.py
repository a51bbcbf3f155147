# SPDX-License-Identifier: Apache-2.0
"""dnstrace with another distribution's Python, BCC and LLVM: those of a root from fetch-root.

    python -m tests.guests.in_root ROOT [--hooks kprobe --hooks tracepoint]

As root, on the kernel that runs, which may be a guest's: the doctor, and a short trace of the lab
with each set of hooks (default: all that this kernel has). One line with what was found; exit
status 0 if all is well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.kernel import kprobes
from tracer.lab import Lab
from tracer.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROJECT = Path(__file__).resolve().parent.parent.parent
POD = "sre/web-0"
# Each under a name of its own, so that no server has the answer yet.
QUESTIONS = 10
_WAIT_S = 120.0  # emulated CPUs take their time

# In a mount namespace that goes away with the command: this machine's kernel, and the sources.
_ENTER = """
root=$1
shift
for directory in proc sys dev run; do
	mount --rbind "/$directory" "$root/$directory" || exit 125
done
mount --bind "$PROJECT" "$root/dnstrace" || exit 125
cd /
unset PROJECT
exec "$CHROOT" "$root" /usr/bin/python3 "$@"
"""
_VERSIONS = """
import bcc, re
used = open("/proc/self/maps").read()
llvm = re.findall(r"libLLVM[-.](?:so[.])?([0-9.]+[0-9])", used)
clang = re.findall(r"libclang-cpp[-.](?:so[.])?([0-9.]+[0-9])", used)
print(f"BCC {bcc.__version__}, LLVM {(llvm or ['?'])[0]}, clang {(clang or ['?'])[0]}")
"""


class Wrong(Exception):
    """What is wrong with what was seen, in one line."""


def python_in_root(root: Path) -> list[str]:
    """What goes before the arguments of `python3`, run in that root with these sources."""
    return [
        "env", "-i", "LANG=C.UTF-8", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE=1", "PYTHONPATH=/dnstrace",
        f"PROJECT={PROJECT}", f"CHROOT={shutil.which('chroot') or '/usr/sbin/chroot'}",
        "unshare", "--mount", "--propagation", "slave",
        "sh", "-c", _ENTER, "enter", str(root.resolve()),
    ]  # fmt: skip


def dnstrace_in_root(root: Path) -> list[str]:
    """What goes before the arguments of `dnstrace`, run in that root with these sources."""
    return [*python_in_root(root), "-m", "tracer"]


def versions(root: Path) -> str:
    """Which BCC the root has, and the LLVM and clang that it is bound to."""
    return _said([*python_in_root(root), "-c", _VERSIONS]).strip()


def doctor(root: Path) -> float:
    """Seconds that the programs took to compile, as `dnstrace doctor` says. Raises Wrong."""
    said = _said([*dnstrace_in_root(root), "doctor"])
    found = re.search(r"programs compile in ([\d.]+) s", said)
    if not found or "This host can be traced" not in said:
        raise Wrong(f"the doctor says:\n{said}")
    return float(found[1])


def trace(root: Path, lab: Lab, hooks: str) -> int:
    """How many transactions of our questions were seen, all whole. Raises Wrong."""
    names = [f"{hooks}-{os.getpid()}-{i}.bench.example.com." for i in range(QUESTIONS)]
    command = [*dnstrace_in_root(root), "--json", "--hooks", hooks, "--namespace", "sre",
               "--duration", "2m", "--count", str(QUESTIONS)]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as tracer,
    ):
        assert tracer.stderr
        try:
            errors = []
            for line in tracer.stderr:
                errors.append(line)
                if "tracing" in line:
                    break
            else:
                raise Wrong(f"{hooks}: dnstrace did not start: {''.join(errors).strip()}")
            for name in names:
                lab.run(POD, ["dig", "+notcp", "+tries=1", "+time=20", name, "A"])
            try:
                rest = tracer.communicate(timeout=_WAIT_S)[1]
            except subprocess.TimeoutExpired as error:
                raise Wrong(f"{hooks}: dnstrace did not see {QUESTIONS} transactions") from error
        finally:
            tracer.kill()
        if tracer.returncode != 0:
            raise Wrong(f"{hooks}: exit status {tracer.returncode}: {''.join(errors)}{rest}")
        output.seek(0)
        seen = [event for event in map(json.loads, output) if event["event"] == "transaction"]
    by_name = {event["name"]: event for event in seen}
    for name in names:
        problem = _what_is_wrong(by_name.get(name), lab)
        if problem:
            raise Wrong(f"{hooks}: {name} {problem}")
    return len(by_name)


def _what_is_wrong(event: dict[str, Any] | None, lab: Lab) -> str | None:
    if event is None:
        return "was not seen"
    client = event["client"]
    expected = {
        "status": (event["status"], "answered"),
        "rcode": (event["rcode"], "NOERROR"),
        "type": (event["type"], "A"),
        "comm": (client["comm"], "dig"),
        "pod": (f"{client['namespace']}/{client['pod']}", POD),
        "cgroup": (client["cgroup_id"], lab.pod(POD).cgroup_id),
        "netns": (client["netns"], lab.pod(POD).netns),
        "first hop": (event["hops"][0]["kind"], "send"),
        "last hop": (event["hops"][-1]["kind"], "receive"),
    }
    for what, (seen, right) in expected.items():
        if seen != right:
            return f"has {what} {seen}, not {right}"
    replicas = {pod.name for pod in lab.dns_pods}
    if not event["backend"] or event["backend"]["pod"] not in replicas:
        return f"was answered by {event['backend']}, not by {' or '.join(sorted(replicas))}"
    kinds = [hop["kind"] for hop in event["hops"]]
    # Both ways: send, at least the pod's veth and the replica's, receive.
    if kinds.count("send") != 2 or kinds.count("receive") != 2 or len(kinds) < 8:
        return f"has the hops {' '.join(kinds)}"
    return None


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise Wrong(f"exit status {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout


def examine(root: Path, hooks: Sequence[str]) -> Iterator[str]:
    """What is found, one after the other. Raises Wrong, or LabError."""
    yield versions(root)
    yield f"compiled in {doctor(root)} s"
    lab = Lab()
    fresh = lab.up()
    try:
        for name in hooks:
            yield f"{name}: {trace(root, lab, name)} of {QUESTIONS} transactions"
    finally:
        if fresh:
            lab.down()


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="in_root", allow_abbrev=False)
    parser.add_argument("root", type=Path)
    parser.add_argument("--hooks", action="append", choices=("kprobe", "tracepoint"))
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("in_root: needs root", file=sys.stderr)
        return 1
    if not (args.root / ".complete").exists():
        print(f"in_root: {args.root} is not complete: run tests/guests/fetch-root", file=sys.stderr)
        return 1
    hooks = args.hooks or [*(["kprobe"] if kprobes.available() else []), "tracepoint"]
    found: list[str] = []
    try:
        found.extend(examine(args.root, hooks))
    except (Wrong, LabError) as error:
        print(f"in_root: {'; '.join(found)}; {error}")
        return 1
    print("; ".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
