"""The swarm as one client sees it: records, distances it measured, nodes it avoids; and the way through it."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from treeswarm.errors import Mismatch, MissingBlocks, Refused, RouteError, SwarmError
from treeswarm.model_files import ModelShape
from treeswarm.protocol.messages import FaultCode, NumericsClass
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm.topology.bans import BanList
from treeswarm.topology.coordinates import Coordinate, update
from treeswarm.topology.routing import END, Candidate, CandidateTable, fastest_chain, worth_changing
from treeswarm_client.discovery.round_trip import RoundTrip
from treeswarm_client.discovery.route import FORGOTTEN, Hop, Target

log = logging.getLogger(__name__)

# A node that was full a moment ago: a generation ends somewhere every few seconds.
FULL_S = 3.0
# What a node that tells no rate is thought to need for a block's tree, seconds: a slow CPU.
UNKNOWN_BLOCK_S = 0.05
LOOK_AGAIN_S = 0.5
# What others load, or have put away, they may not serve; before loading, a node does not know its weights' digest.
SERVING = {NodeState.ONLINE, NodeState.DRAINING}
FULL = {FaultCode.FULL, FaultCode.TOO_MANY, FaultCode.OUT_OF_ROOM}


@dataclass(eq=False)
class SwarmView:
    """A `Router` over a registry.  `watch` must be running."""

    registry: Registry
    target: Target
    rows: int
    """What a traversal carries, for predicting its time."""
    dials: Mapping[str, str] = field(default_factory=dict)
    """Addresses that a user typed for nodes, by id: they go before what the nodes' records say."""
    snapshot: Snapshot = ()
    coordinate: Coordinate = Coordinate()
    bans: BanList = BanList()
    errors: dict[str, str] = field(default_factory=dict)
    """What each node last failed with."""
    round_trips: dict[str, RoundTrip] = field(default_factory=dict)
    full_until: dict[str, float] = field(default_factory=dict)
    """Time until which each node that refused for lack of room is avoided."""
    _candidates: tuple[Snapshot, CandidateTable | None] = ((), None)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _seed: int = field(default_factory=lambda: random.getrandbits(32))

    async def watch(self) -> None:
        """Follow the registry; until cancelled."""
        async for snapshot in self.registry.watch():
            self.snapshot = snapshot
            self._news.set()

    def route(
        self, wanted: Span, *, before: str | None, after: str | None, room: int, avoid: Collection[str]
    ) -> Sequence[Hop]:
        """The fastest chain for `wanted`; see `Router`."""
        now = asyncio.get_running_loop().time()
        records = self._usable()
        full = {node for node, until in self.full_until.items() if now < until}
        banned = self.bans.banned(now)
        try:
            return self._fastest(records, wanted, before, after, room, {*avoid, *full, *banned})
        except MissingBlocks as missing:
            with contextlib.suppress(MissingBlocks):
                # A record may be a minute old: who has not refused lately may have room again.
                return self._fastest(records, wanted, before, after, 0, {*avoid, *full, *banned})
            with contextlib.suppress(MissingBlocks):
                self._fastest(records, wanted, before, after, 0, {*avoid, *banned})
                raise Refused(
                    f"every node that serves blocks {wanted} is full: wait with --patience SECONDS, ask for fewer "
                    "tokens, or try again later",
                    FaultCode.FULL,
                ) from None
            raise MissingBlocks(f"{missing}{self._reasons(wanted)}") from None

    def nodes_to_leave(self, hops: Sequence[Hop], *, room: int, trunk: int, rounds_left: float) -> Collection[str]:
        """See `Router`."""
        records, own = self._usable(), {hop.node: hop for hop in hops}
        if not own.keys() <= records.keys():
            return ()
        now = asyncio.get_running_loop().time()
        whole = Span(0, self.target.blocks)
        here = [replace(_candidate(records[node], self.rows), span=hop.span) for node, hop in own.items()]
        there = [_candidate(record, self.rows) for record in records.values()]
        # What this session has reserved is free to itself.
        there = [replace(one, free_tokens=one.free_tokens + (room if one.node in own else 0)) for one in there]
        measured = self._measured(start=True, end=True)
        ends = (self.coordinate, self.coordinate)
        with contextlib.suppress(MissingBlocks):
            current = fastest_chain(here, whole, *ends, room=0, measured=measured)
            best = fastest_chain(there, whole, *ends, room=room, avoid=self.bans.banned(now), measured=measured)
            # Open, resume and one more traversal, while the trunk is computed again as fast as trees are.
            change_s = 4 * current.seconds + best.seconds * trunk / self.rows
            if worth_changing(current.seconds, best.seconds, change_s=change_s, rounds_left=rounds_left):
                return own.keys() - {node for node, _ in best.hops}
        return ()

    def report_failure(self, node: str, error: SwarmError) -> None:
        """Avoid it for a while, longer each time; one that is only full, not so long."""
        now = asyncio.get_running_loop().time()
        code = error.code if isinstance(error, Refused) else None
        self.errors[node] = str(error)
        if code in FULL:
            self.full_until[node] = now + FULL_S * random.uniform(0.5, 1.5)
        elif code not in FORGOTTEN:
            self.bans = self.bans.with_failure(node, now)

    def report_round_trip(self, node: str, round_trip_s: float) -> None:
        """Learn how far it is, and by it where this client stands."""
        known = self.round_trips.get(node, RoundTrip()).with_sample(round_trip_s)
        self.round_trips[node] = known
        record = next((s.record for s in self.snapshot if s.record.node == node), None)
        if record is not None and record.position is not None:
            self.coordinate = update(self.coordinate, record.position, known.smoothed)

    def report_traversal(self, nodes: Collection[str]) -> None:
        """Forget the earlier failures of `nodes`, which computed and forwarded a traversal; see `topology.bans`."""
        now = asyncio.get_running_loop().time()
        for node in nodes:
            self.bans = self.bans.with_answer(node, now)

    def serving(self) -> Sequence[NodeRecord]:
        """Who is online in the class that this client asks."""
        return list(self._usable().values())

    async def wait_for_change(self, timeout_s: float) -> None:
        """News from the registry, or a ban that may have ended."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, LOOK_AGAIN_S)):
                await self._news.wait()

    def _usable(self) -> dict[str, NodeRecord]:
        return {
            s.record.node: s.record
            for s in self.snapshot
            if s.record.state is NodeState.ONLINE
            and s.record.numerics == self.target.numerics
            and s.record.blocks == self.target.blocks
        }

    def _fastest(
        self,
        records: Mapping[str, NodeRecord],
        wanted: Span,
        before: str | None,
        after: str | None,
        room: int,
        avoid: Collection[str],
    ) -> Sequence[Hop]:
        measured = self._measured(start=before is None, end=after is None)
        chain = fastest_chain(
            self._as_candidates(records),
            wanted,
            self._where(before, records),
            self._where(after, records),
            room=room,
            avoid=avoid,
            measured=measured,
            jitter_seed=self._seed,
        )
        return [Hop(node, self.dials.get(node) or records[node].dial, span) for node, span in chain.hops]

    def _measured(self, *, start: bool, end: bool) -> dict[tuple[str, str], float]:
        """Round trips that this client measured, where a chain begins or ends with it."""
        trips = {node: trip.smoothed for node, trip in self.round_trips.items()}
        return ({(END, node): s for node, s in trips.items()} if start else {}) | (
            {(node, END): s for node, s in trips.items()} if end else {}
        )

    def _where(self, node: str | None, records: Mapping[str, NodeRecord]) -> Coordinate:
        if node is None or node not in records:
            return self.coordinate
        return records[node].position or Coordinate()

    def _as_candidates(self, records: Mapping[str, NodeRecord]) -> CandidateTable:
        """Made once a snapshot: at ten thousand nodes that takes longer than the search."""
        snapshot, made = self._candidates
        if made is None or snapshot is not self.snapshot:
            made = CandidateTable.of([_candidate(record, self.rows) for record in records.values()])
            self._candidates = (self.snapshot, made)
        return made

    def _reasons(self, wanted: Span) -> str:
        said = [
            self.errors[s.record.node]
            for s in self.snapshot
            if s.record.node in self.errors and s.record.span.start < wanted.end and wanted.start < s.record.span.end
        ]
        return f" (lately: {'; '.join(said[:3])})" if said else ""


def choose_target(
    snapshot: Snapshot, config: str, shape: ModelShape, *, dtype: str | None = None, quantization: str | None = None
) -> Target:
    """The numerics class to speak to, among those that serve the model of config digest `config`.

    Of several that cover the model, the one with most nodes; `dtype` and `quantization` leave only such
    classes.  Raises RouteError without nodes, Mismatch where they
    serve other models or no class covers the model, MissingBlocks where one class is all there is and it has gaps.
    """
    records = [sealed.record for sealed in snapshot if sealed.record.state in SERVING]
    if not records:
        soon = f" ({len(snapshot)} known, but none serves at the moment)" if snapshot else ""
        raise RouteError(f"no node answered{soon}: check the addresses given and that `swarm-node` runs there")
    ours = [record for record in records if record.model == config]
    if not ours:
        other = records[0]
        raise Mismatch(
            f"{other.address} serves a model of another config ({other.name}, {other.blocks} blocks, digest "
            f"{other.model[:12]}) than --model says ({config[:12]}): name the model that the node serves"
        )
    classes: dict[NumericsClass, list[NodeRecord]] = {}
    for record in ours:
        classes.setdefault(record.numerics, []).append(record)
    classes = {
        c: nodes for c, nodes in classes.items() if dtype in {None, c.dtype} and quantization in {None, c.quantization}
    }
    if not classes:
        raise Mismatch(
            f"nobody serves the model with {' and '.join(filter(None, (dtype, quantization)))}: "
            f"there is {', '.join(sorted({str(record.numerics) for record in ours}))}"
        )
    whole = {c: nodes for c, nodes in classes.items() if not missing_blocks([n.span for n in nodes], shape.blocks)}
    if not whole and len(classes) > 1:
        one, other = (nodes[0] for nodes in list(classes.values())[:2])
        raise Mismatch(
            f"{one.address} and {other.address} would compute different text: "
            f"{one.numerics.difference(other.numerics)}; "
            "start both from the same model directory with the same --dtype"
        )
    chosen = max(whole or classes, key=lambda numerics: len(classes[numerics]))
    if len(whole) > 1:
        log.warning("several versions of the model are served; taking the one with most nodes, %s", chosen)
    if not whole:
        raise MissingBlocks.of(missing_blocks([n.span for n in classes[chosen]], shape.blocks), shape.blocks)
    return Target(chosen, shape.blocks, shape.vocab_size, shape.hidden_size, shape.max_positions)


def _candidate(record: NodeRecord, rows: int) -> Candidate:
    block_s = rows / record.rate if record.rate > 0 else UNKNOWN_BLOCK_S
    return Candidate(
        record.node, record.span, block_s, record.hop_s, record.free_tokens, record.position or Coordinate()
    )
