"""The choice of a numerics class among those in which nodes serve the model.  Pure except for a log line."""

import logging
from collections.abc import Collection

from treeswarm.errors import Mismatch, RouteError
from treeswarm.model_files import ModelShape
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.registry.seam import Snapshot
from treeswarm_client.discovery.gap import explain_gap
from treeswarm_client.discovery.route import Target

log = logging.getLogger(__name__)

# Nodes in other states may not serve what they load or have put away.  Before loading, a node does not know its
# weights' digest.
SERVING = {NodeState.ONLINE, NodeState.DRAINING}


def choose_target(
    snapshot: Snapshot,
    config: str,
    shape: ModelShape,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    unanswered: Collection[str] = (),
) -> Target:
    """Choose a numerics class among the nodes that serve the model whose config has the digest `config`.

    Of several classes that cover the model, the one with most nodes is chosen; `dtype` and `quantization` leave only
    such classes; `unanswered` are addresses that did not answer.  Raises RouteError if there are no records, Mismatch
    if the nodes serve other models or no class alone covers the model, MissingBlocks if no node serves, or if there is
    one class only and it has gaps.
    """
    records = [sealed.record for sealed in snapshot]
    ours = [record for record in records if record.model == config]
    if not ours:
        if not records:
            raise RouteError("no node announces itself: check the addresses given and that `swarm-node` runs there")
        other = records[0]
        raise Mismatch(
            f"{other.address} serves a model of another config ({other.name}, {other.blocks} blocks, digest "
            f"{other.model[:12]}) than --model says ({config[:12]}): name the model that the node serves"
        )
    serving = [record for record in ours if record.state in SERVING]
    if not serving:
        raise explain_gap(ours, [Span(0, shape.blocks)], shape.blocks, unanswered)
    classes = _classes(serving, dtype, quantization)
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
        like_it = [record for record in ours if record.numerics == chosen or record.state not in SERVING]
        gaps = missing_blocks([n.span for n in classes[chosen]], shape.blocks)
        raise explain_gap(like_it, gaps, shape.blocks, unanswered)
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
