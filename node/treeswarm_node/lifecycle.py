"""A node's life: join, serve, move where it helps most, pause for its owner, leave.

Spans and sessions come and go; the node, its address and its identity stay.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field

import torch

from treeswarm import __version__
from treeswarm.errors import SwarmError
from treeswarm.keys import Identity
from treeswarm.progress import Progress
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_again, choose_span, plan_move
from treeswarm.topology.tables import Placed, PlacementState
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.counters import Counters
from treeswarm_node.engine.loaded_stage import LoadedStage, ModelInfo, find_device, free_unused_memory, load_stage
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.model.memory_fit import count_blocks_that_fit, free_memory, offload_room, read_footprint
from treeswarm_node.reachability.reachability import PublicAddress
from treeswarm_node.sessions.server import NodeServer

log = logging.getLogger(__name__)

# A record is seen by everybody within one poll of the DHT, three seconds; with room for a slow one.
SETTLE_S = 5.0
CHOICES = 4
# A move costs a minute of work; twice an hour or so is soon enough for a swarm that lives for days (swarm simulate).
LOOK_EVERY_S = 600.0
# A model that cannot be loaded now, the disk full or the GPU taken by its owner, may be loadable then.
LOAD_AGAIN_S = 300.0
# What a node that has measured nothing is taken for, block-rows a second; it is measured before it serves.
GUESSED_RATE = 1000.0
# Streams, codec and event loop around a forward, measured by `swarm bench overhead` (docs/benchmarks.md).
OVERHEAD_S = 0.002
PLACED: dict[NodeState, PlacementState] = {
    NodeState.JOINING: "joining",
    NodeState.ONLINE: "online",
    NodeState.DRAINING: "draining",
}


@dataclass(eq=False)
class Lifecycle:
    """`join` until it serves, then `live` until told to stop, then `leave`."""

    config: NodeConfig
    identity: Identity
    model: ModelInfo
    node: NodeServer
    address: Address
    survey: DistanceSurvey
    reachable: bool = False
    span: Span | None = None
    membership: Membership = field(init=False)
    progress: Progress | None = None
    """Hears how far loading is, whenever something is loaded."""
    counters: Counters = field(default_factory=Counters)
    """Of all spans it ever served."""
    moves: int = 0
    """To other blocks."""
    numerics: NumericsClass | None = None
    """Known once the weights were read."""
    _failed: bool = False
    """It is paused because nothing could be loaded, not because its owner said so."""
    _stage: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def make_record(self, generation: int, expires: int) -> NodeRecord:
        """What there is to say of this node now."""
        stage = self.node.stage
        return NodeRecord(
            key=self.identity.public_key,
            generation=generation,
            expires=expires,
            state=self.node.state,
            address=str(self.address.bare),
            pin=self.identity.pin,
            reachable=self.reachable,
            name=self.config.model.name[-64:],
            model=self.model.config,
            numerics=self.numerics
            or NumericsClass(
                UNKNOWN_WEIGHTS, self.config.model.dtype, self.config.model.quantization, self.config.model.activations
            ),
            span=self.span or Span(0, self.model.shape.blocks),
            blocks=self.model.shape.blocks,
            rate=stage.rate if stage else GUESSED_RATE,
            hop_s=OVERHEAD_S + (stage.engine.counters.queue_s if stage else 0.0),
            free_tokens=stage.store.free_tokens if stage else 0,
            total_tokens=self.config.device.kv_tokens,
            coordinate=self.survey.coordinate_values(),
            software=f"treeswarm {__version__}",
        )

    async def settle(self, place: PublicAddress) -> None:
        """Others find this node there from now on."""
        self.address, self.reachable = Address.parse(place.address), place.reachable
        if self.node.port_lender is not None:
            self.node.port_lender.reachable = place.lends
        await self.membership.announce()

    async def lender_candidates(self) -> list[str]:
        """The others, reachable ones and then the nearest first: a port rented there costs the least.  Also those that
        nobody has dialled yet: were they left out, the first two nodes of a swarm would never ask each other."""
        here = [r for r in await self.neighbours() if r.state is NodeState.ONLINE]
        return [r.dial for r in sorted(here, key=lambda r: (not r.reachable, self.survey.distance_to(r)))]

    async def neighbours(self) -> list[NodeRecord]:
        """Everyone else's records."""
        return [sealed.record for sealed in await self.membership.other_nodes()]

    async def join(self) -> LoadedStage:
        """Choose a span, say so, load it, serve it.  Raises ModelError, BadRequest."""
        self.span = self.config.model.span or await self._choose()
        self.node.state = NodeState.JOINING
        await self.membership.announce()
        if self.config.model.span is None:
            self.span = await self._settle(self.span)
        return await self._serve(self.span)

    async def live(self, stop: asyncio.Event) -> None:
        """Serve, obey the owner, and move where it helps, until `stop` is set or the owner says drain.  Whatever is
        under way when `stop` is set is given up."""
        told = asyncio.create_task(stop.wait())
        try:
            while not told.done():
                order = asyncio.create_task(self.membership.orders.get())
                pause = LOAD_AGAIN_S if self._failed else LOOK_EVERY_S * random.uniform(0.5, 1.5)
                await asyncio.wait({told, order}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if order.done():
                    await _unless(told, self._obey(order.result()))
                    if order.result() == "drain":
                        return
                    continue
                order.cancel()
                if self._failed:
                    await _unless(told, self._resume())
                elif self.config.model.span is None and self.node.state is NodeState.ONLINE:
                    await _unless(told, self._consider_moving())
        finally:
            told.cancel()

    async def leave(self) -> None:
        """Withdraw, let the sessions go elsewhere, free everything."""
        if self.node.stage is not None:
            await self._drain()
        self.node.state = NodeState.GONE
        await self.membership.leave()

    async def _obey(self, order: str) -> None:
        """All but `drain`, which ends the node."""
        log.info("the owner says: %s", order)
        if order == "pause":
            self._failed = False
            if self.node.stage is not None:
                await self._drain()
                await self._pause()
        elif order == "resume" and self.node.stage is None:
            await self._resume()

    async def _pause(self) -> None:
        self.node.state = NodeState.PAUSED
        await self.membership.announce()

    async def _resume(self) -> None:
        await self._try(self.join())

    async def _try(self, loading: Coroutine[None, None, LoadedStage]) -> None:
        """Where it fails the node stays, paused, and tries again later or when told."""
        try:
            await loading
            self._failed = False
            return
        except Exception as error:  # torch has many classes of them, and none is worth the node's place in the swarm
            strange = not isinstance(error, SwarmError)
            log.error("serving nothing, again in %.0f min: %s", LOAD_AGAIN_S / 60, error, exc_info=strange)
        self._failed = True
        free_unused_memory()
        await self._pause()

    async def _serve(self, span: Span) -> LoadedStage:
        self.span = span
        opening = load_stage(self.config, self.model, span, self.counters, self.progress)
        stage = await self._stage.enter_async_context(opening)
        self.node.stage, self.node.state, self.numerics = stage, NodeState.ONLINE, stage.served.numerics
        await self.membership.announce()
        return stage

    async def _drain(self) -> None:
        """Sessions move elsewhere, within the grace time; then the span is unloaded."""
        self.node.state = NodeState.DRAINING
        await self.membership.announce()
        await self.node.drain(self.config.limits.drain_grace_s)
        self.node.stage = None
        await self._stage.aclose()

    # ---------------------------------------------------------------- where

    async def _choose(self) -> Span:
        """The window that helps most, as long as fits.  Raises BadRequest."""
        blocks = self.model.shape.blocks
        length = self.config.model.num_blocks
        if length is None:
            length = await asyncio.to_thread(self._fitting)
        others = await self._others()
        span = choose_span(others, blocks, min(length, blocks), self.identity.node_id)
        log.info("choosing blocks %s of %d among %d nodes", span, blocks, len(others))
        return span

    async def _settle(self, span: Span) -> Span:
        """Announced; does anybody else take the same just now?  The lowest id stays, the others make room."""
        for _ in range(CHOICES):
            if not await self._others():
                return span  # nobody is there whose record could still be on its way
            await asyncio.sleep(SETTLE_S * random.uniform(1.0, 1.5))
            others = await self._others()
            mine = Placed(self.identity.node_id, span, _typical(others), "joining")
            again = choose_again(mine, [*others, mine], self.model.shape.blocks)
            if again == span:
                return span
            self.span = span = again
            await self.membership.announce()
        return span

    async def _consider_moving(self) -> None:
        """Move if the swarm gains enough by it, and nobody is left without a block meanwhile."""
        span = await self._planned()
        if span is None:
            return
        log.info("moving from blocks %s to %s", self.span, span)
        self.node.state = NodeState.DRAINING
        await self.membership.announce()
        await asyncio.sleep(SETTLE_S)  # whoever decided the same at the same time is seen by now
        if await self._planned() is None:
            self.node.state = NodeState.ONLINE
            await self.membership.announce()
            return
        await self._drain()
        self.node.state = NodeState.JOINING
        self.moves += 1
        await self._try(self._serve(span))

    async def _planned(self) -> Span | None:
        assert self.span is not None
        assert self.node.stage is not None
        me = Placed(self.identity.node_id, self.span, self.node.stage.rate, PLACED[self.node.state])
        others = await self._others()
        return plan_move(me, [*others, me], self.model.shape.blocks)

    async def _others(self) -> list[Placed]:
        return [
            Placed(record.node, record.span, record.rate, PLACED[record.state])
            for record in await self.neighbours()
            if record.model == self.model.config and record.state in PLACED
        ]

    def _fitting(self) -> int:
        device = find_device(self.config.device.name)
        footprint = read_footprint(
            self.model.folder, getattr(torch, self.config.model.dtype), self.config.model.quantization
        )
        return count_blocks_that_fit(
            self.config.device.memory or free_memory(device),
            footprint,
            kv_tokens=self.config.device.kv_tokens,
            forward_rows=self.config.limits.budget.rows,
            store=offload_room(self.config.device.offload),
            blocks=self.model.shape.blocks,
        )


async def _unless(told: "asyncio.Task[bool]", work: Coroutine[None, None, None]) -> None:
    """Do it, or as much of it as is done when `told` is."""
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({told, doing}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
    finally:
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)


def _typical(others: Sequence[Placed]) -> float:
    """This node's speed is not known before it has loaded something; it is taken for an average one."""
    rates = [one.rate for one in others if one.rate > 0]
    return sum(rates) / len(rates) if rates else GUESSED_RATE
