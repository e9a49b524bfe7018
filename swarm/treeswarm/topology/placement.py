"""Which blocks should I host?  Pure: a snapshot of the swarm in, a span out.

Every node decides for itself, over a snapshot that lags by some seconds, at the same time as many others.  So the
decisions are made such that nodes with the same snapshot do not all do the same: joining nodes that see each other
choose again in turn, and a move is one node's part of a plan that everybody computes alike.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.spans import Span
from treeswarm.topology.rebalancing import Moves, plan_moves

State = Literal["joining", "online", "draining"]
STATES: tuple[State, ...] = ("joining", "online", "draining")
JOINING, ONLINE, DRAINING = range(3)

# A crowd is imagined as at most so many choices, of 75 µs each; larger ones choose in groups of neighbouring ids.
TURNS = 256
# At most this share of a block's replicas is on the move at once (so never two of fewer than 40): a plan made while
# others are under way cannot know where they go.
MOVING = 0.05


@dataclass(frozen=True)
class Placed:
    """One node's place.  `rate`: block-rows a second it computes, so its throughput over k blocks is rate / k."""

    node: str
    span: Span
    rate: float
    state: State


@dataclass(frozen=True, eq=False)
class Layout:
    """A snapshot as arrays, [nodes] each; what everybody would compute from it is computed once."""

    nodes: NDArray[np.str_]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    rate: NDArray[np.float64]
    state: NDArray[np.int64]

    @classmethod
    def of(cls, placed: "Layout | Sequence[Placed]") -> "Layout":
        if isinstance(placed, Layout):
            return placed
        return cls(
            np.array([one.node for one in placed], np.str_),
            np.array([one.span.start for one in placed], np.int64),
            np.array([one.span.end for one in placed], np.int64),
            np.array([one.rate for one in placed], np.float64),
            np.array([STATES.index(one.state) for one in placed], np.int64),
        )

    def only(self, kept: NDArray[np.bool_]) -> "Layout":
        return Layout(self.nodes[kept], self.start[kept], self.end[kept], self.rate[kept], self.state[kept])

    def overlapping(self, span: Span) -> NDArray[np.bool_]:
        return (self.start < span.end) & (span.start < self.end)

    def replicas(self, blocks: int, state: int) -> NDArray[np.int64]:
        """How many nodes of that state have each block, int64 [blocks]."""
        here = self.state == state
        return _summed(self.start[here], self.end[here], np.ones(here.sum()), blocks).round().astype(np.int64)

    @cached_property
    def moves(self) -> dict[int, Moves]:
        """Plans made, by number of blocks."""
        return {}


def block_throughput(placed: Layout | Sequence[Placed], blocks: int) -> NDArray[np.float64]:
    """Rows a second that each block can compute, float64 [blocks]; joining nodes count, draining ones do not."""
    layout = Layout.of(placed)
    stays = layout.state != DRAINING
    start, end = layout.start[stays], layout.end[stays]
    return _summed(start, end, layout.rate[stays] / (end - start), blocks)


def best_possible(rates: NDArray[np.float64] | Sequence[float], blocks: int) -> float:
    """No placement makes the weakest block faster than this, rows a second."""
    return float(np.sum(rates)) / blocks


def choose_span(placed: Layout | Sequence[Placed], blocks: int, length: int, node: str) -> Span:
    """The window of `length` blocks that helps the weakest block most; `choose_again` when others did the same."""
    return _weakest_window(block_throughput(placed, blocks), min(length, blocks), node)


