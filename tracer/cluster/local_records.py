# SPDX-License-Identifier: Apache-2.0
"""What the node itself tells of its containers and pods."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class NotAContainer(Enum):
    """A definite answer: the process or cgroup is the host's. Unknown is None."""

    NOT_A_CONTAINER = "not a container"


NOT_A_CONTAINER: Final = NotAContainer.NOT_A_CONTAINER


@dataclass(frozen=True, slots=True)
class LocalPod:
    """`uid` is kubelet's: of static pods it is a hash, not the API's uid of the mirror pod."""

    uid: str
    namespace: str | None
    name: str | None
    netns: int


@dataclass(frozen=True, slots=True)
class LocalContainer:
    """One container. Without `container_id`: something of the pod that is none, as a monitor is.

    `cgroup_ids` are those of the v2 hierarchy, the container's own and all below; of one that has
    gone, those that it had at the end. `pod_uid` is None for containers that are not kubelet's.
    A sandbox ("pause") has no `name`; `is_sandbox` is None as long as nothing tells.
    """

    cgroup_ids: tuple[int, ...]
    container_id: str | None
    pod_uid: str | None
    namespace: str | None = None
    pod: str | None = None
    name: str | None = None
    is_sandbox: bool | None = None
    netns: int | None = None
