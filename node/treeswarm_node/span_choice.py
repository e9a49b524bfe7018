"""Choose the blocks that a node hosts: at start, when others choose at the same time, and when to move."""

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_again, choose_span, plan_move
from treeswarm.topology.placements import PLACED, placements
from treeswarm.topology.tables import Placed
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, find_device
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.families.kv_shapes import allowed_cuts, fit_to_cuts, kv_givers
from treeswarm_node.model.memory_fit import count_blocks_that_fit, free_memory, offload_room, read_footprint
from treeswarm_node.own_record import GUESSED_RATE

log = logging.getLogger(__name__)

# All nodes see a record within one poll of the DHT, three seconds; the rest is room for a slow one.
SETTLE_S = 5.0
CHOICES = 4


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

    async def choose(self) -> Span:
        """Return the window of blocks that helps the swarm most, as long as fits here.  Raises BadRequest."""
        blocks = self.model.shape.blocks
        length = self.config.model.num_blocks
        if length is None:
            length = await asyncio.to_thread(self._count_fitting)
        others = await self._others()
        span = choose_span(others, blocks, min(length, blocks), self.node_id)
        span = fit_to_cuts(span, await self._cuts(), length)
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
            again = choose_again(mine, [*others, mine], self.model.shape.blocks)
            if again == span or not {again.start, again.end} <= {*await self._cuts()}:
                return span
            span = again
            await announce(span)
        return span

    async def plan_move(self, span: Span, rate: float, state: NodeState) -> Span | None:
        """Return the blocks to move to from `span`, or None if the swarm gains too little or would lack blocks."""
        mine = Placed(self.node_id, span, rate, PLACED[state])
        target = plan_move(mine, [*await self._others(), mine], self.model.shape.blocks)
        return target if target and {target.start, target.end} <= {*await self._cuts()} else None

    async def _cuts(self) -> list[int]:
        """Return where spans may begin and end."""
        return await asyncio.to_thread(_read_cuts, self.model.folder)

    async def _others(self) -> list[Placed]:
        return placements(await self.read_records(), self.model.config_digest, self.numerics)

    def _count_fitting(self) -> int:
        settings, device = self.config.model, self.config.device
        return count_blocks_that_fit(
            device.memory or free_memory(find_device(device.name)),
            read_footprint(self.model.folder, getattr(torch, settings.dtype), settings.quantization),
            kv_tokens=device.kv_tokens,
            forward_rows=self.config.limits.budget.rows,
            store=offload_room(device.offload),
            blocks=self.model.shape.blocks,
        )


@functools.lru_cache(maxsize=4)
def _read_cuts(folder: Path) -> list[int]:
    layers = find_blocks(build_skeleton(folder, torch.float32)).layers
    return allowed_cuts(kv_givers(layers), len(layers))


def _typical_rate(others: Sequence[Placed]) -> float:
    """Return the mean rate of the other nodes: this node's is unknown before it has loaded something."""
    rates = [node.rate for node in others if node.rate > 0]
    return sum(rates) / len(rates) if rates else GUESSED_RATE
