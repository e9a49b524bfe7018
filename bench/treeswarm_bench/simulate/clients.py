"""Clients: choose a route on a stale snapshot, meet dead and full nodes, ban, try again, recover."""

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.topology.bans import BanList
from treeswarm.topology.coordinates import Coordinate
from treeswarm.topology.routing import Route, fastest_chain
from treeswarm_bench.simulate import config
from treeswarm_bench.simulate.agenda import Agenda
from treeswarm_bench.simulate.config import Settings
from treeswarm_bench.simulate.hosts import draw_places, locate
from treeswarm_bench.simulate.nodes import Nodes

Hops = list[tuple[int, Span]]


@dataclass(eq=False)
class Client:
    """One program that asks for texts, one after another."""

    coordinate: Coordinate
    bans: BanList = field(default_factory=BanList)


@dataclass(eq=False)
class Session:
    """A text being generated: nodes by index, in order."""

    client: Client
    hops: Hops
    over: bool = False


class Clients:
    """`counts`: requests, served, gave_up, no_route, waiting; failed_first; deaths, recovered, lost."""

    def __init__(self, settings: Settings, agenda: Agenda, nodes: Nodes, random: np.random.Generator) -> None:
        self.settings, self.agenda, self.nodes, self.random = settings, agenda, nodes, random
        self.counts: Counter[str] = Counter()
        self.planning_s: list[float] = []
        self.traversal_s: list[float] = []
        # Dictionaries as sets that keep their order: the order of a set of objects differs from run to run.
        self._sessions: dict[int, dict[Session, None]] = {}
        self._model = Span(0, settings.blocks)
        nodes.on_gone = self._on_gone

    def begin(self) -> None:
        """All clients exist from the start and think for a while."""
        places = draw_places(self.settings.clients, self.random)
        alive = np.flatnonzero(self.nodes.truth.state >= 0)
        for place in places:
            asked = self.random.choice(alive, size=config.SAMPLES)
            known = [self.nodes.coordinates[one] for one in asked.tolist()]
            client = Client(locate(place, self.nodes.hosts.place[asked], known, self.random))
            self._think(client, config.THINK_S + config.SESSION_S)

    def _think(self, client: Client, mean_s: float = config.THINK_S) -> None:
        def ask() -> None:
            self.counts["requests"] += 1
            self.counts["waiting"] += 1
            self._ask(client, attempt=1)

        self.agenda.after(float(self.random.exponential(mean_s)), ask)

    def _ask(self, client: Client, attempt: int) -> None:
        try:
            hops, bad = self._try(client, self._model, client.coordinate, client.coordinate, attempt == 1)
        except MissingBlocks:
            return self._answer(client, "no_route")
        if not bad:
            session = Session(client, hops)
            self._occupy(session, hops, 1)
            self.agenda.after(float(self.random.exponential(config.SESSION_S)), partial(self._finish, session))
            self.counts["waiting"] -= 1
            self.counts["served"] += 1
            return None
        self.counts["failed_first"] += attempt == 1
        if attempt == config.ATTEMPTS:
            return self._answer(client, "gave_up")
        return self.agenda.after(self._cost_s(bad), partial(self._ask, client, attempt + 1))

    def _answer(self, client: Client, how: str) -> None:
        self.counts["waiting"] -= 1
        self.counts[how] += 1
        self._think(client)

    def _finish(self, session: Session) -> None:
        if not session.over:
            session.over = True
            self._occupy(session, session.hops, -1)
            self._think(session.client)

    def _try(
        self, client: Client, wanted: Span, start: Coordinate, end: Coordinate, first: bool, avoid: Hops | None = None
    ) -> tuple[Hops, list[int]]:
        """A chain over `wanted`, and those of its nodes that refuse or are dead: now banned."""
        now = self.agenda.now
        if self.settings.forget_bans:
            client.bans = BanList()
        mine = {str(self.nodes.hosts.ids[node]) for node, _ in avoid or ()}
        chain = self._plan(wanted, start, end, client.bans.banned(now) | mine, timed=first)
        hops = [(self.nodes.registry.index[name], span) for name, span in chain.hops]
        bad = [node for node, span in hops if not self.nodes.serves(node, span) or self.nodes.full(node)]
        for node, _ in hops:
            name = str(self.nodes.hosts.ids[node])
            client.bans = client.bans.with_failure(name, now) if node in bad else client.bans.with_answer(name, now)
        if first and not bad:
            self.traversal_s.append(chain.seconds)
        return hops, bad

    def _plan(self, wanted: Span, start: Coordinate, end: Coordinate, avoid: frozenset[str], timed: bool) -> Route:
        candidates = self.nodes.registry.view().candidates
        seed = int(self.random.integers(2**32))
        began = time.thread_time()
        chain = fastest_chain(candidates, wanted, start, end, room=config.ROOM, avoid=avoid, jitter_seed=seed)
        if timed:
            self.planning_s.append(time.thread_time() - began)
        return chain

    def _on_gone(self, node: int) -> None:
        for session in list(self._sessions.get(node, ())):
            self.counts["deaths"] += 1
            self.agenda.after(config.NOTICE_S, partial(self._recover, session, node, 1))

    def _recover(self, session: Session, node: int, attempt: int) -> None:
        """Replace one node of a session by a chain over exactly its blocks."""
        place = next((i for i, (one, _) in enumerate(session.hops) if one == node), None)
        if session.over or place is None:
            return
        client, hops = session.client, session.hops
        ends = [client.coordinate, *(self.nodes.coordinates[one] for one, _ in hops), client.coordinate]
        try:
            found, bad = self._try(client, hops[place][1], ends[place], ends[place + 2], False, avoid=hops)
        except MissingBlocks:
            found, bad = [], [node]
        if not bad:
            self._occupy(session, [hops[place]], -1)
            self._occupy(session, found, 1)
            session.hops = [*hops[:place], *found, *hops[place + 1 :]]
            self.counts["recovered"] += 1
        elif attempt == config.ATTEMPTS:
            self.counts["lost"] += 1
            self._finish(session)
        else:
            wait_s = self._cost_s(bad) if found else config.POLL_S
            self.agenda.after(wait_s, partial(self._recover, session, node, attempt + 1))

    def _occupy(self, session: Session, hops: Hops, sign: int) -> None:
        for node, _ in hops:
            self.nodes.load(node, sign)
            here = self._sessions.setdefault(node, {})
            if sign > 0:
                here[session] = None
            else:
                here.pop(session, None)

    def _cost_s(self, bad: list[int]) -> float:
        return config.CONNECT_S if any(map(self.nodes.dead, bad)) else config.REFUSED_S
