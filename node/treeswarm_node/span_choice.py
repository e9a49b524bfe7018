"""Choose the blocks that a node hosts: at start, when others choose at the same time, and when to move."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_again, choose_span, fit_move, plan_move
from treeswarm.topology.placements import PLACED, placements
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, node_room
from treeswarm_node.model.block_fit import choose_holding
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.families.kv_shapes import allowed_cuts, fit_to_cuts, kv_givers
from treeswarm_node.model.memory_fit import count_blocks_that_fit
from treeswarm_node.own_record import GUESSED_RATE

log = logging.getLogger(__name__)

# All nodes see a record within one poll of the DHT, three seconds; the rest is room for a slow one.
SETTLE_S = 5.0
CHOICES = 4


@dataclass(frozen=True)
class HostingLimits:
    """Says which spans of a model this node can host."""

    spans: SpanLimits
    """Number of blocks that fit, or that the owner gave."""
    cuts: Sequence[int]
    """Where spans may begin and end; rises from 0 to the number of blocks."""

    def fit(self, target: Span, swarm: PlacementTable | Sequence[Placed]) -> Span | None:
        """Return what this node can host of blocks that the swarm would have it take, or None if that helps nothing."""
        return fit_move(target, self.spans, swarm, self.cuts[-1], self.cuts)


def read_hosting_limits(config: NodeConfig, model: ModelInfo, skeleton: PreTrainedModel) -> HostingLimits:
    """Return the limits of a node that holds no weights yet; `skeleton` is the model without weights.

    Raises BadRequest if not one block fits.
    """
    settings = config.model
    layers, blocks = find_blocks(skeleton).layers, model.shape.blocks
    cuts = allowed_cuts(kv_givers(layers), len(layers))
    if settings.num_blocks is not None:
        return HostingLimits(SpanLimits.same(min(settings.num_blocks, blocks), blocks), cuts)
    room = node_room(config, model.folder)
    holding = choose_holding(config, room, model.folder, skeleton)
    return HostingLimits(count_blocks_that_fit(room, holding.footprint, blocks), cuts)


@dataclass(frozen=True, eq=False)
class SpanChooser:
    """Decides which blocks this node hosts, from the records of the other nodes."""

    config: NodeConfig
    model: ModelInfo
    node_id: str
    read_records: Callable[[], Awaitable[Sequence[NodeRecord]]]
    """Returns the records of all other nodes."""
    numerics: NumericsClass
    """Class of this node: blocks of nodes of other classes serve it nothing."""
    hosting: HostingLimits
    """Spans that this node can host."""

    async def choose(self) -> Span:
        """Return the window of blocks that helps the swarm most, as long as fits here.  Raises BadRequest."""
        blocks, limits = self.model.shape.blocks, self.hosting.spans
        others = await self._others()
        span = fit_to_cuts(choose_span(others, blocks, limits, self.node_id), self.hosting.cuts, limits)
        log.info("choosing blocks %s of %d among %d nodes", span, blocks, len(others))
        return span

    async def settle(self, span: Span, announce: Callable[[Span], Awaitable[None]]) -> Span:
        """Choose again while other nodes announce that they take the same blocks; return the final choice.

        `span` was announced already; `announce` is called with each new choice.  Of two nodes the one with the lower
        id keeps its choice, and the other one gives way.
        """
        for _ in range(CHOICES):
            if not await self._others():
                return span  # there is no node whose record could still be on its way
            await asyncio.sleep(SETTLE_S * random.uniform(1.0, 1.5))
            others = await self._others()
            mine = Placed(self.node_id, span, _typical_rate(others), "joining")
            again = choose_again(mine, [*others, mine], self.model.shape.blocks, self.hosting.spans)
            if again == span or not {again.start, again.end} <= {*self.hosting.cuts}:
                return span
            span = again
            await announce(span)
        return span

    async def plan_move(self, span: Span, rate: float, state: NodeState) -> Span | None:
        """Return the blocks to move to from `span`, or None if the swarm gains too little or would lack blocks."""
        mine = Placed(self.node_id, span, rate, PLACED[state])
        others = await self._others()
        target = plan_move(mine, [*others, mine], self.model.shape.blocks)
        return target and self.hosting.fit(target, others)

    async def _others(self) -> list[Placed]:
        return placements(await self.read_records(), self.model.config_digest, self.numerics)


def _typical_rate(others: Sequence[Placed]) -> float:
    """Return the mean rate of the other nodes: this node's is unknown before it has loaded something."""
    rates = [node.rate for node in others if node.rate > 0]
    return sum(rates) / len(rates) if rates else GUESSED_RATE
