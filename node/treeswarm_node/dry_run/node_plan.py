"""How many nodes a model needs, and which blocks each of them hosts.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_span
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.topology.tables import Placed
from treeswarm_node.model.families.kv_shapes import fit_to_cuts
from treeswarm_node.model.memory_fit import Footprint, NodeRoom, count_blocks_that_fit, peak_bytes

NOTHING = SpanLimits(0, 0, 0, whole=False)


@dataclass(frozen=True)
class NumberFormat:
    """Names the numbers in which blocks are held and computed."""

    dtype: str
    quantization: str = "none"
    holds_codes: bool = False
    """Whether weights are held in the bits in which they were published."""

    def __str__(self) -> str:
        if self.holds_codes:
            return f"{self.dtype}, expanded at use"
        return self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"


@dataclass(frozen=True)
class NodePlan:
    """Says how a model fits on nodes that have the same room, in one format."""

    format: NumberFormat
    footprint: Footprint
    limits: SpanLimits
    """Number of blocks that fit on one node, by the ends of the model that its span includes."""
    fit: int
    """Largest number of blocks that one node hosts, or 0 if it hosts none."""
    refusal: str | None
    """Why a node hosts no block in this format, or None if it does."""
    spans: Sequence[Span]
    """Blocks of each of the fewest nodes that host the whole model."""
    peak: int
    """Largest number of bytes that one of these nodes needs."""
    nodes_choosing: int
    """Number of nodes after which the model is whole if each node chooses its blocks for itself, as nodes do."""


def plan_nodes(
    numbers: NumberFormat, footprint: Footprint, room: NodeRoom, cuts: Sequence[int], refusal: str | None = None
) -> NodePlan:
    """Return the plan for a model whose spans begin and end at `cuts`, which rise from 0 to the number of blocks.

    With a `refusal` no node can host it in this format.
    """
    blocks = cuts[-1]
    limits, fit = NOTHING, 0
    try:
        if refusal is not None:
            raise BadRequest(refusal)
        limits = count_blocks_that_fit(room, footprint, blocks)
        fit = blocks if limits.whole else limits.longest
        spans, choosing = _divide(cuts, limits), _count_choosing(cuts, limits)
    except BadRequest as error:
        return NodePlan(numbers, footprint, limits, fit, str(error), [], 0, 0)
    peak = max(peak_bytes(len(span), room, footprint, footprint.ends.of(span, blocks)) for span in spans)
    return NodePlan(numbers, footprint, limits, fit, None, spans, peak, choosing)


def _divide(cuts: Sequence[int], limits: SpanLimits) -> list[Span]:
    """Return the fewest spans within the limits.  Raises BadRequest if the model cannot be divided so."""
    spans: list[Span] = []
    blocks = cuts[-1]
    while not spans or spans[-1].end < blocks:
        start = spans[-1].end if spans else 0
        spans.append(_longest_from(start, cuts, limits))
    return spans


def _longest_from(start: int, cuts: Sequence[int], limits: SpanLimits) -> Span:
    """Return the longest span from `start` on that fits.  Raises BadRequest if none does."""
    blocks = cuts[-1]
    reachable = [Span(start, cut) for cut in cuts if cut > start]
    fitting = [span for span in reachable if limits.allow(span, blocks)]
    if fitting:
        return fitting[-1]
    if start == 0 and not limits.head:
        raise BadRequest("the first block and the embedding do not fit on such a node: give it more memory")
    if len(reachable) == 1 and not limits.tail:
        raise BadRequest("the last block and the LM head do not fit on such a node: give it more memory")
    return fit_to_cuts(Span(start, start + 1), cuts, limits)


def _count_choosing(cuts: Sequence[int], limits: SpanLimits) -> int:
    """Return how many nodes join one after another, each where it helps most, until every block is hosted.

    Raises BadRequest as the choice of a node does.
    """
    blocks = cuts[-1]
    placed: list[Placed] = []
    hosted: set[int] = set()
    while len(hosted) < blocks:
        name = str(len(placed))
        span = fit_to_cuts(choose_span(placed, blocks, limits, name), cuts, limits)
        placed.append(Placed(name, span, 1.0, "online"))
        hosted.update(range(span.start, span.end))
    return len(placed)
