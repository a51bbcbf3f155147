# SPDX-License-Identifier: Apache-2.0
"""What every test can use."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tracer.kernel.code_cache import DIRECTORY_VARIABLE

# By default the same examples are tried each time, so that a run says the same twice.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=100_000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is compiled here is kept for these tests, and not for a tracer of this machine."""
    os.environ[DIRECTORY_VARIABLE] = str(tmp_path_factory.mktemp("compiled") / "kept")


@pytest.fixture(scope="session")
def project() -> Path:
    """The directory that holds the project's sources."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> None:
    """Fails a test that needs root, instead of skipping what would then never be tested."""
    if os.geteuid() != 0:
        pytest.fail("this test needs root: run `sudo make test`", pytrace=False)
