# SPDX-License-Identifier: Apache-2.0
"""What is deployed: the manifests by the real API server, the unit by systemd, and that the
capabilities which they give are enough, and none too many."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.api_server import ApiServer
from tests.asking import dig
from tests.counting import Run, running
from tests.test_cluster_api import eventually
from tracer import arguments
from tracer.kernel.code_cache import DIRECTORY_VARIABLE
from tracer.kernel.host import CAPABILITIES
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).parent.parent / "deploy"
_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
}


def manifests() -> list[dict[str, Any]]:
    return [
        each
        for name in ("rbac.yaml", "daemonset.yaml")
        for each in yaml.safe_load_all((DEPLOY / name).read_text())
    ]


def container() -> dict[str, Any]:
    (daemon_set,) = [each for each in manifests() if each["kind"] == "DaemonSet"]
    found: dict[str, Any] = daemon_set["spec"]["template"]["spec"]["containers"][0]
    return found


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "dnstrace.service")
    return parser["Service"]


def capabilities(where: str) -> set[str]:
    if where == "unit":
        return set(unit()["CapabilityBoundingSet"].split())
    return {f"CAP_{name}" for name in container()["securityContext"]["capabilities"]["add"]}


def test_scrapes_keep_the_metrics_own_labels() -> None:
    """Else namespace and pod are those of the tracer, wherever alerts and dashboard ask for them."""
    monitor = yaml.safe_load((DEPLOY / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    ports = {port["name"] for port in container()["ports"]}
    assert endpoint["port"] in ports
    (daemon_set,) = [each for each in manifests() if each["kind"] == "DaemonSet"]
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_image_is_made_of_what_is_there() -> None:
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert list(DEPLOY.parent.glob(source)), source


@pytest.fixture(scope="module")
def server(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    del root
    server = ApiServer(tmp_path_factory.mktemp("api"))
    server.start()
    yield server
    server.stop()


def test_api_server_takes_the_manifests_as_they_are(server: ApiServer) -> None:
    for each in manifests():
        path = f"{_PATHS[each['kind']]}?dryRun=All&fieldValidation=Strict"
        made = server.create(path, each)
        assert made["metadata"]["name"] == "dnstrace"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "dnstrace.service").read_text()
    copy = tmp_path / "dnstrace.service"
    copy.write_text(text.replace("/usr/local/bin/dnstrace", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["unit", "manifest"])
def test_arguments_are_ones_that_there_are(where: str) -> None:
    if where == "unit":
        said = unit()["ExecStart"].replace("$DNSTRACE_OPTIONS", "--metrics 192.0.2.1:9353")
        argv = said.split()[1:]
    else:
        argv = [text.replace("$(HOST_IP)", "192.0.2.1") for text in container()["args"]]
    assert arguments.parse(argv).command == "continuous"


@pytest.mark.parametrize("where", ["unit", "manifest"])
def test_capabilities_are_those_that_are_known_to_be_needed(where: str) -> None:
    assert capabilities(where) == set(CAPABILITIES)


def labels(run: Run, metric: str) -> list[dict[str, str]]:
    return [found for found, _ in run.scrape().get(f"dnstrace_{metric}", [])]


def test_with_these_capabilities_all_is_traced(
    root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del root
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "kept"))  # compiling needs some, too
    lab = Lab()
    lab.up()
    names = sorted(capabilities("unit"))
    bounding = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    confined = ["setpriv", f"--bounding-set={bounding}", "--no-new-privs"]
    record = tmp_path / "rec"
    with running("--pods", str(lab.pods_file), "--record", str(record), command=confined) as run:
        status = Path(f"/proc/{run.process.pid}/status").read_text()
        held = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
        assert held
        assert int(held[1], 16) == sum(1 << CAPABILITIES[name].bit for name in names)
        dig(lab, "sre/web-0", "www.example.com")
        dig(lab, "sre/worker-0", "www.example.com")
        eventually(
            lambda: {"web-0", "worker-0"} <= {k["pod"] for k in labels(run, "transactions_total")}
        )
        expected = {"application_send", "node", "server", "wake_up"}
        eventually(lambda: expected <= {
            k["stage"] for k in labels(run, "stage_seconds_count") if k["pod"] == "web-0"
        })  # fmt: skip
        run.stop()
    lab.down()
    assert list(record.glob("histograms-*.parquet"))
