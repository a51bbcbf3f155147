# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.lab`: the same as `dnstrace lab`."""

import argparse
import sys

from tracer.lab import cli

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="dnstrace lab")
    cli.add_arguments(parser)
    sys.exit(cli.main(parser.parse_args()))
