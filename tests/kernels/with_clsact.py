# SPDX-License-Identifier: Apache-2.0
"""dnstrace as on a kernel without TCX: its programs sit in the clsact qdisc.

`python -m tests.kernels.with_clsact ARGUMENTS…`, so that kernels which have TCX show both ways.
"""

from __future__ import annotations

import errno
import sys
from unittest import mock

from tracer.cli import main
from tracer.kernel import programs

if __name__ == "__main__":
    refusal = OSError(errno.EINVAL, "no TCX")
    with mock.patch.object(programs, "_attach_links", side_effect=refusal):
        sys.exit(main())
