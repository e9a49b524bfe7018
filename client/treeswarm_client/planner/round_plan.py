"""What was decided for one round, and how its nodes are counted afterwards.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner.plan import Plan


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """What was decided for the round under way."""

    plan: Plan
    chances: NDArray[np.float64]
    """Calibrated chances of the drafted nodes, float64 [drafted]."""
    drafted: int
    """Number of nodes drafted."""
    draft_s: float
    """Seconds that the round waited for its draft."""
    expected_s: float
    """Seconds that the round is expected to take by a clock, with `draft_s`."""
    reason: str
    """Why the tree has this size, for `--explain`."""
    exploring: bool
    """Whether the tree is a try that tells whether guesses hit again."""
    is_learned_from: bool
    """Whether the costs of links and hops are learned from this round; if not, a later plain round teaches them."""
    departures: tuple[tuple[int, float], ...] = ()
    """Pairs for each extension that left, in order: its first node, and seconds from the tree's departure to its
    own."""
    in_flight: int = 0
    """Number of nodes in flight when an extension was last considered; 0 if none was."""
    considered_s: float = 0.0
    """Seconds from the tree's departure to that of the extension considered last, which may not have left."""


def on_path(tree: DraftTree, walk: Walk) -> NDArray[np.bool_]:
    """Return which nodes of `tree` are on the target's path as far as it is known, bool [nodes].

    `tree` begins with the nodes that were shipped, through which `walk` leads.  A node that was not shipped, or left
    too late for the walk to wait for it, was right all the same if its token is the bonus token.
    """
    known = np.zeros(len(tree), np.bool_)
    known[list(walk.accepted)] = True
    known |= (tree.parents == (walk.accepted[-1] if walk.accepted else -1)) & (tree.tokens == walk.bonus)
    return known


def departure_s(nodes: NDArray[np.int64], departures: Sequence[tuple[int, float]]) -> NDArray[np.float64]:
    """Return the seconds from the tree's departure to that of each node, float64 [nodes]; 0 for the root (-1).

    `departures` has the first node and the departure of each extension.
    """
    firsts = np.array([first for first, _ in departures], np.int64)
    seconds = np.array([0.0, *(later_s for _, later_s in departures)])
    return seconds[np.searchsorted(firsts, nodes, side="right")]
