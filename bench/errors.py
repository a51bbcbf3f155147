# SPDX-License-Identifier: Apache-2.0
"""What ends a benchmark early, in one line."""


class BenchError(Exception):
    """The measurement cannot go on. The message says why."""
