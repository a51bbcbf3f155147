#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Checks dnstrace on a node of a real cluster (as root), from end to end.

Traces namespace sre while every workload on this node looks a name up that nobody else asks for,
and says for each whether the trace told the truth: PASS or FAIL, and what was expected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Object = dict[str, Any]

NAMESPACE = "sre"
DOMAIN = "dnstrace.test"  # whose every name exists, see manifests/dns.yaml
DNS_LABELS = "k8s-app=kube-dns"
NODELOCAL_LABELS = "k8s-app=node-local-dns"
NODELOCAL_IP = "169.254.20.10"

# How the pods with each label `app` are made to look a name up, by their own resolver.
_GETENT = ("getent", "ahosts", "{name}")
_PROBE = "http://127.0.0.1:9115/probe?module=tcp_connect&target={name}:9"
WORKLOADS: dict[str, tuple[str, ...]] = {
    "glibc": _GETENT,
    "musl": _GETENT,
    "go": ("wget", "-q", "-O", "/dev/null", _PROBE),
    "host": _GETENT,
}

_READY_S = 300.0  # images may still be on their way
_KNOWN_S = 30.0
_ARMED_S = 60.0
_TRACE_S = 120  # at most: it is stopped when all has been asked
_SETTLE_S = 7.0  # after which no lookup waits for more queries any longer
_GONE_S = 10.0
_COMMAND_S = 60


class CheckError(Exception):
    """The check cannot go on. The message is one line: what is wrong, and the remedy."""


@dataclass
class Verdicts:
    """What held and what did not, told as it is found."""

    failed: int = 0
    passed: int = 0

    def say(self, what: str, found: object = "", *, ok: bool) -> bool:
        """One line; `what` is what is expected, `found` what was there instead."""
        if ok:
            self.passed += 1
            line = f"PASS  {what}"
        else:
            self.failed += 1
            line = f"FAIL  expected: {what}" + (f"; found: {found}" if found != "" else "")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        return ok


class Pod(NamedTuple):
    """A pod, as far as the check goes by it."""

    name: str
    node: str
    app: str
    ready: bool


class Asked(NamedTuple):
    """What a workload was made to look up."""

    pod: Pod
    name: str
    expands: bool  # by the search list, since it has no final dot


@dataclass
class Backends:
    """Who may have answered: pods by name, or, with NodeLocal DNSCache, addresses of the node."""

    pods: set[str] = field(default_factory=set)
    ips: set[str] = field(default_factory=set)

    def hold(self, backend: Object | None) -> bool:
        """Whether it is one of them."""
        if backend is None:
            return False
        if self.ips:
            return backend.get("ip") in self.ips
        return backend.get("namespace") == "kube-system" and backend.get("pod") in self.pods

    def __str__(self) -> str:
        return " or ".join(sorted(self.ips or self.pods)) or "(no pod of CoreDNS)"


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    args = _arguments(argv)
    verdicts = Verdicts()
    try:
        _check(args, verdicts)
    except CheckError as error:
        verdicts.say(str(error), ok=False)
    sys.stdout.write(f"{verdicts.passed} passed, {verdicts.failed} failed\n")
    return 1 if verdicts.failed else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--node", default=os.uname().nodename, metavar="NAME",
                        help="this node's name (default: the host's)")  # fmt: skip
    parser.add_argument("--pods", metavar="FILE",
                        help="for dnstrace (default: what provision-dnstrace set up)")  # fmt: skip
    parser.add_argument("--domain", default=DOMAIN, metavar="NAME",
                        help=f"where every name exists (default: {DOMAIN})")  # fmt: skip
    return parser.parse_args(argv)


def _check(args: argparse.Namespace, verdicts: Verdicts) -> None:
    if os.geteuid() != 0:
        raise CheckError("root's rights: run sudo vagrant/check")
    pods = _ready_pods(args.node)
    verdicts.say(
        f"a running pod of each of {', '.join(WORKLOADS)} on {args.node}",
        ", ".join(pods) or "none",
        ok=set(pods) == set(WORKLOADS),
    )
    backends = _backends(verdicts)
    pods_file = args.pods or "/run/dnstrace-pods/pods.json"
    for pod in pods.values():
        what = f"the cgroup of {NAMESPACE}/{pod.name} in {pods_file}"
        verdicts.say(what, ok=wait_for(partial(known, pods_file, pod), _KNOWN_S))
    before = _our_programs()
    nonce = secrets.token_hex(4)
    arguments = ["--pods", args.pods] if args.pods else []
    with tracing(arguments) as trace:
        asked = [_ask(pod, f"{app}-{nonce}.{args.domain}", verdicts) for app, pod in pods.items()]
        if "glibc" in pods:
            asked.append(_ask(pods["glibc"], f"final-dot-{nonce}.{args.domain}.", verdicts))
        time.sleep(_SETTLE_S)
        status = trace.stop()
        said, events = trace.said(), trace.events()
    verdicts.say("dnstrace ends with status 0", f"status {status}: {said}", ok=status == 0)
    judge(events, asked, backends, verdicts)
    gone = wait_for(lambda: not _our_programs() - before, _GONE_S)
    left = ", ".join(map(str, sorted(_our_programs() - before)))
    verdicts.say("no BPF program of dnstrace is left", f"programs {left}", ok=gone)


