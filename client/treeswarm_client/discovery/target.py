"""The choice of a numerics class among those in which nodes serve the model.  Pure except for a log line."""

import logging

from treeswarm.errors import Mismatch, MissingBlocks, RouteError
from treeswarm.model_files import ModelShape
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import missing_blocks
from treeswarm.registry.seam import Snapshot
from treeswarm_client.discovery.route import Target

log = logging.getLogger(__name__)

# Nodes in other states may not serve what they load or have put away.  Before loading, a node does not know its
# weights' digest.
SERVING = {NodeState.ONLINE, NodeState.DRAINING}


def choose_target(
    snapshot: Snapshot, config: str, shape: ModelShape, *, dtype: str | None = None, quantization: str | None = None
) -> Target:
    """Choose a numerics class among the nodes that serve the model whose config has the digest `config`.

    Of several classes that cover the model, the one with most nodes is chosen; `dtype` and `quantization` leave only
    such classes.  Raises RouteError if no node serves, Mismatch if the nodes serve other models or no class alone
    covers the model, MissingBlocks if there is one class only and it has gaps.
    """
    records = [sealed.record for sealed in snapshot if sealed.record.state in SERVING]
    if not records:
        note = f" ({len(snapshot)} known, but none serves at the moment)" if snapshot else ""
        raise RouteError(f"no node answered{note}: check the addresses given and that `swarm-node` runs there")
    ours = [record for record in records if record.model == config]
    if not ours:
        other = records[0]
        raise Mismatch(
            f"{other.address} serves a model of another config ({other.name}, {other.blocks} blocks, digest "
            f"{other.model[:12]}) than --model says ({config[:12]}): name the model that the node serves"
        )
    classes = _classes(ours, dtype, quantization)
    whole = [c for c, nodes in classes.items() if not missing_blocks([n.span for n in nodes], shape.blocks)]
    if not whole and len(classes) > 1:
        first, second = (nodes[0] for nodes in list(classes.values())[:2])
        raise Mismatch(
            f"{first.address} and {second.address} would compute different text: "
            f"{first.numerics.difference(second.numerics)}; "
            "start both from the same model directory with the same --dtype"
        )
    chosen = max(whole or classes, key=lambda numerics: len(classes[numerics]))
    if len(whole) > 1:
        log.warning("several numerics classes of the model are served: using the one with most nodes, %s", chosen)
    if not whole:
        raise MissingBlocks.of(missing_blocks([n.span for n in classes[chosen]], shape.blocks), shape.blocks)
    return Target(chosen, shape.blocks, shape.vocab_size, shape.hidden_size, shape.max_positions)


def _classes(
    records: list[NodeRecord], dtype: str | None, quantization: str | None
) -> dict[NumericsClass, list[NodeRecord]]:
    """Return the records by numerics class, for the classes of this dtype and quantization.  Raises Mismatch."""
    classes: dict[NumericsClass, list[NodeRecord]] = {}
    for record in records:
        numerics = record.numerics
        if dtype in {None, numerics.dtype} and quantization in {None, numerics.quantization}:
            classes.setdefault(numerics, []).append(record)
    if not classes:
        raise Mismatch(
            f"no node serves the model with {' and '.join(filter(None, (dtype, quantization)))}: "
            f"there is {', '.join(sorted({str(record.numerics) for record in records}))}"
        )
    return classes
