"""One session as this node hosts it: link in, device, link or answer out; in epochs, since neighbours may change."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from treeswarm.errors import Malformed, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import (
    Append,
    Fault,
    FaultCode,
    HopTiming,
    LinkWelcome,
    NextHop,
    Open,
    Opened,
    Profile,
    Resume,
)
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession
from treeswarm.session.steps import Step
from treeswarm.tasks import cancelled
from treeswarm.transport.seam import Stream, Transport
from treeswarm_node.engine.engine import Engine, WaitingStep
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.kv_cache.kv_store import SessionKV
from treeswarm_node.kv_cache.prefix_recorder import PrefixRecorder
from treeswarm_node.kv_cache.replay_log import ReplayLog
from treeswarm_node.sessions.compression import by_size, unpacked
from treeswarm_node.sessions.downstream import Downstream, ToClient, ToNextNode

log = logging.getLogger(__name__)

# A client that does not listen is told nothing; nobody else waits for it.
TELL_S = 5.0


@dataclass(eq=False)
class ServerSession:
    """Everything one session holds on this node.  `fail` and `free` end it; either may be called again."""

    id: bytes
    span: Span
    ticket: bytes
    """What the upstream link must show."""
    next_hop: NextHop | None
    session: NodeSession
    kv: SessionKV
    journal: ReplayLog | None
    control: Stream
    engine: Engine
    transport: Transport
    forget: Callable[[], None]
    """Take it off the node's list."""
    sharing: PrefixRecorder | None = None
    """What it shares its trunk by."""
    forwards_replay: bool = False
    """The next hop replaces a lost node too, and needs what is replayed here."""
    profile: Profile = ()
    """Of a forward through `span`, for the client to plan by."""
    value_bytes_to: Callable[[str], int] = lambda _: 0
    """Of the values in rows that are worth packing for the node at an address; 0: none are."""
    detached_at: float | None = None
    """When the client's control stream broke; None while it lives."""
    touched_at: float = 0.0
    """When the client last asked for something."""
    passed_on: int = 0
    """Appends of this epoch, sent on or answered."""
    replayed: int = 0
    """Frames of this epoch's replay, sent from the journal, or computed and sent on where that is asked."""
    _outlet: Downstream = field(init=False)
    _outbox: asyncio.Queue[tuple[Step, Computed, HopTiming]] = field(default_factory=asyncio.Queue)
    """Bounded by the session's credits: a row's credit returns when it has been sent on."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _feeding: set[asyncio.Task[None]] = field(default_factory=set)
    """Those that take from upstream links; each in its transport's task."""
    _freeing: asyncio.Task[None] | None = None
    _passing: asyncio.Task[None] | None = None
    _room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever credit comes back."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _stalled: bool = False
    """Work was withdrawn: what follows on it must not run before a resumption has begun anew."""
    _complained: bool = False
    _over: bool = False

    @classmethod
    def opened(
        cls,
        wanted: Open,
        session: NodeSession,
        kv: SessionKV,
        journal: ReplayLog | None,
        control: Stream,
        engine: Engine,
        transport: Transport,
        forget: Callable[[], None],
        sharing: PrefixRecorder | None = None,
        profile: Profile = (),
        value_bytes_to: Callable[[str], int] = lambda _: 0,
    ) -> "ServerSession":
        """A session just granted; starts passing results on at once."""
        hosted = cls(
            wanted.session, wanted.span, wanted.ticket, wanted.next_hop, session, kv, journal, control, engine,
            transport, forget, sharing, forwards_replay=wanted.forwards_replay, profile=profile,
            value_bytes_to=value_bytes_to, touched_at=asyncio.get_running_loop().time(),
        )  # fmt: skip
        hosted._outlet = hosted._make_outlet()
        hosted._passing = hosted._spawn(hosted._pass_on())
        return hosted

    @property
    def name(self) -> str:
        """Short, for logs."""
        return self.id.hex()[:8]

    @property
    def epoch(self) -> int:
        return self.session.terms.epoch

    async def feed(self, link: Stream, *, packs: bool = False) -> None:
        """Take appends from the upstream link until it ends or its ticket does; one that `packs` hears that it may.
        Raises what made the session fail."""
        ticket, feeding = self.ticket, asyncio.current_task()
        assert feeding is not None
        self._feeding.add(feeding)
        # Beside what comes: on a slow line its turn to go out may be long in coming.
        answering = asyncio.create_task(_say_that_rows_may_be_packed(link)) if packs else None
        try:
            while (append := await link.receive()) is not None and not self._over:
                if not isinstance(append, Append):
                    raise Refused("a link carries appends after its hello", FaultCode.MALFORMED)
                await self._take(await self._as_computed(append))
        except TransportError:
            log.info("session %s: the upstream link broke", self.name)
        except SwarmError as error:
            await self.fail(error)
            raise
        except asyncio.CancelledError:
            if not self._over and self.ticket == ticket:
                raise
            feeding.uncancel()  # cut by `_cut_links`: that ends the stream, and nothing else
        finally:
            self._feeding.discard(feeding)
            if answering is not None:
                await cancelled(answering)

    async def resume(self, wanted: Resume, control: Stream) -> None:
        """Go on in a new epoch, with new neighbours perhaps.  Raises Refused, and then nothing has changed."""
        async with self._turn:
            if wanted.replays and self.journal is None:
                raise Refused("this node kept no journal of the session: it had no room", FaultCode.NO_JOURNAL)
            length = wanted.resumption.trunk_length
            self.session.check_resumption(wanted.epoch, wanted.resumption)
            if length > self.kv.trunk_length:
                raise Refused(f"{self.kv.trunk_length} tokens are here, not {length}", FaultCode.NO_JOURNAL)
            self._stalled = True
            self.engine.discard_waiting(self.session)
            await self.engine.wait_until_idle(self.session)
            self.session.check_resumption(wanted.epoch, wanted.resumption)
            self.kv.truncate(length)
            self.session.resume(wanted.epoch, wanted.resumption)
            self.passed_on = self.replayed = 0
            self._stalled = False
            await self._stop_passing()
            self.sharing = None
            if self._over:
                raise Refused("the session ended meanwhile", FaultCode.UNKNOWN_SESSION)
            self._truncate_journal(length)
            if wanted.replays and self.journal is None:
                raise Refused("this node has no room any more for a journal of its own", FaultCode.NO_JOURNAL)
            self.attach(control)
            broken, self._complained = self._complained, False
            if self.ticket != wanted.ticket:
                self._cut_links()
            self.ticket, self.forwards_replay = wanted.ticket, False
            if broken or self.next_hop != wanted.next_hop or wanted.next_hop is None or wanted.replays:
                self._spawn(self._outlet.end())
                self.next_hop = wanted.next_hop
                self._outlet = self._make_outlet()
            self._passing = self._spawn(self._pass_on(replays=wanted.replays))
        log.info("session %s goes on in epoch %d from %d tokens", self.name, wanted.epoch, length)

    def attach(self, control: Stream) -> None:
        """The client speaks on this stream now."""
        self.control, self.detached_at = control, None
        self.touched_at = asyncio.get_running_loop().time()

    def expired(self, now: float, lease_s: float, idle_s: float) -> bool:
        """Whether its client has been gone for a lease, or has asked nothing for too long."""
        if self.detached_at is not None and now - self.detached_at > lease_s:
            return True
        return now - self.touched_at > idle_s

    async def fail(self, error: SwarmError) -> None:
        """Tell the client why, and free everything."""
        if not self._over:
            log.warning("session %s failed: %s", self.name, error)
            self.let_go()
            await self.tell(error, fatal=True)
        await self.free()

    async def free(self) -> None:
        """Give the room back, once no forward touches it."""
        await asyncio.shield(self.let_go())

    def let_go(self) -> asyncio.Task[None]:
        """Begin to free: whoever asked for it may be cut off, the room comes back all the same."""
        if self._freeing is None:
            self._over = True
            self.forget()
            self._room.set()
            self.engine.discard_waiting(self.session)
            for task in self._tasks - {asyncio.current_task()}:
                task.cancel()
            self._freeing = asyncio.create_task(self._give_back())
        return self._freeing

    async def _give_back(self) -> None:
        await self.engine.wait_until_idle(self.session)
        self.kv.close()
        if self.journal is not None:
            self.journal.close()
        await self._outlet.end()
        self._cut_links()

    async def grant(self) -> None:
        """Tell the client that the session is open in its present epoch."""
        terms = self.session.terms
        offered = self.session.offered
        await self.control.send(Opened(self.id, terms.epoch, terms.credit_rows, self.profile, offered))

    async def tell(self, error: SwarmError, *, fatal: bool) -> None:
        """A fault on the client's control stream, if that still lives."""
        code = FaultCode.INTERNAL
        if isinstance(error, Refused):
            code = FaultCode(error.code)
        elif isinstance(error, Malformed):
            code = FaultCode.MALFORMED
        elif isinstance(error, TransportError):
            code = FaultCode.DOWNSTREAM
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(TELL_S):
                await self.control.send(Fault(self.id, code, str(error)[:1000], fatal))

    async def _as_computed(self, append: Append) -> Append:
        """Before anything counts its bytes.  Raises Malformed."""
        if not append.planes:
            return append
        row_bytes = self.session.terms.row_bytes
        return await by_size(unpacked, append, row_bytes, append.rows * row_bytes)

    async def _take(self, append: Append) -> None:
        self.touched_at = arrived = asyncio.get_running_loop().time()
        while append.replay and not self._over and self.session.replayed_rows > self.session.terms.credit_rows:
            self._room.clear()
            await self._room.wait()
        if self._over or self._stalled:
            return
        offered = self.session.offered
        try:
            steps = self.session.receive(append)
        except Refused as error:
            if error.code != FaultCode.REPLAYED:
                raise
            await self.tell(error, fatal=False)
            return
        if offered and steps and steps[0].append.prefix < offered:
            self.kv.truncate(steps[0].append.prefix)
            self._truncate_journal(steps[0].append.prefix)
        for step in steps:
            self.engine.submit(WaitingStep(self.session, self.kv, self.span, step, self._done, arrived))

    def _done(self, step: Step, computed: Computed, timing: HopTiming) -> None:
        if not self._over and step.append.epoch == self.epoch:
            self._outbox.put_nowait((step, computed, timing))

    async def _pass_on(self, *, replays: bool = False) -> None:
        try:
            if replays and self.journal is not None:
                for append in self.journal.replay(self.epoch):
                    await self._outlet.replay(append)
                    self.replayed += 1
            while True:
                step, computed, timing = await self._outbox.get()
                if computed.error is not None:
                    raise computed.error
                if self.journal is not None:
                    self.journal.record(step, computed.hidden)
                if self.sharing is not None:
                    self.sharing.record(step, self.kv, self.journal)
                if self.forwards_replay or not step.append.replay:
                    await self._outlet.send(step, computed, (*step.append.timings, timing))
                self.session.finish(step)
                if step.append.replay:
                    self.replayed += 1
                else:
                    self.passed_on += 1
                self._room.set()
        except TransportError as error:
            self._complain(error)
        except SwarmError as error:
            await self.fail(error)

    def _truncate_journal(self, length: int) -> None:
        if self.journal is not None and not self.journal.truncate(length):
            self.journal = None

    def _cut_links(self) -> None:
        """Whoever feeds this session now must not speak into what comes."""
        for task in self._feeding - {asyncio.current_task()}:
            task.cancel()

    async def _stop_passing(self) -> None:
        """Whatever of the old epoch was on its way is of no use."""
        if self._passing is not None:
            self._passing.cancel()
            await asyncio.gather(self._passing, return_exceptions=True)
        while not self._outbox.empty():
            self._outbox.get_nowait()
        self._room.set()

    def _complain(self, error: SwarmError) -> None:
        """The way on is broken: the client decides who comes next.  The session stays."""
        if not self._complained and not self._over:
            self._complained = True
            log.info("session %s: %s", self.name, error)
            self._spawn(self.tell(_downstream(error), fatal=False))

    def _make_outlet(self) -> Downstream:
        if self.next_hop is None:
            return ToClient(self.id, self.control)
        outlet: ToNextNode

        def broken(error: SwarmError) -> None:
            if self._outlet is outlet:
                self._complain(error)

        outlet = ToNextNode(
            self.id, self.epoch, self.next_hop, self.transport, self._tree_bytes(), broken,
            self.value_bytes_to(self.next_hop.address),
        )  # fmt: skip
        return outlet

    def _tree_bytes(self) -> int:
        """On the link to the next hop."""
        return self.session.terms.crown_room * (self.journal.row_bytes if self.journal is not None else 0)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _downstream(error: SwarmError) -> SwarmError:
    """Whatever the next hop's words were, to the client they are about the way there."""
    return Refused(str(error), FaultCode.DOWNSTREAM)


async def _say_that_rows_may_be_packed(link: Stream) -> None:
    with contextlib.suppress(SwarmError):  # whoever takes from this link hears what became of it
        await link.send(LinkWelcome(unpacks=True))
