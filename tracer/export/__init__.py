# SPDX-License-Identifier: Apache-2.0
"""What leaves the tracer for other programs."""
