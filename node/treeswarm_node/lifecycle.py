"""A node's life: join, serve, move to where it helps most, pause for its owner, leave.

Spans and sessions come and go; the node, its address and its identity stay.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import SwarmError
from treeswarm.progress import Progress
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm.tasks import cancelled
from treeswarm.topology.placements import placements
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.counters import Counters
from treeswarm_node.engine.loaded_stage import LoadedStage, free_unused_memory, load_stage
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.hole_watch import HoleWatch
from treeswarm_node.membership.liveness_monitor import LivenessMonitor
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.own_record import OwnRecord
from treeswarm_node.reachability.reachability import PublicAddress
from treeswarm_node.sessions.server import NodeServer
from treeswarm_node.span_choice import SETTLE_S, HostingLimits, SpanChooser, read_hosting_limits

log = logging.getLogger(__name__)

# A move costs a minute of work; twice an hour or so is soon enough for a swarm that lives for days (swarm simulate).
LOOK_EVERY_S = 600.0
# While a block has no holder no session can go on, so sessions get only the time that a message to the client takes.
HOLE_GRACE_S = 1.0
# A model that cannot be loaded now, because the disk is full or the owner uses the GPU, may be loadable after this.
LOAD_AGAIN_S = 300.0


@dataclass(eq=False)
class Lifecycle:
    """A node's life: `join` until it serves, then `run` until it is to stop, then `leave`."""

    record: OwnRecord
    membership: Membership
    progress: Progress | None = None
    """Receives how far loading is, whenever something is loaded."""
    counters: Counters = field(default_factory=Counters)
    """Totals over all spans that the node has hosted."""
    moves: int = 0
    """Number of moves to other blocks."""
    liveness: LivenessMonitor = field(init=False)
    """What this node knows of the life of others; its `run` must be running."""
    holes: HoleWatch = field(init=False)
    _hosting: HostingLimits | None = None
    """Spans that this node can host, or None if the owner has named its blocks."""
    _skeleton: PreTrainedModel | None = None
    """The model without weights, built to choose blocks, until the chosen ones are loaded into it."""
    _failed: bool = False
    """Whether the node is paused because nothing could be loaded, rather than by an order of its owner."""
    _stage: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def __post_init__(self) -> None:
        record, records = self.record, self.membership.records
        model, node = record.model, record.identity.node_id
        self.liveness = LivenessMonitor(
            record.node.transport,
            node,
            model.config_digest,
            model.shape.blocks,
            self.neighbours,
            records.hints,
            numerics=lambda: record.numerics_class,
            learn=lambda sealed: records.add_records([sealed]),
        )
        self.holes = HoleWatch(self.liveness, lambda: records.lag_s, self._fit)
        record.survey.on_visit = self.liveness.note_visit
        record.survey.on_settling = self.membership.announce_soon

    @property
    def config(self) -> NodeConfig:
        """The node's settings."""
        return self.record.config

    @property
    def node(self) -> NodeServer:
        """The server of sessions."""
        return self.record.node

    async def set_public_address(self, address: PublicAddress) -> None:
        """Announce the address at which others find this node from now on."""
        self.record.public = address
        if self.node.port_lender is not None:
            self.node.port_lender.reachable = address.lends
        await self.membership.announce()

    async def lender_candidates(self) -> list[str]:
        """Return the addresses of online nodes, reachable ones first and then the nearest: their ports cost least.

        Nodes that no other node has dialled yet are among them.  Without those, the first two nodes of a swarm would
        never ask each other.
        """
        online = [record for record in await self.neighbours() if record.state is NodeState.ONLINE]
        return [
            record.dial for record in sorted(online, key=lambda r: (not r.reachable, self.record.survey.distance_to(r)))
        ]

    async def neighbours(self) -> list[NodeRecord]:
        """Return the records of all other nodes."""
        return [sealed.record for sealed in await self.membership.other_nodes()]

    async def join(self) -> LoadedStage:
        """Choose a span, announce it, load it and serve it.  Raises ModelError, BadRequest."""
        fixed = self.config.model.span
        if fixed is None:
            await asyncio.to_thread(self._read_limits)
            await self.liveness.prove()
        self.record.span = fixed or await self._chooser().choose()
        self.node.state = NodeState.JOINING
        await self.membership.announce()
        if fixed is None:
            self.record.span = await self._chooser().settle(self.record.span, self._announce_span)
        return await self._serve(self.record.span)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve, obey the owner, and move where it helps, until `stop` is set or the owner orders to drain.

        Work that is under way when `stop` is set is cancelled.
        """
        stopping = asyncio.create_task(stop.wait())
        tasks: list[asyncio.Task[Any]] = [stopping]
        try:
            while not stopping.done():
                order = asyncio.create_task(self.membership.orders.get())
                hole = asyncio.create_task(self.holes.wait_for_turn(self._placed, may_move=self.config.may_move))
                tasks = [stopping, order, hole]
                pause = LOAD_AGAIN_S if self._failed else LOOK_EVERY_S * random.uniform(0.5, 1.5)
                await asyncio.wait({stopping, order, hole}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if not hole.done():
                    await cancelled(hole)
                if order.done():
                    await _run_unless(stopping, self._obey(order.result()))
                    if order.result() == "drain":
                        return
                    continue
                order.cancel()
                if hole.done() and not hole.cancelled():
                    await _run_unless(stopping, self._fill_hole(hole.result()))
                elif self._failed:
                    await _run_unless(stopping, self._resume())
                elif self.config.may_move and self.node.state is NodeState.ONLINE:
                    await _run_unless(stopping, self._consider_moving())
        finally:
            for task in tasks:
                task.cancel()

    async def leave(self) -> None:
        """Withdraw from the swarm, let the sessions move to other nodes, and free everything.

        It is called for a node's owner to see it happen, and once more when the node is closed.
        """
        if self.node.state is NodeState.GONE:
            return
        if self.node.stage is not None:
            await self._drain()
        self.node.state = NodeState.GONE
        await self.membership.leave()

    async def _obey(self, order: str) -> None:
        """Carry out every order but `drain`, which ends `run`."""
        log.info("the owner ordered: %s", order)
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
        await self._try_loading(self.join())

    async def _try_loading(self, loading: Coroutine[None, None, LoadedStage]) -> None:
        """Await the loading; if it fails, pause and keep the node, which tries again later or when ordered to."""
        try:
            await loading
            self._failed = False
            return
        except Exception as error:  # torch raises many classes, and none is a reason to leave the swarm
            unexpected = not isinstance(error, SwarmError)
            log.error("cannot load a span, trying again in %.0f min: %s", LOAD_AGAIN_S / 60, error, exc_info=unexpected)
        self._failed = True
        free_unused_memory()
        await self._pause()

    async def _serve(self, span: Span) -> LoadedStage:
        self.record.span = span
        began = asyncio.get_running_loop().time()
        skeleton, self._skeleton = self._skeleton, None
        loading = load_stage(self.config, self.record.model, span, self.counters, self.progress, skeleton)
        stage = await self._stage.enter_async_context(loading)
        log.info("loaded blocks %s in %.2f s", span, asyncio.get_running_loop().time() - began)
        self.node.stage, self.node.state, self.record.numerics = stage, NodeState.ONLINE, stage.served.numerics
        await self.membership.announce()
        return stage

    async def _drain(self) -> None:
        """Let sessions move to other nodes within the grace period, then unload the span."""
        self.node.state = NodeState.DRAINING
        await self.membership.announce()
        await self.node.drain(self.config.limits.drain_grace_s)
        self.node.stage = None
        await self._stage.aclose()

    async def _consider_moving(self) -> None:
        """Move if the swarm gains enough by it and lacks no block meanwhile."""
        span = await self._plan_move()
        if span is None:
            return
        log.info("moving from blocks %s to %s", self.record.span, span)
        self.node.state = NodeState.DRAINING
        await self.membership.announce()
        await asyncio.sleep(SETTLE_S)  # until then the records of nodes that decided at the same time have arrived
        if await self._plan_move() is None:
            self.node.state = NodeState.ONLINE
            await self.membership.announce()
            return
        await self._drain()
        self.node.state = NodeState.JOINING
        self.moves += 1
        await self._try_loading(self._serve(span))

    async def _fill_hole(self, span: Span) -> None:
        """Take over blocks that no living node serves, unless another node does or this one's would be missing."""
        log.warning("claiming blocks %s, which no living node serves, instead of %s", span, self.record.span)
        if not await self._claim(span):
            await self.membership.announce()
            return
        await self.node.drain(min(HOLE_GRACE_S, self.config.limits.drain_grace_s), NodeState.JOINING)
        self.node.stage = None
        await self._stage.aclose()
        self.moves += 1
        await self._try_loading(self._serve(span))

    async def _claim(self, span: Span) -> bool:
        """Announce that this node joins over `span`, and return whether it may: its blocks are still its own."""
        former, stage = self.record.span, self.node.stage
        assert former is not None
        assert stage is not None
        self.node.state, self.record.span, stands = NodeState.JOINING, span, False
        try:
            await self.membership.announce()
            claim = Placed(self.record.identity.node_id, span, stage.rate, "joining")
            stands = await self.holes.stands(claim, former)
        finally:
            if not stands:
                log.warning("keeping blocks %s: the claim on %s is withdrawn", former, span)
                self.node.state, self.record.span = NodeState.ONLINE, former
        return stands

    def _placed(self) -> Placed | None:
        """Return where this node is placed as the others know it, or None while it hosts nothing.

        Its own measurements may be newer, but then it would make another plan than the others.
        """
        sealed = self.membership.records.book.get(self.record.identity.node_id)
        placed = placements([sealed.record], self.record.model.config_digest) if sealed is not None else []
        return placed[0] if placed and self.node.stage is not None else None

    async def _plan_move(self) -> Span | None:
        assert self.record.span is not None
        assert self.node.stage is not None
        return await self._chooser().plan_move(self.record.span, self.node.stage.rate, self.node.state)

    def _read_limits(self) -> None:
        """Find which spans this node can host; the model without weights is kept for the span that is chosen."""
        config, model = self.config, self.record.model
        self._skeleton = build_skeleton(model.folder, getattr(torch, config.model.dtype))
        self._hosting = read_hosting_limits(config, model, self._skeleton)

    def _chooser(self) -> SpanChooser:
        record = self.record
        assert self._hosting is not None
        return SpanChooser(
            self.config,
            record.model,
            record.identity.node_id,
            self.liveness.living,
            record.numerics_class,
            self._hosting,
        )

    def _fit(self, target: Span, swarm: PlacementTable) -> Span | None:
        """Return what this node can host of blocks that it should take over."""
        return target if self._hosting is None else self._hosting.fit(target, swarm)

    async def _announce_span(self, span: Span) -> None:
        self.record.span = span
        await self.membership.announce()


async def _run_unless(stopping: "asyncio.Task[bool]", work: Coroutine[None, None, None]) -> None:
    """Run `work` to its end, or cancel it when `stopping` is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({stopping, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
