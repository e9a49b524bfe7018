"""Says of a gap which nodes serve the other blocks, and what becomes of the missing ones.  Pure."""

from collections.abc import Collection, Sequence

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.address import without_pin
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span

# Nodes that a sentence names of each kind; the others are counted.
NAMED = 3
DOING = {
    NodeState.JOINING: "is loading",
    NodeState.DRAINING: "is leaving with",
    NodeState.PAUSED: "is paused with",
}


def explain_gap(
    records: Collection[NodeRecord], gaps: Sequence[Span], blocks: int, unanswered: Collection[str] = ()
) -> MissingBlocks:
    """Return the error for `gaps` (not empty) in a model of `blocks` blocks, whose nodes have these records.

    `unanswered` are addresses that did not answer when last asked.
    """
    return MissingBlocks.of(gaps, blocks, describe_holders(records, gaps, unanswered))


def describe_holders(records: Collection[NodeRecord], gaps: Sequence[Span], unanswered: Collection[str] = ()) -> str:
    """Return what the nodes with missing blocks do, and which serve the rest; empty if there is nothing to say."""
    silent = dict.fromkeys(without_pin(address) for address in unanswered)
    serving, others = [], []
    for record in sorted(records, key=lambda record: (record.span, record.node)):
        address, span = record.address, record.span
        if address in silent:
            others.append(f"{address} with {span} does not answer")
            del silent[address]
        elif record.state is NodeState.ONLINE:
            serving.append(f"{address} serves {span}")
        elif record.state in DOING and any(map(span.overlaps, gaps)):
            others.append(f"{address} {DOING[record.state]} {span}")
    others += [f"{address} does not answer" for address in silent]
    return "; ".join(filter(None, (list_some(others), list_some(serving))))


def list_some(phrases: Sequence[str]) -> str:
    """Return the first phrases, separated by commas, and the number of the others."""
    left = len(phrases) - NAMED
    return ", ".join(phrases[:NAMED]) + (f" and {left} more" if left > 0 else "")
