"""An epoch: the configuration of a chain between two repairs."""

import ipaddress
import socket
from dataclasses import dataclass, field, replace
from functools import cache

from treeswarm.errors import SwarmError
from treeswarm.protocol.address import host_of
from treeswarm.protocol.messages import Answer, Fault, FaultCode
from treeswarm_client.chain.control_stream import NodeControl
from treeswarm_client.chain.in_flight import Interrupted, RowsInFlight
from treeswarm_client.chain.member import ChainMember
from treeswarm_client.discovery.route import Hop
from treeswarm_client.planner.costs import ChainHop


@dataclass(eq=False)
class Epoch:
    """The nodes of a chain and what is in flight between them.  Every attempt of a repair replaces it.

    While an epoch is `forming`, its members and its appends in flight are still those of the epoch before.
    """

    number: int = -1
    members: list[ChainMember] = field(default_factory=list)
    """Nodes of the chain, head first."""
    in_flight: RowsInFlight = field(default_factory=RowsInFlight)
    lost: dict[str, SwarmError] = field(default_factory=dict)
    """Why a node must not be used any more, by the node's address."""
    loss_reasons: dict[str, SwarmError] = field(default_factory=dict)
    """The same for all nodes lost since the chain was last whole, those that may be used again included."""
    forming: bool = True
    replays: bool = False
    """Whether new nodes of this epoch receive the trunk before any append."""
    postponed: dict[tuple[NodeControl, FaultCode], Fault] = field(default_factory=dict)
    """Faults of this epoch that nodes reported while it was forming, by control stream and code."""

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Nodes of the chain and their spans, head first."""
        return tuple(member.hop for member in self.members)

    @property
    def profiled_hops(self) -> tuple[ChainHop, ...]:
        """Nodes of the chain with the speed each of them reported, head first."""
        return tuple(_profiled(member) for member in self.members)

    @property
    def answered(self) -> int:
        """Number of appends of this epoch that are answered.  Every node has what these brought."""
        return self.in_flight.answered

    @property
    def credit_rows(self) -> int:
        """Number of rows that may be in flight at once: the least that any node grants."""
        return min(member.credit_rows for member in self.members)

    @property
    def free_credit_rows(self) -> int:
        """Number of rows that may be shipped now without waiting."""
        return self.credit_rows - self.in_flight.rows

    @property
    def prefix_rows(self) -> int:
        """Number of the prompt's first tokens that every node had when the chain was opened."""
        return min(member.prefix_rows for member in self.members)

    def index_of(self, control: NodeControl) -> int | None:
        """Return the position of the node with this control stream, or None if it is not a member."""
        return next((i for i, member in enumerate(self.members) if member.control is control), None)

    def loss_of(self, hop: Hop) -> SwarmError | None:
        """Return why a node was lost, or None if it was not."""
        return self.lost.get(hop.address)

    def add_loss(self, hop: Hop, error: SwarmError) -> None:
        """Record that a node is lost, and interrupt the epoch."""
        self.lost[hop.address] = self.loss_reasons[hop.address] = error
        self.in_flight.interrupt()

    def forget_losses(self) -> list[ChainMember]:
        """Remove the lost members and return them.  From then on the router alone decides whether to use them again."""
        lost = [member for member in self.members if member.hop.address in self.lost]
        self.members = [member for member in self.members if member not in lost]
        self.lost = {}
        return lost

    def record_answer(self, answer: Answer) -> None:
        """Take the answer that was due: it has passed through every node."""
        for member in self.members:
            member.proven, member.link_failures = True, 0
        self.in_flight.resolve(answer)

    def raise_if_interrupted(self, *, may_leave: bool = False) -> None:
        """Raise Interrupted if the epoch has ended, or if `may_leave` and a node asked to leave."""
        if self.in_flight.interrupted.is_set() or (may_leave and any(member.leaving for member in self.members)):
            raise Interrupted("the chain lost a node")

    def next_attempt(self, *, replays: bool) -> "Epoch":
        """Return the epoch that the next attempt of a repair forms."""
        return replace(self, number=self.number + 1, forming=True, replays=replays, postponed={})

    def begun_with(self, members: list[ChainMember]) -> "Epoch":
        """Return this epoch with its own nodes, ready for appends."""
        lost = {m.hop.address: self.lost[m.hop.address] for m in members if m.hop.address in self.lost}
        return replace(self, members=members, in_flight=RowsInFlight(), lost=lost, forming=False, postponed={})


def _profiled(member: ChainMember) -> ChainHop:
    hop = member.hop
    return ChainHop(f"{hop.node} {hop.span}", member.profile, is_own_address(host_of(hop.address).strip("[]")))


@cache
def is_own_address(host: str) -> bool:
    """Return whether `host` is an IP address of this machine: only those can be bound to."""
    try:
        address = ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True
