"""Which blocks a node should host.  Pure: a snapshot of the swarm in, a span out.

Every node decides for itself, at the same time as many others, over a snapshot that lags by some seconds.  Therefore
nodes with the same snapshot must not all decide the same.  Joining nodes that see each other choose again in turn, and
a move is one node's part of a plan that every node computes alike.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.rebalancing import plan_moves
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.topology.tables import DRAINING, JOINING, ONLINE, Floats, Placed, PlacementTable

# At most this many choices of other joining nodes are computed, of 75 µs each; more nodes than that choose in groups of
# neighbouring ids.
TURNS = 256
# At most this share of a block's replicas moves at once (so never two of fewer than 40): a plan made while other moves
# are under way cannot know where those nodes go.
MOVING = 0.05


def best_possible(rates: Floats | Sequence[float], blocks: int) -> float:
    """Return an upper bound for the weakest block's rows per second, whatever the placement of nodes of these rates."""
    return float(np.sum(rates)) / blocks


def choose_span(swarm: PlacementTable | Sequence[Placed], blocks: int, length: int | SpanLimits, node: str) -> Span:
    """Return the window of `length` blocks, or of as many as fit there, in which `node` (an id) helps most.

    `choose_again` decides when others chose at the same time.
    """
    return _best_window(PlacementTable.of(swarm).throughput(blocks), length, node)


def choose_again(
    placed: Placed, swarm: PlacementTable | Sequence[Placed], blocks: int, limits: SpanLimits | None = None
) -> Span:
    """Return the window of `placed`, a joining node, once other nodes have announced that they join over its blocks.

    They choose in turn, the lowest id first.  The node computes the choices of those before it; those after it do not
    count, because they will compute its choice.  Without `limits`, the window is as long wherever it is.
    """
    table = PlacementTable.of(swarm)
    others = table.select(table.nodes != placed.node)
    rivals = (others.state == JOINING) & others.overlapping(placed.span)
    before = others.select(rivals & (others.nodes < placed.node))
    if not len(before.nodes):
        return placed.span
    throughput = others.select(~rivals).throughput(blocks)
    in_turn = np.array_split(np.argsort(before.nodes), min(len(before.nodes), TURNS))
    lengths = [int(before.end[turn[0]] - before.start[turn[0]]) for turn in in_turn]
    throughput = _after_choices(throughput, lengths, [float(before.rate[turn].sum()) for turn in in_turn])
    return _best_window(throughput, limits or len(placed.span), placed.node)


def fit_move(
    target: Span,
    limits: SpanLimits,
    swarm: PlacementTable | Sequence[Placed],
    blocks: int,
    cuts: Sequence[int] | None = None,
) -> Span | None:
    """Return the blocks to take of a move to `target` that others planned, or None if it would gain nothing.

    Others do not know where a node can host fewer blocks.  A node takes the part of the target that fits and helps
    the weakest blocks most; if the target has blocks that no node serves, it takes some of those.  Where `cuts` are
    given, spans begin and end there; they rise from 0 to `blocks`.
    """
    longest = [target] if limits.allow(target, blocks) else limits.longest_spans(target, blocks)
    candidates = [span for span in (_within_cuts(span, cuts) for span in longest) if span is not None]
    if target in candidates:
        return target
    throughput = PlacementTable.of(swarm).throughput(blocks)
    if not candidates:
        return None
    chosen = min(candidates, key=lambda span: _by_weakest(throughput, span, len(target)))
    fills = throughput[chosen.start : chosen.end].min() <= 0
    return chosen if fills or throughput[target.start : target.end].min() > 0 else None


def _within_cuts(span: Span, cuts: Sequence[int] | None) -> Span | None:
    """Return the longest span within `span` that begins and ends at cuts, or None if there is none."""
    if cuts is None:
        return span
    inside = [cut for cut in cuts if span.start <= cut <= span.end]
    return Span(inside[0], inside[-1]) if len(inside) > 1 else None


