"""How much to draft for the coming round: before it leaves, and while it travels.  Pure functions of frozen estimates.

A round either waits for its draft, or leaves plain and the nodes follow it.  Waiting costs every round its time.
Following costs a round more only if the text enters the nodes, but is possible only where drafting goes on while a
round travels.  So a draft that is seldom right, or of which nothing is known, follows.

A round without a tree drafts a few nodes in flight all the same.  They tell what drafting takes now, and whether the
guesses would have been right, so that a wrong "no" lasts a few rounds and costs nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.planner.costs import Costs
from treeswarm_client.planner.explain import (
    FIRST_FOLLOWS,
    draft_follows_text,
    draft_seldom_right_text,
    would_not_pay_text,
)
from treeswarm_client.planner.loss_budget import EXPLORE_LONGER, EXPLORE_NODES, SKIPPED_ROUNDS, Exploration
from treeswarm_client.planner.plan import (
    APPEND_S,
    FIRST_NODES,
    OUTGROWN,
    SLACK,
    Estimates,
    cheap_size,
    longest_draft_wait_s,
    plan_following,
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
    rate: float = 0.0
    """Tokens per second planned for a round that its draft follows; 0 for others."""


def decide_draft(
    estimates: Estimates,
    costs: Costs,
    exploration: Exploration,
    *,
    limit: int,
    largest: int,
    overlaps: bool,
    has_kept: bool = False,
    append_s: float = APPEND_S,
) -> DraftDecision:
    """Decide for the coming round.

    `limit` is the most nodes whose cost is known, `largest` the most that may be shipped.  `overlaps` says whether
    drafting goes on while rounds travel, `has_kept` whether nodes that were drafted in flight are still of use.
    `append_s` is what one more append delays a round by, besides the model and the wire.
    """
    if limit < 1:
        return DraftDecision(0, 0, "plain: trees may have no nodes here")
    if overlaps:
        return _decide_beside_rounds(estimates, costs, limit, largest, has_kept=has_kept, append_s=append_s)
    return _decide_between_rounds(estimates, costs, exploration, limit)


def _decide_beside_rounds(
    estimates: Estimates, costs: Costs, limit: int, largest: int, *, has_kept: bool, append_s: float
) -> DraftDecision:
    """Decide where drafting goes on while rounds travel."""
    if not estimates.acceptance.trees:
        return DraftDecision(0, largest, FIRST_FOLLOWS)
    chances = estimates.budget.discounted(estimates.acceptance.usual_chances(limit))
    draft_s = estimates.levels.draft_s(limit)
    entered = estimates.acceptance.usual_entry()
    following = plan_following(chances, costs, draft_s=draft_s, entered=entered, append_s=append_s)
    level_s, wait_s = estimates.levels.level_s, longest_draft_wait_s(costs)
    if wait_s < level_s < FOLLOWS_SHARE * costs.plain_s and following.size:
        return DraftDecision(0, largest, draft_follows_text(level_s, wait_s), rate=following.rate)
    waiting = plan_round(chances, costs, exposed_draft_s=draft_s)
    if has_kept or estimates.outgrown or (waiting.size and waiting.rate >= following.rate):
        return DraftDecision(largest, largest)
    if following.size:
        text = draft_seldom_right_text(entered, float(draft_s[following.size]))
        return DraftDecision(0, largest, text, rate=following.rate)
    return DraftDecision(0, EXPLORE_NODES, _refusal(estimates, costs, chances, draft_s))


def _decide_between_rounds(estimates: Estimates, costs: Costs, exploration: Exploration, limit: int) -> DraftDecision:
    """Decide where nothing is drafted while a round travels."""
    if exploration.is_due():
        return DraftDecision(cheap_size(costs, EXPLORE_LONGER, min(limit, EXPLORE_NODES)), 0)
    if not estimates.acceptance.trees:
        return DraftDecision(min(FIRST_NODES, limit), 0)
    chances = estimates.budget.discounted(estimates.acceptance.usual_chances(limit))
    draft_s = estimates.levels.draft_s(limit)
    best = plan_round(chances, costs, exposed_draft_s=draft_s)
    if best.size or estimates.outgrown:
        nodes = max(int(np.ceil(SLACK * best.size)), OUTGROWN * estimates.outgrown)
        return DraftDecision(min(nodes, limit), 0)
    # On fast links planning takes a share of a round that counts.
    return DraftDecision(0, 0, _refusal(estimates, costs, chances, draft_s), SKIPPED_ROUNDS)


def _refusal(estimates: Estimates, costs: Costs, chances: NDArray[np.float64], draft_s: NDArray[np.float64]) -> str:
    """Say why no tree pays."""
    refused = plan_round(chances, costs, exposed_draft_s=draft_s, smallest=1)
    return would_not_pay_text(refused, float(draft_s[refused.size]), costs.plain_s, in_debt=estimates.budget.in_debt)


def longest_wait_s(estimates: Estimates, costs: Costs) -> float:
    """Return the longest that a round waits for its draft before it leaves without it, in seconds."""
    is_first = not estimates.acceptance.trees
    return longest_draft_wait_s(costs, is_first=is_first) + OUTLIER * estimates.levels.level_s
