"""Nodes without a model, which announce, watch each other and fill holes, for tests on a virtual clock."""

import asyncio
from dataclasses import dataclass, field, replace

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode, NumericsClass, Ping, Pong, Records, ReportLost, Watch
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span
from treeswarm.tasks import TaskSet
from treeswarm.topology.placement import fit_move
from treeswarm.topology.placements import PLACED
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.topology.tables import Placed, PlacementTable
from treeswarm.transport.memory import MemoryListener, MemoryNetwork, MemoryTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_node.membership.hole_watch import HoleWatch
from treeswarm_node.membership.liveness_monitor import LivenessMonitor

LAG_S = 4.0
LOAD_S = 10.0
BLOCKS = 8
RATE = 100.0
CLASS = NumericsClass("01" * 32, "float32")


class UnevenTransport(MemoryTransport):
    """Takes its time to dial some addresses, as a loaded machine's answers do."""

    late_s: dict[str, float]
    keyless: set[str]
    """Addresses of nodes that do not know the swarm's key; a node that is one of them is refused by all others."""
    address: str = ""

    async def connect(self, address: str, kind: StreamKind):  # type: ignore[no-untyped-def]  # as the base class
        if (address.partition("#")[0] in self.keyless) != (self.address in self.keyless):
            raise Refused("this is a private swarm, and the caller has no swarm key", FaultCode.WRONG_SWARM_KEY)
        await asyncio.sleep(self.late_s.get(address.partition("#")[0], 0.0))
        return await super().connect(address, kind)


@dataclass(eq=False)
class HealingNode:
    """One node.  Loading takes LOAD_S seconds, and a record reaches the others after the swarm's lag."""

    swarm: "HealingSwarm"
    key: FakeNode
    span: Span
    may_move: bool
    transport: UnevenTransport
    listener: MemoryListener
    state: NodeState = NodeState.ONLINE
    moves: int = 0
    claims: int = 0
    pings: int = 0
    reports: int = 0
    load_s: float = LOAD_S
    numerics: NumericsClass = CLASS
    limits: SpanLimits | None = None
    """Number of blocks that fit, or None if any span does."""
    heard: dict[str, NodeRecord] = field(default_factory=dict)
    """Records that other nodes answered with."""
    monitor: LivenessMonitor = field(init=False)
    holes: HoleWatch = field(init=False)
    tasks: TaskSet = field(default_factory=TaskSet)

    def __post_init__(self) -> None:
        hints: asyncio.Queue[str] = asyncio.Queue()
        self.monitor = LivenessMonitor(
            *(self.transport, self.key.id, MODEL, BLOCKS, self.read_records, hints),
            numerics=lambda: self.numerics,
            learn=self.learn,
        )
        self.holes = HoleWatch(self.monitor, lambda: self.swarm.lag_s, self._fit)

    def _fit(self, target: Span, swarm: PlacementTable) -> Span | None:
        return target if self.limits is None else fit_move(target, self.limits, swarm, BLOCKS)

    @property
    def placed(self) -> Placed:
        return Placed(self.key.id, self.span, RATE, PLACED[self.state])

    async def read_records(self) -> list[NodeRecord]:
        now = asyncio.get_running_loop().time()
        seen = {r.node: r for at, r in self.swarm.announced if at + self.swarm.lag_s <= now and r.node != self.key.id}
        newer = {n: r for n, r in self.heard.items() if n not in seen or seen[n].generation < r.generation}
        return list((seen | newer).values())

    async def learn(self, sealed: bytes) -> None:
        """Take the newest record of the node that answered; its id stands for the signed bytes here."""
        node = sealed.decode()
        self.heard[node] = [record for _, record in self.swarm.announced if record.node == node][-1]

    def announce(self, early_s: float = 0.0) -> None:
        port = int(self.listener.address.rpartition(":")[2])
        record = self.key.record(port, span=self.span, state=self.state, rate=RATE, numerics=self.numerics).record
        self.swarm.announced.append((asyncio.get_running_loop().time() - early_s, replace(record, pin="")))

    async def live(self) -> None:
        """Fill holes as `Lifecycle` does."""
        while True:
            span = await self.holes.wait_for_turn(lambda: self.placed, may_move=self.may_move)
            former, self.span, self.state = self.span, span, NodeState.JOINING
            self.claims += 1
            self.announce()
            if await self.holes.stands(self.placed, former):
                self.moves += 1
                await asyncio.sleep(self.load_s)
            else:
                self.span = former
            self.state = NodeState.ONLINE
            self.announce()

    async def answer(self, kind: StreamKind, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            if isinstance(message, ReportLost):
                self.reports += 1
                for node in message.nodes:
                    self.monitor.hints.put_nowait(node)
            elif isinstance(message, Watch):
                await stream.send(Records((self.key.id.encode(),), 0))
            elif isinstance(message, Ping):
                self.pings += 1
                await stream.send(Pong(message.stamp))

    async def kill(self) -> None:
        """End the node as SIGKILL does: its record stays."""
        await self.tasks.close()
        await self.listener.close()


@dataclass(eq=False)
class HealingSwarm:
    """All nodes, and the records that they announced, each with its time."""

    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    announced: list[tuple[float, NodeRecord]] = field(default_factory=list)
    nodes: list[HealingNode] = field(default_factory=list)
    lag_s: float = LAG_S
    late_s: dict[str, float] = field(default_factory=dict)
    """Seconds that a connection to an address takes."""
    keyless: set[str] = field(default_factory=set)
    """Addresses of nodes without the key of the swarm, which is open while there are none."""

    async def start(
        self,
        *spans: tuple[int, int],
        may_move: bool = True,
        numerics: NumericsClass = CLASS,
        limits: SpanLimits | None = None,
    ) -> list[HealingNode]:
        """Start nodes that have been online for a while."""
        started = []
        for span in spans:
            transport = UnevenTransport(self.network)
            transport.late_s, transport.keyless = self.late_s, self.keyless
            node: HealingNode | None = None

            async def accept(kind: StreamKind, stream: Stream) -> None:
                await self.at(stream).answer(kind, stream)

            listener = await transport.listen("127.0.0.1:0", accept)
            transport.address = listener.address
            node = HealingNode(
                self, FakeNode(), Span(*span), may_move, transport, listener, numerics=numerics, limits=limits
            )
            started.append(node)
        self.nodes += started
        for node in started:
            node.announce(early_s=self.lag_s)
            node.tasks.start(node.monitor.run())
            node.tasks.start(node.live())
        return started

    def at(self, stream: Stream) -> HealingNode:
        """Return the node at this end of an accepted stream."""
        return next(node for node in self.nodes if node.listener.address == stream.host)  # type: ignore[attr-defined]

    def covered(self, dead: HealingNode | None = None) -> bool:
        """Return whether every block is online on a living node."""
        online = [node.span for node in self.nodes if node.state is NodeState.ONLINE and node is not dead]
        return set(range(BLOCKS)) <= {block for span in online for block in range(span.start, span.end)}

    async def heal_s(self, dead: HealingNode, limit_s: float = 600.0) -> float:
        """Wait until every block is served again, and return the seconds that took beside loading."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self.covered(dead):
            assert loop.time() - began < limit_s, [(node.span, node.state) for node in self.nodes]
            await asyncio.sleep(0.1)
        return loop.time() - began - LOAD_S

    async def stop(self) -> None:
        for node in self.nodes:
            await node.kill()
