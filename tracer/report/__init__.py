# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: reports over recordings. The only room for DuckDB, but for the writer."""
