# SPDX-License-Identifier: Apache-2.0
"""The command line where streams are closed or full, and where pods have hostile names."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.samples import transaction
from tracer import arguments
from tracer.output import make_output
from tracer.streams import OutputError

if TYPE_CHECKING:
    from pathlib import Path

_RED = "\x1b[31m"


def dnstrace(words: str, project: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command line, which may redirect its streams."""
    command = ["sh", "-c", f'exec "$0" -m tracer {words}', sys.executable]
    return subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=60, check=False
    )


def pods(directory: Path, *entries: dict[str, Any]) -> Path:
    path = directory / "pods.json"
    path.write_text(json.dumps({"pods": entries}))
    return path


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("doctor >&-", "stdout is closed"),
        ("doctor <&- >&-", "stdout is closed"),
        ("--json >&-", "stdout is closed"),
        ("doctor >/dev/full", "No space left on device"),
        ("--help >/dev/full", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_told_in_a_line(
    words: str, reason: str, project: Path
) -> None:
    done = dnstrace(words, project)
    assert (done.returncode, done.stderr) == (1, f"dnstrace: cannot write output: {reason}\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_status_is_the_same_where_nothing_can_be_said(redirection: str, project: Path) -> None:
    done = dnstrace(f"--pods /nonexistent --namespace sre {redirection}", project)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("options", ["--json", "", "path"])
def test_full_device_ends_the_trace(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = open("/dev/full", "w")  # noqa: SIM115 - closing it raises, since it is full
    monkeypatch.setattr(sys, "stdout", nowhere)
    output = make_output(arguments.parse(options.split()))
    with pytest.raises(OutputError, match="cannot write output: No space left on device"):
        output.write([transaction()])
    with pytest.raises(OSError, match="No space left"):
        nowhere.close()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("words", ["--namespace other", "--namespace sre --pod other"])
def test_names_of_pods_cannot_command_the_terminal(
    words: str, project: Path, tmp_path: Path
) -> None:
    path = pods(
        tmp_path,
        {"namespace": "sre", "name": f"web{_RED}", "netns": 1},
        {"namespace": f"{_RED}\n{'x' * 5000}", "name": "api", "netns": 2},
    )
    done = dnstrace(f"--pods {path} {words}", project)
    assert done.returncode == 2
    assert r"\x1b[31m" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()
    assert len(done.stderr) < 500


@pytest.mark.usefixtures("root")
def test_pods_that_cannot_be_told_from_others_are_bad_usage(project: Path, tmp_path: Path) -> None:
    path = pods(tmp_path, *({"namespace": "sre", "name": f"web-{i}"} for i in range(5)))
    done = dnstrace(f"--pods {path} --namespace sre", project)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "dnstrace: neither network namespace nor cgroup is known here of "
        "sre/web-0, sre/web-1, sre/web-2 and 2 more: "
    )
    assert done.stderr.count("\n") == 1
