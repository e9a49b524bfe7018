"""Tell nodes that could help when this client lost the last holder of some blocks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.protocol.messages import NumericsClass
from treeswarm.registry.seam import Snapshot
from treeswarm.tasks import TaskSet
from treeswarm.topology.healing import find_holes, plan_healing
from treeswarm.topology.liveness import without
from treeswarm.topology.placements import placements
from treeswarm.topology.tables import PlacementTable
from treeswarm.transport.lost_report import report_lost
from treeswarm.transport.seam import Transport

# A node that receives a report probes the lost node itself, twice; sooner another report tells it nothing.
AGAIN_S = 10.0
# Nodes that were lost within this time may have left the hole together.
TOGETHER_S = 60.0
# The nodes of these turns are told: those that act at once, and those that follow if they cannot.
TURNS = (0, 1)


@dataclass(eq=False)
class LostReporter:
    """Reports lost nodes of one model to the nodes that would take their blocks over.

    They believe nothing of it but probe the lost nodes themselves.
    """

    transport: Transport
    read_snapshot: Callable[[], Snapshot]
    model: str
    """Config digest of the model."""
    blocks: int
    numerics: NumericsClass | None = None
    """Class of the client's chain, of which the blocks must be held, or None for any."""
    _lost_at: dict[str, float] = field(default_factory=dict)
    """Time of the loop's clock, in seconds, of the last report of each lost node."""
    _tasks: TaskSet = field(default_factory=TaskSet)

    def report(self, node: str) -> None:
        """Report a node, in the background, if blocks have no other holder without it."""
        now = asyncio.get_running_loop().time()
        if now - self._lost_at.get(node, -AGAIN_S) < AGAIN_S:
            return
        self._lost_at = {lost: at for lost, at in self._lost_at.items() if now - at < TOGETHER_S} | {node: now}
        records = {sealed.record.node: sealed.record for sealed in self.read_snapshot()}
        table = PlacementTable.of(placements(records.values(), self.model, self.numerics))
        table = without(table, self._lost_at)
        if not find_holes(table, self.blocks):
            return
        for mover in {name for turn in TURNS for name in plan_healing(table, self.blocks, turn)}:
            self._tasks.start(report_lost(self.transport, records[mover].dial, sorted(self._lost_at)))

    async def close(self) -> None:
        """End the reports that are under way."""
        await self._tasks.close()
