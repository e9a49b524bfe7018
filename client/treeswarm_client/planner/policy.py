"""How many nodes to draft and to ship: the seam that the generation loop asks, and the automatic policy behind it.

A node is a node of the draft tree here, and a hop a node of the chain.  In every round the loop asks for the number of
nodes to draft (`nodes_to_draft`, `stop_drafting`), then which of them to ship (`choose`), then, while they travel, how
many to draft further and to send after them (`nodes_to_draft_in_flight`, `extension`).  At last the policy learns from
the round (`learn`).  A plain round ships only the bonus token of the last one.

`AutoPolicy.choose` decides by `plan.plan_round`.  What a policy has learned are frozen estimates in its
`PlannerMemory`, which are replaced as rounds come back.  A memory serves one generation at a time, and outlives
generations.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, ShouldStop, never_stop
from treeswarm_client.planner.acceptance import AcceptanceEstimate
from treeswarm_client.planner.costs import (
    ChainHop,
    Costs,
    CostTracker,
    TraversalParts,
    round_duration_s,
    take_apart,
)
from treeswarm_client.planner.draft_decision import DraftDecision, decide_draft, longest_wait_s
from treeswarm_client.planner.draft_levels import DraftLevels
from treeswarm_client.planner.explain import (
    LAST_TOKEN,
    NO_ROOM,
    RoundReport,
    draft_is_late_text,
    reason_of,
    with_extension,
    with_next_try,
)
from treeswarm_client.planner.loss_budget import (
    EXPLORE_LONGER,
    EXPLORE_NODES,
    Exploration,
    LossBudget,
)
from treeswarm_client.planner.plan import (
    FIRST_NODES,
    OUTGROWN_AT,
    Estimates,
    Plan,
    cheap_size,
    exploration_interval,
    extension_size,
    longest_draft_wait_s,
    plan_for_size,
    plan_round,
)
from treeswarm_client.planner.round_plan import RoundPlan, departure_s, on_path

# Most nodes that the automatic policy reserves room for on every hop and may ship: over the dearest links that it was
# tried on (100 ms one way) it chose 30 to 80 nodes and hardly ever more than 100; a larger reservation only keeps other
# clients out.  Planned on assumed costs, 2,048 nodes gain 2 to 7 % in one cell of eleven (docs/decisions/, 016).
LARGEST = 256
# Before shipping, drafting goes on only while it promises this many times the tokens that its time is worth.  A promise
# adds up the chances that the text passes the next nodes, and half of such nodes bring a token.  Besides, nodes that
# are not waited for may still be sent after the tree.  Of 2 to 8, 3 to 5 were best on links of 1 to 100 ms.
PROMISE = 4.0
# While a tree of a fixed size travels, drafting goes on up to this many times its nodes.  Nodes that the walk does not
# reach were drafted in vain on the client's own machine, and the chance to be reached falls quickly with a node's rank.
AHEAD = 4
# Costs are known for the numbers of rows that were measured: a tree has at most this many times the most rows that ever
# travelled through this chain, and at most this many times the most nodes that were ever drafted.
FURTHER = 2
# A round that took longer than this many times its usual duration counts in the loss budget as if it had taken that
# long.
LATE = 1.2
# Costs are learned from a round that took longer than expected by this factor, or shorter, even if its decision was
# only a repetition of an earlier one.
SURPRISE = 1.5
# Weight of one plan in the average rate.
RATE_STEP = 1 / 4


# ---------------------------------------------------------------- the seam


@dataclass(frozen=True, eq=False)
class Round:
    """What one traversal shipped and brought."""

    draft: DraftTree
    """The tree as it was shipped, extensions included."""
    walk: Walk
    """The target's walk through it."""
    answered: int
    """Number of nodes of `draft` that were answered before the walk was over."""
    first_shipped: int
    """Number of nodes of `draft` in the first shipment; the others were sent after it."""
    seconds: float
    """Seconds from the first append to the end of the walk."""
    first_seconds: float
    """Seconds from the first append to the last answer of the first shipment; 0 if the walk was over before."""
    timings: Sequence[Sequence[HopTiming]]
    """Timings per answered append and hop."""
    unbroken: bool
    """Whether nothing broke on the way, so that the times mean something."""


