# SPDX-License-Identifier: Apache-2.0
"""What the stages hand to one another: a DNS transaction, its hops, and an application's lookup.

Times are in nanoseconds. `None` is unknown. Field names and meanings are those of the JSON lines
(see README.md), so that what is shown, exported and recorded says the same thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Status = Literal["answered", "timeout", "dropped", "refused"]
HopKind = Literal["send", "ingress", "egress", "receive", "drop"]
Direction = Literal["query", "response"]
Address = tuple[str, int]


class Client(NamedTuple):
    """Who asked. Process, cgroup and network namespace were taken in the kernel at the send."""

    ip: str
    port: int
    netns: int | None = None
    cgroup_id: int | None = None
    pid: int | None = None
    comm: str | None = None
    namespace: str | None = None
    pod: str | None = None
    container: str | None = None
    node: str | None = None


class Server(NamedTuple):
    """Whom the client addressed. `service` is "namespace/name" where the address is a service's.

    `role`: "cluster" of a DNS service, "node-cache" of NodeLocal DNSCache, "stub" of a resolver on
    the loopback, "upstream" of one outside the cluster.
    """

    ip: str
    port: int
    service: str | None = None
    role: str | None = None


class Backend(NamedTuple):
    """Who answered (or was last asked) after NAT; the server itself where there was none."""

    ip: str
    port: int
    namespace: str | None = None
    pod: str | None = None


class Nat(NamedTuple):
    """What changed at a hop, each as (before, after); None: unchanged.

    For a response these are the changes that undo the query's.
    """

    dnat: tuple[Address, Address] | None = None
    snat: tuple[Address, Address] | None = None


class Hop(NamedTuple):
    """One place that the query or its response was seen at. `t_ns` counts from the first hop."""

    kind: HopKind
    direction: Direction
    t_ns: int
    ifindex: int | None
    ifname: str | None
    netns: int | None
    src: Address
    dst: Address
    owner: str | None = None  # "namespace/pod", or a node's name
    nat: Nat | None = None
    reason: str | None = None  # the kernel's drop reason, of a drop
    location: str | None = None  # kernel symbol, of a drop


class Answer(NamedTuple):
    """One resource record, in presentation format."""

    name: str
    type: str
    ttl: int
    data: str


class Served(NamedTuple):
    """The query at the socket of who answered it. Times as in `time_ns`."""

    netns: int | None
    cgroup_id: int | None
    received_ns: int
    answered_ns: int | None


class Transaction(NamedTuple):
    """One query and what became of it."""

    time_ns: int  # of the send, since 1970
    status: Status
    dns_id: int | None  # None: nothing was asked, since the connection was refused
    protocol: Literal["udp", "tcp"]
    name: str | None  # absolute, presentation format, case kept; None: no or malformed question
    type: str | None
    rcode: str | None  # None: no response
    flags: tuple[str, ...]  # of the response, else of the query: "aa", "tc", "rd", "ra", "ad", "cd"
    latency_ns: int | None  # client's send to client's receive
    attempt: int
    client: Client
    server: Server
    backend: Backend | None
    query: bytes  # DNS message as captured, perhaps cut
    response: bytes | None
    response_len: int | None  # on the wire
    make_hops: Callable[[], tuple[Hop, ...]]  # hops are seldom asked for, and cost the most
    served: Served | None = None  # None: not seen on this machine
    problem: str | None = None  # with the connection; those of messages are found when decoded
    upstream: tuple[Transaction, ...] | None = None  # None: unknown, as the server was not seen
    upstream_unsure: int = 0  # more, that are this one's or another's of the same question

    @property
    def hops(self) -> tuple[Hop, ...]:
        """In the order of time; the first has t_ns 0."""
        return self.make_hops()


class Lookup(NamedTuple):
    """What an application asked for, and all the transactions that this took."""

    time_ns: int
    client: Client
    question: str  # as far as it can be told, what the application asked for, without final dot
    search: tuple[str, ...]
    ndots: int | None
    queries: int
    wasted: int
    latency_ns: int | None
    wasted_ns: int
    status: str  # rcode of the answer that the application got, else "TIMEOUT"
    advice: str | None
    ids: tuple[int, ...]
