"""How many nodes a model needs, and which blocks each of them hosts.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_span
from treeswarm.topology.tables import Placed
from treeswarm_node.model.memory_fit import Footprint, count_blocks_that_fit


@dataclass(frozen=True)
class NumberFormat:
    """Names the numbers in which blocks are held and computed."""

    dtype: str
    quantization: str = "none"

    def __str__(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"


@dataclass(frozen=True)
class Room:
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
    numbers: NumberFormat, footprint: Footprint, room: Room, blocks: int, refusal: str | None = None
) -> NodePlan:
    """Return the plan for a model of `blocks` blocks; with a `refusal` no node can host it in this format."""
    try:
        fit = 0 if refusal else count_blocks_that_fit(
            room.memory, footprint, kv_tokens=room.kv_tokens, forward_rows=room.forward_rows, blocks=blocks,
            store=room.store,
        )  # fmt: skip
    except BadRequest as error:
        fit, refusal = 0, str(error)
    spans = [Span(start, min(start + fit, blocks)) for start in range(0, blocks, fit)] if fit else []
    return NodePlan(numbers, footprint, fit, refusal, spans, _count_choosing(fit, blocks) if fit else 0)


def _count_choosing(fit: int, blocks: int) -> int:
    """Return how many nodes join one after another, each where it helps most, until every block is hosted."""
    placed: list[Placed] = []
    hosted: set[int] = set()
    while len(hosted) < blocks:
        name = str(len(placed))
        span = choose_span(placed, blocks, fit, name)
        placed.append(Placed(name, span, 1.0, "online"))
        hosted.update(range(span.start, span.end))
    return len(placed)
