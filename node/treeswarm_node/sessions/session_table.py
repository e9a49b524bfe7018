"""The sessions that are open on a node, by id."""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from treeswarm.errors import Refused
from treeswarm.protocol.address import host_of
from treeswarm.protocol.messages import FaultCode, LinkHello, Open, Resume
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.version import check_version
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Stream, Transport
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.latency_profile import scale_profile
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.engine.step_rules import SessionRules
from treeswarm_node.kv_cache.prefix_cache import PrefixUnit
from treeswarm_node.kv_cache.prefix_recorder import make_recorder, starts_from_prompt
from treeswarm_node.kv_cache.replay_log import ReplayLog, ReplayLogBudget
from treeswarm_node.sessions.admission import check_open
from treeswarm_node.sessions.compression import LinkCompression
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_parts import Opening, SessionClient, SessionMemory
from treeswarm_node.sessions.speculation import SessionSpeculation
from treeswarm_node.sessions.tap_log import TapLog
from treeswarm_node.speculator.seam import ReadsTapSums, can_tap

log = logging.getLogger(__name__)


@dataclass(eq=False)
class SessionCounters:
    """Numbers of sessions since the node started."""

    opened: int = 0
    """Number of sessions opened."""
    resumed: int = 0
    """Number of epochs begun in sessions that lost another node."""
    refused: Counter[str] = field(default_factory=Counter)
    """Number of sessions refused, by fault code."""