def choose_again(mine: Placed, placed: Layout | Sequence[Placed], blocks: int) -> Span:
    """My window once I see who else announced joining over blocks of mine: we choose in turn, the lowest id first.

    I imagine the choices of those before me; those after me do not count, they will imagine mine.
    """
    layout = Layout.of(placed)
    others = layout.only(layout.nodes != mine.node)
    rivals = (others.state == JOINING) & others.overlapping(mine.span)
    before = others.only(rivals & (others.nodes < mine.node))
    if not len(before.nodes):
        return mine.span
    throughput = block_throughput(others.only(~rivals), blocks)
    in_turn = np.array_split(np.argsort(before.nodes), min(len(before.nodes), TURNS))
    lengths = [int(before.end[turn[0]] - before.start[turn[0]]) for turn in in_turn]
    throughput = _poured(throughput, lengths, [float(before.rate[turn].sum()) for turn in in_turn])
    return _weakest_window(throughput, len(mine.span), mine.node)


def yields(mine: Placed, placed: Layout | Sequence[Placed], blocks: int) -> bool:
    """Whether I, still joining, leave my window to nodes that announced it at nearly the same time."""
    return choose_again(mine, placed, blocks) != mine.span


def plan_move(me: Placed, placed: Layout | Sequence[Placed], blocks: int) -> Span | None:
    """Where I should move to, or None to stay.

    Asked when online, and once more when draining has been announced and has had time to be seen: None then means to
    go back online.  I move if I am part of the plan that everybody makes of this snapshot (`rebalancing.plan_moves`),
    all my blocks are online elsewhere, and not too many of those that share them are moving already.
    """
    layout = Layout.of(placed)
    if me.state == "draining":
        layout = _back_online(me, layout.only(layout.nodes != me.node))
    # The plan first: of thousands of nodes that ask, few are part of it.
    if blocks not in layout.moves:
        online = layout.only((layout.state == ONLINE) & (layout.end <= blocks))
        layout.moves[blocks] = plan_moves(block_throughput(layout, blocks), layout.replicas(blocks, ONLINE), online)
    target = layout.moves[blocks].get(me.node)
    return target if target and _may_leave(me, layout.only(layout.nodes != me.node), blocks) else None


def _may_leave(me: Placed, others: Layout, blocks: int) -> bool:
    """Whether all my blocks are online elsewhere, and few enough nodes that share them are moving already."""
    replicas = int(others.replicas(blocks, ONLINE)[me.span.start : me.span.end].min())
    moving = (others.state == DRAINING) & others.overlapping(me.span)
    if me.state == "draining":
        moving &= others.nodes < me.node
    return replicas > 0 and int(moving.sum()) <= max(0, MOVING * replicas - 1)


def _back_online(me: Placed, others: Layout) -> Layout:
    return Layout(
        np.append(others.nodes, me.node),
        np.append(others.start, me.span.start),
        np.append(others.end, me.span.end),
        np.append(others.rate, me.rate),
        np.append(others.state, ONLINE),
    )


def _poured(throughput: NDArray[np.float64], lengths: Sequence[int], rates: Sequence[float]) -> NDArray[np.float64]:
    """`throughput` after nodes of these lengths and rates have chosen, one after another."""
    throughput = throughput.copy()
    for length, rate in zip(lengths, rates, strict=True):
        window = _weakest_window(throughput, length, "")
        throughput[window.start : window.end] += rate / length
    return throughput


def _weakest_window(throughput: NDArray[np.float64], length: int, node: str) -> Span:
    """The window whose throughputs, sorted, are the lowest; of equal ones the one that a hash of `node` says.

    Of equal ones those go first that lie whole windows away from an end of the model: nodes alike then tile it, where
    two halves begun in the middle would leave a block to nobody.
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


def _summed(
    start: NDArray[np.int64], end: NDArray[np.int64], value: NDArray[np.float64], blocks: int
) -> NDArray[np.float64]:
    """The sum of `value` over the spans that contain each block, float64 [blocks]."""
    steps = np.bincount(start, value, blocks + 1)[: blocks + 1] - np.bincount(end, value, blocks + 1)[: blocks + 1]
    summed: NDArray[np.float64] = steps.cumsum()[:blocks]
    # What was added and taken away again leaves rounding behind, and an empty block must read as empty.
    summed[np.abs(summed) < 1e-9 * max(1.0, float(value.sum()))] = 0.0
    return summed
