"""How many drafted nodes to ship: the tree that brings most tokens per second.  Pure functions of frozen estimates.

A round ships the bonus token of the last one and the best `size` drafted nodes.  It brings 1 token, and one more for
every node on the target's path: 1 + Σ chances.  Its time is what links and hops take, and the exposed drafting: the
time that the round waits for its draft while nothing travels.  `plan_round` finds the best size; the other functions
answer what a policy asks besides.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.planner.acceptance import AcceptanceEstimate
from treeswarm_client.planner.costs import Costs, slowest_stage_s, traversal_s
from treeswarm_client.planner.draft_levels import DraftLevels
from treeswarm_client.planner.loss_budget import (
    EXPLORE_EVERY,
    EXPLORE_LONGER,
    EXPLORE_NODES,
    EXPLORE_SHARE,
    EXPLORE_SOON,
    NEARLY,
    LossBudget,
)

# Share of a plain round that a round waits for its draft at most, even if more drafting promises more: about what trees
# of 64 needed where they paid.
DRAFT_SHARE = 0.3
# The same for the first tree of a drafter, of which nothing is known: in a short text a single round counts.
FIRST_DRAFT_SHARE = 0.1
# Number of nodes to draft when nothing is known of a drafter's trees: on a fast network drafting costs most.
FIRST_NODES = 16
# Trees differ from round to round: this many times the nodes that the usual tree would ship are drafted.
SLACK = 1.25
# Seconds that client and nodes spend on one more append besides the model and the wire: `swarm bench overhead`.
APPEND_S = 0.002
# A tree that the text followed for at least OUTGROWN_AT nodes, down to a leaf, was too small.  The next one is
# drafted with OUTGROWN times its nodes: usual trees change over rounds, and a text that begins to copy has few rounds.
OUTGROWN_AT, OUTGROWN = 3, 4


@dataclass(frozen=True)
class Plan:
    """How many nodes to ship, and what is expected of it."""

    size: int
    """Number of nodes, the best ones; 0 is the plain round."""
    tokens: float
    """Number of tokens expected, the bonus token included."""
    seconds: float
    """Seconds expected, with exposed drafting.  A row costs its price, which counts the sessions that it delays (see
    `costs.py`)."""
    rate: float
    """Tokens per second."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """What earlier rounds taught about the drafter, the text and what may be risked."""

    acceptance: AcceptanceEstimate
    levels: DraftLevels
    budget: LossBudget
    most_drafted: int = 0
    """Number of nodes of the largest tree drafted so far."""
    outgrown: int = 0
    """Number of nodes of the last round's tree if the text followed it down to a leaf and beyond; 0 otherwise."""

    def believed(self, chances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the calibrated `chances`, float64 [n], as far as the draft seems to fit the text, and less in debt."""
        return self.acceptance.trust * self.budget.discounted(chances)


def plan_round(
    chances: NDArray[np.float64],
    costs: Costs,
    *,
    exposed_draft_s: NDArray[np.float64] | float = 0.0,
    smallest: int = 0,
) -> Plan:
    """Find the number of nodes, at least `smallest`, that brings most tokens per second; of equally good ones the
    smallest.

    `chances` has each node's chance to be on the target's path, float64 [n], best first.  `exposed_draft_s` is the time
    of exposed drafting in seconds, the same for all sizes or by size, [n + 1].
    """
    tokens = 1.0 + np.concatenate([[0.0], np.cumsum(chances)])
    seconds = traversal_s(costs, np.arange(1.0, len(chances) + 2)) + exposed_draft_s
    rates = tokens / seconds
    size = smallest + int(np.argmax(rates[smallest:]))
    return Plan(size, float(tokens[size]), float(seconds[size]), float(rates[size]))


def plan_following(chances: NDArray[np.float64], costs: Costs, *, draft_s: NDArray[np.float64], entered: float) -> Plan:
    """Find the number of nodes that brings most tokens per second if the round leaves plain and they follow it.

    Then drafting and a further append cost time only where the text enters the nodes, of which `entered` is the chance.
    `extension_size` sends no nodes that bring less than their forward takes, so those count as none.  Arrays are as for
    `plan_round`; `draft_s` has the seconds of drafting by size.
    """
    brought = np.concatenate([[0.0], np.cumsum(chances)])
    forward_s = np.concatenate([[0.0], slowest_stage_s(costs, np.arange(1.0, len(chances) + 1))])
    brought = np.where(brought * costs.plain_s > forward_s, brought, 0.0)
    rows_s = traversal_s(costs, np.arange(1.0, len(chances) + 2)) - costs.plain_s
    further_s = np.maximum(forward_s, rows_s) + APPEND_S
    seconds = costs.plain_s + np.where(brought > 0, entered * (draft_s + further_s), 0.0)
    rates = (1.0 + brought) / seconds
    size = int(np.argmax(rates))
    return Plan(size, 1.0 + float(brought[size]), float(seconds[size]), float(rates[size]))


def plan_for_size(size: int, chances: NDArray[np.float64], costs: Costs, *, exposed_draft_s: float = 0.0) -> Plan:
    """Return what is expected of a size that is given; arguments as for `plan_round`."""
    tokens = 1.0 + float(chances[:size].sum())
    # A single row delays no other session: its price is its time.
    seconds = (float(traversal_s(costs, 1.0 + size)) if size else costs.plain_s) + exposed_draft_s
    return Plan(size, tokens, seconds, tokens / seconds)


def extension_size(chances: NDArray[np.float64], later_s: NDArray[np.float64], costs: Costs, rate: float) -> int:
    """Return how many of the next nodes to send after a tree that is in flight; 0 for none.

    `chances` float64 [n] are those of the nodes, best first.  `later_s` float64 [n] are the seconds by which each would
    leave later than its parent, 0 where both leave together.  The nodes cost a further forward at the slowest hop, its
    fixed part included.  If the text enters them, the round ends later by `later_s`.  `rate` is the number of tokens
    that a second is worth, as planned for the round.
    """
    if not len(chances):
        return 0
    busy_s = slowest_stage_s(costs, np.arange(1.0, len(chances) + 1))
    gain = np.cumsum(chances) - rate * (busy_s + np.cumsum(chances * later_s))
    best = int(np.argmax(gain))
    return best + 1 if gain[best] > 0 else 0


def longest_draft_wait_s(costs: Costs, *, is_first: bool = False) -> float:
    """Return for how long a round's draft goes on before the round leaves, in seconds."""
    return (FIRST_DRAFT_SHARE if is_first else DRAFT_SHARE) * costs.plain_s


def cheap_size(costs: Costs, share: float, largest: int) -> int:
    """Return the most nodes, 1 to `largest`, that lengthen a plain round by no more than `share` of it."""
    seconds = traversal_s(costs, np.arange(1.0, largest + 2))
    return max(1, int(np.searchsorted(seconds, seconds[0] * (1 + share), side="right")) - 1)


def exploration_interval(estimates: Estimates, costs: Costs) -> int:
    """Return the number of plain rounds after which to ship a few nodes again, to see whether guesses hit.

    No round waits longer for its draft than `longest_draft_wait_s`, so a slow draft makes tries no rarer than that.
    """
    size = cheap_size(costs, EXPLORE_LONGER, EXPLORE_NODES)
    draft_s = min(float(estimates.levels.draft_s(size)[-1]), longest_draft_wait_s(costs))
    longer_s = float(traversal_s(costs, 1.0 + size) - traversal_s(costs, 1.0) + draft_s)
    promised = estimates.acceptance.fit * estimates.acceptance.usual_chances(size).sum()
    if promised * costs.plain_s > NEARLY * longer_s:
        return EXPLORE_SOON
    return max(EXPLORE_EVERY, int(np.ceil(longer_s / (EXPLORE_SHARE * costs.plain_s))))
