"""How much to draft for the coming round: before it leaves, and while it travels.  Pure functions of frozen estimates.

A round either waits for its draft, or leaves plain and the nodes follow it.  Waiting costs every round its time.
Following costs a round more only if the text enters the nodes, but is possible only where drafting goes on while a
round travels.  So a draft that is seldom right, or of which nothing is known, follows.  Where nodes share the client's
cores, a draft in flight is slow and comes late: there only a slow draft follows.  Everywhere chances count only as far
as the draft seems to fit the text: their calibration needs dozens of rounds to tell that it does not.

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
    follows: bool = False,
    has_kept: bool = False,
) -> DraftDecision:
    """Decide for the coming round.

    `limit` is the most nodes whose cost is known, `largest` the most that may be shipped.  `overlaps` says whether
    drafting goes on while rounds travel, `follows` whether it has cores of its own there, and `has_kept` whether nodes
    that were drafted in flight are still of use.
    """
    if limit < 1:
        return DraftDecision(0, 0, "plain: trees may have no nodes here")
    if overlaps and follows:
        return _wait_or_follow(estimates, costs, limit, largest, has_kept=has_kept)
    return _wait_or_leave(estimates, costs, exploration, limit, largest, overlaps=overlaps)


def _wait_or_follow(estimates: Estimates, costs: Costs, limit: int, largest: int, *, has_kept: bool) -> DraftDecision:
    """Decide where drafting in flight is free: learning costs nothing, and tries are not needed."""
    if not estimates.acceptance.trees:
        return DraftDecision(0, largest, FIRST_FOLLOWS)
    chances = estimates.believed(estimates.acceptance.usual_chances(limit))
    draft_s = estimates.levels.draft_s(limit)
    entered = estimates.acceptance.trust * estimates.acceptance.usual_entry()
    following = plan_following(chances, costs, draft_s=draft_s, entered=entered)
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


def _wait_or_leave(
    estimates: Estimates, costs: Costs, exploration: Exploration, limit: int, largest: int, *, overlaps: bool
) -> DraftDecision:
    """Decide where nothing is drafted in flight, or where that takes the nodes' cores and so comes late."""
    few = EXPLORE_NODES if overlaps else 0
    if exploration.is_due():
        return DraftDecision(cheap_size(costs, EXPLORE_LONGER, min(limit, EXPLORE_NODES)), 2 * few)
    if not estimates.acceptance.trees:
        return _tree_of(FIRST_NODES, limit, largest, overlaps=overlaps)
    chances = estimates.acceptance.fit * estimates.budget.discounted(estimates.acceptance.usual_chances(limit))
    draft_s = estimates.levels.draft_s(limit)
    best = plan_round(chances, costs, exposed_draft_s=draft_s)
    level_s, wait_s = estimates.levels.level_s, longest_draft_wait_s(costs)
    if overlaps and wait_s < level_s < FOLLOWS_SHARE * costs.plain_s and plan_round(chances, costs).size:
        return DraftDecision(0, largest, draft_follows_text(level_s, wait_s))
    if best.size or estimates.outgrown:
        nodes = max(int(np.ceil(SLACK * best.size)), OUTGROWN * estimates.outgrown)
        return _tree_of(nodes, limit, largest, overlaps=overlaps)
    # On fast links planning takes a share of a round that counts.
    text = _refusal(estimates, costs, chances, draft_s)
    return DraftDecision(0, few, text, 0 if overlaps else SKIPPED_ROUNDS)


def _refusal(estimates: Estimates, costs: Costs, chances: NDArray[np.float64], draft_s: NDArray[np.float64]) -> str:
    """Say why no tree pays."""
    refused = plan_round(chances, costs, exposed_draft_s=draft_s, smallest=1)
    return would_not_pay_text(refused, float(draft_s[refused.size]), costs.plain_s, in_debt=estimates.budget.in_debt)


def _tree_of(nodes: int, limit: int, largest: int, *, overlaps: bool) -> DraftDecision:
    """Return the decision for a tree of about `nodes` nodes.

    Where few are worth a round, so are few in flight: a tree of 256 there took 5 % of every 25 ms round from the nodes.
    """
    nodes = min(nodes, limit)
    if not overlaps:
        return DraftDecision(nodes, 0)
    return DraftDecision(largest, largest) if nodes > EXPLORE_NODES else DraftDecision(nodes, 2 * EXPLORE_NODES)


def longest_wait_s(estimates: Estimates, costs: Costs) -> float:
    """Return the longest that a round waits for its draft before it leaves without it, in seconds."""
    is_first = not estimates.acceptance.trees
    return longest_draft_wait_s(costs, is_first=is_first) + OUTLIER * estimates.levels.level_s
