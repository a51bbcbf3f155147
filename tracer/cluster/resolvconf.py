# SPDX-License-Identifier: Apache-2.0
"""resolv.conf as the C library reads it, resolver(5): what a client's names are expanded with.

Pods write these files, so their size, and what may be in them, are bounded here.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

NAMESERVERS_USED = 3  # MAXNS
TEXT_MAX = 64 << 10
_NAMESERVERS_MAX = 32
_SEARCH_MAX = 64  # Kubernetes allows 32
_DOMAIN_MAX = 255
_OPTIONS_MAX = 64
_NDOTS_MAX = 15  # RES_MAXNDOTS
_TIMEOUT_MAX_S = 30  # RES_MAXRETRANS
_ATTEMPTS_MAX = 5  # RES_MAXRETRY


class ResolvConf(NamedTuple):
    """Defaults are the C library's. Without a `nameserver` line it asks this host itself.

    Domains of the search list have no final dot; "." is the root. `options` are those without a
    field of their own, as they are written ("rotate", "single-request-reopen").
    """

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ndots: int = 1
    timeout_s: int = 5
    attempts: int = 2
    options: tuple[str, ...] = ()

    @property
    def used_nameservers(self) -> tuple[str, ...]:
        """Those that are asked; the C library ignores further ones."""
        return self.nameservers[:NAMESERVERS_USED]


def parse(text: str) -> ResolvConf:
    """What the text says; lines that say nothing are skipped, as the C library does."""
    nameservers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text[:TEXT_MAX].split("\n"):
        keyword, *values = line.replace("\t", " ").replace("\r", " ").split(" ")
        values = [value for value in values if value]
        if not values:
            continue
        # The last of `search` and `domain` wins, wherever they are; the others add up.
        match keyword:
            case "nameserver":
                nameservers += _address(values[0])
            case "search":
                search = tuple(map(_domain, filter(_is_domain, values)))[:_SEARCH_MAX]
            case "domain":
                search = tuple(map(_domain, filter(_is_domain, values[:1])))
            case "options":
                options += values
    return ResolvConf(
        nameservers=tuple(nameservers[:_NAMESERVERS_MAX]),
        search=search,
        ndots=_number(options, "ndots", ResolvConf().ndots, _NDOTS_MAX),
        timeout_s=_number(options, "timeout", ResolvConf().timeout_s, _TIMEOUT_MAX_S),
        attempts=_number(options, "attempts", ResolvConf().attempts, _ATTEMPTS_MAX),
        options=_others(options),
    )


def _address(value: str) -> list[str]:
    # A comment may follow an address without a space.
    for comment in "#;":
        value = value.partition(comment)[0]
    try:
        return [str(ipaddress.ip_address(value))]
    except ValueError:
        return []


def _is_domain(value: str) -> bool:
    return len(value) <= _DOMAIN_MAX and value.isascii() and value.isprintable()


def _domain(value: str) -> str:
    return value.removesuffix(".") or "."


def _number(options: list[str], name: str, default: int, at_most: int) -> int:
    found = default
    for option in options:
        key, _, value = option.partition(":")
        if key == name and value.isascii() and value.isdigit():
            found = min(int(value[:4]), at_most)
    return found


def _others(options: list[str]) -> tuple[str, ...]:
    numbers = ("ndots:", "timeout:", "attempts:")
    kept = (o for o in options if not o.startswith(numbers) and _is_domain(o))
    return tuple(dict.fromkeys(kept))[:_OPTIONS_MAX]
