"""The plan of moves that every node computes alike from one snapshot.  Pure.

Petals lets a node move where it simulates that everybody's moves together raise the weakest block past 1/0.75.  That
sends every node whose best window changed.  Here the simulation keeps the moves it made, best first, and only
those nodes move.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.spans import Span

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Moves = Mapping[str, Span]

# Petals' balance quality: a move costs a minute of a node's work, so a few percent are not worth it.
BALANCED = 0.75
# A plan aims higher than the threshold at which it is made, or the next departure would call for another.
AIM = 0.95
# Nodes that may be part of one plan: those with the most to spare.  A step over them takes 2 ms; a swarm that needs
# more moves than that makes the next plan when these have begun.
DONORS = 256
# The plan maximises the sum of -(throughput)^-4 over blocks: steep enough that the weakest counts most, smooth enough
# that one of several equally weak blocks helps.  The floor keeps an empty block finite, and worth more than all others.
STEEPNESS, FLOOR = 4, 0.02


class Online(Protocol):
    """Nodes that may move, [nodes] each."""

    @property
    def nodes(self) -> NDArray[np.str_]: ...
    @property
    def start(self) -> Ints: ...
    @property
    def end(self) -> Ints: ...
    @property
    def rate(self) -> Floats: ...


def plan_moves(throughput: Floats, replicas: Ints, online: Online) -> Moves:
    """Which online nodes move where, given rows a second and online replicas of every block, both [blocks].

    Empty unless the weakest block would gain past 1/0.75 (or the plan is but the beginning of one that long), or an
    empty block would be served.  Nobody in the plan
    leaves a block without an online replica, even if all leave at once.
    """
    mean = float(throughput.mean())
    # No placement raises the weakest block above the mean.
    if len(online.nodes) == 0 or throughput.min() >= BALANCED * mean:
        return {}
    donors = _donors(throughput, replicas, online)
    share = online.rate[donors] / (online.end[donors] - online.start[donors])
    plan = _Plan(throughput / mean, replicas, online.start[donors], online.end[donors], share / mean)
    moves: dict[str, Span] = {}
    while len(moves) < len(donors) and (move := plan.next_move()):
        donor, span = move
        moves[str(online.nodes[donors[donor]])] = span
        if plan.throughput.min() >= AIM:
            break
    before, after = throughput.min() / mean, plan.throughput.min()
    served_more = (plan.throughput > 0).sum() > (throughput > 0).sum()
    cut_short = len(moves) == DONORS and before < after
    return moves if served_more or cut_short or before < BALANCED * after else {}


def _donors(throughput: Floats, replicas: Ints, online: Online) -> Ints:
    """The nodes that leave the most behind when they go, weakest block of their span first asked."""
    left = np.empty(len(online.nodes))
    length = online.end - online.start
    for size in np.unique(length):
        windows = np.lib.stride_tricks.sliding_window_view(np.where(replicas > 1, throughput, -np.inf), size)
        here = length == size
        left[here] = windows.min(axis=1)[online.start[here]]
    left -= online.rate / length
    movable = np.flatnonzero(np.isfinite(left) & (length < len(throughput)))
    ranked = movable[np.lexsort((online.nodes[movable], -left[movable]))]
    return ranked[:DONORS]


class _Plan:
    """The swarm as it would be after the moves so far; donors by index, throughputs as shares of the mean."""

    def __init__(self, throughput: Floats, replicas: Ints, start: Ints, end: Ints, share: Floats) -> None:
        self.throughput, self.replicas = throughput.copy(), replicas.copy()
        self.start, self.end, self.share = start, end, share
        self.moved = np.zeros(len(start), np.bool_)
        blocks = np.arange(len(throughput))
        self.own = (start[:, None] <= blocks) & (blocks < end[:, None])
        # Windows that would reach past the last block are no windows.
        self.impossible = blocks > len(throughput) - (end - start)[:, None]

    def next_move(self) -> tuple[int, Span] | None:
        """Make the move of one donor that helps the weakest blocks most; None if none does."""
        rows = np.arange(len(self.start))
        alone = ((self.replicas < 2) & self.own).any(axis=1)
        without = np.maximum(self.throughput - self.own * self.share[:, None], 0.0)
        helped = np.pad((_worth(without + self.share[:, None]) - _worth(without)).cumsum(axis=1), ((0, 0), (1, 0)))
        reach = np.minimum(np.arange(len(self.throughput)) + (self.end - self.start)[:, None], len(self.throughput))
        gain = np.take_along_axis(helped, reach, axis=1) - helped[:, :-1]
        gain -= gain[rows, self.start][:, None]
        gain[self.impossible] = -np.inf
        gain[alone | self.moved] = -np.inf
        donor, window = (int(part) for part in np.unravel_index(gain.argmax(), gain.shape))
        if not gain[donor, window] > 0 or window == self.start[donor]:
            return None
        span = Span(window, window + int(self.end[donor] - self.start[donor]))
        self.throughput = without[donor].copy()
        self.throughput[span.start : span.end] += self.share[donor]
        self.replicas[self.start[donor] : self.end[donor]] -= 1
        self.moved[donor] = True
        return donor, span


def _worth(throughput: Floats) -> Floats:
    return -((throughput + FLOOR) ** -STEEPNESS)
