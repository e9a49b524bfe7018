"""The parts of a session on a node: how it was opened, its memory, its client, and its current epoch."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from treeswarm.errors import Malformed, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import Append, Fault, FaultCode, HopTiming, NextHop, Open, Profile, Proposal, Resume
from treeswarm.protocol.spans import Span
from treeswarm.session.steps import Step
from treeswarm.transport.seam import Stream, Transport
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.engine.tap_slice import TapSlice
from treeswarm_node.kv_cache.kv_store import SessionKV
from treeswarm_node.kv_cache.prefix_recorder import PrefixRecorder
from treeswarm_node.kv_cache.replay_log import ReplayLog
from treeswarm_node.sessions.downstream import Downstream
from treeswarm_node.sessions.tap_log import TapLog

# A client that does not read its control stream is given up after this time, so that nothing else waits for it.
SEND_FAULT_S = 5.0
MAX_FAULT_CHARACTERS = 1000


@dataclass(frozen=True, eq=False)
class Opening:
    """What the client's request and this node settled when the session was opened."""

    request: Open
    engine: Engine
    transport: Transport
    profile: Profile = ()
    """Latency profile of a forward through the session's span, by which the client plans."""
    value_bytes_to: Callable[[str], int] = lambda _: 0
    """Return the bytes per value of rows to compress for the node at an address, or 0 for none."""
    tap_slice: TapSlice | None = None
    """What this node adds to the sums of a head's taps, or None if it has no part of a head."""
    on_end: Callable[[], None] = lambda: None
    """Called once, when the session begins to end."""

    @property
    def id(self) -> bytes:
        return self.request.session

    @property
    def span(self) -> Span:
        return self.request.span

    @property
    def name(self) -> str:
        """Short form of the id, for logs."""
        return self.id.hex()[:8]


@dataclass(eq=False)
class SessionMemory:
    """What this node stores for a session."""

    kv: SessionKV
    replay_log: ReplayLog | None = None
    """Replay log, or None at the tail and where the budget had no room for one."""
    prefix_recorder: PrefixRecorder | None = None
    """Recorder of the prefix, or None if the session shares no prefix and after its first resumption."""
    tap_log: TapLog | None = None
    """Sums of taps that go with the replay log, or None where none are sent on."""

    def record(self, step: Step, computed: Computed) -> None:
        """Take note of a computed step; steps come in order."""
        if self.replay_log is not None:
            self.replay_log.record(step, computed.hidden)
        if self.tap_log is not None:
            self.tap_log.record(step, computed.tap_sums)
        if self.prefix_recorder is not None:
            self.prefix_recorder.record(step, self.kv, self.replay_log)

    def with_sums(self, append: Append) -> Append:
        """Return an append of the replay log with the sums of taps that its rows had."""
        return append if self.tap_log is None else self.tap_log.attach(append)

    def truncate(self, length: int) -> None:
        """Cut the trunk back to `length` rows.  The replay log is lost if its budget has no room for that."""
        self.kv.truncate(length)
        if self.tap_log is not None:
            self.tap_log.truncate(length)
        if self.replay_log is not None and not self.replay_log.truncate(length):
            self.replay_log = None

    def close(self) -> None:
        """Give everything back; no forward may touch the session any more."""
        self.kv.close()
        if self.replay_log is not None:
            self.replay_log.close()


