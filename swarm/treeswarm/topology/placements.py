"""Where the nodes of a swarm are placed, by their records.  Pure."""

from collections.abc import Iterable

from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.topology.tables import Placed, PlacementState

PLACED: dict[NodeState, PlacementState] = {
    NodeState.JOINING: "joining",
    NodeState.ONLINE: "online",
    NodeState.DRAINING: "draining",
}
"""States in which a node counts for placement, and their names there."""


def placements(records: Iterable[NodeRecord], model: str) -> list[Placed]:
    """Return the placement of the nodes that host, or are about to host, blocks of the model with this digest."""
    return [
        Placed(record.node, record.span, record.rate, PLACED[record.state])
        for record in records
        if record.model == model and record.state in PLACED
    ]
