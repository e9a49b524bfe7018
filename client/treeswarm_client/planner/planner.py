"""The one thing that remembers: what rounds cost and brought so far, and what that says of the next one.

Everything it knows is frozen estimates; it replaces them as rounds come back.  One planner serves one client, one
generation at a time, and outlives generations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import MAX_ROWS, HopTiming
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner.acceptance import AcceptanceEstimate
from treeswarm_client.planner.costs import ChainHop, DraftLevels, HopEstimate, LinkEstimate
from treeswarm_client.planner.explain import RoundReport, reason_of
from treeswarm_client.planner.loss_budget import LossBudget
from treeswarm_client.planner.plan import (
    Costs,
    Plan,
    Split,
    cheap_size,
    clock_s,
    plan_of,
    plan_round,
    split,
    traversal_s,
    worth_extending,
)

# A text that has changed is noticed after so many plain rounds; rarer where a try costs more than its share.
EXPLORE_EVERY = 16
EXPLORE_SHARE = 0.02
# Trees that would nearly pay are looked at sooner: it was chance perhaps, and little is lost.
EXPLORE_SOON, NEARLY = 4, 0.6
# What an exploring tree may add to a round: enough for the few best nodes, where chances show first.
EXPLORE_LONGER = 0.025
# And no more of them than show that.
EXPLORE_NODES = 8
# A plain round teaches nothing of trees, only what links and nodes take: that no tree pays holds for so many of them,
# of which the last is learned from.  Thinking about each cost a fiftieth of a round at 1 ms.
NO_FOR = 4
# Nodes asked for when nothing is known of a drafter's trees: on a fast network drafting is what costs most.
FIRST_WISH = 16
# Trees differ from round to round: draft a little more than the usual tree ships.
SLACK = 1.25
# Costs are known as far as they were seen: a tree has at most so many times the rows that ever travelled here.
FURTHER = 2
FIRST_ROWS = 16
# A tree through which the text went for so many nodes and out at a leaf is followed by one of so many times its nodes:
# usual trees change over rounds, and a text that begins to copy has few.
OUTGROWN_AT, OUTGROWN = 3, 4
# Usual times lie this near each other.
LATE = 1.2
# How far one tree moves the usual one, and one plan the usual rate.
STEP, RATE_STEP = 1 / 8, 1 / 4
# Chains and nodes remembered after they were left.
REMEMBERED = 64


@dataclass(frozen=True, eq=False)
class _Round:
    """What was decided for the round under way."""

    plan: Plan
    chances: NDArray[np.float64]
    drafted: int
    draft_s: float
    expected_s: float
    reason: str
    exploring: bool
    teaches: bool
    """What links and nodes took: unless the next plain round will tell."""
    left: tuple[tuple[int, float], ...] = ()
    """Of further appends: the first node of each and how much later than the tree it left, the latest last."""
    reached: int = 0
    """Nodes on their way when that was asked last."""
    thought_of: float = 0.0
    """How much later the next one leaves, if it leaves."""


@dataclass(eq=False)
class Planner:
    """`begin`; then for every round `wish`, `drafted`, `choose` (where `wish` said nothing: `plain`), `learn_traversal`
    and `learn_walk`."""

    outlook: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    rounds: int = 0
    costs: Costs = Costs(LinkEstimate(), (), 0, 0)
    """Of the present chain, by what is known of it."""
    _nodes: dict[str, HopEstimate] = field(default_factory=dict)
    _links: dict[tuple[str, ...], LinkEstimate] = field(default_factory=dict)
    _chain: tuple[str, ...] = ()
    _most_rows: int = FIRST_ROWS
    _levels: DraftLevels = field(default_factory=DraftLevels)
    _most_drafted: int = 0
    _outgrown: int = 0
    """Nodes of the last round's tree, if the text went through it to a leaf: it was too small."""
    _no_for: int = 0
    """Plain rounds to come, before whether a tree pays is asked again."""
    _ledger: LossBudget = LossBudget()
    _explore_in: int | None = EXPLORE_EVERY
    """Rounds; None: a tree was shipped just now, and how long to wait is reckoned when a plain round follows."""
    _rate: float = 0.0
    """Tokens a second, as planned lately; 0: nothing was."""
    _draft_s: float = 0.0
    """Of the round to be chosen."""
    _round: _Round | None = None
    _trip: Split | None = None
    _trip_s: float = 0.0

    # ---------------------------------------------------------------- what is known

    def begin(self, hops: Sequence[ChainHop], *, row_bytes: int, segment_rows: int) -> None:
        """A generation begins, or its chain has changed.  What is known of a node and of a chain is kept."""
        chain = tuple(hop.node for hop in hops)
        self._round = self._trip = None
        self._draft_s, self._no_for = 0.0, 0
        for hop in hops:
            if hop.node not in self._nodes:
                self._nodes[hop.node] = HopEstimate.begin(hop.profile)
        if chain != self._chain:
            self._chain, self._most_rows, self._rate = chain, FIRST_ROWS, 0.0
        for known in (self._nodes, self._links):
            _forget(known, REMEMBERED + len(chain))  # type: ignore[arg-type]
        link = self._links.get(chain, LinkEstimate())
        self.costs = Costs(link, self._hops(), row_bytes, max(0, len(chain) - 1), segment_rows)

    @property
    def waits_for_links(self) -> bool:
        """Whether a plain round spends more time on links than in nodes: then there is time to draft in meanwhile, and
        nodes that are idle when further appends come."""
        return self.costs.link.latency_s > float(self.costs.clock.at(1.0))

    @property
    def rate(self) -> float:
        """Tokens a second, as planned lately: what a second is worth."""
        return self._rate or 1.0 / self.costs.plain_s

    # ---------------------------------------------------------------- what to do

    def wants_draft(self) -> bool:
        """Whether the coming round needs the drafter at all."""
        return self.wish(FIRST_WISH) > 0

    @property
    def explores_next(self) -> bool:
        """Whether the round after the present one tries some nodes, unless it is worth more."""
        return self._explores_within(1)

    def wish(self, largest: int) -> int:
        """How many nodes to ask the drafter for, at most `largest`; 0: the coming round is plain."""
        limit = min(self._limit(largest), max(FIRST_WISH, FURTHER * self._most_drafted))
        if limit < 1:
            return 0
        if self._explores_within(0):
            return cheap_size(self.costs, EXPLORE_LONGER, min(limit, EXPLORE_NODES))
        if not self.outlook.trees:
            return min(limit, FIRST_WISH)
        if self._no_for:
            return 0
        draft_s = self._levels.draft_s(limit)
        chances = self._ledger.believed(self.outlook.usual(limit))
        best = plan_round(chances, self.costs, exposed_draft_s=draft_s).size
        wished = min(limit, max(int(np.ceil(SLACK * best)), OUTGROWN * self._outgrown))
        self._no_for = 0 if wished else NO_FOR
        return wished

    def drafted(self, tree: DraftTree, seconds: float) -> None:
        """The drafter made this tree for the coming round, in `seconds` that nothing hid."""
        self._draft_s = seconds
        if len(tree):
            self._most_drafted = max(self._most_drafted, len(tree))
            self._levels = self._levels.learned(tree, seconds)
            # A few nodes, drafted only to explore, tell little of a whole tree.
            if len(tree) > EXPLORE_NODES or not self.outlook.trees:
                self.outlook = self.outlook.drafted(tree)

    def choose(self, tree: DraftTree, largest: int = MAX_ROWS - 1) -> Plan:
        """How many of the tree's nodes to ship."""
        chances = self.outlook.chances(tree)
        considered = self._ledger.believed(chances[: self._limit(largest)])
        costs, draft_s = self.costs, self._draft_s
        plan = plan_round(considered, costs, exposed_draft_s=draft_s)
        exploring = bool(len(considered)) and self._explores_within(0) and plan.size == 0
        if exploring:
            size = cheap_size(costs, EXPLORE_LONGER, min(len(considered), EXPLORE_NODES))
            plan = plan_of(size, considered, costs, exposed_draft_s=draft_s)
        why = reason_of(plan, considered, costs, exploring=exploring, in_debt=self._ledger.in_debt)
        return self._decided(plan, chances, len(tree), why, exploring=exploring)

    def told(self, tree: DraftTree) -> Plan:
        """Somebody else decided to ship the whole tree: nothing is chosen, but all is learned."""
        chances = self.outlook.chances(tree)
        plan = plan_of(len(tree), chances, self.costs, exposed_draft_s=self._draft_s)
        return self._decided(plan, chances, len(tree), f"{len(tree)} nodes: as told")

    def plain(self) -> Plan:
        """The coming round ships nothing drafted, since `wish` was 0 or only one more token is wanted."""
        self._no_for = max(0, self._no_for - 1)
        plan = plan_of(0, np.empty(0), self.costs, exposed_draft_s=self._draft_s)
        return self._decided(plan, np.empty(0), 0, "plain: nothing was drafted, or its time would not pay")

    def regrown(self, tree: DraftTree) -> None:
        """The coming or present round's tree was drafted on, behind a traversal."""
        if self.outlook.trees and len(tree) > len(self.outlook.trees[-1]):
            self.outlook = self.outlook.regrown(tree)
            self._most_drafted = max(self._most_drafted, len(tree))

    def extension(self, tree: DraftTree, shipped: int, lag_s: float) -> int:
        """How many nodes of the (grown) tree after the first `shipped` to send, `lag_s` after those in flight; 0:
        none."""
        if self._round is None:
            return 0
        before, chances = self._round, self._ledger.believed(self.outlook.chances(tree))
        left, known = before.left, before.reached or before.plan.size
        if shipped > known:
            left = (*left, (known, before.thought_of))
        later_s = lag_s - left_at(tree.parents[shipped:], left)
        count = worth_extending(
            chances[shipped:], np.where(tree.parents[shipped:] < shipped, later_s, 0.0), self.costs, before.plan.rate
        )
        self._round = replace(before, drafted=len(tree), chances=chances, left=left, reached=shipped, thought_of=lag_s)
        return count

    # ---------------------------------------------------------------- what was seen

    def learn_traversal(
        self, rows: Sequence[int], seconds: float, timings: Sequence[Sequence[HopTiming]], *, prefill: bool = False
    ) -> None:
        """A traversal that nothing broke came back: rows of each append, and what each hop says of each."""
        found = split(self.costs, rows, seconds, timings)
        if not prefill:
            self._trip, self._trip_s = found, seconds
        if self._round is not None and not self._round.teaches:
            return
        link = self._links.pop(self._chain, LinkEstimate()).learned(found.bytes, found.wire_s)
        self._links[self._chain] = link
        for place, node in enumerate(self._chain):
            for timing in _forwards([hops[place] for hops in timings if place < len(hops)]):
                self._nodes[node] = self._nodes[node].learned(timing)
        self._most_rows = max(self._most_rows, sum(rows))
        self.costs = replace(self.costs, link=link, hops=self._hops())

    def learn_walk(
        self, tree: DraftTree, accepted: Sequence[int], bonus: int, *, waited_s: float = 0.0
    ) -> RoundReport | None:
        """The walk is over: the tree as it was shipped, extensions too, the nodes of the path, and the target's token
        after them.  The round took `waited_s` longer than the trip that was learned: further appends, and drafting
        that had to end.

        Returns what there is to tell of the round; None where a loss interrupted it.
        """
        on_path = np.zeros(len(tree), np.bool_)
        on_path[list(accepted)] = True
        # A node that went out too late to be waited for was right all the same.
        on_path |= (tree.parents == (accepted[-1] if accepted else -1)) & (tree.tokens == bonus)
        self.outlook = self.outlook.learned(tree, on_path)
        outgrown = len(accepted) >= OUTGROWN_AT and accepted[-1] not in tree.parents
        self._outgrown = len(tree) if outgrown else 0
        if len(tree):
            self._no_for = 0
        done, trip = self._round, self._trip
        self._round = self._trip = None
        draft_s, self._draft_s = self._draft_s, 0.0
        if done is None or trip is None:
            return None
        self.rounds += 1
        tokens = 1 + len(accepted)
        self._settle(done, tokens, draft_s + self._trip_s, waited_s)
        return RoundReport(
            round=self.rounds,
            drafted=done.drafted,
            shipped=done.plan.size,
            extended=max(0, len(tree) - done.plan.size),
            expected=1.0 + float(done.chances[: len(tree)].sum()),
            got=tokens,
            expected_s=done.expected_s,
            seconds=draft_s + self._trip_s + waited_s,
            draft_s=draft_s,
            wire_s=trip.wire_s,
            queue_s=trip.queue_s,
            compute_s=trip.compute_s,
            reason=done.reason,
        )

    # ---------------------------------------------------------------- inside

    def _hops(self) -> tuple[HopEstimate, ...]:
        return tuple(self._nodes[node] for node in self._chain)

    def _settle(self, done: _Round, tokens: int, seconds: float, waited_s: float) -> None:
        """Into the account, and when to explore next."""
        if done.drafted:
            # By the clock, but a packet that came late is not the tree's fault: no longer than such rounds usually are.
            usual_s = done.draft_s + clock_s(self.costs, done.plan.size)
            took_s = min(seconds, LATE * usual_s) + waited_s
            self._ledger = self._ledger.after_tree(tokens, took_s, self.costs.plain_s)
        else:
            self._ledger = self._ledger.after_plain()
        if done.plan.size:
            # Hits where none were expected: look again at once.
            self._explore_in = 0 if done.exploring and tokens > 1 else None
        else:
            self._explore_in = (self._explore_every() if self._explore_in is None else self._explore_in) - 1

    def _explores_within(self, rounds: int) -> bool:
        return self._explore_in is not None and self._explore_in <= rounds

    def _explore_every(self) -> int:
        costs = self.costs
        size = cheap_size(costs, EXPLORE_LONGER, EXPLORE_NODES)
        draft_s = self._levels.draft_s(size)[-1]
        longer = float(traversal_s(costs, 1.0 + size) - traversal_s(costs, 1.0) + draft_s)
        if self.outlook.usual(size).sum() * costs.plain_s > NEARLY * longer:
            return EXPLORE_SOON
        return max(EXPLORE_EVERY, int(np.ceil(longer / (EXPLORE_SHARE * costs.plain_s))))

    def _decided(
        self, plan: Plan, chances: NDArray[np.float64], drafted: int, why: str, *, exploring: bool = False
    ) -> Plan:
        expected_s = clock_s(self.costs, plan.size) + self._draft_s
        teaches = drafted > 0 or not self._no_for
        self._round = _Round(plan, chances, drafted, self._draft_s, expected_s, why, exploring, teaches)
        self._rate = self.rate + RATE_STEP * (plan.rate - self.rate)
        return plan

    def _limit(self, largest: int) -> int:
        return min(largest, FURTHER * self._most_rows)


def _forwards(timings: Sequence[HopTiming]) -> list[HopTiming]:
    """One hop's timings of one traversal by forward: appends that waited together were computed together, and say so
    by the same microseconds."""
    found: list[HopTiming] = []
    for timing in timings:
        if found and found[-1].compute_us == timing.compute_us:
            found[-1] = replace(found[-1], rows=found[-1].rows + timing.rows)
        else:
            found.append(timing)
    return found


def left_at(nodes: NDArray[np.int64], left: Sequence[tuple[int, float]]) -> NDArray[np.float64]:
    """How much later than the first part of a tree these nodes left, given the first node and the time of each later
    part; 0 for the root."""
    firsts = np.array([first for first, _ in left], np.int64)
    times = np.array([0.0, *(seconds for _, seconds in left)])
    return times[np.searchsorted(firsts, nodes, side="right")]


def _forget(known: dict[object, object], keep: int) -> None:
    for key in list(known)[: max(0, len(known) - keep)]:
        del known[key]
