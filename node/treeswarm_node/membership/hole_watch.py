"""Notice blocks that no living node serves, and find out whose turn it is to take them over."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.tasks import TaskSet
from treeswarm.topology.healing import (
    JOINING_TRUST_S,
    TURN_MARGIN_S,
    Verdict,
    find_holes,
    is_served,
    judge_claim,
    nodes_to_ask,
    plan_healing,
)
from treeswarm.topology.liveness import suspects, without
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm.transport.lost_report import report_lost
from treeswarm_node.membership.liveness_monitor import REST, LivenessMonitor

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A claim that waits for others to be withdrawn is judged so many times, after so many seconds each.
CLAIM_CHECKS, CHECK_AGAIN_S = 4, 2.0
# The nodes of so many turns are told at once, so that the later ones count their turns from about the same time.
TOLD_AHEAD = 3
# Stands for the turn of the nodes that are told before the deaths are proven.
EARLY = -1
# A node tells each other one of a hole at most so often, and sends so many reports of it in all: those told pass it on,
# and if it is still open after these, nobody can fill it.
TOLD_EACH, TOLD_IN_ALL = 2, 64
# Nodes that withdraw a claim at the same time must not claim again at the same time.
BACK_OFF = (0.5, 1.5)


@dataclass(eq=False)
class HoleWatch:
    """Watches for holes by the records of living nodes."""

    monitor: LivenessMonitor
    lag_s: Callable[[], float]
    """Returns the seconds within which a record reaches all readers, as a rule."""
    fit: Callable[[Span, PlacementTable], Span | None] = lambda target, _: target
    """Returns what this node can host of blocks that it should take over, or None."""
    _holes: tuple[Span, ...] = ()
    _since: float = 0.0
    """Time of the loop's clock, in seconds, since which these blocks are known to be missing."""
    _has_met: bool = False
    """Whether any other node was ever known.  One without a registry cannot know what others serve."""
    _not_before: float = 0.0
    """Time before which this node makes no other claim."""
    _told: set[tuple[str, int]] = field(default_factory=set)
    """Nodes that were told of these holes, each with its turn."""
    _rivals: tuple[str, ...] = ()
    """Nodes whose turn is about the same as this node's."""
    _suspects: frozenset[str] = frozenset()
    """Nodes that are silent, or hold the blocks of so many silent ones that they probably are."""
    _joining: dict[str, tuple[Span, float]] = field(default_factory=dict)
    """What each joining node joins over, and the time since which it does."""
    _reports: TaskSet = field(default_factory=TaskSet)

    async def wait_for_turn(self, own: Callable[[], Placed | None], *, may_move: bool) -> Span:
        """Return the blocks that this node should take over, once there is a hole and it is this node's turn.

        `own` returns where this node is placed now, or None if it hosts nothing.  A node that may not move, and every
        other one, tells the nodes of a turn of the hole, because they may not know of it.
        """
        loop, pause_s = asyncio.get_running_loop(), LOOK_EVERY_S
        while True:
            await asyncio.sleep(pause_s)
            began = loop.time()
            records, placed = await self.monitor.living(), own()
            self._tell_early(records, placed)
            span = self._find_turn(records, placed)
            if span is not None and may_move:
                return span
            pause_s = max(LOOK_EVERY_S, REST * (loop.time() - began))

    async def stands(self, claim: Placed, former: Span) -> bool:
        """Return whether this node may give its blocks `former` up for those of its announced claim.

        The nodes that the claim concerns, the lost ones among them, were asked.  If they do not all answer, all readers
        have seen the claim.  A claim that does not stand is to be withdrawn, and this node makes no other one for a
        random while.
        """
        verdict: Verdict = "wait"
        for _ in range(CLAIM_CHECKS):
            await self._settle(former)
            others = self._counted(await self.monitor.living())
            verdict = judge_claim(claim, former, others, self.monitor.blocks)
            if verdict != "wait":
                break
            await asyncio.sleep(CHECK_AGAIN_S)
        self._not_before = asyncio.get_running_loop().time() + self.settle_s * random.uniform(*BACK_OFF)
        return verdict == "load"

    @property
    def settle_s(self) -> float:
        """Seconds until other nodes have seen what this one announces, and it has seen what they announced."""
        return self.lag_s() + LOOK_EVERY_S

    async def _settle(self, former: Span) -> None:
        """Wait until the nodes that a claim concerns have answered, or all readers have seen it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settle_s
        # One that is silent may be proven dead meanwhile: then it need not answer.
        while True:
            left_s = end - loop.time()
            if await self._ask(former) or left_s <= 0:
                return
            await asyncio.sleep(min(left_s, CHECK_AGAIN_S))

    async def _ask(self, former: Span) -> bool:
        """Ask the nodes that the claim concerns for their records, and return whether enough of them answered."""
        table = self._counted(await self.monitor.living())
        rivals, holders = nodes_to_ask(former, table, self._rivals)
        dead = self.monitor.liveness.dead
        lost = [record.node for record in await self.monitor.read_records() if record.node in dead]
        answered = await self.monitor.ask({*rivals, *holders}, lost)
        heard = table.select(np.isin(table.nodes, list(answered)))
        return answered >= set(rivals) and is_served(former, heard, self.monitor.blocks)

    def _counted(self, records: Iterable[NodeRecord], own: Placed | None = None) -> PlacementTable:
        """Return the placement of the nodes that count: not of those that join over a hole and do not fill it."""
        now = asyncio.get_running_loop().time()
        placed = self.monitor.placements(records)
        joining = {other.node: other.span for other in placed if other.state == "joining"}
        known = self._joining
        self._joining = {
            node: known[node] if node in known and known[node][0] == span else (span, now)
            for node, span in joining.items()
        }
        stuck = [node for node, (_, since) in self._joining.items() if now - since > JOINING_TRUST_S]
        return without(PlacementTable.of([*placed, own] if own is not None else placed), stuck)

    def _find_turn(self, records: list[NodeRecord], placed: Placed | None) -> Span | None:
        """Return the blocks to take over if it is this node's turn, and tell the other nodes of the turn."""
        now = asyncio.get_running_loop().time()
        table = self._counted(records, placed)
        self._has_met = self._has_met or len(table.nodes) > (placed is not None)
        holes = tuple(find_holes(table, self.monitor.blocks)) if self._has_met else ()
        if holes != self._holes:
            if self._holes:  # Those told early, before these holes were proven, need not be told again.
                self._told.clear()
            self._holes, self._since = holes, now
            if holes:
                log.warning("no living node serves blocks %s", ", ".join(map(str, holes)))
        if not holes or now < self._not_before:
            return None
        turn = int((now - self._since) / (self.lag_s() + TURN_MARGIN_S))
        soon = [plan_healing(table, self.monitor.blocks, turn + ahead) for ahead in range(TOLD_AHEAD)]
        self._tell([record for record in records if any(record.node in moves for moves in soon)], turn)
        around = [plan_healing(table, self.monitor.blocks, max(0, turn - 1)), *soon[:2]]
        self._rivals = tuple(node for moves in around for node in moves if node != self.monitor.node)
        target = soon[0].get(self.monitor.node)
        return target and self.fit(target, table)

    def _tell_early(self, records: list[NodeRecord], placed: Placed | None) -> None:
        """Tell the nodes that would act if all suspects were dead: they can prove it in the meantime."""
        silent = self.monitor.liveness.silences.keys()
        if not silent:
            self._told = {(node, turn) for node, turn in self._told if turn != EARLY}
        if not silent - self.monitor.liveness.dead:
            return
        table = self._counted(records, placed)
        self._suspects = suspects(self.monitor.liveness, table)
        moves = plan_healing(without(table, self._suspects), self.monitor.blocks, 0)
        self._tell([record for record in records if record.node in moves], EARLY)

    def _tell(self, movers: list[NodeRecord], turn: int) -> None:
        lost = sorted(self.monitor.liveness.silences.keys() | (self._suspects if turn == EARLY else ()))
        for record in movers:
            times = sum(node == record.node for node, _ in self._told)
            is_allowed = times < TOLD_EACH and len(self._told) < TOLD_IN_ALL
            if lost and is_allowed and (record.node, turn) not in self._told:
                self._told.add((record.node, turn))
                self._reports.start(report_lost(self.monitor.transport, record.dial, lost))
