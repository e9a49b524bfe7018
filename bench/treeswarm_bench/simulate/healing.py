"""Simulated nodes prove deaths and fill holes, by the rules of `topology.liveness` and `topology.healing`."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Protocol

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.healing import TURN_MARGIN_S, find_holes, is_served, judge_claim, nodes_to_ask, plan_healing
from treeswarm.topology.liveness import CONFIRM_S, VERIFIED_AT_ONCE, WATCH_EVERY_S, WATCHERS, sole_holders, without
from treeswarm.topology.tables import JOINING, ONLINE, Placed, PlacementTable
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.config import SimulationSettings
from treeswarm_bench.simulate.hosts import SimulatedHosts
from treeswarm_bench.simulate.registry import ABSENT, RecordTable, SimulatedRegistry

# Nodes of so many turns are told of deaths, as by `treeswarm_node.membership.hole_watch`.
TOLD_AHEAD = 3


class HealingHost(Protocol):
    """What healing needs of the simulated nodes."""

    settings: SimulationSettings
    hosts: SimulatedHosts
    agenda: Agenda
    registry: SimulatedRegistry
    truth: RecordTable
    random: np.random.Generator
    moves: int
    moves_refused: int
    on_gone: Callable[[int], None]

    def dead(self, node: int) -> bool: ...

    def span_of(self, node: int) -> Span: ...

    def placed(self, node: int) -> Placed: ...

    def become(self, node: int, state: int) -> None: ...

    def load_span(self, node: int) -> None: ...


class SimulatedHealing:
    """What each node knows of the deaths of others, and the claims that follow.  Nodes are indices."""

    def __init__(self, nodes: HealingHost) -> None:
        self.nodes, self.agenda, self.random = nodes, nodes.agenda, nodes.random
        self.known: dict[int, set[int]] = {}
        """Nodes that each node has proven dead."""
        self._probe_s: dict[int, float] = {}
        """Seconds that it takes to prove each death."""
        self._told_after_s: dict[int, float] = {}
        """Seconds after each node has proven deaths in which the nodes that it tells have proven them."""
        self._healing: set[int] = set()
        """Nodes that know of a hole and see to it."""

    def on_death(self, node: int) -> None:
        """Plan who notices that `node` has vanished: its watchers, and a node that happens to measure its distance."""
        online = np.flatnonzero(self.nodes.truth.state == ONLINE)
        if not len(online):
            return
        is_dark = self.random.random() < config.DARK
        self._probe_s[node] = config.DARK_PROBE_S if is_dark else CONFIRM_S
        layout, blocks = self.nodes.registry.view().layout, self.nodes.settings.blocks
        watched = layout.nodes[sole_holders(layout, blocks)]
        after_s = [float(self.random.exponential(config.SURVEY_S))]
        if self.nodes.hosts.ids[node] in watched:
            after_s += self.random.uniform(0, WATCH_EVERY_S, WATCHERS).tolist()
        for seconds in after_s:
            witness = int(self.random.choice(online))
            self.agenda.after(seconds + self._probe_s[node], partial(self._learn, witness, {node}))

    def on_hole_in_records(self) -> None:
        """React to records without a holder for some block, which all nodes see."""
        self._see_to_it(None, 0)

    def _learn(self, witness: int, dead: Iterable[int]) -> None:
        """Let a node learn of deaths, which it has proven, and probe other holders of these blocks."""
        known = self.known.setdefault(witness, set())
        if self.nodes.dead(witness) or known >= set(dead):
            return
        known.update(dead)
        others = self._dead_holders(known) - known
        # Times from now on, when the first node is proven dead.  Others are probed since its first silence.
        silence_s = -max(max(0.0, self._probe_s[node] - config.ANSWER_S) for node in dead)
        asked_s = silence_s + self._search_s(others)
        proven_s = max(0.0, asked_s + self._slowest(others)) if others else 0.0
        # The nodes that would act are told once the last ones are silent, or asked and probably silent.
        refusing = sum(self._probe_s[node] < config.ANSWER_S for node in others)
        silent_s = config.LOOK_S if 2 * refusing >= VERIFIED_AT_ONCE else min(self._slowest(others), config.ANSWER_S)
        told_s = asked_s + silent_s + config.REFUSED_S + self._slowest(known | others)
        self.agenda.after(proven_s, partial(self._verified, witness, others, max(0.0, told_s - proven_s)))

    def _slowest(self, nodes: Iterable[int]) -> float:
        """Return the seconds that it takes to prove the deaths of all `nodes` side by side."""
        return max((self._probe_s[node] for node in nodes), default=0.0)

    def _search_s(self, others: Iterable[int]) -> float:
        """Return the seconds from the first silence until all other holders are probed, more and more at once."""
        waiting, silent, seconds = [self._probe_s[node] for node in others], 1, 0.0
        while len(waiting) > VERIFIED_AT_ONCE * silent:
            asked, waiting = waiting[: VERIFIED_AT_ONCE * silent], waiting[VERIFIED_AT_ONCE * silent :]
            # A machine that refuses is silent at once; then more are asked at the next look.
            refusing = sum(proof_s < config.ANSWER_S for proof_s in asked)
            silent += refusing or len(asked)
            seconds += config.LOOK_S if refusing else config.ANSWER_S
        return seconds

    def _verified(self, witness: int, others: set[int], told_after_s: float) -> None:
        """Go on when the deaths are proven; the nodes that are told of them have proven them so much later."""
        self.known[witness].update(others)
        self._told_after_s[witness] = told_after_s
        if witness not in self._healing:
            self._healing.add(witness)
            self._see_to_it(witness, 0)

    def _dead_holders(self, dead: Iterable[int]) -> set[int]:
        """Return the dead holders, by the records, of those blocks of the nodes `dead` that no living node serves."""
        layout, state = self.nodes.registry.view().layout, self.nodes.truth.state
        index = np.array([self.nodes.registry.index[name] for name in layout.nodes.tolist()], np.int64)
        vanished = state[index] == ABSENT if len(index) else np.zeros(0, np.bool_)
        throughput = layout.select(~vanished).throughput(self.nodes.settings.blocks)
        holders: set[int] = set()
        for node in dead:
            span = self.nodes.span_of(node)
            for block in range(span.start, span.end):
                if throughput[block] <= 0:
                    here = vanished & (layout.start <= block) & (block < layout.end)
                    holders.update(index[here].tolist())
        return holders

    def _see_to_it(self, witness: int | None, turn: int) -> None:
        """Let the nodes of this turn act: those of the plan that `witness` makes, or of all nodes' plan by records."""
        table = self.known_layout(witness)
        if (witness is not None and self.nodes.dead(witness)) or not find_holes(table, self.nodes.settings.blocks):
            if witness is not None:
                self._healing.discard(witness)
            return
        blocks, index = self.nodes.settings.blocks, self.nodes.registry.index
        for name, span in plan_healing(table, blocks, turn).items():
            if witness is None or index[name] == witness:
                self._claim(index[name], span, table, turn)
        told = {index[name] for ahead in range(TOLD_AHEAD) for name in plan_healing(table, blocks, turn + ahead)}
        for mover in sorted(told - {witness}):
            if witness is not None:
                # It was told of them at their first silence, and proves each death itself, several at once.
                known, seconds = set(self.known[witness]), self._told_after_s[witness]
                self.agenda.after(seconds, partial(self._learn, mover, known))
        self.agenda.after(config.CLAIM_S + TURN_MARGIN_S, partial(self._see_to_it, witness, turn + 1))

    def known_layout(self, witness: int | None) -> PlacementTable:
        """Return the records without the nodes that `witness` has proven dead."""
        layout = self.nodes.registry.view().layout
        dead = self.known.get(witness, set()) if witness is not None else set()
        return without(layout, [str(self.nodes.hosts.ids[node]) for node in dead])

    def _claim(self, node: int, span: Span, before: PlacementTable, turn: int) -> None:
        """Announce that `node` joins over `span`; it still has its blocks.

        `before` is the swarm that it planned by.
        """
        truth = self.nodes.truth
        if truth.state[node] != ONLINE or len(span) != len(self.nodes.span_of(node)):
            return
        former = self.nodes.span_of(node)
        self.nodes.become(node, JOINING)
        truth.start[node] = span.start
        self.nodes.registry.announce(node)
        rivals = [name for ahead in (0, 1) for name in plan_healing(before, self.nodes.settings.blocks, turn + ahead)]
        self._ask(node, former, [name for name in rivals if self.nodes.registry.index[name] != node], 1)

    def _ask(self, node: int, former: Span, rivals: list[str], times: int) -> None:
        """Let a node ask those that its claim concerns.  If too few answer, it waits until all have seen the claim."""
        if self.nodes.truth.state[node] != JOINING:
            return
        table, state, index = self.known_layout(node), self.nodes.truth.state, self.nodes.registry.index
        table = table.select(table.nodes != self.nodes.hosts.ids[node])
        asked_rivals, holders = nodes_to_ask(former, table, rivals)
        answered = [name for name in dict.fromkeys([*asked_rivals, *holders]) if state[index[name]] != ABSENT]
        heard = self._with_truth(table.select(np.isin(table.nodes, answered)), answered)
        enough = set(answered) >= set(asked_rivals) and is_served(former, heard, self.nodes.settings.blocks)
        after_s = config.ASK_S if len(answered) == len({*asked_rivals, *holders}) else config.ANSWER_S
        if not enough:
            after_s += config.CLAIM_S
        self.agenda.after(after_s, partial(self._judge, node, former, rivals, times, answered))

    def _with_truth(self, table: PlacementTable, answered: Iterable[str]) -> PlacementTable:
        """Return the table with the newest records of the nodes that answered."""
        nodes = [self.nodes.placed(self.nodes.registry.index[name]) for name in answered]
        newest = PlacementTable.of(nodes)
        kept = table.select(~np.isin(table.nodes, newest.nodes))
        columns = [field.name for field in fields(PlacementTable)]
        return PlacementTable(*(np.concatenate([getattr(kept, c), getattr(newest, c)]) for c in columns))

    def _judge(self, node: int, former: Span, rivals: list[str], times: int, asked: list[str]) -> None:
        if self.nodes.truth.state[node] != JOINING:
            return
        answered = [name for name in asked if self.nodes.truth.state[self.nodes.registry.index[name]] != ABSENT]
        table = self._with_truth(self.known_layout(node), answered)
        verdict = judge_claim(self.nodes.placed(node), former, table, self.nodes.settings.blocks)
        if verdict == "load":
            self.nodes.moves += 1
            self.nodes.on_gone(node)
            self.nodes.load_span(node)
        elif verdict == "wait" and times < config.CLAIM_CHECKS:
            self.agenda.after(config.CHECK_AGAIN_S, partial(self._ask, node, former, rivals, times + 1))
        else:
            self.nodes.moves_refused += 1
            self.nodes.truth.start[node] = former.start
            self.nodes.become(node, ONLINE)
            self.nodes.registry.announce(node)
