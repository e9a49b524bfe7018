"""The node: accepts control and link streams, hosts sessions, answers what it is asked."""

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from treeswarm import PROTOCOL_VERSION, __version__
from treeswarm.errors import Refused
from treeswarm.protocol.address import host_of
from treeswarm.protocol.messages import Description, FaultCode, LinkHello, Open
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.records import NodeState
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.latency_profile import scale_profile
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.kv_cache.prefix_cache import PrefixUnit
from treeswarm_node.kv_cache.prefix_recorder import make_recorder, starts_from_prompt
from treeswarm_node.kv_cache.replay_log import ReplayLog, ReplayLogBudget
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.admission import check_open
from treeswarm_node.sessions.compression import LinkCompression
from treeswarm_node.sessions.control_stream import ControlStream
from treeswarm_node.sessions.server_session import ServerSession

log = logging.getLogger(__name__)

SWEEP_S = 1.0


@dataclass(eq=False)
class NodeServer:
    """`accept` is handed to a transport's `listen`; `sweep` must be running.

    A node lives longer than its stage: while it loads, moves or pauses it has none, and still tells who is out there.
    """

    transport: Transport
    limits: NodeLimits = NodeLimits()
    membership: Membership | None = None
    stage: LoadedStage | None = None
    state: NodeState = NodeState.JOINING
    port_lender: PortLender | None = None
    compression: LinkCompression = LinkCompression()
    """Of rows to other nodes; what comes packed is always unpacked."""
    forwarded_ports: set[int] = field(default_factory=set)
    """Ports of this machine behind which strangers are: those who come through a rented port."""
    sessions: dict[bytes, ServerSession] = field(default_factory=dict)
    opened: int = 0
    resumed: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """Sessions refused, by code."""
    journals: ReplayLogBudget = field(init=False)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Told whenever a session opens or begins an epoch."""
    _streams: int = 0
    _was_full: bool = False
    """A session was refused since one was last freed."""
    _beside: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.journals = ReplayLogBudget(self.limits.replay_log_bytes)

    @property
    def streams(self) -> int:
        """Open now, of both kinds."""
        return self._streams

    async def accept(self, kind: StreamKind, stream: Stream) -> None:
        """Serve one stream until it ends.  What it raises ends that stream alone."""
        if self._streams >= self.limits.streams:
            raise Refused(f"this node has {self._streams} streams open and takes no more", FaultCode.TOO_MANY)
        self._streams += 1
        try:
            await (ControlStream(self, stream).run() if kind is StreamKind.CONTROL else self._link(stream))
        finally:
            self._streams -= 1

    async def sweep(self) -> None:
        """Free the sessions nobody comes back to; until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            why = Refused("the session expired: nothing was asked of it", FaultCode.EXPIRED)
            over = [
                h for h in self.sessions.values() if h.expired(now, self.limits.session_grace_s, self.limits.idle_s)
            ]
            await asyncio.gather(*(hosted.fail(why) for hosted in over))

    async def drain(self, grace_s: float) -> None:
        """Open nothing new, ask every session's client to go elsewhere, and wait for them to; then end what is left."""
        self.state = NodeState.DRAINING
        leaving = Refused("this node is about to leave: go on elsewhere", FaultCode.DRAINING)
        await asyncio.gather(*(hosted.tell(leaving, fatal=False) for hosted in self.sessions.values()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s), self._news:
                await self._news.wait_for(lambda: not self.sessions)
        await self.close()

    async def close(self) -> None:
        """Tell every client, free every session, keep nothing."""
        why = Refused("the node is shutting down", FaultCode.DRAINING)
        await asyncio.gather(*(hosted.fail(why) for hosted in self.sessions.values()))
        if self.stage is not None:
            self.stage.store.prefixes.clear()

    def describe(self) -> Description:
        """What is hosted, and how busy it is.  Raises Refused while nothing is."""
        stage = self.ready_stage()
        served, counters = stage.served, stage.engine.counters
        return Description(
            version=PROTOCOL_VERSION,
            software=f"treeswarm {__version__}",
            span=served.span,
            blocks=served.blocks,
            vocab_size=served.vocab_size,
            hidden_size=served.hidden_size,
            max_positions=served.max_positions,
            config=served.config,
            numerics=served.numerics,
            attention=served.attention,
            trunk_free=stage.store.free_tokens,
            frames=counters.frames,
            forwards=counters.forwards,
            forward_sessions=counters.forward_sessions,
            sessions=len(self.sessions),
            opened=self.opened,
            resumed=self.resumed,
            refused=self.refusals.total(),
            prefix_hits=stage.store.prefixes.hits,
            prefix_tokens=stage.store.prefixes.hit_tokens,
            skipped_rows=counters.skipped_rows,
            shared_pages=stage.store.shared_pages,
        )

    def ready_stage(self) -> LoadedStage:
        """Raises Refused while there is none."""
        if self.stage is None:
            raise Refused(f"this node is {self.state} and hosts nothing at the moment", FaultCode.DRAINING)
        return self.stage

    async def open(self, wanted: Open, control: Stream) -> ServerSession:
        """Grant a session.  Raises Refused."""
        await self._leave_older_epoch(wanted)
        stage = self.ready_stage()
        guests = [host_of(hosted.control.peer) for hosted in self.sessions.values()]
        try:
            check_open(wanted, stage.served, self.limits, self.state, host_of(control.peer), guests)
            units = self._kept_of(wanted, stage)
            pages = [page for unit in units for page in unit.pages]
            kv = stage.store.open(wanted.trunk_room, wanted.crown_room, pages)
        except Refused as error:
            self.refusals[error.code] += 1
            self._say_room(full=True)
            raise
        terms = SessionTerms(
            epoch=wanted.epoch,
            trunk_room=wanted.trunk_room,
            crown_room=wanted.crown_room,
            credit_rows=max(self.limits.credit_rows, 2 * wanted.crown_room),
            vocab_size=stage.served.vocab_size,
            row_bytes=0 if wanted.span.start == 0 else stage.served.activation_bytes,
            resumption=wanted.resumption,
            offered=len(units) * PREFIX_TOKENS,
            alternatives=wanted.alternatives,
        )
        hosted = ServerSession.opened(
            wanted, NodeSession(terms), kv, self._journal(wanted, stage, units), control, stage.engine, self.transport,
            forget=lambda: self._forget(hosted),
            sharing=make_recorder(wanted, stage.store.prefixes) if stage.shares_prefixes else None,
            profile=scale_profile(stage.profile, wanted.span, stage.served.span),
            value_bytes_to=partial(self.compression.value_bytes, stage.served.numerics),
        )  # fmt: skip
        self.sessions[wanted.session] = hosted
        self.opened += 1
        await self.tell_links()
        log.info("session %s opened for blocks %s by %s", hosted.name, wanted.span, control.peer)
        return hosted

    def _kept_of(self, wanted: Open, stage: LoadedStage) -> list[PrefixUnit]:
        """What is here of the text that a session is about to begin with."""
        if not stage.shares_prefixes or wanted.prefix is None or not starts_from_prompt(wanted):
            return []
        return stage.store.prefixes.find(wanted.span, wanted.prefix.digests)

    def _journal(self, wanted: Open, stage: LoadedStage, units: Sequence[PrefixUnit]) -> ReplayLog | None:
        """None at the tail, where there is no room for it, and where the units lack their part of it."""
        chunks = [unit.chunk for unit in units if unit.chunk is not None]
        if wanted.next_hop is None or len(chunks) < len(units):
            return None
        row_bytes = stage.served.activation_bytes
        rows = wanted.trunk_room + wanted.crown_room - len(units) * PREFIX_TOKENS
        stage.store.prefixes.make_room_for_log(self.journals, rows * row_bytes)
        return self.journals.open(row_bytes, wanted.trunk_room, wanted.crown_room, chunks)

    def _say_room(self, *, full: bool) -> None:
        """Clients stay away from a node whose record says that it is full, so it must say when it no longer is."""
        self._was_full = full
        if self.membership is not None:
            self.membership.changed()

    def _forget(self, hosted: ServerSession) -> None:
        if self.sessions.get(hosted.id) is hosted:
            del self.sessions[hosted.id]
        if self._was_full:
            self._say_room(full=False)
        if not self.sessions and self.state is NodeState.DRAINING:
            self._beside = asyncio.create_task(self.tell_links())

    async def _leave_older_epoch(self, wanted: Open) -> None:
        """A client that lost sight of this node may come back to it for the same session, as to a new one."""
        while (hosted := self.sessions.get(wanted.session)) is not None:  # another may open while one is freed
            if wanted.epoch <= hosted.epoch:
                raise Refused("a session of this id is open", FaultCode.REFUSED)
            await hosted.free()

    async def _link(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(self.limits.hello_s):
                hello = await stream.receive()
        except TimeoutError:
            raise Refused("a link must begin with a hello", FaultCode.MALFORMED) from None
        if hello is None:
            return
        if not isinstance(hello, LinkHello):
            raise Refused("a link must begin with a hello", FaultCode.MALFORMED)
        hosted = await self._welcome(hello)
        # Nothing may come between: a resumption would not see a link that is checked and not yet fed from.
        await hosted.feed(stream, packs=hello.packs)

    async def _welcome(self, hello: LinkHello) -> ServerSession:
        """Raises Refused.  A neighbour may dial before the client's own word has come: it waits for that a while."""
        if hello.version != PROTOCOL_VERSION:
            raise Refused("the link speaks another version", FaultCode.WRONG_VERSION)
        try:
            async with asyncio.timeout(self.limits.hello_s), self._news:
                await self._news.wait_for(lambda: self._epoch_of(hello.session) >= hello.epoch)
        except TimeoutError:
            raise Refused(
                f"session {hello.session.hex()[:8]} is not open here in epoch {hello.epoch}", FaultCode.UNKNOWN_SESSION
            ) from None
        hosted = self.sessions[hello.session]
        if not secrets.compare_digest(hosted.ticket, hello.ticket):
            raise Refused("the link's ticket is not the one this session was opened with", FaultCode.WRONG_TICKET)
        return hosted

    def _epoch_of(self, session: bytes) -> int:
        hosted = self.sessions.get(session)
        return -1 if hosted is None else hosted.epoch

    async def tell_links(self) -> None:
        """Wake the links that wait for a session to open or to reach an epoch."""
        async with self._news:
            self._news.notify_all()
