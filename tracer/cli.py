# SPDX-License-Identifier: Apache-2.0
"""`dnstrace`: wires the stages together, and turns what goes wrong into one line and a status."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tracer import arguments, streams
from tracer.streams import OutputError, say

if TYPE_CHECKING:
    import argparse

    from tracer.cluster.identities import Identities
    from tracer.cluster.model import Inventory
    from tracer.kernel.compile import Compilation
    from tracer.kernel.session import Selection, Session

OK, FAILED, USAGE, UNSUPPORTED = 0, 1, 2, 3
_LAB_PODS = Path("/run/dnstrace-lab/pods.json")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    try:
        streams.settle()
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read our output has had enough
        streams.discard(sys.stdout)
        return OK
    except OutputError as error:
        if sys.stdout is not None:
            streams.discard(sys.stdout)
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return OK


def _run(argv: list[str]) -> int:
    with streams.writing():
        try:
            args = arguments.parse(argv)
        finally:
            sys.stdout.flush()  # the help, which may not have fitted
    if args.command == "lab":
        from tracer.lab import cli as lab

        return lab.main(args)
    if args.command == "doctor":
        from tracer import doctor

        return doctor.main()
    return _trace(args)


def _trace(args: argparse.Namespace) -> int:
    """Traces; the compiler, which takes longest, starts before anything else is even imported."""
    from tracer.kernel import host, kprobes
    from tracer.kernel.compile import Compilation

    if not host.may_trace():
        return _trace_with(args, None)  # which says what is wrong with the rest, then with this
    with_kprobes = args.hooks != "tracepoint" and kprobes.available()
    compilation = Compilation.for_tracing(args.max_in_flight, kprobes=with_kprobes)
    try:
        return _trace_with(args, compilation)
    finally:
        compilation.abandon()


def _trace_with(args: argparse.Namespace, compilation: Compilation | None) -> int:
    from tracer.cluster.identities import Identities
    from tracer.cluster.model import Inventory
    from tracer.cluster.pods_file import PodsFileError
    from tracer.correlate.lookups import Lookups
    from tracer.filters import Filters
    from tracer.kernel import host, netns
    from tracer.kernel.session import Limits, Session, Unsupported
    from tracer.run import Stop, Totals, Trace

    filters = Filters(
        namespaces=tuple(args.namespace),
        pods=tuple(args.pod),
        container=args.container,
        pid=args.pid,
        comm=args.comm,
        name=args.name,
        type=args.type,
        rcode=args.rcode,
        failed=args.failed,
        slower=args.slower,
        server=args.server,
        backend=args.backend,
        side=args.side,
    )
    try:
        keep = filters.predicate()
        pods = _Pods(args)
        inventory = pods.changed() or Inventory()
    except (ValueError, PodsFileError) as error:
        say(str(error))
        return USAGE
    session: Session | None = None
    identities = Identities(
        inventory,
        netns.cgroup2_root(),
        lambda netns, ifindex: session.devices.find(netns, ifindex) if session else None,
    )
    wrong = _unknown_pods(args, identities)
    if wrong:
        say(wrong)
        return USAGE
    stop = Stop(args.duration)
    selection = _selection(args, identities)
    try:
        session = Session.open(
            selection,
            Limits(slots=args.max_in_flight),
            None if args.hooks == "auto" else args.hooks,
            compilation,
        )
    except Unsupported as error:
        say(str(error))
        return UNSUPPORTED
    try:
        if session.hooks is None and (args.pid or args.comm or args.container or args.slower):
            what = "--pid, --comm, --container and --slower need socket hooks"
            say(f"{what}: {'; '.join(session.notes)}")
            return UNSUPPORTED
        for found in host.confinement():
            say(f"{found.what} ({found.fix})")
        for note in session.notes:
            say(note)
        say(_armed(session, args))
        from tracer.output import make_output

        output = make_output(args)
        lookups = None if filters.tear_lookups or args.command == "path" else Lookups()
        keep_up = _KeepUp(args, pods, identities, session, selection)
        trace = Trace(
            session, identities, keep, lookups, output, args.timeout, args.count, Totals(), stop,
            keep_up,
        )  # fmt: skip
        trace.run()
        output.finish(session, trace.totals)
    finally:
        session.close()
        stop.done()
    return OK


class _Pods:
    """Where pods are known from: a file, read again whenever it changes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path: Path | None = None if args.no_kubernetes else args.pods or _LAB_PODS
        self._optional = not args.pods
        self._seen: tuple[int, int] | None = None

    def changed(self) -> Inventory | None:
        """What is known now, or None if that is what it was. Raises PodsFileError."""
        from tracer.cluster import pods_file
        from tracer.cluster.model import Inventory

        if self._path is None:
            return None
        try:
            status = self._path.stat()
            now = (status.st_mtime_ns, status.st_ino)
        except OSError:
            now = None
        if now == self._seen and (now is not None or self._optional):
            return None
        self._seen = now
        if now is None and self._optional:
            say(f"pods are no longer known: {self._path} is gone")
            return Inventory()
        inventory = pods_file.load(self._path)
        if self._optional:
            say(f"pods are those of the lab ({self._path})")
        return inventory


