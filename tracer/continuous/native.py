# SPDX-License-Identifier: Apache-2.0
"""Metrics as protocol buffers, which is how Prometheus takes native histograms.

The messages are those of io.prometheus.client (client_model's metrics.proto), each with its length
before it. A bucket of ours goes into the exponential bucket of schema 6 (64 for each power of two)
that its middle is in, so that what is read from it is within 4.3 % of the truth.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from tracer.stages import bounds, middle

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from prometheus_client.core import Metric

    from tracer.continuous.book import Histogram

CONTENT_TYPE = (
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
)
SCHEMA = 6
_PER_OCTAVE = 1 << SCHEMA
_ZERO_S = 1e-9
_COUNTER, _GAUGE, _HISTOGRAM = 0, 1, 4  # enum MetricType
_VALUE_FIELD = {_COUNTER: 3, _GAUGE: 2}  # of Metric


def is_asked_for(accept: str) -> bool:
    """Whether a scrape's Accept header asks for this form."""
    return "application/vnd.google.protobuf" in accept and "delimited" in accept


def simple(family: Metric) -> bytes:
    """A MetricFamily of counters or gauges."""
    kind = _COUNTER if family.type == "counter" else _GAUGE
    name = f"{family.name}_total" if kind == _COUNTER else family.name
    metrics = []
    for sample in family.samples:
        value = _message(_VALUE_FIELD[kind], _double(1, sample.value))
        metrics.append(_labels(sample.labels) + value)
        name = sample.name
    return _family(name, family.documentation, kind, metrics)


def histograms(
    name: str,
    text: str,
    labels: Sequence[str],
    found: Iterable[tuple[Sequence[str], Histogram, Sequence[tuple[str, float]]]],
) -> bytes:
    """A MetricFamily of histograms, each with its label values and its classic buckets."""
    metrics = []
    for values, histogram, classic in found:
        body = _varint_field(1, histogram.count()) + _double(2, histogram.sum_ns / 1e9)
        for bound, count in classic:
            body += _message(3, _varint_field(1, int(count)) + _double(2, float(bound)))
        body += _native(histogram.counts)
        metrics.append(_labels(dict(zip(labels, values, strict=True))) + _message(7, body))
    return _family(name, text, _HISTOGRAM, metrics)


def _native(counts: Mapping[int, int]) -> bytes:
    """Schema, zero bucket, and spans of exponential buckets with the differences of their counts."""
    zero = 0
    by_index: Counter[int] = Counter()
    for bucket, count in counts.items():
        if bucket:
            by_index[_index(bucket)] += count
        else:
            zero += count
    body = _sint_field(5, SCHEMA) + _double(6, _ZERO_S) + _varint_field(7, zero)
    spans: list[list[int]] = []  # offset, length
    deltas = b""
    expected = before = 0
    for index in sorted(by_index):
        if spans and index == expected:
            spans[-1][1] += 1
        else:
            spans.append([index - expected, 1])
        expected = index + 1
        deltas += _zigzag(by_index[index] - before)
        before = by_index[index]
    if not spans:  # an empty one says that this is a native histogram nevertheless
        spans.append([0, 0])
    for offset, length in spans:
        body += _message(12, _sint_field(1, offset) + _varint_field(2, length))
    return body + _message(13, deltas)


@lru_cache(1024)  # there are fewer buckets
def _index(bucket: int) -> int:
    """The exponential bucket for one of ours, which is not that of 0."""
    return math.ceil(math.log2(middle(*bounds(bucket)) / 1e9) * _PER_OCTAVE - 1e-9)


def _family(name: str, text: str, kind: int, metrics: Iterable[bytes]) -> bytes:
    body = _message(1, name.encode()) + _message(2, text.encode()) + _varint_field(3, kind)
    body += b"".join(_message(4, metric) for metric in metrics)
    return _varint(len(body)) + body


def _labels(labels: Mapping[str, str]) -> bytes:
    return b"".join(
        _message(1, _message(1, name.encode()) + _message(2, value.encode()))
        for name, value in labels.items()
    )


@lru_cache(4096)
def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _zigzag(number: int) -> bytes:
    return _varint(number << 1 if number >= 0 else (-number << 1) - 1)


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _sint_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _zigzag(number)


def _double(field: int, number: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", number)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body