def judge(events: list[Object], asked: list[Asked], backends: Backends, to: Verdicts) -> None:
    """Whether the trace has told what was asked, of whom, and who answered."""
    transactions = [event for event in events if event.get("event") == "transaction"]
    lookups = [event for event in events if event.get("event") == "lookup"]
    last = events[-1].get("event") if events else None
    to.say("a summary as the last line", last, ok=last == "summary")
    foreign = {_client(t) for t in transactions if not _client(t).startswith(f"{NAMESPACE}/")}
    to.say(f"nothing but namespace {NAMESPACE}", ", ".join(sorted(foreign)), ok=not foreign)
    for question in asked:
        _judge_one(question, transactions, lookups, backends, to)


def _judge_one(
    asked: Asked,
    transactions: list[Object],
    lookups: list[Object],
    backends: Backends,
    to: Verdicts,
) -> None:
    who, name = f"{NAMESPACE}/{asked.pod.name}", asked.name.rstrip(".")
    found = [t for t in transactions if _same(t.get("name"), name)]
    if not to.say(f"{who} asks for {name}.", "no such transaction", ok=bool(found)):
        return
    clients = {_client(t) for t in found}
    to.say(f"{name}. is asked for by {who}", ", ".join(sorted(clients)), ok=clients == {who})
    codes = {f"{t.get('status')} {t.get('rcode')}" for t in found}
    good = codes == {"answered NOERROR"}
    to.say(f"{name}. is answered NOERROR", ", ".join(sorted(codes)), ok=good)
    others = [t.get("backend") for t in found if not backends.hold(t.get("backend"))]
    to.say(f"{name}. is answered by {backends}", json.dumps(others), ok=not others)
    times = [t.get("latency_ns") for t in found]
    whole = all(type(ns) is int and ns > 0 for ns in times)
    to.say(f"the latency of {name}. is a number", json.dumps(times), ok=whole)
    of_name = [lookup for lookup in lookups if _same(lookup.get("question"), name)]
    told = [(_number(lookup.get("queries")), _number(lookup.get("wasted"))) for lookup in of_name]
    if asked.expands:
        wasted = any(q > w > 0 for q, w in told)
        what = f"a lookup of {name} with some queries wasted, by its search list"
    else:
        wasted = bool(told) and all(w == 0 for _, w in told)
        what = f"a lookup of {name} with none wasted, because of its final dot"
    to.say(what, f"(queries, wasted) {told}", ok=wasted)


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1


def _same(name: object, wanted: str) -> bool:
    return isinstance(name, str) and name.rstrip(".").lower() == wanted.lower()


def _client(transaction: Object) -> str:
    client = transaction.get("client") or {}
    return f"{client.get('namespace')}/{client.get('pod')}"


def known(path: str, pod: Pod) -> bool:
    """Whether a pods file knows the cgroup of a pod's container."""
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)["pods"]
    except (OSError, ValueError, KeyError):
        return False
    return any(
        (entry.get("namespace"), entry.get("name")) == (NAMESPACE, pod.name)
        and any(container.get("cgroup") for container in entry.get("containers", []))
        for entry in listed
    )


def _ready_pods(node: str) -> dict[str, Pod]:
    """The workloads on this node, by app; waits for them, and returns what there is in the end."""
    ready: dict[str, Pod] = {}

    def all_ready() -> bool:
        pods = _pods(NAMESPACE)
        ready.clear()
        ready.update({p.app: p for p in pods if p.node == node and p.ready and p.app in WORKLOADS})
        return set(ready) == set(WORKLOADS)

    wait_for(all_ready, _READY_S, 2.0)
    return ready


def _backends(verdicts: Verdicts) -> Backends:
    replicas: list[Pod] = []

    def two_ready() -> bool:
        replicas[:] = [pod for pod in _pods("kube-system", DNS_LABELS) if pod.ready]
        return len(replicas) == 2

    wait_for(two_ready, _READY_S, 2.0)
    nodes = sorted(pod.node for pod in replicas)
    verdicts.say("two replicas of CoreDNS, on two nodes", nodes, ok=len(set(nodes)) == 2)
    found = Backends(pods={pod.name for pod in replicas})
    if _pods("kube-system", NODELOCAL_LABELS):
        service = _kubectl_json("--namespace", "kube-system", "get", "service", "kube-dns")
        found.ips = {NODELOCAL_IP, str(service["spec"]["clusterIP"])}
    return found


