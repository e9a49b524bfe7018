"""Routes: the nodes of a chain, the blocks each computes, and the model they serve."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treeswarm.errors import SwarmError
from treeswarm.protocol.messages import FaultCode, NumericsClass
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import RULES_VERSION, TextRules

# A node that had a session and has it no more is no reason to avoid that node.
FORGOTTEN = {FaultCode.NO_JOURNAL, FaultCode.UNKNOWN_SESSION, FaultCode.EXPIRED}


@dataclass(frozen=True)
class Hop:
    """One node of a chain and the blocks it computes."""

    node: str
    """Id of the node."""
    address: str
    """Address of the node, as a transport dials it."""
    span: Span
    speculator: str = field(default="", compare=False)
    """Kind of the speculator that proposes trees there, if the node is a tail that has one, or ""."""
    tap_head: str = field(default="", compare=False)
    """Digest of the head whose taps the node adds where they are among its blocks, and reads if it is a tail, or ""."""
    taps: tuple[int, ...] = field(default=(), compare=False)
    """Blocks that this head taps, rising."""

    def __str__(self) -> str:
        return f"{self.address.partition('#')[0]} with blocks {self.span}"


@dataclass(frozen=True)
class Target:
    """The model as the nodes of a chain must serve it."""

    numerics: NumericsClass
    blocks: int
    """Number of decoder blocks."""
    vocab_size: int
    hidden_size: int
    max_positions: int

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row of activations between nodes."""
        return self.numerics.row_bytes(self.hidden_size)


@dataclass(frozen=True)
class TailNeeds:
    """What a tail must be able to do for one text, by its record."""

    rules: int = 0
    """Least version of the rules that it applies, or 0 if there are none."""
    grammar: str = ""
    """Library, with its version, that applies the text's grammar, or "" if there is none.  Another one may allow other
    tokens, so all tails of one text use the same."""

    def are_met_by(self, record: NodeRecord) -> bool:
        """Return whether a node can be the tail."""
        return record.rules >= self.rules and (not self.grammar or record.grammar == self.grammar)

    def __str__(self) -> str:
        """Name the needs for people."""
        return f"grammars with {self.grammar}" if self.grammar else "the rules of this request"


ANY_TAIL = TailNeeds()


def needs_of(rules: TextRules, library: str) -> TailNeeds:
    """Return what rules need of a tail; `library` names the client's own library of grammars, which checks the text."""
    if rules.neutral:
        return ANY_TAIL
    return TailNeeds(RULES_VERSION, library if rules.grammar is not None else "")


class Router(Protocol):
    """Chooses nodes for chains, and learns how they did."""

    def route(
        self,
        blocks: Span,
        *,
        before: str | None,
        after: str | None,
        room: int,
        avoid: Collection[str],
        needs: TailNeeds = ANY_TAIL,
    ) -> Sequence[Hop]:
        """Return nodes for `blocks`, in order, with room for `room` tokens each, and none of `avoid` (node ids).

        `before` and `after` are the ids of the neighbouring nodes, or None for the client itself.  The model's last
        block is given to a node that meets `needs`.  Raises MissingBlocks, or Refused (full) if only a lack of room
        excludes nodes.
        """
        ...

    def has_spare(self, blocks: Span, *, avoid: Collection[str], needs: TailNeeds = ANY_TAIL) -> bool:
        """Return whether nodes besides those of `avoid` (node ids) could serve `blocks` now.

        A node that failed lately or is full does not count: it may hang.
        """
        ...

    def nodes_to_leave(
        self, hops: Sequence[Hop], *, room: int, trunk: int, rounds_left: float, needs: TailNeeds = ANY_TAIL
    ) -> Collection[str]:
        """Return the ids of the nodes of a working chain that a faster chain would leave out.

        Return none unless the change pays within `rounds_left` rounds; `trunk` tokens would have to be replayed.
        """
        ...

    def report_failure(self, node: str, error: SwarmError) -> None:
        """Avoid a node for a while because of `error`."""
        ...

    def report_silence(self, node: str) -> None:
        """Learn that a node, which is not given up yet, has been silent for too long."""
        ...

    def report_round_trip(self, node: str, round_trip_s: float) -> None:
        """Learn that a node is alive, and the round-trip time to it in seconds."""
        ...

    def report_traversal(self, nodes: Collection[str]) -> None:
        """Learn that the answer of a traversal has passed through `nodes`, all nodes of a chain."""
        ...

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait, for at most `timeout_s` seconds, until there may be another route."""
        ...


def gaps(spans: Sequence[Span], blocks: int) -> list[tuple[int, Span]]:
    """Return what `spans`, in order and without overlap, leave of a model with `blocks` blocks.

    Each gap comes with the number of spans before it.
    """
    uncovered, reached = [], 0
    for i, span in enumerate([*spans, None]):
        start = span.start if span else blocks
        if start > reached:
            uncovered.append((i, Span(reached, start)))
        reached = span.end if span else blocks
    return uncovered
