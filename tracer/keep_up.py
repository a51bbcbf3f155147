# SPDX-License-Identifier: Apache-2.0
"""Takes in what becomes of pods and containers while they are traced."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tracer.cluster.cluster import ClusterWatch
from tracer.kernel import netns
from tracer.streams import say

if TYPE_CHECKING:
    from tracer.chosen import Chosen
    from tracer.cluster.identities import Identities
    from tracer.cluster.local import LocalContainers
    from tracer.cluster.sources import Source
    from tracer.kernel.session import Selection, Session

_LOOK_S = 1.0  # at what does not tell of its changes
_POLL_S = 0.1  # between two looks at containers, as long as nobody asks anything
_SELECT_S = 0.1  # between two changes of what the kernel is told
_NODES_S = 10.0
_NODES_KNOWN_S = 60.0
_FIRST_NAMES_S = 10.0  # of a cluster that answers, on a busy machine
_NO_ANSWER_S = 1.0
_LEARN_SHARE = 20  # of the time, one part at most is spent on learning


class KeepUp:
    """To be called often; costs next to nothing when nothing has happened."""

    def __init__(
        self,
        source: Source,
        local: LocalContainers | None,
        identities: Identities,
        chosen: Chosen,
    ) -> None:
        self._source = source
        self._local = local
        self._identities = identities
        self._chosen = chosen
        self._session: Session | None = None
        self._selection: Selection | None = None
        self._learned = source.version
        self._local_version = local.version if local else 0
        self._stale = False  # whether the kernel's filter is not what is known
        self._poll_s = self._look_s = self._select_s = self._nodes_s = self._learn_s = 0.0
        self._problem = source.problem()

    def wait(self) -> None:
        """Until the source has told all, or for a few seconds; less if it does not answer."""
        began_s = time.monotonic()
        if isinstance(self._source, ClusterWatch):
            while not self._source.wait_synced(_NO_ANSWER_S / 10):
                patience_s = _NO_ANSWER_S if self._source.problem() else _FIRST_NAMES_S
                if time.monotonic() - began_s > patience_s:
                    break
        self._tell()
        self._learn(time.monotonic())

    def use(self, session: Session) -> None:
        """From now on, the kernel is told as well."""
        self._session = session
        self._stale = True
        self()

    def refuse(self, cgroup_id: int) -> None:
        """Queries of this cgroup are not asked for."""
        if self._chosen.refuse(cgroup_id) and self._session:
            self._session.refuse(cgroup_id)

    def __call__(self, *, at_once: bool = False) -> None:
        """Looks for news, and sees to them: in good time, or at once."""
        now_s = time.monotonic()
        if at_once:
            self._poll_s = self._look_s = self._learn_s = 0.0
        if self._local and now_s >= self._poll_s:
            self._poll_s = now_s + _POLL_S
            self._local.poll()
            if self._local.version != self._local_version:
                self._local_version = self._local.version
                self._stale = True
        if now_s >= self._look_s:
            self._look_s = now_s + _LOOK_S
            self._source.update()
            self._tell()
            if self._identities.walk_again():
                self._stale = True
        # Looked at first: what is known by then is of this version, or of one before.
        whole = self._source.version if self._chosen.may_be_known() else None
        self._learn(now_s)
        if self._learned == whole and not at_once:
            self._chosen.say_late(say)
        if self._stale and now_s >= self._select_s:
            self._select_s = now_s + _SELECT_S
            self._stale = False
            self._select()

    def _learn(self, now_s: float) -> None:
        version = self._source.version
        if version != self._learned and now_s >= self._learn_s:
            self._learned = version
            nodes = self._identities.inventory.nodes
            self._identities.learn(self._source.inventory())
            if self._identities.inventory.nodes != nodes:
                self._nodes_s = 0.0
            self._stale = True
            took_s = time.monotonic() - now_s
            self._learn_s = now_s + min(_LEARN_SHARE * took_s, _LOOK_S)
        if now_s >= self._nodes_s:
            is_found = self._name_nodes()
            self._nodes_s = now_s + (_NODES_KNOWN_S if is_found else _NODES_S)

    def _name_nodes(self) -> bool:
        """Finds which network namespaces are the nodes' own, where that is not written down.

        Whether there is nothing more to find. It takes a look at all processes.
        """
        name_of = {
            ip: node.name
            for node in self._identities.inventory.nodes
            if node.netns is None
            for ip in node.ips
        }
        if not name_of:
            return True
        names = {}
        for inode, addresses in netns.addresses().items():
            found = {name_of[ip] for ip in addresses if ip in name_of}
            if len(found) == 1:
                names[inode] = found.pop()
        self._identities.name_nodes(names)
        return bool(names)

    def _select(self) -> None:
        selection = self._chosen.selection()
        if self._session and selection != self._selection:
            self._session.select(selection)
            self._selection = selection

    def _tell(self) -> None:
        """Says once that names may be out of date, and once that they are not any more."""
        problem = self._source.problem()
        if (problem is None) == (self._problem is None):
            return
        if problem:
            say(problem)
        else:
            say("names are up to date again", "info")
        self._problem = problem
