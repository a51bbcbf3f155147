# SPDX-License-Identifier: Apache-2.0
"""Histograms in Prometheus' text formats, one after the other.

prometheus_client would make an object of each line first: of tens of thousands, some four times the
page's size, at every scrape, in between what stays. Both formats have the same lines for histograms:
https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def add_histograms(
    page: bytearray,
    name: str,
    text: str,
    labels: Sequence[str],
    found: Iterable[tuple[Sequence[str], Iterable[tuple[str, float]], float]],
) -> None:
    """One family. `found`: values of the labels, (upper bound, how many up to that), and the sum."""
    page += f"# HELP {name} {text}\n# TYPE {name} histogram\n".encode()
    for values, buckets, total in found:
        told = ",".join(
            f'{label}="{value.translate(_ESCAPES)}"'
            for label, value in zip(labels, values, strict=True)
        )
        count = 0.0
        lines = []
        for bound, count in buckets:
            lines.append(f'{name}_bucket{{{told},le="{bound}"}} {count}\n')
        lines.append(f"{name}_count{{{told}}} {count}\n{name}_sum{{{told}}} {total!r}\n")
        page += "".join(lines).encode()
