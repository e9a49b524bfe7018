"""Where the nodes of a swarm are placed, by their records.  Pure."""

from collections.abc import Iterable
from dataclasses import replace

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import UNKNOWN_WEIGHTS, NodeRecord, NodeState
from treeswarm.topology.tables import Placed, PlacementState

PLACED: dict[NodeState, PlacementState] = {
    NodeState.JOINING: "joining",
    NodeState.ONLINE: "online",
    NodeState.DRAINING: "draining",
}
"""States in which a node counts for placement, and their names there."""


def placements(records: Iterable[NodeRecord], model: str, numerics: NumericsClass | None = None) -> list[Placed]:
    """Return the placement of the nodes that host, or are about to host, blocks of the model with this digest.

    With `numerics`, only nodes that can be in one chain with a node of this class count: others serve it no block.
    """
    return [
        Placed(record.node, record.span, record.rate, PLACED[record.state])
        for record in records
        if record.model == model
        and record.state in PLACED
        and (numerics is None or may_be_one_class(record.numerics, numerics))
    ]


def may_be_one_class(first: NumericsClass, second: NumericsClass) -> bool:
    """Return whether the classes are equal, as far as is known: a node that joins has not read its weights yet."""
    if UNKNOWN_WEIGHTS in {first.weights, second.weights}:
        first, second = replace(first, weights=UNKNOWN_WEIGHTS), replace(second, weights=UNKNOWN_WEIGHTS)
    return first == second
