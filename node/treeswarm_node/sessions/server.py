"""The server of a node: it accepts control and link streams and holds the sessions behind them."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION, __version__
from treeswarm.errors import Refused
from treeswarm.protocol.messages import Description, FaultCode, LinkHello, Open
from treeswarm.protocol.records import NodeState
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.reachability.dial_back import DialBackResponder
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.control_stream import ControlStream, DrivesTexts
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_table import SessionTable

SWEEP_S = 1.0


@dataclass(eq=False)
class NodeServer:
    """Serves streams: `accept` is given to a transport's `listen`, and `sweep` must be running.

    A server lives longer than its stage.  While the node loads, moves or pauses it has none, and still sends records.
    """

    transport: Transport
    limits: NodeLimits = NodeLimits()
    membership: Membership | None = None
    stage: LoadedStage | None = None
    state: NodeState = NodeState.JOINING
    port_lender: PortLender | None = None
    driver: DrivesTexts | None = None
    """Runs the generation loop for clients, or None if this node drives no texts."""
    registry_spec: Callable[[], str] | None = None
    """Returns the registry that this node is announced in, "" for none; None while the node has yet to find it."""
    forwarded_ports: set[int] = field(default_factory=set)
    """Local ports of the connections that come through a leased port.  The machines behind them are remote ones, though
    these connections seem to come from this machine."""
    sessions: SessionTable = field(init=False)
    streams: int = 0
    """Number of streams open now, of both kinds."""
    drain_ends: float | None = None
    """Time of the event loop's clock at which sessions are freed, or None unless the node drains."""

    def __post_init__(self) -> None:
        self.sessions = SessionTable(self.transport, self.limits, on_room_changed=self._announce_room)

    async def accept(self, kind: StreamKind, stream: Stream) -> None:
        """Serve one stream until it ends.  An error that this raises ends that stream alone."""
        if self.streams >= self.limits.streams:
            raise Refused(f"this node has {self.streams} streams open and takes no more", FaultCode.TOO_MANY)
        self.streams += 1
        try:
            await (self._control_stream(stream).run() if kind is StreamKind.CONTROL else self._serve_link(stream))
        finally:
            self.streams -= 1

    async def sweep(self) -> None:
        """Free expired sessions, every second until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await self.sessions.end_expired()

    async def drain(self, grace_s: float, state: NodeState = NodeState.DRAINING) -> None:
        """Open nothing new, ask every client to move its session elsewhere, and free what is left after `grace_s`.

        Meanwhile the node is in `state`.
        """
        self.state = state
        await self.sessions.send_fault(
            Refused("this node is about to leave: move the session elsewhere", FaultCode.DRAINING)
        )
        self.drain_ends = asyncio.get_running_loop().time() + grace_s
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.sessions.wait_until_empty()
            await self.close()
        finally:
            self.drain_ends = None

    @property
    def grace_left_s(self) -> float | None:
        """Seconds that open sessions still have to move, or None unless the node drains."""
        return None if self.drain_ends is None else self.drain_ends - asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Tell every client that the node shuts down, and free all sessions and prefixes."""
        await self.sessions.end_all(Refused("the node is shutting down", FaultCode.DRAINING))
        if self.stage is not None:
            self.stage.store.prefixes.clear()

    def describe(self) -> Description:
        """Describe what this node hosts and how busy it is.  Raises Refused while it hosts nothing."""
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
            opened=self.sessions.counters.opened,
            resumed=self.sessions.counters.resumed,
            refused=self.sessions.counters.refused.total(),
            prefix_hits=stage.store.prefixes.hits,
            prefix_tokens=stage.store.prefixes.hit_tokens,
            skipped_rows=counters.skipped_rows,
            shared_pages=stage.store.shared_pages,
        )

    def ready_stage(self) -> LoadedStage:
        """Return the loaded stage.  Raises Refused while there is none."""
        if self.stage is None:
            raise Refused(f"this node is {self.state} and hosts nothing at the moment", FaultCode.DRAINING)
        return self.stage

    async def open(self, request: Open, control: Stream) -> ServerSession:
        """Open a session for the client behind `control`.  Raises Refused."""
        await self.sessions.end_older_epoch(request)
        return await self.sessions.open(request, control, self.ready_stage(), self.state)

    def _control_stream(self, stream: Stream) -> ControlStream:
        return ControlStream(
            stream,
            sessions=self.sessions,
            open_session=self.open,
            describe=self.describe,
            dial_back=DialBackResponder(self.transport, self.forwarded_ports),
            services=self,
        )

    async def _serve_link(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(self.limits.hello_s):
                hello = await stream.receive()
        except TimeoutError:
            raise Refused(f"no hello came on the link within {self.limits.hello_s:g} s", FaultCode.MALFORMED) from None
        if hello is None:
            return
        if not isinstance(hello, LinkHello):
            raise Refused(f"a link must begin with a hello, not {type(hello).__name__}", FaultCode.MALFORMED)
        session = await self.sessions.authorize_link(hello)
        # Nothing may be awaited in between: a resumption would not see a link that is authorized and not yet read.
        await session.read_link(stream, compresses=hello.packs)

    def _announce_room(self) -> None:
        if self.membership is not None:
            self.membership.announce_soon()