class TreePolicy(Protocol):
    """Decides how many nodes to draft and to ship, and learns from every round."""

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Begin a generation on these hops, or go on after a repair of the chain."""
        ...

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        """Learn from the prompt's traversal, which nothing broke if `unbroken`; `timings` are per append and hop."""
        ...

    def nodes_to_draft(self) -> int:
        """Return how many nodes to draft before anything is shipped; 0 for a plain round."""
        ...

    def stop_drafting(self) -> ShouldStop:
        """Return the function that tells the drafter when to stop before shipping.  Time counts from this call."""
        ...

    def longest_wait_s(self) -> float | None:
        """Return the longest that the round waits for its draft, in seconds, or None to wait until it is there."""
        ...

    def record_draft(self, tree: DraftTree, seconds: float) -> None:
        """Learn from the first tree of a round that was drafted while it travelled, which took `seconds`."""
        ...

    def choose(self, tree: DraftTree, *, is_late: bool = False) -> DraftTree:
        """Return the first nodes of `tree`, to be shipped.  Asked every round, also where nothing was drafted.

        `is_late` says that something is being drafted, but was not ready in time.
        """
        ...

    def nodes_to_draft_in_flight(self) -> int:
        """Return up to how many nodes to draft while a tree is in flight; the count includes those shipped."""
        ...

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        """Return `shipped` followed by the nodes of `wider` that are worth an append of their own.

        `elapsed_s` is the number of seconds since `shipped` left.
        """
        ...

    def learn(self, finished: Round) -> RoundReport | None:
        """Learn from a round.  Returns its report, or None if there is nothing to report."""
        ...


# ---------------------------------------------------------------- the automatic policy


@dataclass(eq=False)
class PlannerMemory:
    """What a policy has learned from earlier rounds.  It outlives generations and serves one at a time."""

    tracker: CostTracker = field(default_factory=CostTracker)
    estimates: Estimates = field(default_factory=lambda: Estimates(AcceptanceEstimate(), DraftLevels(), LossBudget()))
    exploration: Exploration = Exploration()
    planned_rate: float = 0.0
    """Tokens per second, averaged over the last plans; 0 before the first plan on a chain."""
    rounds: int = 0
    """Number of rounds reported."""

    @property
    def rate(self) -> float:
        """Tokens that a second of waiting costs: the rate of the last plans, or of plain decoding before the first."""
        return self.planned_rate or 1.0 / self.tracker.costs.plain_s

    def tree_drafted(self, tree: DraftTree, seconds: float) -> None:
        """Learn from a tree that was drafted for the coming round; the round waited `seconds` for it."""
        if not len(tree):
            return
        estimates = self.estimates
        levels, acceptance = estimates.levels.updated(tree, seconds), estimates.acceptance
        # A few nodes, drafted only to explore, say little about a whole tree.
        if len(tree) > EXPLORE_NODES or not acceptance.trees:
            acceptance = acceptance.with_tree(tree)
        self.estimates = replace(
            estimates, levels=levels, acceptance=acceptance, most_drafted=max(estimates.most_drafted, len(tree))
        )

    def tree_grew(self, tree: DraftTree) -> None:
        """Learn that the tree of the coming or present round was drafted further while a traversal was under way."""
        estimates = self.estimates
        if estimates.acceptance.trees and len(tree) > len(estimates.acceptance.trees[-1]):
            acceptance = estimates.acceptance.with_grown_tree(tree)
            self.estimates = replace(
                estimates, acceptance=acceptance, most_drafted=max(estimates.most_drafted, len(tree))
            )