class _KeepUp:
    """Takes in what has become of pods and containers since the last call."""

    def __init__(
        self,
        args: argparse.Namespace,
        pods: _Pods,
        identities: Identities,
        session: Session,
        selection: Selection,
    ) -> None:
        self._args = args
        self._pods = pods
        self._identities = identities
        self._session = session
        self._selection = selection

    def __call__(self) -> None:
        from tracer.cluster.pods_file import PodsFileError

        known = None
        try:
            known = self._pods.changed()
        except PodsFileError as error:
            say(f"{error}; pods are named as before")
        if known is not None:
            self._identities.learn(known)
        elif self._args.namespace or self._args.pod:
            self._identities.walk_again()
        selection = _selection(self._args, self._identities)
        if selection != self._selection:
            self._session.select(selection)
            self._selection = selection


def _selection(args: argparse.Namespace, identities: Identities) -> Selection:
    """What the kernel itself can filter by; the rest is filtered afterwards."""
    from tracer.kernel.session import Selection

    ports = tuple(args.port or (53,))
    if args.side == "server" or not (args.namespace or args.pod):
        return Selection(ports=ports, pid=args.pid, server_side=args.side == "server")
    netns, cgroups = identities.select(identities.matching(args.namespace, args.pod))
    return Selection(ports=ports, netns=netns, cgroup_ids=cgroups, pid=args.pid, only_selected=True)


def _unknown_pods(args: argparse.Namespace, identities: Identities) -> str | None:
    """What is wrong with --namespace and --pod, in one line."""
    if not args.namespace and not args.pod:
        return None
    pods = identities.inventory.pods
    if not pods:
        return "--namespace and --pod need to know the pods: give --pods FILE (see the README)"
    for namespace in args.namespace:
        known = sorted({pod.namespace for pod in pods})
        if namespace not in known:
            return f"no pod is in namespace {namespace!r}{_near(namespace, known)}"
    for glob in args.pod:
        if not identities.matching(args.namespace, [glob]):
            known = sorted(
                {p.name for p in pods if not args.namespace or p.namespace in args.namespace}
            )
            return f"no pod is called {glob!r}{_near(glob, known)}"
    return None if args.side == "server" else _untraceable(args, identities)


def _untraceable(args: argparse.Namespace, identities: Identities) -> str | None:
    """That none of the chosen pods can be told from others; of some, a line to say so."""
    from tracer.show.cells import clean

    chosen = identities.matching(args.namespace, args.pod)
    lost = [clean(name) for name in identities.untraceable(chosen)]
    if not lost:
        return None
    names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    line = f"neither network namespace nor cgroup is known here of {names}"
    if chosen and len(lost) == len(chosen):
        return (
            f"{line}: give 'netns' or 'cgroup' in the pods file, or leave --namespace and --pod out"
        )
    say(f"{line}: not traced")
    return None


def _near(name: str, known: list[str]) -> str:
    from tracer.show.cells import clean

    known = [clean(other) for other in known]
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are: {', '.join(known[:10])}"


def _armed(session: Session, args: argparse.Namespace) -> str:
    devices, namespaces = session.devices.count(), len(session.devices.namespaces())
    ports = ", ".join(map(str, args.port or (53,)))
    sockets = f"at sockets ({session.hooks} hooks) and" if session.hooks else "at"
    by = f" ({session.attached_by})" if session.attached_by else ""
    until = "" if args.duration else "; Ctrl-C ends"
    return (
        f"tracing UDP port {ports} {sockets} {devices} device{'s' if devices != 1 else ''}{by} "
        f"in {namespaces} network namespace{'s' if namespaces != 1 else ''}{until}"
    )
