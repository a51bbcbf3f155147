# SPDX-License-Identifier: Apache-2.0
"""Whose a network namespace is: a pod's, if it is that pod's alone.

The node's own is shared by hostNetwork pods. A node inside a container has one too, which its
hostNetwork pods share with that container, or with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Claim(NamedTuple):
    """A container is in a namespace. `pod_uid` is None if it is of no pod."""

    netns: int
    pod_uid: str | None


def sole_owners(live: Iterable[Claim], gone: Iterable[Claim]) -> dict[int, str]:
    """Namespace to the uid of its pod. Who has gone owns only what nobody has now."""
    owners = _owners(live)
    owners = _owners(gone) | owners
    return {netns: uid for netns, (uid, *others) in owners.items() if uid and not others}


def _owners(claims: Iterable[Claim]) -> dict[int, set[str | None]]:
    owners: dict[int, set[str | None]] = {}
    for netns, uid in claims:
        owners.setdefault(netns, set()).add(uid)
    return owners