@dataclass(eq=False)
class AutoPolicy:
    """The policy of `--tree-size auto`: it chooses trees that fit the links, the hops and the text.

    With a `fixed_size` all trees have that size, and the policy only learns.
    """

    memory: PlannerMemory
    row_bytes: int
    """Number of bytes of one row on a link between two hops."""
    segment_rows: int
    """Most rows of one append."""
    largest: int = LARGEST
    """Most nodes of a tree."""
    fixed_size: int | None = None
    """Number of nodes of every tree, or None to plan."""
    overlaps: bool = True
    """Whether to draft while a tree is in flight, where links leave time for it, and to send extensions if planned."""
    clock: Callable[[], float] = time.perf_counter
    _draft_started_s: float | None = None
    """Time of the clock at which the round began to wait for its draft, or None if it does not."""
    _decision: DraftDecision = DraftDecision(0, 0)
    """How much to draft for the coming round, or for the one under way."""
    _is_asked: bool = False
    """Whether `nodes_to_draft` was asked for the coming round."""
    _drafted: DraftTree = NO_TREE
    """All nodes drafted for the round under way; those shipped come first."""
    _has_kept: bool = False
    """Whether nodes that were drafted for the last round are of use for the coming one."""
    _is_local: bool = False
    """Whether a hop of the chain computes on the client's own machine."""
    _planned: RoundPlan | None = None
    """What was decided for the round under way, or None between rounds."""
    _parts: TraversalParts | None = None
    """Parts of the round's traversal, or None before it came back."""

    @property
    def costs(self) -> Costs:
        return self.memory.tracker.costs

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Begin a generation, or go on after a repair.  What is known of hops and chains is kept."""
        memory = self.memory
        self._planned = self._parts = None
        self._has_kept, self._is_local = False, any(hop.is_local for hop in hops)
        memory.exploration = memory.exploration.skip(0)
        if memory.tracker.begin(hops, row_bytes=self.row_bytes, segment_rows=self.segment_rows):
            memory.planned_rate = 0.0

    # ---------------------------------------------------------------- how much to draft

    def nodes_to_draft(self) -> int:
        """Return how many nodes to draft before the coming round leaves; 0 if it leaves plain.

        Where drafting goes on in flight, it is the most that may be shipped: nodes that were drafted while the last
        tree travelled cost nothing, and `stop_drafting` limits the time that the round waits for more.
        """
        if self.fixed_size is not None:
            return self.fixed_size
        memory, self._is_asked = self.memory, True
        if not memory.exploration.skipped_rounds or memory.exploration.is_due():
            limit = min(self._limit, max(FIRST_NODES, FURTHER * memory.estimates.most_drafted))
            self._decision = decide_draft(
                memory.estimates,
                self.costs,
                memory.exploration,
                limit=limit,
                largest=self.largest,
                overlaps=self._overlaps_now,
                has_kept=self._has_kept,
                follows=self._may_follow,
            )
            memory.exploration = memory.exploration.skip(self._decision.skipped_rounds)
        return self._decision.before

    def stop_drafting(self) -> ShouldStop:
        """Return the function that ends drafting early.

        Nodes not drafted by then may still be sent after the tree, or be drafted for the next round.
        """
        self._draft_started_s = self.clock()
        if self.fixed_size is not None:
            return never_stop
        estimates = self.memory.estimates
        end_s = self._draft_started_s + longest_draft_wait_s(self.costs, is_first=not estimates.acceptance.trees)
        worth = PROMISE * self.memory.rate / min(1.0, estimates.acceptance.steps.optimism)
        return lambda promise: promise < worth or self.clock() > end_s

    def longest_wait_s(self) -> float | None:
        """See `TreePolicy`."""
        return longest_wait_s(self.memory.estimates, self.costs) if self.fixed_size is None else None

    def nodes_to_draft_in_flight(self) -> int:
        """See `TreePolicy`."""
        if self.fixed_size is not None:
            return AHEAD * self.fixed_size if self.overlaps else 0
        return self._decision.in_flight if self._overlaps_now else 0

    def record_draft(self, tree: DraftTree, seconds: float) -> None:
        """See `TreePolicy`."""
        self.memory.tree_drafted(tree, seconds)

    # ---------------------------------------------------------------- how much to ship

    def choose(self, tree: DraftTree, *, is_late: bool = False) -> DraftTree:
        """Return the nodes of `tree` that bring most tokens per second.

        Without a call of `stop_drafting` since the last round, nothing was drafted and the round is plain.
        """
        is_asked, self._is_asked, self._drafted = self._is_asked, False, tree
        if self._draft_started_s is None:
            self._record_plain_round(is_asked=is_asked)
            return tree
        draft_s = self.clock() - self._draft_started_s
        self._draft_started_s = None
        if is_late:
            plan = plan_for_size(0, np.empty(0), self.costs, exposed_draft_s=draft_s)
            self._decide(plan, np.empty(0), draft_s, draft_is_late_text(draft_s))
            return NO_TREE
        self.memory.tree_drafted(tree, draft_s)
        estimates, costs = self.memory.estimates, self.costs
        chances = estimates.acceptance.chances(tree)
        if self.fixed_size is not None:
            return self._record_fixed_size(tree, chances, draft_s)
        considered = estimates.budget.discounted(chances[: self._limit])
        plan = plan_round(considered, costs, exposed_draft_s=draft_s)
        is_due = self.memory.exploration.is_due() and not self._tries_nothing
        exploring = bool(len(considered)) and is_due and plan.size == 0
        if exploring:
            size = cheap_size(costs, EXPLORE_LONGER, min(len(considered), EXPLORE_NODES))
            plan = plan_for_size(size, considered, costs, exposed_draft_s=draft_s)
        reason = reason_of(plan, considered, costs, exploring=exploring, in_debt=estimates.budget.in_debt)
        self._decide(plan, chances, draft_s, reason, exploring=exploring)
        return tree.best(plan.size)

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        """Return `shipped`, followed by the nodes of `wider` that bring more than their time is worth."""
        self.memory.tree_grew(wider)
        both = shipped.union(wider, self.largest) if self.fixed_size is None else shipped
        self._drafted = both
        planned = self._planned
        if len(both) == len(shipped) or planned is None or self.costs.is_busy:
            return shipped
        estimates = self.memory.estimates
        chances = estimates.believed(estimates.acceptance.chances(both))
        departures, in_flight = planned.departures, planned.in_flight or planned.plan.size
        if len(shipped) > in_flight:  # the extension considered last has left
            departures = (*departures, (in_flight, planned.considered_s))
        parents = both.parents[len(shipped) :]
        later_s = np.where(parents < len(shipped), elapsed_s - departure_s(parents, departures), 0.0)
        count = extension_size(chances[len(shipped) :], later_s, self.costs, planned.plan.rate)
        self._planned = replace(
            planned,
            drafted=len(both),
            chances=chances,
            departures=departures,
            in_flight=len(shipped),
            considered_s=elapsed_s,
        )
        return both.best(len(shipped) + count)

    # ---------------------------------------------------------------- what came of it

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        """Learn what links and hops cost, if nothing broke."""
        if unbroken:
            rows = [hops[0].rows if hops else 0 for hops in timings]
            self.memory.tracker.learn(sum(rows), take_apart(self.costs, rows, seconds, timings), timings)

    def learn(self, finished: Round) -> RoundReport | None:
        """Learn from a round.  Returns its report, or None where a loss interrupted it."""
        if finished.unbroken:
            rows, seconds, timings = _first_shipment(finished)
            self._parts = take_apart(self.costs, rows, seconds, timings)
            if self._planned is None or self._planned.is_learned_from or self._is_surprising(seconds):
                self.memory.tracker.learn(sum(rows), self._parts, timings)
        self._learn_walk(finished.draft, finished.walk)
        self._drafted = NO_TREE
        planned, parts = self._planned, self._parts
        self._planned = self._parts = None
        if planned is None or parts is None:
            return None
        # The round took longer than the traversal that was learned from if it waited for extensions, or for drafting to
        # end.
        waited_s = max(0.0, finished.seconds - finished.first_seconds) if finished.first_seconds else 0.0
        tokens = 1 + len(finished.walk.accepted)
        self._settle(planned, len(finished.draft), tokens, planned.draft_s + parts.seconds, waited_s)
        self.memory.rounds += 1
        extended = max(0, len(finished.draft) - planned.plan.size)
        return RoundReport(
            round=self.memory.rounds,
            drafted=planned.drafted,
            shipped=planned.plan.size,
            extended=extended,
            expected=1.0 + float(planned.chances[: len(finished.draft)].sum()),
            got=tokens,
            expected_s=planned.expected_s,
            seconds=planned.draft_s + parts.seconds + waited_s,
            draft_s=planned.draft_s,
            wire_s=parts.wire_s,
            queue_s=parts.queue_s,
            compute_s=parts.compute_s,
            reason=with_extension(planned.reason, extended),
        )

    # ---------------------------------------------------------------- inside

    @property
    def _overlaps_now(self) -> bool:
        """Whether to draft while a round travels.

        It takes the client's cores.  Where a hop computes on the same machine, that pays only if a plain round spends
        more time on links than at hops.
        """
        links_leave_time = self.costs.link.latency_s > float(self.costs.duration.at(1.0))
        return self.overlaps and (links_leave_time or not self._is_local)

    @property
    def _may_follow(self) -> bool:
        """Whether a round may leave plain and its tree follow: not where that takes cores or time from others."""
        return not self._is_local and not self.costs.is_busy

    @property
    def _tries_nothing(self) -> bool:
        """Whether no tree is sent only to explore: what is drafted in flight tells as much, and costs nothing."""
        return self._overlaps_now and not self._is_local

    @property
    def _limit(self) -> int:
        """Most nodes of a tree whose cost can be estimated from what was measured."""
        return min(self.largest, FURTHER * self.memory.tracker.most_rows)

    def _is_surprising(self, seconds: float) -> bool:
        """Whether a traversal took so much more or less than expected that costs may have changed."""
        return self._planned is not None and not 1 / SURPRISE < seconds / self._planned.expected_s < SURPRISE

    def _record_plain_round(self, *, is_asked: bool) -> None:
        """Record that the coming round ships no draft nodes: none is worth it, or only one more token is needed."""
        exploration = self.memory.exploration
        self.memory.exploration = exploration.skip(max(0, exploration.skipped_rounds - 1))
        plan = plan_for_size(0, np.empty(0), self.costs)
        plan = replace(plan, rate=max(plan.rate, self._decision.rate))
        next_try = None if self._tries_nothing else exploration.due_in
        reason = NO_ROOM if self._decision.before else with_next_try(self._decision.why_plain, next_try)
        self._decide(plan, np.empty(0), 0.0, reason if is_asked else LAST_TOKEN)

    def _record_fixed_size(self, tree: DraftTree, chances: NDArray[np.float64], draft_s: float) -> DraftTree:
        """Record that the whole tree is shipped: nothing is chosen, but all is learned."""
        plan = plan_for_size(len(tree), chances, self.costs, exposed_draft_s=draft_s)
        self._decide(plan, chances, draft_s, f"{len(tree)} nodes: fixed size")
        return tree

    def _decide(
        self, plan: Plan, chances: NDArray[np.float64], draft_s: float, reason: str, *, exploring: bool = False
    ) -> None:
        """Store what was decided for the round; `chances` are those of all drafted nodes, float64 [drafted]."""
        drafted = len(chances)
        expected_s = round_duration_s(self.costs, plan.size) + draft_s
        is_learned_from = drafted > 0 or not self.memory.exploration.skipped_rounds
        self._planned = RoundPlan(plan, chances, drafted, draft_s, expected_s, reason, exploring, is_learned_from)
        self.memory.planned_rate = self.memory.rate + RATE_STEP * (plan.rate - self.memory.rate)

    def _learn_walk(self, shipped: DraftTree, walk: Walk) -> None:
        """Learn which nodes were on the target's path, and whether the tree was outgrown.

        Nodes that were drafted and not shipped count too: whether they were right is known where their parents were.  A
        plain round tells so whether the guesses for its token would have been right.
        """
        memory, accepted = self.memory, walk.accepted
        tree = self._drafted if len(self._drafted) > len(shipped) else shipped
        known = on_path(tree, walk)
        bonus_nodes = np.setdiff1d(np.flatnonzero(known), accepted)
        self._has_kept = bool(np.isin(tree.parents, bonus_nodes).any())
        memory.estimates = replace(
            memory.estimates,
            acceptance=memory.estimates.acceptance.after_walk(tree, known),
            outgrown=len(shipped) if len(accepted) >= OUTGROWN_AT and accepted[-1] not in shipped.parents else 0,
        )
        if len(shipped):
            memory.exploration = memory.exploration.skip(0)

    def _settle(self, planned: RoundPlan, shipped: int, tokens: int, seconds: float, waited_s: float) -> None:
        """Enter the round into the loss budget, and decide when to explore next.

        The round shipped `shipped` nodes and brought `tokens` in `seconds`, and then `waited_s` more passed before it
        was over.
        """
        memory, budget = self.memory, self.memory.estimates.budget
        if shipped or planned.draft_s:
            # Time counts by the clock, but at most LATE times the usual: a packet that came late is not due to the
            # tree.
            usual_s = planned.draft_s + round_duration_s(self.costs, planned.plan.size)
            budget = budget.after_tree(tokens, min(seconds, LATE * usual_s) + waited_s, self.costs.plain_s)
        else:
            budget = budget.after_plain_round()
        memory.estimates = replace(memory.estimates, budget=budget)
        if shipped:
            memory.exploration = memory.exploration.after_tree(found_hit=planned.exploring and tokens > 1)
        else:
            interval = partial(exploration_interval, memory.estimates, self.costs)
            memory.exploration = memory.exploration.after_plain_round(interval)


def _first_shipment(finished: Round) -> tuple[list[int], float, list[Sequence[HopTiming]]]:
    """Return the first shipment's rows per append, its seconds, and its timings, as far as it came back."""
    rows: list[int] = []
    for timings in finished.timings:
        if sum(rows) > finished.first_shipped:
            break
        rows.append(timings[0].rows if timings else 0)
    came_back = sum(rows) > finished.first_shipped
    seconds = finished.first_seconds if came_back and finished.first_seconds else finished.seconds
    return rows, seconds, list(finished.timings[: len(rows)])
