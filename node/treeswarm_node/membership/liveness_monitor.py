"""Probe other nodes, and learn which of them are dead although their records are still in date."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from treeswarm.errors import Refused, SwarmError
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeRecord
from treeswarm.registry.ask import ask_record
from treeswarm.topology.liveness import CONFIRM_S, PROOFS, Liveness, nodes_to_probe, probes_at_once
from treeswarm.topology.placements import placements
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport
from treeswarm_node.membership.key_watch import KeyWatch

log = logging.getLogger(__name__)

TICK_S = 1.0
# With ten thousand nodes a look takes 0.1 s: then it is repeated as rarely as this factor says.
REST = 20.0
# A probe waits for twice as long as the node's answers took lately, at least so many seconds (a handshake on a machine
# with a load of 20 took two), and the one after a failed probe twice as long: a loaded machine answers late, a dead one
# not at all.
FIRST_ANSWER_S, LAST_ANSWER_S = 4.0, 12.0
REMEMBERED_S = 60.0
# If the own event loop was late by so much during a probe, its failure says nothing about the other node.
OWN_LAG_S = 1.0

# The nodes that are believed dead are asked once more for so long before their blocks are taken over: the one that has
# come back answers in one round trip.
LAST_CHANCE_S = 1.0

ReadRecords = Callable[[], Awaitable[Sequence[NodeRecord]]]


@dataclass(eq=False)
class LivenessMonitor:
    """Keeps what one node knows of the life of others; `run` must be running."""

    transport: Transport
    node: str
    """Id of this node."""
    model: str
    """Config digest of the model."""
    blocks: int
    """Number of blocks of the model."""
    read_records: ReadRecords
    """Returns the records of all other nodes."""
    hints: "asyncio.Queue[str]"
    """Ids of nodes that a client, another node or a broker reports as lost."""
    numerics: Callable[[], NumericsClass | None] = lambda: None
    """Returns the numerics class of this node: nodes of others do not count, or all do if it is None."""
    learn: Callable[[bytes], Awaitable[object]] | None = None
    """Takes a sealed record that a node answered with, or None if records come from a registry alone."""
    liveness: Liveness = Liveness()
    keys: KeyWatch = field(default_factory=KeyWatch)
    _lag_total_s: float = 0.0
    """Seconds by which the own event loop was late, in all."""
    _slowest: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Time and seconds of the slowest answer of each node within REMEMBERED_S."""
    _probing: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)

    async def run(self) -> None:
        """Probe whom it is time to probe, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            pause_s = TICK_S
            while True:
                began = loop.time()
                await asyncio.sleep(pause_s)
                woke = loop.time()
                self._lag_total_s += max(0.0, woke - began - pause_s)
                await self.probe_due()
                pause_s = max(TICK_S, REST * (loop.time() - woke))
        finally:
            tasks = list(self._probing.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def living(self) -> list[NodeRecord]:
        """Return the records of the other nodes, without those that are proven dead or have another swarm key."""
        records, now = await self.read_records(), asyncio.get_running_loop().time()
        excluded = self.liveness.dead | self.keys.strangers(now)
        return [record for record in records if record.node not in excluded]

    def placements(self, records: Iterable[NodeRecord]) -> list[Placed]:
        """Return the placement of the nodes of `records` that can be in one chain with this one."""
        return placements(records, self.model, self.numerics())

    async def ask(self, living: Collection[str], dead: Collection[str]) -> set[str]:
        """Ask nodes for their newest records, and return the ids of those that answered.

        Those that are believed dead get LAST_CHANCE_S, the others the time of a probe.
        """
        records = {record.node: record for record in await self.read_records()}
        times = dict.fromkeys(dead, LAST_CHANCE_S) | dict.fromkeys(living, FIRST_ANSWER_S)
        asked = [self._ask(records[node], answer_s) for node, answer_s in times.items() if node in records]
        return {node for node in await asyncio.gather(*asked) if node is not None}

    async def verify(self) -> None:
        """Probe now whom it is time to probe, and wait for the results."""
        await self.probe_due()
        if self._probing:
            await asyncio.wait(self._probing.values(), timeout=LAST_ANSWER_S)

    async def prove(self) -> None:
        """Probe until the nodes whose death matters have answered or are proven dead."""
        for _ in range(PROOFS):
            await self.verify()
            if not self.liveness.silences:
                return
            await asyncio.sleep(CONFIRM_S)

    def note_silence(self, node: str) -> None:
        """Learn that a node did not answer another part of this program: it is probed soon."""
        self.liveness = self.liveness.with_report(node, asyncio.get_running_loop().time())

    def note_visit(self, record: NodeRecord, error: Exception | None) -> None:
        """Learn from a visit that another part of this program made."""
        now = asyncio.get_running_loop().time()
        if error is None:
            self.keys.note_answer(record.node, now)
        elif isinstance(error, Refused):
            self.keys.note_refusal(record, error, now)
        else:
            self.note_silence(record.node)

    async def probe_due(self) -> None:
        """Start the probes that are due."""
        now = asyncio.get_running_loop().time()
        while not self.hints.empty():
            self.liveness = self.liveness.with_report(self.hints.get_nowait(), now)
        records = {record.node: record for record in await self.read_records() if record.model == self.model}
        self.liveness = self.liveness.known_as({node: record.generation for node, record in records.items()})
        self._slowest = {node: slowest for node, slowest in self._slowest.items() if node in records}
        table = PlacementTable.of(self.placements(records.values()))
        for node in nodes_to_probe(self.liveness, self.node, table, self.blocks, now):
            if node not in self._probing and len(self._probing) < probes_at_once(self.liveness):
                task = asyncio.create_task(self._probe(records[node]))
                self._probing[node] = task
                task.add_done_callback(lambda _, node=node: self._probing.pop(node, None))  # type: ignore[misc]

    def _answer_s(self, node: str, now: float) -> float:
        """Return the seconds within which a node must answer the next probe."""
        at, slowest_s = self._slowest.get(node, (now, 0.0))
        usual_s = max(FIRST_ANSWER_S, 2 * slowest_s if now - at < REMEMBERED_S else 0.0)
        return min(2 * usual_s if node in self.liveness.silences else usual_s, LAST_ANSWER_S)

    def _note_answer(self, node: str, seconds: float, now: float) -> None:
        at, slowest_s = self._slowest.get(node, (now, 0.0))
        if seconds > slowest_s or now - at > REMEMBERED_S:
            self._slowest[node] = now, seconds

    async def _ask(self, record: NodeRecord, answer_s: float) -> str | None:
        try:
            sealed = await ask_record(self.transport, record.dial, answer_s)
        except (SwarmError, TimeoutError):
            self.note_silence(record.node)
            return None
        if self.learn is not None:
            await self.learn(sealed)
        self.liveness = self.liveness.with_answer(record.node, asyncio.get_running_loop().time())
        return record.node

    async def _probe(self, record: NodeRecord) -> None:
        loop, node = asyncio.get_running_loop(), record.node
        began, lag_s = loop.time(), self._lag_total_s
        answer_s = self._answer_s(node, began)
        try:
            await round_trip(self.transport, record.dial, answer_s=answer_s)
        except Refused as error:  # It has too many streams, say, or belongs to another private swarm: but it lives.
            self.keys.note_refusal(record, error, loop.time())
        except (SwarmError, TimeoutError) as error:
            timed_out = loop.time() - began > answer_s / 2
            if not (timed_out and self._lag_total_s - lag_s > OWN_LAG_S):
                self.liveness = self.liveness.with_silence(node, record.generation, began, loop.time())
                reason = str(error) or f"no answer within {answer_s:.0f} s"
                log.info("the node at %s with blocks %s is silent: %s", record.address, record.span, reason)
            return
        else:
            self.keys.note_answer(node, loop.time())
        self._note_answer(node, loop.time() - began, loop.time())
        if node in self.liveness.dead:
            log.info("the node at %s answers again", record.address)
        self.liveness = self.liveness.with_answer(node, loop.time())
