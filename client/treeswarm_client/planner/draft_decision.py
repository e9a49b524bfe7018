"""How much to draft for the coming round: before it leaves, and while it travels.  Pure functions of frozen estimates.

Where links leave time, drafting goes on while a round travels.  There a draft that is slow need not be waited for: the
round leaves plain, and the nodes follow it.  A round without a tree drafts a few nodes in flight all the same.  They
tell what drafting takes now, and whether the guesses would have been right, so that a wrong "no" lasts a few rounds.
"""

from dataclasses import dataclass

import numpy as np

from treeswarm_client.planner.costs import Costs
from treeswarm_client.planner.explain import draft_follows_text, would_not_pay_text
from treeswarm_client.planner.loss_budget import EXPLORE_LONGER, EXPLORE_NODES, SKIPPED_ROUNDS, Exploration
from treeswarm_client.planner.plan import (
    FIRST_NODES,
    OUTGROWN,
    SLACK,
    Estimates,
    cheap_size,
    longest_draft_wait_s,
    plan_round,
)

# A draft follows its round only if a level takes less than this share of a plain round: later, the round is over.
FOLLOWS_SHARE = 0.7
# Once drafting should end, a round waits for the last level this many times the usual time of one: what takes longer is
# an outlier.
OUTLIER = 2.0


@dataclass(frozen=True)
class DraftDecision:
    """How many nodes to draft for a round."""

    before: int
    """Number of nodes to draft before anything is shipped; 0 for a round that leaves plain."""
    in_flight: int
    """Most nodes to draft while the round travels, those shipped included; 0 for none."""
    why_plain: str = ""
    """Why the round leaves plain, for `--explain`; empty if it does not."""
    skipped_rounds: int = 0
    """Number of further rounds for which the decision holds without being made again."""


def decide_draft(
    estimates: Estimates, costs: Costs, exploration: Exploration, *, limit: int, largest: int, overlaps: bool
) -> DraftDecision:
    """Decide for the coming round.

    `limit` is the most nodes whose cost is known, `largest` the most that may be shipped.  `overlaps` says whether
    drafting goes on while rounds travel.
    """
    few = EXPLORE_NODES if overlaps else 0
    if limit < 1:
        return DraftDecision(0, 0, "plain: trees may have no nodes here")
    if exploration.is_due():
        return DraftDecision(cheap_size(costs, EXPLORE_LONGER, min(limit, EXPLORE_NODES)), 2 * few)
    if not estimates.acceptance.trees:
        return _tree_of(FIRST_NODES, limit, largest, overlaps=overlaps)
    chances = estimates.budget.discounted(estimates.acceptance.usual_chances(limit))
    draft_s = estimates.levels.draft_s(limit)
    best = plan_round(chances, costs, exposed_draft_s=draft_s)
    level_s, wait_s = estimates.levels.level_s, longest_draft_wait_s(costs)
    if overlaps and wait_s < level_s < FOLLOWS_SHARE * costs.plain_s and plan_round(chances, costs).size:
        return DraftDecision(0, largest, draft_follows_text(level_s, wait_s))
    if best.size or estimates.outgrown:
        nodes = max(int(np.ceil(SLACK * best.size)), OUTGROWN * estimates.outgrown)
        return _tree_of(nodes, limit, largest, overlaps=overlaps)
    refused = plan_round(chances, costs, exposed_draft_s=draft_s, smallest=1)
    text = would_not_pay_text(refused, float(draft_s[refused.size]), costs.plain_s, in_debt=estimates.budget.in_debt)
    # On fast links planning takes a share of a round that counts.
    return DraftDecision(0, few, text, 0 if overlaps else SKIPPED_ROUNDS)


def _tree_of(nodes: int, limit: int, largest: int, *, overlaps: bool) -> DraftDecision:
    """Return the decision for a tree of about `nodes` nodes."""
    nodes = min(nodes, limit)
    return DraftDecision(largest if overlaps and nodes > EXPLORE_NODES else nodes, largest if overlaps else 0)


def longest_wait_s(estimates: Estimates, costs: Costs) -> float:
    """Return the longest that a round waits for its draft before it leaves without it, in seconds."""
    is_first = not estimates.acceptance.trees
    return longest_draft_wait_s(costs, is_first=is_first) + OUTLIER * estimates.levels.level_s
