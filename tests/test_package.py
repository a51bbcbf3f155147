# SPDX-License-Identifier: Apache-2.0
"""The package as users get it: built into a wheel, installed without its sources."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tracer


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True)


def names_in_wheel(project: Path) -> set[str]:
    """What a wheel must hold: every module, and what is compiled on the user's machine."""
    modules = {str(path.relative_to(project)) for path in (project / "tracer").rglob("*.py")}
    bpf = {f"tracer/{path.relative_to(project)}" for path in (project / "bpf").rglob("*.[ch]")}
    deploy = {f"tracer/{path.relative_to(project)}" for path in (project / "deploy").glob("*.yaml")}
    go = {
        str(path.relative_to(project))
        for pattern in ("*.go", "go.mod", "go.sum")
        for path in (project / "tracer/lab").glob(f"*/{pattern}")
    }
    return modules | bpf | deploy | go


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build directory is left beside them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "LICENSE", "LICENSE.GPL-2.0"):
        shutil.copy(project / name, copy)
    for name in ("bpf", "deploy", "tracer"):
        shutil.copytree(project / name, copy / name, symlinks=True)
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, copy)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel installed, apart from the sources."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", "--target", target, wheel)
    return target


def test_version_is_the_same_in_code_and_metadata(project: Path) -> None:
    metadata = tomllib.loads((project / "pyproject.toml").read_text())
    assert tracer.__version__ == metadata["project"]["version"]


def test_wheel_holds_every_source_file(project: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        missing = names_in_wheel(project) - set(archive.namelist())
    assert missing == set()


def test_wheel_holds_both_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE.GPL-2.0"}


def test_command_runs_from_an_installation_without_sources(installed: Path) -> None:
    shown = subprocess.run(
        [installed / "bin/dnstrace", "--help"],
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "dnstrace" in shown.stdout