@dataclass(eq=False)
class SessionTable(Mapping[bytes, ServerSession]):
    """Opens sessions, finds them by id, and frees those that expire."""

    transport: Transport
    limits: NodeLimits
    on_room_changed: Callable[[], None]
    """Called when a session is refused, and when one is freed after that: others choose nodes by their room."""
    compression: LinkCompression = LinkCompression()
    """Compression of rows to next nodes.  Rows that arrive compressed are always decompressed."""
    counters: SessionCounters = field(default_factory=SessionCounters)
    replay_logs: ReplayLogBudget = field(init=False)
    _sessions: dict[bytes, ServerSession] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Notified whenever a session opens, a session begins an epoch, or the table becomes empty."""
    _was_full: bool = False
    """Whether a session was refused since one was last freed."""
    _tasks: TaskSet = field(default_factory=TaskSet)

    def __post_init__(self) -> None:
        self.replay_logs = ReplayLogBudget(self.limits.replay_log_bytes)

    def __getitem__(self, session: bytes) -> ServerSession:
        return self._sessions[session]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    async def open(self, request: Open, control: Stream, stage: LoadedStage, state: NodeState) -> ServerSession:
        """Open a session on `stage` for the client behind `control`.  Raises Refused."""
        hosts = [host_of(session.client.control.peer) for session in self.values()]
        try:
            with_grammars = stage.grammars is not None
            check_open(
                request, stage.served, self.limits, state, host_of(control.peer), hosts, has_grammars=with_grammars
            )
            units = _find_prefix(request, stage)
            pages = [page for unit in units for page in unit.pages]
            kv = stage.store.open(request.trunk_room, request.crown_room, pages)
        except Refused as error:
            self.counters.refused[error.code] += 1
            self._report_room(full=True)
            raise
        recorder = make_recorder(request, stage.store.prefixes) if stage.shares_prefixes else None
        log_of_rows = _open_replay_log(request, stage, self.replay_logs, units)
        session = ServerSession(
            Opening(
                request,
                stage.engine,
                self.transport,
                profile=scale_profile(stage.profile, request.span, stage.served.span),
                value_bytes_to=partial(self.compression.value_bytes, stage.served.numerics),
                on_end=lambda: self._remove(session),
                tap_slice=stage.tap_slice,
            ),
            NodeSession(_session_terms(request, stage, self.limits, units)),
            SessionMemory(kv, log_of_rows, recorder, _open_tap_log(stage, log_of_rows)),
            SessionClient(control, last_request_at=asyncio.get_running_loop().time()),
            _speculation(request, stage),
            _rules(request, stage),
        )
        self._sessions[request.session] = session
        self.counters.opened += 1
        await self.notify_changed()
        log.info("session %s opened for blocks %s by %s", session.opening.name, request.span, control.peer)
        return session

    async def end_older_epoch(self, request: Open) -> None:
        """Free the session of this id if it is in an older epoch.  Raises Refused if it is not.

        A client that lost sight of this node may come back to it for the same session, as to a new node.
        """
        while (session := self.get(request.session)) is not None:  # Another may open while one is freed.
            if request.epoch <= session.epoch.number:
                raise Refused(
                    f"session {session.opening.name} is already open in epoch {session.epoch.number}", FaultCode.REFUSED
                )
            await session.free()

    async def resume(self, request: Resume, control: Stream) -> ServerSession:
        """Begin a new epoch of a session for the client behind `control`.  Raises Refused."""
        session = self.get(request.session)
        if session is None:
            raise Refused(f"session {request.session.hex()[:8]} is not open here", FaultCode.UNKNOWN_SESSION)
        await session.resume(request, control)
        self.counters.resumed += 1
        await self.notify_changed()
        return session

    async def authorize_link(self, hello: LinkHello) -> ServerSession:
        """Return the session that a link may feed.  Raises Refused.

        A neighbour may dial before the client's own request has arrived here, so this waits for it up to `hello_s`.
        """
        check_version("the upstream node", hello.version)
        try:
            async with asyncio.timeout(self.limits.hello_s), self._changed:
                await self._changed.wait_for(lambda: _has_begun(self.get(hello.session), hello.epoch))
        except TimeoutError:
            raise Refused(
                f"session {hello.session.hex()[:8]} is not open here in epoch {hello.epoch}", FaultCode.UNKNOWN_SESSION
            ) from None
        session = self[hello.session]
        if not secrets.compare_digest(session.epoch.ticket, hello.ticket):
            raise Refused("the link's ticket is not the one this session was opened with", FaultCode.WRONG_TICKET)
        return session

    async def notify_changed(self) -> None:
        """Wake the links that wait for a session to open or to reach an epoch, and `wait_until_empty`."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_until_empty(self) -> None:
        """Wait until no session is open."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._sessions)

    async def end_expired(self) -> None:
        """Fail the sessions whose clients have been gone, or idle, for too long."""
        now = asyncio.get_running_loop().time()
        expired = [
            s for s in self.values() if s.client.has_expired(now, self.limits.session_grace_s, self.limits.idle_s)
        ]
        await _fail_all(expired, Refused("the session expired: its client asked for nothing", FaultCode.EXPIRED))

    async def send_fault(self, error: Refused) -> None:
        """Report a fault to every client whose session stays open."""
        sessions = list(self.values())
        await asyncio.gather(*(s.client.send_fault(s.opening.id, error, fatal=False) for s in sessions))

    async def end_all(self, error: Refused) -> None:
        """Fail every session."""
        await _fail_all(list(self.values()), error)

    def _remove(self, session: ServerSession) -> None:
        if self.get(session.opening.id) is session:
            del self._sessions[session.opening.id]
        if self._was_full:
            self._report_room(full=False)
        if not self._sessions:
            self._tasks.start(self.notify_changed())

    def _report_room(self, *, full: bool) -> None:
        """Clients avoid a node whose record says that it is full, so the record must change when it is not any more."""
        self._was_full = full
        self.on_room_changed()


def _has_begun(session: ServerSession | None, epoch: int) -> bool:
    return session is not None and session.epoch.number >= epoch


async def _fail_all(sessions: Sequence[ServerSession], error: Refused) -> None:
    await asyncio.gather(*(session.fail(error) for session in sessions))


def _session_terms(request: Open, stage: LoadedStage, limits: NodeLimits, units: Sequence[PrefixUnit]) -> SessionTerms:
    return SessionTerms(
        epoch=request.epoch,
        trunk_room=request.trunk_room,
        crown_room=request.crown_room,
        credit_rows=max(limits.credit_rows, 2 * request.crown_room),
        vocab_size=stage.served.vocab_size,
        row_bytes=0 if request.span.start == 0 else stage.served.activation_bytes,
        resumption=request.resumption,
        offered=len(units) * PREFIX_TOKENS,
        alternatives=request.alternatives,
        alternative_logprobs=request.alternative_logprobs,
        keeps_text=request.rules is not None,
        offered_tokens=tuple(token for unit in units for token in unit.tokens),
    )


def _speculation(request: Open, stage: LoadedStage) -> SessionSpeculation | None:
    """Return what proposes trees for a session, if it asks for them and this node computes the blocks that count."""
    speculator, span = stage.speculator, request.span
    if speculator is None or not speculator.name or not request.proposal_nodes or request.next_hop is not None:
        return None
    if not isinstance(speculator, ReadsTapSums) and not can_tap(speculator.taps, span.start, span.end):
        return None
    return SessionSpeculation(speculator, request.proposal_nodes, span, stage.engine.counters)


def _rules(request: Open, stage: LoadedStage) -> SessionRules | None:
    """Return the rules of a session, if it has some."""
    if request.rules is None:
        return None
    if request.rules.rules.grammar is None or stage.grammars is None:
        return SessionRules(request.rules)
    return SessionRules(request.rules, stage.grammars.open(request.rules))


def _open_tap_log(stage: LoadedStage, log_of_rows: ReplayLog | None) -> TapLog | None:
    """Return the log of sums of taps that goes with a replay log, or None if there is none or no sum is ever sent."""
    return None if log_of_rows is None or stage.tap_slice is None else TapLog(stage.tap_slice.window)


def _find_prefix(request: Open, stage: LoadedStage) -> list[PrefixUnit]:
    """Return the units in the prefix cache that the session's prompt begins with."""
    if not stage.shares_prefixes or request.prefix is None or not starts_from_prompt(request):
        return []
    return stage.store.prefixes.find(request.span, request.prefix.digests)


def _open_replay_log(
    request: Open, stage: LoadedStage, budget: ReplayLogBudget, units: Sequence[PrefixUnit]
) -> ReplayLog | None:
    """Open the session's replay log.

    Return None at the tail, where the budget has no room for it, and where some of the units have no replay chunk.
    """
    chunks = [unit.chunk for unit in units if unit.chunk is not None]
    if request.next_hop is None or len(chunks) < len(units):
        return None
    row_bytes = stage.served.activation_bytes
    rows = request.trunk_room + request.crown_room - len(units) * PREFIX_TOKENS
    stage.store.prefixes.make_room_for_log(budget, rows * row_bytes)
    return budget.open(row_bytes, request.trunk_room, request.crown_room, chunks)
