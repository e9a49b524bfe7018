"""How many nodes to draft and to ship: the seam that the generation loop asks, and the automatic policy behind it.

`AutoPolicy.choose` answers how many nodes of a drafted tree to ship, by `plan.plan_round`.  All that a policy knows is
frozen estimates, which it replaces as rounds come back.  One `PlannerMemory` serves one generation at a time, and
outlives generations.
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
from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop
from treeswarm_client.planner.acceptance import AcceptanceEstimate
from treeswarm_client.planner.costs import (
    ChainHop,
    Costs,
    CostTracker,
    DraftLevels,
    TraversalParts,
    round_duration_s,
    take_apart,
)
from treeswarm_client.planner.explain import RoundReport, reason_of
from treeswarm_client.planner.loss_budget import (
    EXPLORE_LONGER,
    EXPLORE_NODES,
    SKIPPED_ROUNDS,
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
    usual_nodes_wanted,
)

# Most nodes that the automatic policy reserves on every node and may ship: over the dearest links that it was tried on
# (100 ms one way) it chose 30 to 80 nodes and hardly ever more than 100; a larger reservation only keeps other clients
# out.
LARGEST = 256
# Drafting goes on before shipping while it promises this many times the tokens that its time is worth.  A promise is
# the chance that the text passes a node, and half of those bring a token; and what is not waited for may follow the
# tree.  Of 2 to 8, 3 to 5 were best on links of 1 to 100 ms.
PROMISE = 4.0
# While a tree of a fixed size travels, this many times its nodes are drafted.  What the walk does not reach is wasted
# work on the client's own machine.  The chance that it reaches a node falls quickly with the node's rank.
AHEAD = 4
# Costs are known as far as they were measured: a tree has at most this many times the most rows that ever travelled
# here.
FURTHER = 2
# A round that took longer than this many times its usual duration counts as having taken so long.
LATE = 1.2
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
    """Number of nodes of the draft that were answered before the walk was over."""
    first_shipped: int
    """Number of nodes of the draft in the first shipment; the others were sent after it."""
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

    def choose(self, tree: DraftTree) -> DraftTree:
        """Return the first nodes of `tree`, to be shipped.  Asked every round, also where nothing was drafted."""
        ...

    def nodes_to_draft_in_flight(self) -> int:
        """Return how many nodes to draft while a tree is in flight, those shipped included."""
        ...

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        """Return `shipped` followed by the nodes of `wider` that are worth an append of their own.

        `elapsed_s` is the number of seconds since `shipped` left.
        """
        ...

    def learn(self, flown: Round) -> RoundReport | None:
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
        """Tokens per second that a second is worth: as planned lately, or as plain decoding brings."""
        return self.planned_rate or 1.0 / self.tracker.costs.plain_s

    def tree_drafted(self, tree: DraftTree, seconds: float) -> None:
        """Learn from a tree that was drafted for the coming round in `seconds` that nothing hid."""
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
        """Learn that the tree of the coming or present round was drafted further, while a traversal was under way."""
        estimates = self.estimates
        if estimates.acceptance.trees and len(tree) > len(estimates.acceptance.trees[-1]):
            acceptance = estimates.acceptance.with_grown_tree(tree)
            self.estimates = replace(
                estimates, acceptance=acceptance, most_drafted=max(estimates.most_drafted, len(tree))
            )


@dataclass(frozen=True, eq=False)
class _RoundPlan:
    """What was decided for the round under way."""

    plan: Plan
    chances: NDArray[np.float64]
    """Calibrated chances of the drafted nodes, float64 [drafted]."""
    drafted: int
    draft_s: float
    """Seconds of drafting that nothing hid."""
    expected_s: float
    """Seconds expected by a clock, drafting included."""
    reason: str
    exploring: bool
    is_learned_from: bool
    """Whether links and nodes are learned from this round, or only from the next plain one."""
    left: tuple[tuple[int, float], ...] = ()
    """First node of each further append and the seconds by which it left later than the tree; the latest last."""
    reached: int = 0
    """Number of nodes in flight when an extension was last considered."""
    considered_s: float = 0.0
    """Seconds by which that extension leaves later than the tree, if it leaves."""


@dataclass(eq=False)
class AutoPolicy:
    """`--tree-size auto`: trees that fit the links, the nodes and the text.

    With a `fixed_size` all trees have that size, and the policy only learns.
    """

    memory: PlannerMemory
    row_bytes: int
    """Number of bytes of one row on a link between nodes."""
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
    _planned: _RoundPlan | None = None
    _parts: TraversalParts | None = None
    """Parts of the round's traversal, or None before it came back."""

    @property
    def costs(self) -> Costs:
        return self.memory.tracker.costs

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Begin a generation, or go on after a repair.  What is known of nodes and chains is kept."""
        memory = self.memory
        self._planned = self._parts = None
        memory.exploration = memory.exploration.skip(0)
        if memory.tracker.begin(hops, row_bytes=self.row_bytes, segment_rows=self.segment_rows):
            memory.planned_rate = 0.0

    # ---------------------------------------------------------------- how much to draft

    def nodes_to_draft(self) -> int:
        """Return `nodes_wanted`, or as many as may be shipped where drafting goes on in flight.

        There, what was drafted ahead costs nothing, and `stop_drafting` ends what does cost.
        """
        if self.fixed_size is not None:
            return self.fixed_size
        nodes = self.nodes_wanted()
        return self.largest if nodes > EXPLORE_NODES and self._overlaps_now else nodes

    def nodes_wanted(self) -> int:
        """Return how many nodes are worth drafting for the coming round; 0: it is plain."""
        memory = self.memory
        estimates = memory.estimates
        limit = min(self._limit, max(FIRST_NODES, FURTHER * estimates.most_drafted))
        if limit < 1:
            return 0
        if memory.exploration.is_due():
            return cheap_size(self.costs, EXPLORE_LONGER, min(limit, EXPLORE_NODES))
        if not estimates.acceptance.trees:
            return min(limit, FIRST_NODES)
        if memory.exploration.skipped_rounds:
            return 0
        nodes = usual_nodes_wanted(estimates, self.costs, limit)
        memory.exploration = memory.exploration.skip(0 if nodes else SKIPPED_ROUNDS)
        return nodes

    def stop_drafting(self) -> ShouldStop:
        """Return the function that ends drafting: nodes left out may follow the tree or serve the next round."""
        self._draft_started_s = self.clock()
        if self.fixed_size is not None:
            return never_stop
        end_s = self._draft_started_s + longest_draft_wait_s(self.costs)
        worth = PROMISE * self.memory.rate
        return lambda promise: promise < worth or self.clock() > end_s

    def nodes_to_draft_in_flight(self) -> int:
        """Return as many nodes as may be shipped; where guesses are worth nothing, those that the next round tries."""
        if self.fixed_size is not None:
            return AHEAD * self.fixed_size if self.overlaps else 0
        if not self._overlaps_now:
            return 0
        if self.nodes_wanted():
            return self.largest
        return EXPLORE_NODES if self.memory.exploration.is_due(within=1) else 0

    # ---------------------------------------------------------------- how much to ship

    def choose(self, tree: DraftTree) -> DraftTree:
        """Return the nodes of `tree` that bring most tokens per second.

        Without a call of `stop_drafting` since the last round, nothing was drafted and the round is plain.
        """
        if self._draft_started_s is None:
            self._record_plain_round()
            return tree
        draft_s = self.clock() - self._draft_started_s
        self._draft_started_s = None
        self.memory.tree_drafted(tree, draft_s)
        estimates, costs = self.memory.estimates, self.costs
        chances = estimates.acceptance.chances(tree)
        if self.fixed_size is not None:
            return self._record_fixed_size(tree, chances, draft_s)
        considered = estimates.budget.discounted(chances[: self._limit])
        plan = plan_round(considered, costs, exposed_draft_s=draft_s)
        exploring = bool(len(considered)) and self.memory.exploration.is_due() and plan.size == 0
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
        before = self._planned
        if len(both) == len(shipped) or before is None:
            return shipped
        estimates = self.memory.estimates
        chances = estimates.budget.discounted(estimates.acceptance.chances(both))
        left, reached = before.left, before.reached or before.plan.size
        if len(shipped) > reached:
            left = (*left, (reached, before.considered_s))
        parents = both.parents[len(shipped) :]
        later_s = np.where(parents < len(shipped), elapsed_s - departure_s(parents, left), 0.0)
        count = extension_size(chances[len(shipped) :], later_s, self.costs, before.plan.rate)
        self._planned = replace(
            before, drafted=len(both), chances=chances, left=left, reached=len(shipped), considered_s=elapsed_s
        )
        return both.best(len(shipped) + count)

    # ---------------------------------------------------------------- what came of it

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        """Learn what links and nodes took, if nothing broke."""
        if unbroken:
            rows = [hops[0].rows if hops else 0 for hops in timings]
            self.memory.tracker.learn(sum(rows), take_apart(self.costs, rows, seconds, timings), timings)

    def learn(self, flown: Round) -> RoundReport | None:
        """Learn from a round.  Returns its report, or None where a loss interrupted it."""
        if flown.unbroken:
            rows, seconds, timings = _first_shipment(flown)
            self._parts = take_apart(self.costs, rows, seconds, timings)
            if self._planned is None or self._planned.is_learned_from:
                self.memory.tracker.learn(sum(rows), self._parts, timings)
        self._learn_walk(flown.draft, flown.walk)
        planned, parts = self._planned, self._parts
        self._planned = self._parts = None
        if planned is None or parts is None:
            return None
        # Further appends, and drafting that had to end, take longer than the traversal that was learned from.
        waited_s = max(0.0, flown.seconds - flown.first_seconds) if flown.first_seconds else 0.0
        tokens = 1 + len(flown.walk.accepted)
        self._settle(planned, tokens, planned.draft_s + parts.seconds, waited_s)
        self.memory.rounds += 1
        return RoundReport(
            round=self.memory.rounds,
            drafted=planned.drafted,
            shipped=planned.plan.size,
            extended=max(0, len(flown.draft) - planned.plan.size),
            expected=1.0 + float(planned.chances[: len(flown.draft)].sum()),
            got=tokens,
            expected_s=planned.expected_s,
            seconds=planned.draft_s + parts.seconds + waited_s,
            draft_s=planned.draft_s,
            wire_s=parts.wire_s,
            queue_s=parts.queue_s,
            compute_s=parts.compute_s,
            reason=planned.reason,
        )

    # ---------------------------------------------------------------- inside

    @property
    def _overlaps_now(self) -> bool:
        """Whether a plain round spends more time on links than in nodes.

        Then there is time to draft meanwhile, and nodes are idle when further appends come.
        """
        return self.overlaps and self.costs.link.latency_s > float(self.costs.duration.at(1.0))

    @property
    def _limit(self) -> int:
        """Most nodes of a tree that is within what costs were measured for."""
        return min(self.largest, FURTHER * self.memory.tracker.most_rows)

    def _record_plain_round(self) -> None:
        """Record that the coming round ships nothing drafted: no node is worth it, or only one more token is needed."""
        exploration = self.memory.exploration
        self.memory.exploration = exploration.skip(max(0, exploration.skipped_rounds - 1))
        plan = plan_for_size(0, np.empty(0), self.costs)
        self._decide(plan, np.empty(0), 0.0, "plain: nothing was drafted, or drafting would not pay")

    def _record_fixed_size(self, tree: DraftTree, chances: NDArray[np.float64], draft_s: float) -> DraftTree:
        """Record that the whole tree is shipped: nothing is chosen, but all is learned."""
        plan = plan_for_size(len(tree), chances, self.costs, exposed_draft_s=draft_s)
        self._decide(plan, chances, draft_s, f"{len(tree)} nodes: fixed size")
        return tree

    def _decide(
        self, plan: Plan, chances: NDArray[np.float64], draft_s: float, reason: str, *, exploring: bool = False
    ) -> None:
        """Keep what was decided for the round; `chances` are those of all drafted nodes, float64 [drafted]."""
        drafted = len(chances)
        expected_s = round_duration_s(self.costs, plan.size) + draft_s
        is_learned_from = drafted > 0 or not self.memory.exploration.skipped_rounds
        self._planned = _RoundPlan(plan, chances, drafted, draft_s, expected_s, reason, exploring, is_learned_from)
        self.memory.planned_rate = self.memory.rate + RATE_STEP * (plan.rate - self.memory.rate)

    def _learn_walk(self, tree: DraftTree, walk: Walk) -> None:
        """Learn how far the target followed the tree."""
        memory, accepted = self.memory, walk.accepted
        on_path = np.zeros(len(tree), np.bool_)
        on_path[list(accepted)] = True
        # A node that was sent too late to be waited for was right all the same.
        on_path |= (tree.parents == (accepted[-1] if accepted else -1)) & (tree.tokens == walk.bonus)
        is_outgrown = len(accepted) >= OUTGROWN_AT and accepted[-1] not in tree.parents
        memory.estimates = replace(
            memory.estimates,
            acceptance=memory.estimates.acceptance.after_walk(tree, on_path),
            outgrown=len(tree) if is_outgrown else 0,
        )
        if len(tree):
            memory.exploration = memory.exploration.skip(0)

    def _settle(self, planned: _RoundPlan, tokens: int, seconds: float, waited_s: float) -> None:
        """Enter the round into the loss budget, and decide when to explore next."""
        memory, budget = self.memory, self.memory.estimates.budget
        if planned.drafted:
            # By the clock; but a packet that came late is not due to the tree: no longer than such rounds usually take.
            usual_s = planned.draft_s + round_duration_s(self.costs, planned.plan.size)
            budget = budget.after_tree(tokens, min(seconds, LATE * usual_s) + waited_s, self.costs.plain_s)
        else:
            budget = budget.after_plain_round()
        memory.estimates = replace(memory.estimates, budget=budget)
        if planned.plan.size:
            memory.exploration = memory.exploration.after_tree(found_hit=planned.exploring and tokens > 1)
        else:
            interval = partial(exploration_interval, memory.estimates, self.costs)
            memory.exploration = memory.exploration.after_plain_round(interval)


def departure_s(nodes: NDArray[np.int64], left: Sequence[tuple[int, float]]) -> NDArray[np.float64]:
    """Return the seconds by which each of `nodes` left later than the first part of a tree; 0 for the root (-1).

    `left` has the first node and the departure of each later part.  The result is float64 [nodes].
    """
    firsts = np.array([first for first, _ in left], np.int64)
    departures = np.array([0.0, *(seconds for _, seconds in left)])
    return departures[np.searchsorted(firsts, nodes, side="right")]


def _first_shipment(flown: Round) -> tuple[list[int], float, list[Sequence[HopTiming]]]:
    """Return the first shipment's rows per append, its seconds, and its timings, as far as it came back."""
    rows: list[int] = []
    for timings in flown.timings:
        if sum(rows) > flown.first_shipped:
            break
        rows.append(timings[0].rows if timings else 0)
    came_back = sum(rows) > flown.first_shipped
    seconds = flown.first_seconds if came_back and flown.first_seconds else flown.seconds
    return rows, seconds, list(flown.timings[: len(rows)])
