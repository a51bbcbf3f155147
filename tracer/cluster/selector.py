# SPDX-License-Identifier: Apache-2.0
"""Label selectors as kubectl's -l takes them.

https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Matches = Callable[[Mapping[str, str]], bool]

_KEY = (
    r"(?P<key>(?:[A-Za-z0-9][A-Za-z0-9.-]{0,252}/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)"
)
_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
_REQUIREMENT = re.compile(
    rf"\s*(?:{_KEY}\s*(?:(?P<op>==?|!=)\s*(?P<value>[^,()=!\s]*)"
    r"|\s(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?"
    rf"|!\s*{_KEY.replace('key', 'absent')})\s*(?:,|$)",
    re.ASCII,
)


def parse(text: str) -> Matches:
    """Whether labels fit; all requirements must hold. ValueError says what is wrong."""
    requirements: list[Matches] = []
    at = 0
    while at < len(text):
        found = _REQUIREMENT.match(text, at)
        if found is None:
            raise ValueError(
                f"selector {text!r} cannot be read at {text[at:]!r}; "
                "write it as for kubectl: app=web,tier!=cache or 'app in (web,api)'"
            )
        requirements.append(_requirement(found, text))
        at = found.end()
    if not requirements or text.rstrip().endswith(","):
        raise ValueError(f"selector {text!r} ends too early; write it as for kubectl: app=web")
    return lambda labels: all(matches(labels) for matches in requirements)


def _requirement(found: re.Match[str], text: str) -> Matches:
    key, op, absent = found["key"], found["op"] or found["set"], found["absent"]
    if absent:
        return lambda labels: absent not in labels
    if op is None:
        return lambda labels: key in labels
    listed = found["value"] if found["op"] else found["values"]
    values = {value.strip() for value in listed.split(",")}
    for value in values:
        if not _VALUE.fullmatch(value):
            raise ValueError(f"selector {text!r}: {value!r} is no value that a label can have")
    if op in ("!=", "notin"):
        return lambda labels: labels.get(key) not in values
    return lambda labels: labels.get(key) in values
