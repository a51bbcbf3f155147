# SPDX-License-Identifier: Apache-2.0
"""The tracer with newer releases' Python, BCC and LLVM, on the kernel that runs.

Needs the roots that fetch-root makes (see ROOTS); `make test-kernels` sees to that. What older BCC
does, all other tests show.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.guests import in_root
from tests.kernels.world import HOOK_SETS
from tracer.kernel import kprobes
from tracer.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUITES = ("trixie", "sid")
ROOTS = Path("~/.cache/dnstrace/roots").expanduser()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Up for all of them."""
    lab = Lab()
    lab.up()
    yield lab
    lab.down()


@pytest.mark.parametrize("hooks", HOOK_SETS)
@pytest.mark.parametrize("suite", SUITES, ids="BCC of Debian {}".format)
def test_other_bcc(
    lab: Lab, suite: str, hooks: str, record_property: Callable[[str, object], None]
) -> None:
    """Its programs compile and load, and every query of a pod is seen whole."""
    if hooks == "kprobe" and not kprobes.available():
        pytest.skip("not offered by this kernel: no kprobes (CONFIG_KPROBE_EVENTS)")
    root = ROOTS / suite
    record_property(f"Debian {suite}", in_root.versions(root))
    if hooks == "tracepoint":
        in_root.doctor(root)
    assert in_root.trace(root, lab, hooks) == in_root.QUESTIONS
