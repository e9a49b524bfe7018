"""Notice blocks that no living node serves, and find out whose turn it is to take them over."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.tasks import TaskSet
from treeswarm.topology.healing import TURN_MARGIN_S, Verdict, find_holes, judge_claim, plan_healing
from treeswarm.topology.placements import placements
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm.transport.lost_report import report_lost
from treeswarm_node.membership.liveness_monitor import REST, LivenessMonitor

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A claim that waits for others to be withdrawn is judged so many times.
CLAIM_CHECKS = 4
# The nodes of so many turns are told at once, so that the later ones count their turns from about the same time.
TOLD_AHEAD = 3
# Stands for the turn of the nodes that are told before the deaths are proven.
EARLY = -1
# Nodes that withdraw a claim at the same time must not claim again at the same time.
BACK_OFF = (0.5, 1.5)


@dataclass(eq=False)
class HoleWatch:
    """Watches for holes by the records of living nodes."""

    monitor: LivenessMonitor
    lag_s: Callable[[], float]
    """Returns the seconds within which a record reaches all readers, as a rule."""
    _holes: tuple[Span, ...] = ()
    _since: float = 0.0
    """Time of the loop's clock, in seconds, since which these blocks are known to be missing."""
    _has_met: bool = False
    """Whether any other node was ever known.  One without a registry cannot know what others serve."""
    _not_before: float = 0.0
    """Time before which this node makes no other claim."""
    _told: set[tuple[str, int]] = field(default_factory=set)
    """Nodes that were told of these holes, each with its turn."""
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

        Others have then seen the claim, and the lost nodes were probed again.  A claim that does not stand is to be
        withdrawn, and this node makes no other one for a random while.
        """
        verdict: Verdict = "wait"
        for _ in range(CLAIM_CHECKS):
            await asyncio.sleep(self.settle_s)
            await self.monitor.verify()
            others = PlacementTable.of(placements(await self.monitor.living(), self.monitor.model))
            verdict = judge_claim(claim, former, others, self.monitor.blocks)
            if verdict != "wait":
                break
        self._not_before = asyncio.get_running_loop().time() + self.settle_s * random.uniform(*BACK_OFF)
        return verdict == "load"

    @property
    def settle_s(self) -> float:
        """Seconds until other nodes have seen what this one announces, and it has seen what they announced."""
        return self.lag_s() + LOOK_EVERY_S

    def _find_turn(self, records: list[NodeRecord], placed: Placed | None) -> Span | None:
        """Return the blocks to take over if it is this node's turn, and tell the other nodes of the turn."""
        now = asyncio.get_running_loop().time()
        others = placements(records, self.monitor.model)
        table = PlacementTable.of([*others, placed] if placed is not None else others)
        self._has_met = self._has_met or bool(others)
        holes = tuple(find_holes(table, self.monitor.blocks)) if self._has_met else ()
        if holes != self._holes:
            self._holes, self._since = holes, now
            self._told.clear()
            if holes:
                log.warning("no living node serves blocks %s", ", ".join(map(str, holes)))
        if not holes or now < self._not_before:
            return None
        turn = int((now - self._since) / (self.lag_s() + TURN_MARGIN_S))
        soon = [plan_healing(table, self.monitor.blocks, turn + ahead) for ahead in range(TOLD_AHEAD)]
        self._tell([record for record in records if any(record.node in moves for moves in soon)], turn)
        return soon[0].get(self.monitor.node)

    def _tell_early(self, records: list[NodeRecord], placed: Placed | None) -> None:
        """Tell the nodes that would act if all silent nodes were dead: they can prove it in the meantime."""
        silent = self.monitor.liveness.silences.keys()
        if not silent - self.monitor.liveness.dead:
            self._told = {(node, turn) for node, turn in self._told if turn != EARLY}
            return
        others = placements((record for record in records if record.node not in silent), self.monitor.model)
        table = PlacementTable.of([*others, placed] if placed is not None else others)
        moves = plan_healing(table, self.monitor.blocks, 0)
        self._tell([record for record in records if record.node in moves], EARLY)

    def _tell(self, movers: list[NodeRecord], turn: int) -> None:
        lost = sorted(self.monitor.liveness.silences)
        for record in movers:
            if lost and (record.node, turn) not in self._told:
                self._told.add((record.node, turn))
                self._reports.start(report_lost(self.monitor.transport, record.dial, lost))
