# SPDX-License-Identifier: Apache-2.0
"""What belongs together: pure functions of transactions and times."""
