# SPDX-License-Identifier: Apache-2.0
"""Where names come from, if the command line does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer.cluster import sources
from tracer.cluster.cluster import ClusterWatch
from tracer.cluster.sources import Way

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_kubeconfig_of_the_lab_is_said_to_be_the_labs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that --kubeconfig gave."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.touch()
    monkeypatch.setattr(sources, "LAB_KUBECONFIG", kubeconfig)
    found, said = sources.choose(Way())
    assert isinstance(found, ClusterWatch)
    assert str(found._source) == f"{kubeconfig} (of the lab that is up)"
    assert said == "the cluster is the lab's"
    given, _ = sources.choose(Way(kubeconfig=str(kubeconfig)))
    assert isinstance(given, ClusterWatch)
    assert str(given._source) == f"{kubeconfig} (--kubeconfig)"
