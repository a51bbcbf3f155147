# SPDX-License-Identifier: Apache-2.0
"""`dnstrace`: wires the stages together, and turns what goes wrong into one line and a status."""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tracer import arguments, streams
from tracer.streams import OutputError, fail, say

if TYPE_CHECKING:
    import argparse

    from tracer.cluster.sources import Way
    from tracer.continuous.command import Outlets
    from tracer.filters import Filters
    from tracer.kernel.compile import Compilation
    from tracer.kernel.devices import Device
    from tracer.kernel.limits import Limits
    from tracer.kernel.session import Session
    from tracer.run import Stop

OK, FAILED, USAGE, UNSUPPORTED = 0, 1, 2, 3
_WINDOW_NS = 30 * 10**9
_COUNTED = ("continuous", "report")  # commands for which the kernel counts


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    try:
        streams.settle()
        status = _run(sys.argv[1:] if argv is None else argv)
        with streams.writing():
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read our output has had enough
        streams.discard(sys.stdout)
        return OK
    except OutputError as error:
        if sys.stdout is not None:
            streams.discard(sys.stdout)
        fail(str(error))
        return FAILED
    except KeyboardInterrupt:
        return OK


def _run(argv: list[str]) -> int:
    with streams.writing():
        try:
            args = arguments.parse(argv)
            if args.command == "continuous":
                from tracer.continuous.log import log

                streams.say_by(log)
                # There is nothing to complete yet.
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        finally:
            sys.stdout.flush()  # the help, which may not have fitted
    if args.command == "lab":
        from tracer.lab import cli as lab

        return lab.main(args)
    if args.command == "doctor":
        from tracer import doctor

        return doctor.main(_way(args))
    if args.command == "report":
        return _report(args)
    return _trace(args)


def _report(args: argparse.Namespace) -> int:
    """Reports on recordings, or on a window that is recorded for it."""
    from tracer.report import command
    from tracer.report.recordings import RecordingError

    try:
        filters = _filters(args)
        filters.predicate()
        if args.files:
            if args.duration is not None:
                fail("--duration is of a live window: give it, or recordings")
                return USAGE
            return command.show(args, args.files, filters)
        if args.duration is None:
            args.duration = _WINDOW_NS
        with tempfile.TemporaryDirectory(prefix="dnstrace-report-") as directory:
            args.window = Path(directory)
            status = _trace(args)
            # Only pods with these labels were recorded.
            recorded = replace(filters, selector=None)
            return status or command.show(args, [args.window], recorded)
    except ValueError as error:
        fail(str(error))
        return USAGE
    except RecordingError as error:
        fail(str(error))
        return FAILED


def _limits(args: argparse.Namespace) -> Limits:
    from tracer.kernel.limits import CONTINUOUS, Limits

    if args.command in _COUNTED:
        return CONTINUOUS
    return Limits(slots=args.max_in_flight)


def _trace(args: argparse.Namespace) -> int:
    """Traces; the compiler, which takes longest, starts before anything else is even imported."""
    from tracer.kernel import host, kprobes
    from tracer.kernel.compile import Compilation

    if not host.may_trace():
        return _trace_with(args, None)  # which says what is wrong with the rest, then with this
    with_kprobes = args.hooks != "tracepoint" and kprobes.available()
    compilation = Compilation(_limits(args).macros(), kprobes=with_kprobes)
    try:
        return _trace_with(args, compilation)
    finally:
        compilation.abandon()


def _trace_with(args: argparse.Namespace, compilation: Compilation | None) -> int:
    from tracer.chosen import NobodyChosen
    from tracer.cluster.api_source import ConfigError
    from tracer.cluster.pods_file import PodsFileError
    from tracer.kernel.session import Unsupported

    try:
        filters = _filters(args)
        filters.predicate()
        if args.command == "continuous":
            filters.require_counted()
        names = _Names(args, filters)
    except (ValueError, PodsFileError, ConfigError) as error:
        fail(str(error))
        return USAGE
    try:
        names.begin()
        return _trace_named(args, filters, names, compilation)
    except NobodyChosen as error:
        fail(str(error))
        return USAGE
    except Unsupported as error:
        fail(str(error))
        return UNSUPPORTED
    finally:
        names.end()


class _Names:
    """What pods are known from, and who is who by it. Raises PodsFileError, ConfigError."""

    def __init__(self, args: argparse.Namespace, filters: Filters) -> None:
        from tracer.chosen import Chosen
        from tracer.cluster import sources
        from tracer.cluster.identities import Identities
        from tracer.cluster.local import LocalContainers
        from tracer.keep_up import KeepUp
        from tracer.kernel import netns

        self.session: Session | None = None
        named = [*args.node, *filter(None, [os.environ.get("NODE_NAME")])]
        self._node = named[0] if named else None
        self.source, said = sources.choose(_way(args))
        if said:
            say(said)
        root = netns.cgroup2_root()
        self._local = None if args.no_kubernetes else LocalContainers(root)
        self.identities = Identities(self.source.inventory(), root, self._find_device, self._local)
        self.chosen = Chosen(filters, args.port or (), self.identities, self.source)
        self.keep_up = KeepUp(self.source, self._local, self.identities, self.chosen)

    def begin(self) -> None:
        """Looks for containers here, and for the rest in the background."""
        self.source.start()
        if self._local:
            self._local.start()

    def end(self) -> None:
        """Ends both."""
        self.source.close()
        if self._local:
            self._local.close()

    def node(self) -> str:
        """What recordings call this machine: its node's name, else its own."""
        return self._node or self.identities.only_node() or platform.node()

    def _find_device(self, netns: int, ifindex: int) -> Device | None:
        return self.session.devices.find(netns, ifindex) if self.session else None