def plan_move(placed: Placed, swarm: PlacementTable | Sequence[Placed], blocks: int) -> Span | None:
    """Return where the node `placed` should move to, or None to stay.

    A node asks when it is online, and once more after it has announced that it drains and other nodes had time to see
    that: None then means to go back online.  A node moves if it is part of the plan that every node makes of this
    snapshot (`rebalancing.plan_moves`).  All its blocks must be online on other nodes, and not too many of those may be
    moving already.
    """
    table = PlacementTable.of(swarm)
    if placed.state == "draining":
        table = table.select(table.nodes != placed.node).with_online(placed)
    # The plan comes first: of thousands of nodes that ask, few are part of it.
    if blocks not in table.moves:
        online = table.select((table.state == ONLINE) & (table.end <= blocks))
        table.moves[blocks] = plan_moves(table.throughput(blocks), table.replicas(blocks, ONLINE), online)
    target = table.moves[blocks].get(placed.node)
    return target if target and _may_leave(placed, table.select(table.nodes != placed.node), blocks) else None


def _may_leave(placed: Placed, others: PlacementTable, blocks: int) -> bool:
    """Return whether all blocks of `placed` are online on others, of which few enough are moving already."""
    replicas = int(others.replicas(blocks, ONLINE)[placed.span.start : placed.span.end].min())
    moving = (others.state == DRAINING) & others.overlapping(placed.span)
    if placed.state == "draining":
        moving &= others.nodes < placed.node
    return replicas > 0 and int(moving.sum()) <= max(0, MOVING * replicas - 1)


def _after_choices(throughput: Floats, lengths: Sequence[int], rates: Sequence[float]) -> Floats:
    """Return `throughput` after nodes of these lengths and rates have chosen, one after another."""
    throughput = throughput.copy()
    for length, rate in zip(lengths, rates, strict=True):
        window = _weakest_window(throughput, length, "")
        throughput[window.start : window.end] += rate / length
    return throughput


def _best_window(throughput: Floats, length: int | SpanLimits, node: str) -> Span:
    """Return the window that helps most, of one length or within limits.

    A node that can host an end of the model which no node serves takes it first: other nodes may not be able to.  Else
    the window is chosen whose throughputs, sorted, are the lowest; among equal ones the longest, then those that tile
    the model from its ends.
    """
    blocks = len(throughput)
    if isinstance(length, int):
        return _weakest_window(throughput, min(length, blocks), node)
    if length.whole:
        return Span(0, blocks)
    if length.is_same:
        return _weakest_window(throughput, min(length.middle, blocks - 1), node)
    windows = list(length.longest_spans(Span(0, blocks), blocks))
    ends = [w for w in windows if (w.start == 0 and throughput[0] <= 0) or (w.end == blocks and throughput[-1] <= 0)]
    ranked = [(_by_weakest(throughput, window, length.longest), window) for window in ends or windows]
    least = min(rank for rank, _ in ranked)
    tied = [window for rank, window in ranked if rank == least]
    tiling = [window for window in tied if _tiles(window, length, blocks)]
    return min(tiling or tied, key=lambda window: _digest(f"{node} {window.start}"))


def _by_weakest(throughput: Floats, window: Span, length: int) -> tuple[float, ...]:
    """Return a window's throughputs from the lowest on, filled up to `length` so that longer ones come first."""
    # Sums of floats in another order differ in the last digits.
    sizes = np.sort(throughput[window.start : window.end]).round(9 - int(np.log10(throughput.max() + 1)))
    return (*sizes.tolist(), *[float("inf")] * (length - len(window)))


def _tiles(window: Span, limits: SpanLimits, blocks: int) -> bool:
    """Return whether a window lies whole windows away from a window at an end of the model."""
    if window.start == 0 or window.end == blocks:
        return True
    middle = max(1, limits.middle)
    return (window.start - limits.head) % middle == 0 or (blocks - limits.tail - window.end) % middle == 0


def _weakest_window(throughput: Floats, length: int, node: str) -> Span:
    """Return the window whose throughputs, sorted, are the lowest; a hash of `node` chooses among equal ones.

    Of equal windows those come first that lie whole windows away from an end of the model.  Similar nodes then tile
    the model; two nodes that begin in the middle would leave a block without a node.
    """
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(throughput, length), axis=1)
    # Sums of floats in another order differ in the last digits.
    windows = windows.round(9 - int(np.log10(throughput.max() + 1)))
    tied = np.arange(len(windows))
    for column in windows.T:
        tied = tied[column[tied] == column[tied].min()]
        if len(tied) == 1:
            break
    tiling = tied[(tied % length == 0) | ((len(throughput) - tied) % length == 0)]
    equal = (tiling if len(tiling) else tied).tolist()
    start = min(equal, key=lambda start: _digest(f"{node} {start}")) if len(equal) > 1 else equal[0]
    return Span(start, start + length)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
