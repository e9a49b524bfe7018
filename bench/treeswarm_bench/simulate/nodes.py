"""Simulated nodes: they choose a span, load, serve, check whether to move, and leave."""

from collections.abc import Callable
from functools import partial

import numpy as np

from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate
from treeswarm.topology.placement import choose_again, choose_span, plan_move
from treeswarm.topology.tables import DRAINING, JOINING, ONLINE, STATES, Placed, PlacementTable
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.config import SimulationSettings
from treeswarm_bench.simulate.healing import SimulatedHealing
from treeswarm_bench.simulate.hosts import SimulatedHosts, first_coordinates, locate
from treeswarm_bench.simulate.meter import SimulationMeter
from treeswarm_bench.simulate.registry import ABSENT, SimulatedRegistry


class SimulatedNodes:
    """All nodes of a simulation, by index into `hosts`.

    `on_gone(node)` is called when a node stops serving its span, because it moves or leaves.
    """

    def __init__(
        self,
        settings: SimulationSettings,
        hosts: SimulatedHosts,
        agenda: Agenda,
        registry: SimulatedRegistry,
        meter: SimulationMeter,
        random: np.random.Generator,
    ) -> None:
        self.settings, self.hosts, self.agenda = settings, hosts, agenda
        self.registry, self.meter, self.random = registry, meter, random
        self.truth = registry.truth
        self.truth.free[:] = hosts.cache
        self.truth.hop_s[:] = config.OVERHEAD_S
        self.coordinates: list[Coordinate] = []
        self.moves = self.moves_refused = 0
        self.on_gone: Callable[[int], None] = lambda _: None
        self.healing = SimulatedHealing(self)
        self._alarm = False
        self._load_s: dict[int, float] = {}
        """Seconds that each node takes to load the span that it is about to serve."""

    def grow(self, count: int) -> None:
        """Let nodes 0 up to `count` join one after another; all are online at the start."""
        hosts, truth, blocks = self.hosts, self.truth, self.settings.blocks
        self.coordinates = first_coordinates(hosts.place[:count], self.random)
        end = truth.start.copy()
        for node in range(count):
            before = PlacementTable(
                hosts.ids[:node], truth.start[:node], end[:node], hosts.rate[:node], np.full(node, ONLINE)
            )
            span = choose_span(before, blocks, int(hosts.length[node]), str(hosts.ids[node]))
            truth.start[node], end[node] = span.start, span.end
            self.registry.place(node, self.coordinates[node])
            self.become(node, ONLINE)
            self.agenda.after(float(self.random.uniform(0, config.CHECK_S[1])), partial(self._check, node))
        self.registry.publish_all()

    def arrive(self, node: int) -> None:
        """Let a new node join.  Nodes arrive in the order of their index."""
        alive = np.flatnonzero(self.truth.state[:node] != ABSENT)
        measured = self.random.choice(alive, size=config.SAMPLES) if len(alive) else alive
        coordinates = [self.coordinates[other] for other in measured.tolist()]
        self.coordinates.append(locate(self.hosts.place[node], self.hosts.place[measured], coordinates, self.random))
        self.registry.place(node, self.coordinates[node])
        layout, length = self.registry.view().layout, int(self.hosts.length[node])
        span = choose_span(layout, self.settings.blocks, length, str(self.hosts.ids[node]))
        self.truth.start[node] = span.start
        self.become(node, JOINING)
        self.registry.announce(node)
        self.agenda.after(config.SETTLE_S, partial(self._settle, node, 1))
        self.agenda.after(float(self.random.uniform(*config.CHECK_S)), partial(self._check, node))

    def leave_one(self) -> None:
        """Let a random node leave.  Half of the nodes that leave drain first."""
        alive = np.flatnonzero(self.truth.state != ABSENT)
        if not len(alive):
            return
        node = int(self.random.choice(alive))
        if self.random.random() < config.GRACEFUL and self.truth.state[node] == ONLINE:
            self.become(node, DRAINING)
            self.registry.announce(node)
            self.agenda.after(config.DRAIN_S, partial(self._withdraw, node))
        else:
            self.vanish(node)

    def vanish(self, node: int) -> None:
        """Let a node vanish without a word."""
        self._go(node)
        if self.settings.probes:
            self.healing.on_death(node)

    def lose_a_block(self) -> None:
        """Let all holders of a random block vanish at once."""
        block = int(self.random.integers(self.settings.blocks))
        end = self.truth.start + self.hosts.length
        holders = (self.truth.state != ABSENT) & (self.truth.start <= block) & (block < end)
        for node in np.flatnonzero(holders).tolist():
            self.vanish(node)

    def serves(self, node: int, span: Span) -> bool:
        """Return whether `node` is online and serves `span`."""
        return bool(self.truth.state[node] == ONLINE) and span in self.span_of(node)

    def full(self, node: int) -> bool:
        """Return whether `node` has no room for another session."""
        return bool(self.truth.free[node] < config.ROOM)

    def dead(self, node: int) -> bool:
        """Return whether `node` has left or has not joined yet."""
        return bool(self.truth.state[node] == ABSENT)

    def load(self, node: int, sessions: int) -> None:
        """Add `sessions` to `node`, or remove them if negative.

        Its next record says so.  A node that became full, or has room again, announces that at once.
        """
        was_full = self.full(node)
        busy_s = float(self.hosts.length[node]) * config.ROWS / float(self.hosts.rate[node])
        self.truth.free[node] -= sessions * config.ROOM
        self.truth.hop_s[node] += sessions * config.DUTY * busy_s
        if self.full(node) != was_full and not self.dead(node):
            self.registry.announce(node)

    def poll(self) -> None:
        """React to a new snapshot: if a block is missing from it, the nodes whose turn it is fill the hole."""
        if not self.settings.probes:
            return
        weakest = float(self.registry.view().layout.throughput(self.settings.blocks).min())
        if weakest == 0 and not self._alarm:
            self.healing.on_hole_in_records()
        self._alarm = weakest == 0

    def _settle(self, node: int, times: int) -> None:
        """Choose again if others announced the same blocks; load once the choice stands."""
        if self.truth.state[node] != JOINING:
            return
        span = choose_again(self.placed(node), self.healing.known_layout(node), self.settings.blocks)
        if span.start != self.truth.start[node] and times <= config.SETTLE_TIMES:
            self.truth.start[node] = span.start
            self.registry.announce(node)
            self.agenda.after(config.SETTLE_S, partial(self._settle, node, times + 1))
        else:
            self.load_span(node)

    def load_span(self, node: int) -> None:
        """Let a node load its span, and serve it."""
        self._load_s[node] = float(self.random.uniform(*config.LOAD_S))
        self.agenda.after(self._load_s[node], partial(self._serve, node))

    def _serve(self, node: int) -> None:
        if self.truth.state[node] == JOINING:
            self.become(node, ONLINE)
            self.registry.announce(node)

    def _check(self, node: int) -> None:
        """Consider a move about every ten minutes, for as long as the node lives."""
        if self.dead(node):
            return
        self._consider_move(node)
        self.agenda.after(float(self.random.uniform(*config.CHECK_S)), partial(self._check, node))

    def _consider_move(self, node: int) -> None:
        """Begin to move if `plan_move` advises it."""
        if self.truth.state[node] != ONLINE:
            return
        if plan_move(self.placed(node), self.healing.known_layout(node), self.settings.blocks):
            self.become(node, DRAINING)
            self.registry.announce(node)
            self.agenda.after(config.SETTLE_S, partial(self._confirm_move, node))

    def _confirm_move(self, node: int) -> None:
        """Plan the move again and move or stay: by now nodes that began to move at the same time see each other."""
        if self.truth.state[node] != DRAINING:
            return
        span = plan_move(self.placed(node), self.healing.known_layout(node), self.settings.blocks)
        if span:
            self.agenda.after(max(config.DRAIN_S - config.SETTLE_S, 0), partial(self._move, node, span))
        else:
            self.moves_refused += 1
            self.become(node, ONLINE)
            self.registry.announce(node)

    def _move(self, node: int, span: Span) -> None:
        if self.truth.state[node] != DRAINING:
            return
        self.moves += 1
        self.on_gone(node)
        self.truth.start[node] = span.start
        self.become(node, JOINING)
        self.registry.announce(node)
        self.load_span(node)

    def _withdraw(self, node: int) -> None:
        if self.truth.state[node] == DRAINING:
            self._go(node)
            self.registry.announce(node)

    def _go(self, node: int) -> None:
        self.become(node, ABSENT)
        self.on_gone(node)

    def become(self, node: int, state: int) -> None:
        was_online = bool(self.truth.state[node] == ONLINE)
        self.truth.state[node] = state
        if was_online != (state == ONLINE):
            span, rate = self.span_of(node), float(self.hosts.rate[node])
            load_s = self._load_s.pop(node, 0.0) if state == ONLINE else 0.0
            self.meter.change(self.agenda.now, span.start, span.end, rate, -1 if was_online else 1, load_s)

    def span_of(self, node: int) -> Span:
        start = int(self.truth.start[node])
        return Span(start, start + int(self.hosts.length[node]))

    def placed(self, node: int) -> Placed:
        state = STATES[int(self.truth.state[node])]
        return Placed(str(self.hosts.ids[node]), self.span_of(node), float(self.hosts.rate[node]), state)