def _pods(namespace: str, labels: str | None = None) -> list[Pod]:
    only = ["--selector", labels] if labels else []
    return pods_of(_kubectl_json("--namespace", namespace, "get", "pods", *only))


def pods_of(listed: Object) -> list[Pod]:
    """The pods in a list of kubectl's."""
    found = []
    for item in listed["items"]:
        metadata, status = item["metadata"], item.get("status", {})
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        found.append(
            Pod(
                metadata["name"],
                item["spec"].get("nodeName", ""),
                metadata.get("labels", {}).get("app", ""),
                conditions.get("Ready") == "True" and "deletionTimestamp" not in metadata,
            )
        )
    return found


def _ask(pod: Pod, name: str, verdicts: Verdicts) -> Asked:
    """Has the pod look a name up, and says if that did not work."""
    command = [part.format(name=name) for part in WORKLOADS[pod.app]]
    done = _run(["kubectl", "--namespace", NAMESPACE, "exec", pod.name, "--", *command])
    problem = done.stderr.strip().replace("\n", " ") or f"status {done.returncode}"
    what = f"{NAMESPACE}/{pod.name} can run {' '.join(command)}"
    verdicts.say(what, problem, ok=done.returncode == 0)
    return Asked(pod, name, expands=not name.endswith("."))


class Trace:
    """A running `dnstrace --json`."""

    def __init__(self, process: subprocess.Popen[bytes], output: str, errors: str) -> None:
        self._process, self._output, self._errors = process, output, errors

    def wait_until_armed(self) -> None:
        """Raises CheckError if it does not come up."""
        wait_for(lambda: "tracing" in self.said() or self._process.poll() is not None, _ARMED_S)
        if "tracing" not in self.said() or self._process.poll() is not None:
            raise CheckError(f"that dnstrace traces (see dnstrace doctor), but: {self.said()}")

    def stop(self) -> int | None:
        """Ends it as Ctrl-C does; its exit status, or None if it does not end."""
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(timeout=_COMMAND_S)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        """Its messages, as one line."""
        with open(self._errors, encoding="utf-8", errors="replace") as file:
            return " / ".join(file.read().strip().splitlines())

    def events(self) -> list[Object]:
        """Its JSON lines; raises CheckError for a line that is none."""
        try:
            with open(self._output, encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        except ValueError as error:
            raise CheckError(
                f"a JSON object in each line of dnstrace --json, but: {error}"
            ) from error


@contextlib.contextmanager
def tracing(arguments: list[str]) -> Iterator[Trace]:
    """A trace that has begun; killed, if the block does not stop it."""
    command = ["dnstrace", "--namespace", NAMESPACE, "--json", "--duration", f"{_TRACE_S}s"]
    with tempfile.TemporaryDirectory(prefix="dnstrace-check-") as directory:
        output, errors = f"{directory}/output", f"{directory}/errors"
        try:
            with open(output, "wb") as stdout, open(errors, "wb") as stderr:
                process = subprocess.Popen([*command, *arguments], stdout=stdout, stderr=stderr)
        except OSError as error:
            raise CheckError("dnstrace on the PATH: run vagrant/provision-dnstrace") from error
        try:
            trace = Trace(process, output, errors)
            trace.wait_until_armed()
            yield trace
        finally:
            process.kill()
            process.wait()


def _our_programs() -> set[int]:
    """Ids of the loaded BPF programs that are dnstrace's."""
    done = _run(["bpftool", "--json", "prog", "list"])
    if done.returncode != 0:
        raise CheckError(f"bpftool to list programs, but: {done.stderr.strip()}")
    listed = _parsed("bpftool", done.stdout)
    return {p["id"] for p in listed if p.get("name", "").startswith("dnstrace")}


def _kubectl_json(*arguments: str) -> Object:
    done = _run(["kubectl", *arguments, "--output", "json"])
    if done.returncode != 0:
        raise CheckError(f"kubectl to answer (see KUBECONFIG), but: {done.stderr.strip()}")
    listed: Object = _parsed("kubectl", done.stdout)
    return listed


def _parsed(command: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckError(f"JSON from {command}, but: {error}") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise CheckError(
            f"{command[0]} on the PATH: install it, or run vagrant provision"
        ) from error
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 1, "", f"{error}")


def wait_for(condition: Callable[[], bool], seconds: float, pause_s: float = 0.2) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
    return True


if __name__ == "__main__":
    sys.exit(main())
