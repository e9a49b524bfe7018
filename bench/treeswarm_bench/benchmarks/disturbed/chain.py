"""A chain of scripted nodes behind the interface that the generation loop uses.

It has what shapes a round's time: links that delay and carry one message at a time, nodes that compute what waits for
them in one forward, rows that a hint saves, and a repair.  Sessions, codecs and control streams are left out.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Answer, Answers, Append, HopTiming, Profile
from treeswarm.tasks import TaskSet
from treeswarm_bench.benchmarks.disturbed.text import ScriptedText
from treeswarm_bench.benchmarks.disturbed.world import (
    BYTES_PER_S,
    CLIENT,
    CLIENT_ROW_BYTES,
    NODES,
    REPAIR_S,
    ROW_BYTES,
    SMALL,
    Speeds,
    World,
    sleep_until,
)
from treeswarm_client.chain.in_flight import Interrupted, RowsInFlight
from treeswarm_client.planner.costs import ChainHop

CREDIT_ROWS = 1024


@dataclass(eq=False)
class _Travelling:
    """An append on its way."""

    append: Append
    session: object
    """Whose rows these are."""
    timings: tuple[HopTiming, ...] = ()
    is_dead: bool = False
    """Whether the walk has left all of its rows."""
    computed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the present node has computed it."""
    arrived_s: float = 0.0


@dataclass(eq=False)
class ScriptedNode:
    """One node: its device computes everything that waits in one forward."""

    name: str
    world: World
    factor: float = 1.0
    """How many times as long its forwards take as those of the others."""
    cold_forwards: int = 0
    """Number of coming forwards that are cold."""
    forwards: int = 0
    sessions: int = 0
    """Number of sessions in all forwards together."""
    _waiting: list[_Travelling] = field(default_factory=list)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def machine(self) -> str:
        return self.name.split()[0]

    async def compute(self, travelling: _Travelling) -> None:
        travelling.computed = asyncio.Event()
        travelling.arrived_s = self.world.loop.now
        self._waiting.append(travelling)
        self._arrival.set()
        await travelling.computed.wait()

    async def run(self) -> None:
        """Compute what waits, again and again until cancelled."""
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._forward(batch)

    async def _forward(self, batch: list[_Travelling]) -> None:
        started = self.world.loop.now
        rows = [0 if each.is_dead else each.append.rows for each in batch]
        seconds = 0.0
        if sum(rows):
            seconds = self.factor * self.world.forward_base_s(sum(rows))
            if self.cold_forwards:
                self.cold_forwards -= 1
                seconds *= self.world.script.cold_nodes
            seconds = self.world.work_s(self.machine, seconds)
            self.world.at_work.add(self.machine)
            await asyncio.sleep(seconds)
            self.world.at_work.discard(self.machine)
        sessions = len({id(each.session) for each in batch})
        self.forwards, self.sessions = self.forwards + 1, self.sessions + sessions
        for each, count in zip(batch, rows, strict=True):
            queue_us = int(1e6 * (started - each.arrived_s))
            each.timings += (HopTiming(queue_us, int(1e6 * seconds), count, sessions),)
            each.computed.set()


@dataclass(eq=False)
class _Uplink:
    """What one machine sends: one message at a time leaves, and order is kept."""

    free_s: float = 0.0
    last_arrival_s: float = 0.0

    def arrival(self, now: float, byte_count: float, delay_s: float) -> float:
        """Return when a message that is sent now arrives."""
        self.free_s = max(now, self.free_s) + byte_count / BYTES_PER_S
        self.last_arrival_s = max(self.last_arrival_s, self.free_s + delay_s)
        return self.last_arrival_s