def _trace_named(
    args: argparse.Namespace, filters: Filters, names: _Names, compilation: Compilation | None
) -> int:
    from tracer.run import Stop

    by_pods = filters.namespaces or filters.pods or filters.selector or filters.backend_wanted()
    if by_pods or args.node or args.command in _COUNTED:
        names.keep_up.wait()
    names.chosen.check(say)
    stop = Stop(args.duration, hangup_stops=args.command != "continuous")
    if args.command != "continuous":
        return _trace_until(stop, args, filters, names, compilation)
    from tracer.continuous import command
    from tracer.continuous.recorder import RecorderError

    try:
        # What is in the way of these is known at once; arming takes seconds.
        with command.outlets(args, names.node()) as outlets:
            return _trace_until(stop, args, filters, names, compilation, outlets)
    except (command.CannotServe, RecorderError) as error:
        fail(str(error))
        return FAILED


def _trace_until(
    stop: Stop,
    args: argparse.Namespace,
    filters: Filters,
    names: _Names,
    compilation: Compilation | None,
    outlets: Outlets | None = None,
) -> int:
    from tracer.correlate.lookups import Lookups
    from tracer.kernel import host
    from tracer.kernel.session import KEEP_ALL, Keeping, Session
    from tracer.run import Totals, Trace

    hooks = None if args.hooks == "auto" else args.hooks
    # Until somebody reads, little may leave.
    keeping = Keeping(share=0) if args.command == "continuous" else KEEP_ALL
    session = Session.open(
        names.chosen.selection(), _limits(args), hooks, compilation, keeping, stop.hold
    )
    try:
        if session.hooks is None and (
            filters.pid or filters.comm or args.container or filters.slower
        ):
            what = "--pid, --comm, --container and --slower need socket hooks"
            fail(f"{what}: {'; '.join(session.notes)}")
            return UNSUPPORTED
        for found in host.confinement():
            say(f"{found.what} ({found.fix})")
        for note in session.notes:
            say(note)
        names.session = session
        names.keep_up.use(session)
        if args.command in _COUNTED:
            return _count(args, filters, names, session, stop, outlets)
        say(_armed(session, args))
        from tracer.output import make_output

        output = make_output(args)
        lookups = None if filters.tear_lookups or args.command == "path" else Lookups()
        keep = filters.predicate(names.identities.labels)
        trace = Trace(
            session, names.identities, keep, lookups, output, args.timeout, args.count, Totals(),
            stop, names.keep_up, names.keep_up.refuse,
        )  # fmt: skip
        trace.run()
        trace.totals.names_problem = names.source.problem()
        with stop.writing():
            output.finish(session, trace.totals)
    finally:
        session.close()
        stop.done()
    return OK


def _count(
    args: argparse.Namespace,
    filters: Filters,
    names: _Names,
    session: Session,
    stop: Stop,
    outlets: Outlets | None,
) -> int:
    """Has the kernel count, until stopped, or without `outlets` for a window."""
    from tracer.continuous import command
    from tracer.continuous.recorder import RecorderError

    around = command.Surroundings(
        session, names.identities, names.keep_up, stop, filters, names.node(), names.source
    )
    try:
        if outlets is not None:
            command.run(args, around, outlets)
        else:
            say(_armed(session, args))
            command.measure(args, around, args.window)
    except RecorderError as error:
        fail(str(error))
        return FAILED
    return OK


def _way(args: argparse.Namespace) -> Way:
    from tracer.cluster.sources import Way

    return Way(
        args.pods, args.kubeconfig, args.context, tuple(args.node), no_kubernetes=args.no_kubernetes
    )


def _filters(args: argparse.Namespace) -> Filters:
    from tracer.filters import Filters

    return Filters(
        namespaces=tuple(args.namespace),
        pods=tuple(args.pod),
        selector=args.selector,
        container=args.container,
        pid=getattr(args, "pid", None),
        comm=getattr(args, "comm", None),
        name=getattr(args, "name", None),
        type=args.type,
        rcode=args.rcode,
        failed=getattr(args, "failed", False),
        slower=None if args.command == "continuous" else args.slower,
        server=args.server,
        backend=args.backend,
        side=args.side,
    )


def _armed(session: Session, args: argparse.Namespace) -> str:
    devices, namespaces = session.devices.count(), len(session.devices.namespaces())
    numbers = sorted(session.ports())
    ports = f"port{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    sockets = f"at sockets ({session.hooks} hooks) and" if session.hooks else "at"
    by = f" ({session.attached_by})" if session.attached_by else ""
    until = "" if args.duration else "; Ctrl-C ends"
    return (
        f"tracing UDP and TCP {ports} {sockets} {devices} device{'s' if devices != 1 else ''}{by} "
        f"in {namespaces} network namespace{'s' if namespaces != 1 else ''}{until}"
    )
