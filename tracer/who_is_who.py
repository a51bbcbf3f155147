# SPDX-License-Identifier: Apache-2.0
"""The doctor's part about names: what this node, and the cluster, tell of pods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.cluster import sources
from tracer.cluster.api_source import ConfigError
from tracer.cluster.cluster import ClusterWatch
from tracer.cluster.local import LocalContainers
from tracer.cluster.pods_file import PodsFileError
from tracer.finding import Finding
from tracer.kernel import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracer.cluster.sources import Way

_PATIENCE_S = 10.0
_RBAC = "kubectl apply -f deploy/rbac.yaml, and use the service account kube-system/dnstrace"


def examine(way: Way) -> Iterator[Finding]:
    """What names come from."""
    yield _containers()
    yield _cluster(way)


def _containers() -> Finding:
    local = LocalContainers(netns.cgroup2_root())
    local.start()
    try:
        found = local.containers()
        named = sum(one.pod is not None for one in found)
        pods = len({one.pod_uid for one in found if one.pod_uid})
        how = "; ".join(f"{root} by {by}" for root, by in local.watched_by().items())
    finally:
        local.close()
    detail = (
        f"{len(found)} in {pods} pods; without an API server or --pods, this node's own files "
        f"name {named} of them; changes are learned of in {how or 'no hierarchy'}"
    )
    return Finding("containers", "ok" if how else "note", detail)


def _cluster(way: Way) -> Finding:
    try:
        source, said = sources.choose(way)
    except (PodsFileError, ConfigError) as error:
        return Finding("cluster", "note", str(error), "give --kubeconfig FILE")
    if not isinstance(source, ClusterWatch):
        return Finding("cluster", "note", said or "pods are named from a file")
    source.start()
    try:
        source.wait_synced(_PATIENCE_S)
        status = source.status()
    finally:
        source.close()
    if status.problem is None:
        return Finding("cluster", "ok", status.text)
    forbidden = any(resource.status == 403 for resource in status.resources)
    return Finding("cluster", "note", status.problem, _RBAC if forbidden else None)
