# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer` is `dnstrace`."""

import sys

from tracer.cli import main

sys.exit(main())