@dataclass(eq=False)
class SessionClient:
    """The client of a session, as this node sees it."""

    control: Stream
    """Control stream on which the client opened or last resumed the session."""
    last_request_at: float
    """Time of the event loop at which the client last asked for something, in seconds."""
    detached_at: float | None = None
    """Time of the event loop at which the control stream broke, or None while it is open."""

    def attach(self, control: Stream) -> None:
        """Use `control` from now on."""
        self.control, self.detached_at = control, None
        self.last_request_at = asyncio.get_running_loop().time()

    def has_expired(self, now: float, grace_period_s: float, idle_s: float) -> bool:
        """Return whether the client has been gone for the grace period, or has asked for nothing for `idle_s`."""
        if self.detached_at is not None and now - self.detached_at > grace_period_s:
            return True
        return now - self.last_request_at > idle_s

    async def send_fault(self, session: bytes, error: SwarmError, *, fatal: bool) -> None:
        """Send the error as a fault on the control stream, if that is still open."""
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(SEND_FAULT_S):
                message = str(error)[:MAX_FAULT_CHARACTERS]
                await self.control.send(Fault(session, fault_code(error), message, fatal))

    async def send_proposal(self, proposal: Proposal) -> None:
        """Send a proposal on the control stream, if that is still open: nothing depends on it."""
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(SEND_FAULT_S):
                await self.control.send(proposal)


def fault_code(error: SwarmError) -> FaultCode:
    """Return the code under which a client is told of an error."""
    if isinstance(error, Refused):
        return FaultCode(error.code)
    if isinstance(error, Malformed):
        return FaultCode.MALFORMED
    return FaultCode.DOWNSTREAM if isinstance(error, TransportError) else FaultCode.INTERNAL


@dataclass(eq=False)
class SessionEpoch:
    """One epoch of a session: its neighbours, and the results on their way to the downstream one.

    A resumption replaces the whole object.
    """

    request: Open | Resume
    """The client's message that began the epoch."""
    downstream: Downstream
    results: asyncio.Queue[tuple[Step, Computed, HopTiming]] = field(default_factory=asyncio.Queue)
    """Results to send downstream.  Their number is bounded by the session's credit, which returns once they are
    sent."""
    forwarding: asyncio.Task[None] | None = None
    """Task that sends the results, or None before it is started."""
    forwarded: int = 0
    """Number of appends sent downstream or answered."""
    replayed: int = 0
    """Number of replayed appends: sent from the replay log, or computed and, if the client asked for it, forwarded."""
    stalled: bool = False
    """Whether waiting steps were discarded.  Appends that follow on them must not run in this epoch."""
    link_broken: bool = False
    """Whether the client was told that the downstream link broke."""

    @property
    def number(self) -> int:
        return self.request.epoch

    @property
    def ticket(self) -> bytes:
        """Ticket that the upstream link must show."""
        return self.request.ticket

    @property
    def next_hop(self) -> NextHop | None:
        return self.request.next_hop

    def sums_from(self, part: TapSlice | None, *, replay: bool) -> int | None:
        """Return the position in the text from which rows of a prompt or replay get sums of taps, or None for none.

        `part` is what this node has of a head.  It must be the one that the client asked for.
        """
        asked = self.request.taps
        if part is None or asked is None or asked.head != part.head or self.next_hop is None:
            return None
        resumption = self.request.resumption if replay else None
        return max(0, (resumption.trunk_length if resumption else asked.prompt_rows) - part.window)

    @property
    def replays(self) -> bool:
        """Whether the downstream node is new and is sent the replay log first."""
        return isinstance(self.request, Resume) and self.request.replays

    @property
    def forwards_replay(self) -> bool:
        """Whether this node and the downstream one are both new, so that replayed appends are forwarded."""
        return isinstance(self.request, Open) and self.request.forwards_replay

    def keeps_downstream(self, request: Resume) -> bool:
        """Return whether the downstream link also serves the epoch that `request` begins."""
        neighbour_stays = request.next_hop is not None and request.next_hop == self.next_hop
        return neighbour_stays and not self.link_broken and not request.replays

    async def wait_stopped(self) -> None:
        """Wait until the cancelled forwarding task has ended."""
        if self.forwarding is not None:
            await asyncio.wait({self.forwarding})

    async def end_downstream(self) -> None:
        """End the downstream link, once nothing is sent on it any more."""
        try:
            await self.wait_stopped()
        finally:
            await self.downstream.end()
