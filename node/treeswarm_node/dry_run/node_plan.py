"""How many nodes a model needs, and which blocks each of them hosts.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_span
from treeswarm.topology.tables import Placed
from treeswarm_node.model.families.kv_shapes import fit_to_cuts
from treeswarm_node.model.memory_fit import Footprint, count_blocks_that_fit


@dataclass(frozen=True)
class NumberFormat:
    """Names the numbers in which blocks are held and computed."""

    dtype: str
    quantization: str = "none"

    def __str__(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"


@dataclass(frozen=True)
class NodeRoom:
    """Holds what a node has for its blocks."""

    memory: int
    """Number of bytes on the device."""
    store: int | None
    """Number of bytes for offloaded weights, or None if nothing is offloaded."""
    kv_tokens: int
    forward_rows: int


@dataclass(frozen=True)
class NodePlan:
    """Says how a model fits on nodes that have the same room, in one format."""

    format: NumberFormat
    footprint: Footprint
    fit: int
    """Number of blocks that one node hosts, or 0 if it hosts none."""
    refusal: str | None
    """Why a node hosts no block in this format, or None if it does."""
    spans: Sequence[Span]
    """Blocks of each of the fewest nodes that host the whole model."""
    nodes_choosing: int
    """Number of nodes after which the model is whole if each node chooses its blocks for itself, as nodes do."""


def plan_nodes(
    numbers: NumberFormat, footprint: Footprint, room: NodeRoom, cuts: Sequence[int], refusal: str | None = None
) -> NodePlan:
    """Return the plan for a model whose spans begin and end at `cuts`, which rise from 0 to the number of blocks.

    With a `refusal` no node can host it in this format.
    """
    try:
        if refusal is not None:
            raise BadRequest(refusal)
        fit = count_blocks_that_fit(
            room.memory, footprint, kv_tokens=room.kv_tokens, forward_rows=room.forward_rows, blocks=cuts[-1],
            store=room.store,
        )  # fmt: skip
        return NodePlan(numbers, footprint, fit, None, _divide(cuts, fit), _count_choosing(cuts, fit))
    except BadRequest as error:
        return NodePlan(numbers, footprint, 0, str(error), [], 0)


def _divide(cuts: Sequence[int], fit: int) -> list[Span]:
    """Return the fewest spans of at most `fit` blocks.  Raises BadRequest if blocks cannot be divided so far."""
    spans: list[Span] = []
    start = 0
    while start < cuts[-1]:
        reach = fit_to_cuts(Span(start, min(start + fit, cuts[-1])), cuts, fit)
        spans.append(reach)
        start = reach.end
    return spans


def _count_choosing(cuts: Sequence[int], fit: int) -> int:
    """Return how many nodes join one after another, each where it helps most, until every block is hosted.

    Raises BadRequest as the choice of a node does.
    """
    blocks = cuts[-1]
    placed: list[Placed] = []
    hosted: set[int] = set()
    while len(hosted) < blocks:
        name = str(len(placed))
        span = fit_to_cuts(choose_span(placed, blocks, fit, name), cuts, fit)
        placed.append(Placed(name, span, 1.0, "online"))
        hosted.update(range(span.start, span.end))
    return len(placed)
