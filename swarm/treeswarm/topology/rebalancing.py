"""The plan of moves that every node computes alike from one snapshot.  Pure.

In Petals a node moves where its simulation of every node's moves raises the weakest block past 1/0.75.  That moves
every node whose best window changed.  Here the simulation keeps the moves it made, best first, and only those nodes
move.
"""

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.tables import Floats, Ints, Moves, PlacementTable

# Petals' balance quality: a move costs a minute of a node's work, so a few percent are not worth it.
BALANCED = 0.75
# A plan aims higher than the threshold at which it is made; otherwise the next departure would call for another plan.
AIM = 0.95
# Most nodes that may be part of one plan: those with the most to spare.  A step over them takes 2 ms.  A swarm that
# needs more moves makes the next plan when these have begun.
DONORS = 256
# The plan maximises the sum of -(throughput)^-4 over blocks: steep enough that the weakest counts most, smooth enough
# that one of several equally weak blocks helps.  The floor keeps an empty block finite, and worth more than all others.
STEEPNESS, FLOOR = 4, 0.02


def plan_moves(throughput: Floats, replicas: Ints, online: PlacementTable, *, only_empty: bool = False) -> Moves:
    """Return which of the `online` nodes move where, given the `throughput` (rows per second) and the number of online
    `replicas` of each block, both [blocks].

    The plan is empty unless the weakest block would gain past 1/0.75, or an empty block would be served.  A plan that
    is cut short after DONORS moves needs only some gain.  No node of the plan leaves a block without an online replica,
    even if all of them leave at once.  With `only_empty`, the plan has only moves that fill empty blocks.
    """
    mean = float(throughput.mean())
    # No placement raises the weakest block above the mean.
    if len(online.nodes) == 0 or throughput.min() >= BALANCED * mean:
        return {}
    donors = _donors(throughput, replicas, online)
    share = online.rate[donors] / (online.end[donors] - online.start[donors])
    plan = _Plan(throughput / mean, replicas, online.start[donors], online.end[donors], share / mean)
    moves: dict[str, Span] = {}
    while len(moves) < len(donors):
        empty, move = int((plan.throughput <= 0).sum()), plan.next_move()
        if move is None or (only_empty and int((plan.throughput <= 0).sum()) >= empty):
            break
        donor, span = move
        moves[str(online.nodes[donors[donor]])] = span
        if plan.throughput.min() >= AIM:
            break
    before, after = throughput.min() / mean, plan.throughput.min()
    served_more = (plan.throughput > 0).sum() > (throughput > 0).sum()
    cut_short = len(moves) == DONORS and before < after
    return moves if served_more or cut_short or before < BALANCED * after else {}


def _donors(throughput: Floats, replicas: Ints, online: PlacementTable) -> Ints:
    """Return the indices of the nodes that may move, first those that leave the most throughput in the weakest block of
    their span; at most DONORS."""
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
    """The swarm as it would be after the moves so far.  Donors are indices, throughputs are shares of the mean."""

    def __init__(self, throughput: Floats, replicas: Ints, start: Ints, end: Ints, share: Floats) -> None:
        self.throughput, self.replicas = throughput.copy(), replicas.copy()
        self.start, self.end, self.share = start, end, share
        self.moved = np.zeros(len(start), np.bool_)
        blocks = np.arange(len(throughput))
        self.own = (start[:, None] <= blocks) & (blocks < end[:, None])
        # A window that would reach past the last block cannot be chosen.
        self.impossible = blocks > len(throughput) - (end - start)[:, None]

    def next_move(self) -> tuple[int, Span] | None:
        """Make the one move that helps the weakest blocks most.  Returns the donor and its new span, or None if no move
        helps."""
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
