"""The swarm as one client sees it: records, distances, failures; and the routes it chooses by them."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from treeswarm.errors import MissingBlocks, NodeLost, Refused, SwarmError, TransportError
from treeswarm.protocol.address import without_pin
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm.topology.coordinates import Coordinate
from treeswarm.topology.routing import END, Candidate, CandidateTable, fastest_chain, worth_changing
from treeswarm_client.discovery.distances import Distances
from treeswarm_client.discovery.failures import NodeFailures
from treeswarm_client.discovery.gap import explain_gap
from treeswarm_client.discovery.route import ANY_TAIL, Hop, TailNeeds, Target
from treeswarm_client.discovery.tapping import hops_without_head

# Seconds that a node without a rate is assumed to need for a tree in one block: a slow CPU.
UNKNOWN_BLOCK_S = 0.05
LOOK_AGAIN_S = 0.5


@dataclass(eq=False)
class SwarmView:
    """A `Router` over a registry.  `watch` must be running."""

    registry: Registry
    target: Target
    rows: int
    """Number of rows of a traversal, by which its time is predicted."""
    dials: Mapping[str, str] = field(default_factory=dict)
    """Addresses that a user gave for nodes, by node id.  They take precedence over the nodes' records."""
    snapshot: Snapshot = ()
    """Records of nodes, as the registry last had them."""
    on_lost: Callable[[str], None] = lambda _: None
    """Called with the id of a node that seems to be lost."""
    distances: Distances = field(default_factory=Distances)
    failures: NodeFailures = field(default_factory=NodeFailures)
    _candidates: tuple[Snapshot, TailNeeds, CandidateTable | None] = ((), ANY_TAIL, None)
    """Candidates of a snapshot for tails with some needs, computed once for both."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _seed: int = field(default_factory=lambda: random.getrandbits(32))
    _loop: asyncio.AbstractEventLoop | None = None
    """Loop that follows the registry.  Its time counts, because blocking clients ask for routes from other threads."""

    async def watch(self) -> None:
        """Follow the registry until cancelled."""
        self._loop = asyncio.get_running_loop()
        async for snapshot in self.registry.watch():
            self.snapshot = snapshot
            self._changed.set()

    def route(
        self,
        blocks: Span,
        *,
        before: str | None,
        after: str | None,
        room: int,
        avoid: Collection[str],
        needs: TailNeeds = ANY_TAIL,
    ) -> Sequence[Hop]:
        """Return the fastest chain for `blocks`; see `Router.route`."""
        now = self._now()
        full, banned = self.failures.full(now), self.failures.banned(now)

        def fastest(room: int, avoid: Collection[str], last_resort: Collection[str] = ()) -> Sequence[Hop]:
            return self._fastest(needs, blocks, before, after, room, avoid, last_resort)

        try:
            return fastest(room, {*avoid, *full, *banned})
        except MissingBlocks as missing:
            with contextlib.suppress(MissingBlocks):
                # A record may be a minute old: a node that has not refused lately may have room again.
                return fastest(0, {*avoid, *full, *banned})
            with contextlib.suppress(MissingBlocks):
                # There is no other: a node that was stopped or cut off for a moment may answer again.
                last_resort = self.failures.last_resort(now) - {*avoid, *full}
                return fastest(0, {*avoid, *full, *banned}, last_resort)
            with contextlib.suppress(MissingBlocks):
                fastest(0, {*avoid, *banned})
                raise Refused(
                    f"every node that serves blocks {blocks} is full: wait with --patience SECONDS, ask for fewer "
                    "tokens, or try again later",
                    FaultCode.FULL,
                ) from None
            if missing.gaps and needs != ANY_TAIL and not missing_blocks(self._spans(ANY_TAIL), self.target.blocks):
                raise MissingBlocks(f"no node that serves the last block applies {needs}: {self._tails()}") from None
            if missing.gaps:
                raise self._explain_gap(missing) from None
            raise MissingBlocks(f"{missing}{self._recent_errors(blocks)}") from None

    def _now(self) -> float:
        return (self._loop or asyncio.get_running_loop()).time()

    def fastest_hops(self) -> Sequence[Hop]:
        """Return the fastest chain for a loop at this client, or nothing if blocks are missing."""
        with contextlib.suppress(MissingBlocks, Refused):
            return self.route(Span(0, self.target.blocks), before=None, after=None, room=0, avoid=())
        return ()

    def traversals_s(self, loops: Sequence[str | None], rows: int) -> list[float]:
        """Predict the seconds of a traversal of `rows` rows, for loops at nodes (their ids) and at this client (None).

        Raises MissingBlocks.
        """
        records, now = self._usable(), self._now()
        table = CandidateTable.of([_candidate(record, rows) for record in records.values()])
        avoid = {*self.failures.full(now), *self.failures.banned(now)}

        def predict(node: str | None) -> float:
            position = self.distances.position_of(records.get(node) if node is not None else None)
            measured = self.distances.measured(start=True, end=True)
            if node is not None:
                measured = {(END, node): 0.0, (node, END): 0.0}
            whole = Span(0, self.target.blocks)
            return fastest_chain(table, whole, position, position, room=0, avoid=avoid, measured=measured).seconds

        return [predict(node) for node in loops]

    def has_spare(self, blocks: Span, *, avoid: Collection[str], needs: TailNeeds = ANY_TAIL) -> bool:
        """Return whether nodes that have not failed lately could serve `blocks`; see `Router.has_spare`."""
        now = self._now()
        out = {*avoid, *self.failures.full(now), *self.failures.banned(now)}
        spans = self._spans(needs, out)
        return not any(gap.overlaps(blocks) for gap in missing_blocks(spans, self.target.blocks))

    def nodes_to_leave(
        self, hops: Sequence[Hop], *, room: int, trunk: int, rounds_left: float, needs: TailNeeds = ANY_TAIL
    ) -> Collection[str]:
        """Return the nodes that a faster chain would leave out; see `Router.nodes_to_leave`."""
        records, own = self._usable(needs), {hop.node: hop for hop in hops}
        if not own.keys() <= records.keys():
            return ()
        now = self._now()
        whole = Span(0, self.target.blocks)
        current_nodes = [replace(_candidate(records[node], self.rows), span=hop.span) for node, hop in own.items()]
        all_nodes = [_candidate(record, self.rows) for record in records.values()]
        # What this session has reserved is free to itself.
        all_nodes = [
            replace(candidate, free_tokens=candidate.free_tokens + (room if candidate.node in own else 0))
            for candidate in all_nodes
        ]
        measured = self.distances.measured(start=True, end=True)
        ends = (self.distances.coordinate, self.distances.coordinate)
        banned = self.failures.banned(now)
        with contextlib.suppress(MissingBlocks):
            current = fastest_chain(current_nodes, whole, *ends, room=0, measured=measured)
            best = fastest_chain(all_nodes, whole, *ends, room=room, avoid=banned, measured=measured)
            # Open, resume and one more traversal, while the trunk is computed again as fast as trees are.
            change_s = 4 * current.seconds + best.seconds * trunk / self.rows
            if worth_changing(current.seconds, best.seconds, change_s=change_s, rounds_left=rounds_left):
                return own.keys() - {node for node, _ in best.hops}
        return ()

    def report_failure(self, node: str, error: SwarmError) -> None:
        """Avoid a node for a while: longer with each failure, and only some seconds if it was full."""
        self.failures.add(node, error, self._now())
        if isinstance(error, TransportError | NodeLost):
            self.on_lost(node)

    def report_silence(self, node: str) -> None:
        """Learn that a node, which is not given up yet, has been silent for too long."""
        self.on_lost(node)

    def report_round_trip(self, node: str, round_trip_s: float) -> None:
        """Learn how far a node is, and by it where this client stands."""
        record = next((s.record for s in self.snapshot if s.record.node == node), None)
        self.distances.add_round_trip(node, round_trip_s, record.position if record is not None else None)

    def report_traversal(self, nodes: Collection[str]) -> None:
        """Clear earlier failures of `nodes`, which computed and forwarded a traversal; see `topology.bans`."""
        self.failures.add_traversal(nodes, self._now())

    def serving(self) -> Sequence[NodeRecord]:
        """Return the records of the nodes that are online in the numerics class of this client."""
        return list(self._usable().values())

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait for news from the registry, or until a ban may have ended: at most half a second or `timeout_s`."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, LOOK_AGAIN_S)):
                await self._changed.wait()

    def missing(self) -> MissingBlocks | None:
        """Return the error that names the blocks without a node and the nodes of the others, or None if none lack.

        Nodes that did not answer when the registry last asked them do not count.
        """
        silent = {without_pin(address) for address in self._unanswered()}
        answering = [record for record in self._usable().values() if record.address not in silent]
        gaps = missing_blocks([record.span for record in answering], self.target.blocks)
        return self._explain_gap(MissingBlocks.of(gaps)) if gaps else None

    def _explain_gap(self, missing: MissingBlocks) -> MissingBlocks:
        records = [s.record for s in self.snapshot if s.record.blocks == self.target.blocks]
        ours = [r for r in records if r.state is not NodeState.ONLINE or r.numerics == self.target.numerics]
        gaps = [gap for gap in missing.gaps if isinstance(gap, Span)]
        return explain_gap(ours, gaps, self.target.blocks, self._unanswered())

    def _unanswered(self) -> Collection[str]:
        """Return the addresses where nothing answers: a node that refuses to send records is busy, and lives."""
        unanswered = self.registry.report().unanswered
        return [address for address, error in unanswered.items() if not isinstance(error, Refused)]

    def tail_speculator(self) -> NodeRecord | None:
        """Return the record of the tail of the fastest chain if that proposes trees, else None.

        A tail whose speculator needs taps of other nodes proposes trees only if these have its head.
        While blocks are missing it is the record of any node that may be a tail and proposes trees.
        """
        tails = {node: r for node, r in self._usable().items() if r.speculator and r.span.end == r.blocks}
        route = self.fastest_hops() if tails else ()
        if hops_without_head(route):
            return None
        return tails.get(route[-1].node) if route else next(iter(tails.values()), None)

    def tails(self) -> list[NodeRecord]:
        """Return the records of the nodes that could be the tail."""
        return [record for record in self._usable().values() if record.span.end == record.blocks]

    def _tails(self) -> str:
        """Return the nodes that could be the tail, as the end of a message."""
        return f"{', '.join(record.address for record in self.tails())} would need a newer release, or its extras"

    def _usable(self, needs: TailNeeds = ANY_TAIL) -> dict[str, NodeRecord]:
        """Return the records of the nodes that serve the target, by id.

        Nodes with the last block that do not meet `needs` appear without that block.
        """
        records = {
            s.record.node: s.record
            for s in self.snapshot
            if s.record.state is NodeState.ONLINE
            and s.record.numerics == self.target.numerics
            and s.record.blocks == self.target.blocks
        }
        for node, record in list(records.items()) if needs != ANY_TAIL else ():
            if record.span.end == record.blocks and not needs.are_met_by(record):
                del records[node]
                if len(record.span) > 1:
                    records[node] = replace(record, span=Span(record.span.start, record.span.end - 1))
        return records

    def _spans(self, needs: TailNeeds, avoid: Collection[str] = ()) -> list[Span]:
        return [record.span for node, record in self._usable(needs).items() if node not in avoid]

    def _fastest(
        self,
        needs: TailNeeds,
        blocks: Span,
        before: str | None,
        after: str | None,
        room: int,
        avoid: Collection[str],
        last_resort: Collection[str] = (),
    ) -> Sequence[Hop]:
        records = self._usable(needs)
        chain = fastest_chain(
            self._candidates_of(records, needs),
            blocks,
            self.distances.position_of(records.get(before) if before is not None else None),
            self.distances.position_of(records.get(after) if after is not None else None),
            room=room,
            avoid=avoid,
            last_resort=last_resort,
            measured=self.distances.measured(start=before is None, end=after is None),
            jitter_seed=self._seed,
        )
        return [self._hop(records[node], span) for node, span in chain.hops]

    def _hop(self, record: NodeRecord, span: Span) -> Hop:
        address = self.dials.get(record.node) or record.dial
        return Hop(record.node, address, span, record.speculator, record.tap_head, record.taps)

    def _candidates_of(self, records: Mapping[str, NodeRecord], needs: TailNeeds) -> CandidateTable:
        """Return the table of candidates, made once per snapshot: with ten thousand nodes that outlasts the search."""
        snapshot, for_needs, table = self._candidates
        if table is None or snapshot is not self.snapshot or for_needs != needs:
            table = CandidateTable.of([_candidate(record, self.rows) for record in records.values()])
            self._candidates = (self.snapshot, needs, table)
        return table

    def _recent_errors(self, blocks: Span) -> str:
        """Return the last errors of up to three nodes that serve some of the blocks, as the end of a message."""
        errors = [
            self.failures.errors[s.record.node]
            for s in self.snapshot
            if s.record.node in self.failures.errors
            and s.record.span.start < blocks.end
            and blocks.start < s.record.span.end
        ]
        return f" (lately: {'; '.join(errors[:3])})" if errors else ""


def _candidate(record: NodeRecord, rows: int) -> Candidate:
    block_s = rows / record.rate if record.rate > 0 else UNKNOWN_BLOCK_S
    position = record.position or Coordinate()
    return Candidate(record.node, record.span, block_s, record.hop_s, record.free_tokens, position)
