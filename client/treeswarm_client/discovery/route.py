"""Which nodes, which blocks; and which model they serve."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from treeswarm.errors import SwarmError
from treeswarm.protocol.messages import FaultCode, NumericsClass
from treeswarm.protocol.spans import Span

# No reason to keep away from a node that had a session and has it no more.
FORGOTTEN = {FaultCode.NO_JOURNAL, FaultCode.UNKNOWN_SESSION, FaultCode.EXPIRED}


@dataclass(frozen=True)
class Hop:
    """One node of a chain and the blocks it computes."""

    node: str
    """Its id."""
    address: str
    """As a transport dials it."""
    span: Span

    def __str__(self) -> str:
        return f"{self.address.partition('#')[0]} with blocks {self.span}"


@dataclass(frozen=True)
class Target:
    """The model as the nodes of a chain must serve it."""

    numerics: NumericsClass
    blocks: int
    vocab_size: int
    hidden_size: int
    max_positions: int

    @property
    def row_bytes(self) -> int:
        """Of one row of activations between nodes."""
        return self.numerics.row_bytes(self.hidden_size)


class Router(Protocol):
    """Who finds the way: a chain asks it for nodes, and tells it how they did."""

    def route(
        self, wanted: Span, *, before: str | None, after: str | None, room: int, avoid: Collection[str]
    ) -> Sequence[Hop]:
        """Nodes for `wanted`, in order, between the nodes `before` and `after` (None: the client itself), with room
        for `room` tokens each.

        Raises MissingBlocks, and Refused (full) where all that keeps them out is want of room.
        """
        ...

    def nodes_to_leave(self, hops: Sequence[Hop], *, room: int, trunk: int, rounds_left: float) -> Collection[str]:
        """Nodes of a working chain that a faster one would do without, if changing pays in the rounds that are left;
        `trunk` tokens would have to be replayed."""
        ...

    def report_failure(self, node: str, error: SwarmError) -> None:
        """Keep away from it for a while."""
        ...

    def report_round_trip(self, node: str, round_trip_s: float) -> None:
        """It is alive, and this far away."""
        ...

    def report_traversal(self, nodes: Collection[str]) -> None:
        """Learn that the answer of a traversal has passed through `nodes`, all nodes of a chain."""
        ...

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until there may be another way, at most so long."""
        ...


def gaps(spans: Sequence[Span], blocks: int) -> list[tuple[int, Span]]:
    """What `spans`, in order and without overlap, leave of 0 to `blocks`: (how many spans come before it, the gap)."""
    found, reached = [], 0
    for i, span in enumerate([*spans, None]):
        start = span.start if span else blocks
        if start > reached:
            found.append((i, Span(reached, start)))
        reached = span.end if span else blocks
    return found
