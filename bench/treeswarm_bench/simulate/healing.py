"""Simulated nodes prove deaths and fill holes, by the rules of `topology.liveness` and `topology.healing`."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.healing import TURN_MARGIN_S, find_holes, judge_claim, plan_healing
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
        # They are probed since the first silence; more and more at once, as soon as those before were silent once.
        rounds = math.ceil(math.log2(1 + len(others) / VERIFIED_AT_ONCE))
        proof_s = max((self._probe_s[other] for other in others), default=0.0)
        before_s = max(self._probe_s[node] - config.ANSWER_S for node in dead)
        seconds = proof_s + max(0, rounds - 1) * min(proof_s, config.ANSWER_S) - max(0.0, before_s)
        self.agenda.after(max(0.0, seconds), partial(self._verified, witness, others))

    def _verified(self, witness: int, others: set[int]) -> None:
        self.known[witness].update(others)
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
        table = self._table(witness)
        if (witness is not None and self.nodes.dead(witness)) or not find_holes(table, self.nodes.settings.blocks):
            if witness is not None:
                self._healing.discard(witness)
            return
        blocks, index = self.nodes.settings.blocks, self.nodes.registry.index
        for name, span in plan_healing(table, blocks, turn).items():
            if witness is None or index[name] == witness:
                self._claim(index[name], span)
        told = {index[name] for ahead in range(TOLD_AHEAD) for name in plan_healing(table, blocks, turn + ahead)}
        for mover in sorted(told - {witness}):
            if witness is not None:
                # It was told of them at their first silence, and proves each death itself, several at once.
                known = set(self.known[witness])
                proof_s = max((self._probe_s[node] for node in known), default=0.0)
                seconds = config.REFUSED_S + min(proof_s, config.ANSWER_S)
                self.agenda.after(seconds, partial(self._learn, mover, known))
        self.agenda.after(config.CLAIM_S + TURN_MARGIN_S, partial(self._see_to_it, witness, turn + 1))

    def _table(self, witness: int | None) -> PlacementTable:
        layout = self.nodes.registry.view().layout
        dead = self.known.get(witness, set()) if witness is not None else set()
        return without(layout, [str(self.nodes.hosts.ids[node]) for node in dead])

    def _claim(self, node: int, span: Span) -> None:
        """Announce that `node` joins over `span`; it still has its blocks."""
        truth = self.nodes.truth
        if truth.state[node] != ONLINE or len(span) != len(self.nodes.span_of(node)):
            return
        former = self.nodes.span_of(node)
        self.nodes.become(node, JOINING)
        truth.start[node] = span.start
        self.nodes.registry.announce(node)
        self.agenda.after(config.CLAIM_S, partial(self._judge, node, former, 1))

    def _judge(self, node: int, former: Span, times: int) -> None:
        if self.nodes.truth.state[node] != JOINING:
            return
        verdict = judge_claim(self.nodes.placed(node), former, self._table(node), self.nodes.settings.blocks)
        if verdict == "load":
            self.nodes.moves += 1
            self.nodes.on_gone(node)
            self.nodes.load_span(node)
        elif verdict == "wait" and times < config.SETTLE_TIMES:
            self.agenda.after(config.CLAIM_S, partial(self._judge, node, former, times + 1))
        else:
            self.nodes.moves_refused += 1
            self.nodes.truth.start[node] = former.start
            self.nodes.become(node, ONLINE)
            self.nodes.registry.announce(node)