@dataclass(eq=False)
class SharedNodes:
    """Nodes that several chains lead through, with what each of them sends; `start` runs them until `close`."""

    nodes: list[ScriptedNode]
    uplinks: list[_Uplink] = field(init=False)
    _running: list["asyncio.Task[None]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uplinks = [_Uplink() for _ in self.nodes]

    def start(self) -> None:
        """Let the nodes compute."""
        self._running = [asyncio.create_task(node.run()) for node in self.nodes]

    async def close(self) -> None:
        """End the nodes."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


@dataclass(eq=False)
class ScriptedEpoch:
    """The configuration of the chain between two repairs, as the loop reads it."""

    number: int
    nodes: list[ScriptedNode]
    in_flight: RowsInFlight = field(default_factory=RowsInFlight)
    credit_rows: int = CREDIT_ROWS
    prefix_rows: int = 0

    @property
    def profiled_hops(self) -> tuple[ChainHop, ...]:
        scripts = [node.world.script for node in self.nodes]
        return tuple(
            ChainHop(node.name, profile(node.factor, script.speeds), script.shares_cores)
            for node, script in zip(self.nodes, scripts, strict=True)
        )

    @property
    def answered(self) -> int:
        return self.in_flight.answered

    @property
    def free_credit_rows(self) -> int:
        return self.credit_rows - self.in_flight.rows


def profile(factor: float, speeds: Speeds = SMALL) -> Profile:
    """Return the profile that an undisturbed node would measure and send."""
    rows = sorted({1, 2, 4, *(int(count) for count in speeds.rows)})[: speeds.profiled]
    return tuple((count, int(1e6 * factor * float(np.interp(count, speeds.rows, speeds.forward_s)))) for count in rows)


@dataclass(eq=False)
class ScriptedChain:
    """One session on scripted nodes.  `start` must be called before it is used, `close` at the end."""

    text: ScriptedText
    world: World
    hops: tuple[Any, ...] = NODES
    shared: SharedNodes | None = None
    """Nodes that other chains use too, or None if this chain has nodes of its own."""
    _background: TaskSet = field(default_factory=TaskSet)
    _running: list["asyncio.Task[None]"] = field(default_factory=list)
    _places: dict[int, tuple[int, bool]] = field(default_factory=lambda: {0: (-1, True)})
    """Position in the text of every tree node by id, and whether its path is the text's own."""
    _travelling: list[_Travelling] = field(default_factory=list)
    _epochs: int = -1

    def start(self) -> None:
        """Start the nodes, and the replacement of one if the script has it; nodes that are shared run already."""
        if self.shared is not None:
            self._begin_epoch(self.shared.nodes)
            return
        lost = self.world.script.replacement
        cold = 2 if self.world.script.cold_nodes > 1 else 0
        already = lost is not None and lost.start_s < 0
        nodes = [ScriptedNode(name, self.world, cold_forwards=cold) for name in NODES]
        self._begin_epoch([self._successor(node) if already else node for node in nodes])

    def begin_script(self) -> None:
        """Begin the script: the prompt is computed."""
        self.world.origin_s = self.world.loop.now
        lost = self.world.script.replacement
        if lost is not None and lost.start_s >= 0:
            self.world.loop.call_later(lost.start_s, self.epoch.in_flight.interrupt)

    async def append(self, append: Append) -> "asyncio.Future[Answer]":
        """Ship one append and return the future of its answer.  Raises Interrupted if the chain lost a node."""
        if self.epoch.in_flight.interrupted.is_set():
            raise Interrupted("the chain lost a node")
        answer = self.epoch.in_flight.add(append)
        travelling = _Travelling(append, self)
        self._travelling.append(travelling)
        self._background.start(self._travel(travelling, self.epoch))
        return answer

    async def repair(self, trunk: Sequence[int], tip: int) -> None:
        """Replace the lost node, and begin a new epoch on the given trunk."""
        await asyncio.sleep(REPAIR_S)
        await self._end_nodes()
        self._places[tip] = (len(trunk) - 1, True)
        self._begin_epoch([self._successor(node) for node in self.epoch.nodes])

    def send_hint(self, trunk_length: int, tip: int) -> None:
        """Tell the nodes that the rows in flight are dead: the next round's first append drops them all."""
        in_flight = list(self._travelling)

        def arrive() -> None:
            for travelling in in_flight:
                travelling.is_dead = True

        self.world.loop.call_later(self.world.message_s(CLIENT), arrive)

    def record_traversal(self, seconds: float) -> None:
        """Do nothing: no node of this chain stalls."""

    def reroute_if_faster(self, *, trunk: int, rounds_left: float) -> None:
        """Do nothing: there is no other chain."""

    async def close(self) -> None:
        """End everything that runs."""
        self._background.cancel()
        await self._end_nodes()

    # ---------------------------------------------------------------- inside

    def _successor(self, node: ScriptedNode) -> ScriptedNode:
        lost = self.world.script.replacement
        if lost is None or node.machine != lost.node:
            return ScriptedNode(node.name, self.world, node.factor)
        return ScriptedNode(f"{node.name} replaced", self.world, lost.factor)

    def _begin_epoch(self, nodes: list[ScriptedNode]) -> None:
        self._epochs += 1
        self.epoch = ScriptedEpoch(self._epochs, nodes)
        self._travelling = []
        if self.shared is not None:
            self._uplinks = [_Uplink(), *self.shared.uplinks]
            return
        self._uplinks = [_Uplink() for _ in range(len(nodes) + 1)]
        self._running = [asyncio.create_task(node.run()) for node in nodes]

    async def _end_nodes(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _travel(self, travelling: _Travelling, epoch: ScriptedEpoch) -> None:
        append, machine = travelling.append, CLIENT
        tokens = self._answers(append)
        for place, node in enumerate(epoch.nodes):
            await self._send(place, machine, append.rows * (ROW_BYTES if place else CLIENT_ROW_BYTES))
            await node.compute(travelling)
            machine = node.machine
        await self._send(len(epoch.nodes), machine, append.rows * CLIENT_ROW_BYTES)
        if travelling in self._travelling:
            self._travelling.remove(travelling)
        if not epoch.in_flight.interrupted.is_set():
            epoch.in_flight.resolve(_answer(append, tokens, travelling.timings))

    async def _send(self, place: int, machine: str, byte_count: float) -> None:
        world = self.world
        await sleep_until(self._uplinks[place].arrival(world.loop.now, byte_count, world.message_s(machine)))

    def _answers(self, append: Append) -> NDArray[np.int64]:
        """Return the target's token after every row, int64 [rows]."""
        positions, on_path = [], []
        for i, (parent, token) in enumerate(zip(append.parents.tolist(), append.tokens.tolist(), strict=True)):
            above, is_right = self._places[parent]
            place = (above + 1, is_right and int(self.text.tokens[above + 1]) == token)
            self._places[append.first_id + i] = place
            positions.append(place[0])
            on_path.append(place[1])
        return self.text.answers(np.array(positions), append.tokens.astype(np.int64), np.array(on_path))


def _answer(append: Append, tokens: NDArray[np.int64], timings: tuple[HopTiming, ...]) -> Answer:
    ids = append.first_id + np.arange(append.rows)
    kept = {Answers.NONE: slice(0, 0), Answers.LAST: slice(-1, None), Answers.ALL: slice(None)}[append.answers]
    answered = tokens[kept].astype(np.uint32)
    return Answer(
        b"",
        append.epoch,
        append.seq,
        ids[kept].astype(np.uint32),
        answered,
        np.zeros(len(answered), np.float32),
        timings,
    )
