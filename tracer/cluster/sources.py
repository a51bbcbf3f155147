# SPDX-License-Identifier: Apache-2.0
"""Where the cluster's pods, services and nodes are known from: an API server, a file, or nowhere.

Either way there is an inventory, and a number that changes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tracer.cluster import api_source, pods_file
from tracer.cluster.cluster import ClusterWatch
from tracer.cluster.model import Inventory
from tracer.cluster.pods_file import PodsFileError
from tracer.kernel import netns

_LAB = Path("/run/dnstrace-lab")
LAB_PODS = _LAB / "pods.json"
LAB_KUBECONFIG = _LAB / "kubeconfig"


class Source(Protocol):
    """Where names come from."""

    version: int

    def start(self) -> None:
        """Begins; returns at once."""

    def close(self) -> None:
        """Ends it."""

    def inventory(self) -> Inventory:
        """What is known now."""

    def update(self) -> None:
        """Looks for news, if that is not done in the background."""

    def problem(self) -> str | None:
        """Why names may be incomplete, or out of date, now."""

    def age_s(self) -> float | None:
        """Seconds since all that an API server tells was last heard of; None: not yet, or none."""


class Nowhere:
    """Nothing is known of a cluster."""

    version = 0

    def __init__(self, why: str | None = None) -> None:
        self._why = why

    def start(self) -> None:
        """Nothing to begin."""

    def close(self) -> None:
        """Nothing to end."""

    def inventory(self) -> Inventory:
        """Nothing."""
        return Inventory()

    def update(self) -> None:
        """Nothing new."""

    def problem(self) -> str | None:
        """Why nothing is known, if that was not asked for."""
        return self._why

    def age_s(self) -> None:
        """There is no API server."""


class FileSource:
    """A file, read again whenever it changes. Raises PodsFileError when it is made.

    What becomes of it later is told, and names stay as they were. One that is `optional` may go.
    """

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        self.version = 0
        self._path = path
        self._optional = optional
        self._seen: tuple[int, int] | None = None
        self._inventory = Inventory()
        self._problem: str | None = None
        self._look()

    def start(self) -> None:
        """Nothing to begin."""

    def close(self) -> None:
        """Nothing to end."""

    def inventory(self) -> Inventory:
        """What the file said when it could last be read."""
        return self._inventory

    def update(self) -> None:
        """Reads the file if it has changed."""
        try:
            self._look()
            self._problem = None
        except PodsFileError as error:
            self._problem = f"{error}; pods are named as before"

    def problem(self) -> str | None:
        """Why it cannot be read."""
        return self._problem

    def age_s(self) -> None:
        """There is no API server."""

    def _look(self) -> None:
        now = None
        try:
            status = self._path.stat()
            now = (status.st_mtime_ns, status.st_ino)
        except OSError:
            if self._optional and self._seen is None:
                return
        if now == self._seen and now is not None:
            return
        if now is None and self._optional:
            self._seen = None
            raise PodsFileError(f"{self._path} is gone")
        self._inventory = pods_file.load(self._path)
        self._seen = now
        self.version += 1


class ApiServer(ClusterWatch):
    """An API server, as a source."""

    def update(self) -> None:
        """It is watched in the background."""

    def problem(self) -> str | None:
        """What the last word of it is."""
        return self.status().problem

    def age_s(self) -> float | None:
        """Of what was heard of longest ago; ordinarily a minute at most, see Timing."""
        ages = [one.contact_s for one in self.status().resources]
        known = [age for age in ages if age is not None]
        return max(known) if known and len(known) == len(ages) else None


@dataclass(frozen=True, slots=True)
class Way:
    """What the command line says of where names are known; `nodes` are those of this machine."""

    pods: Path | None = None
    kubeconfig: str | None = None
    context: str | None = None
    nodes: tuple[str, ...] = ()
    no_kubernetes: bool = False


def choose(way: Way) -> tuple[Source, str | None]:
    """The source that was asked for, else the lab if it is up, else what this host has.

    And what to say of it. Raises PodsFileError, and api.ConfigError.
    """
    if way.no_kubernetes:
        return Nowhere(), None
    if way.pods:
        return FileSource(way.pods), None
    asked = way.kubeconfig or way.context
    if not asked and LAB_KUBECONFIG.exists():
        lab = api_source.ApiSource((str(LAB_KUBECONFIG),), None, "of the lab that is up")
        return ApiServer(lab, way.nodes, _addresses), "the cluster is the lab's"
    if not asked and LAB_PODS.exists():
        return FileSource(LAB_PODS, optional=True), f"pods are those of the lab ({LAB_PODS})"
    source = api_source.find(way.kubeconfig, way.context)
    if source is None:
        why = (
            "no cluster is configured here (no kubeconfig, no service account): pods are named "
            "as far as this node's own files tell; give --kubeconfig"
        )
        return Nowhere(why), why
    return ApiServer(source, way.nodes, _addresses), f"the cluster is that of {source}"


def _addresses() -> set[str]:
    """Those of this machine, in whichever network namespace."""
    return set().union(*netns.addresses().values())
