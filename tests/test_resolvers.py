# SPDX-License-Identifier: Apache-2.0
"""resolv.conf of other processes, whose roots may hold anything."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tracer.cluster.resolvers import Resolvers
from tracer.transaction import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracer.cluster.resolvconf import ResolvConf

pytestmark = pytest.mark.usefixtures("root")

_CONFINED = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """/etc of the confined process."""
    made = tmp_path / "root" / "etc"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def client(etc: Path) -> Iterator[Client]:
    """A process that has a root directory of its own."""
    command = [sys.executable, "-c", _CONFINED, str(etc.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield Client("10.0.0.1", 1, pid=process.pid)
        process.communicate()


def found(client: Client) -> ResolvConf | None:
    """What is found out about it, which must not take long."""
    result: list[ResolvConf | None] = []
    finder = threading.Thread(
        target=lambda: result.append(Resolvers(lambda _: []).of(client)), daemon=True
    )
    finder.start()
    finder.join(5)
    assert result, "reading resolv.conf blocks"
    return result[0]


def ndots(client: Client) -> int | None:
    conf = found(client)
    return conf.ndots if conf else None


def test_resolv_conf_is_that_of_the_process_root(etc: Path, client: Client) -> None:
    (etc / "resolv.conf").write_text("options ndots:7\n")
    assert ndots(client) == 7


def test_number_of_another_process_gives_nothing(etc: Path, client: Client) -> None:
    (etc / "resolv.conf").write_text("options ndots:7\n")
    here = os.stat("/proc/self/ns/net").st_ino
    assert ndots(client._replace(netns=here)) == 7
    assert found(client._replace(netns=here + 1)) is None


def test_fifo_does_not_block(etc: Path, client: Client) -> None:
    os.mkfifo(etc / "resolv.conf")
    assert found(client) is None


def test_what_is_no_file_is_not_opened(etc: Path, client: Client) -> None:
    (etc / "resolv.conf").mkdir()
    assert found(client) is None


def test_device_is_not_opened(etc: Path, client: Client) -> None:
    os.mknod(etc / "resolv.conf", 0o20666, os.makedev(1, 5))  # /dev/zero
    assert found(client) is None


def test_links_stay_in_the_root(etc: Path, client: Client, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("options ndots:9\n")
    for target in (str(outside), "../../outside"):
        (etc / "resolv.conf").unlink(missing_ok=True)
        (etc / "resolv.conf").symlink_to(target)
        assert found(client) is None
    (etc.parent / "run").mkdir()
    (etc.parent / "run" / "resolv.conf").write_text("options ndots:3\n")
    (etc / "resolv.conf").unlink()
    (etc / "resolv.conf").symlink_to("/run/resolv.conf")
    assert ndots(client) == 3


def test_of_a_huge_file_only_the_beginning_is_read(etc: Path, client: Client) -> None:
    with open(etc / "resolv.conf", "wb") as file:
        file.write(b"options ndots:3\n" + b"#\n" * 40_000 + b"options ndots:7\n")
        file.truncate(1 << 40)
    assert ndots(client) == 3


def test_nothing_stays_open(etc: Path, client: Client) -> None:
    (etc / "resolv.conf").symlink_to("resolv.conf")
    before = len(os.listdir("/proc/self/fd"))
    assert found(client) is None
    assert len(os.listdir("/proc/self/fd")) == before
