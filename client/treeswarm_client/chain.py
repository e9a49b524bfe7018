"""A session on a chain of nodes: appends to the head, answers from the tail, and a chain that changes under way.

Opening a session and going on after a loss are one procedure (`mend`): keep the nodes that are sure to have the trunk,
fill the gaps with others, begin a new epoch, replay the trunk to whoever lacks it.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.deadlines import RoundTrip
from treeswarm.errors import Malformed, MissingBlocks, NodeLost, Refused, SwarmError, TransportError
from treeswarm.messages import (
    SESSION_ID_BYTES,
    Answer,
    Append,
    ControlDown,
    Fault,
    FaultCode,
    Hint,
    LinkHello,
    Opened,
)
from treeswarm.replay import replay
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.control import GOODBYE_S, NodeControl
from treeswarm_client.mending import Interrupted, Member, Mender, Room
from treeswarm_client.overdue import overdue
from treeswarm_client.route import Hop, Pilot, Target

log = logging.getLogger(__name__)

# How often a chain that waits for answers asks itself whether they are overdue.
WATCH_EVERY_S = 0.25
# Records change every minute or so; a look at ten thousand of them takes some 0.1 s.
RECONSIDER_S = 10.0
# More dead nodes in a row than this were never seen in a simulated swarm that loses a fifth of its nodes an hour.
QUICK_TRIES = 8
PAUSE_S = 0.5


@dataclass(frozen=True)
class Repair:
    """What happened to a chain once."""

    epoch: int
    lost: tuple[tuple[Hop, str], ...]
    """Nodes, and why each was let go."""
    gained: tuple[Hop, ...]
    seconds: float
    """From the first sign to a chain that takes appends again; the replay runs on behind it."""


@dataclass(eq=False)
class Chain:
    """One session.  Use `open_chain`; it needs `watch` running."""

    target: Target
    pilot: Pilot
    transport: Transport
    room: Room
    patience_s: float
    alternatives: int = 0
    """How many of the target's best tokens come with every answered row."""
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_ID_BYTES))
    epoch: int = -1
    members: list[Member] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    answered: int = 0
    """Appends of this epoch whose answers are here: every node has what they brought."""
    _link: Stream | None = None
    _lost: dict[str, SwarmError] = field(default_factory=dict)
    """Nodes of the chain that are of no more use to it, by address."""
    _why: dict[str, SwarmError] = field(default_factory=dict)
    """The same, and those given up since, until the chain is whole again."""
    _interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    _interrupted_at: float = 0.0
    _answers: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    _in_flight: dict[int, int] = field(default_factory=dict)
    """Rows by sequence number."""
    _free: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when an answer has made room."""
    _moved_at: float = 0.0
    _considered_at: float = 0.0
    _better_without: frozenset[str] = frozenset()
    _tries: int = 0
    """Interrupted ones since the chain broke."""
    _mending: bool = False
    _complaints: list[tuple[NodeControl, Fault]] = field(default_factory=list)
    """That came while the chain was mended, about the epoch to come."""
    _traversal: RoundTrip = RoundTrip()
    _goodbyes: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The chain as it is now."""
        return tuple(member.hop for member in self.members)

    @property
    def credit_rows(self) -> int:
        return min(member.credit_rows for member in self.members)

    @property
    def credit_left(self) -> int:
        """Rows that may be shipped without waiting."""
        return self.credit_rows - sum(self._in_flight.values())

    def hint(self, trunk_length: int, tip: int) -> None:
        """Tell every node how far the walk has come: what waits there and does not hang below need not be computed."""
        for member in self.members:
            self._background(member.control.tell(Hint(self.session, trunk_length, tip)))

    async def append(self, append: Append) -> asyncio.Future[Answer]:
        """Ship one append as soon as credit allows; the future holds its answer.  Raises Interrupted."""
        while not self._interrupted.is_set() and sum(self._in_flight.values()) + append.rows > self.credit_rows:
            self._free.clear()
            await self._free.wait()
        self._raise_interruption(leaving=append.seq == 0 or not self._in_flight)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._answers[append.seq] = answer
        self._in_flight[append.seq] = append.rows
        self._moved_at = loop.time()
        try:
            assert self._link is not None
            await self._link.send(append)
        except SwarmError:
            self._relink(self.members[0])
            self._raise_interruption()
        return answer

    async def mend(self, trunk: Sequence[int], tip: int) -> None:
        """Make the chain whole: every node then has the tokens `trunk`, whose last one is called `tip`, and no more.

        Waits up to the chain's patience for nodes to appear.  Raises MissingBlocks naming what nobody serves, or
        Refused (full) where nobody has room.
        """
        loop = asyncio.get_running_loop()
        started = self._interrupted_at or loop.time()
        before = self.hops
        end, self._tries = loop.time() + self.patience_s, 0
        while not await self._mended(trunk, tip, end):
            pass
        if before:
            left = [hop for hop in before if hop not in self.hops]
            gone = tuple((hop, str(self._why.get(hop.address, "it asked to leave"))) for hop in left)
            gained = tuple(hop for hop in self.hops if hop not in before)
            self.repairs.append(Repair(self.epoch, gone, gained, loop.time() - started))
        self._why.clear()

    async def _mended(self, trunk: Sequence[int], tip: int, end: float) -> bool:
        """One try, in an epoch of its own."""
        self.epoch += 1
        self._mending, self._complaints = True, []
        try:
            self._begin_epoch(await Mender(self).attempt(trunk, tip))
            self._link = await self._feed(trunk)
        except Interrupted:  # another node failed meanwhile: the next try goes without it
            await self._pause_between_tries(end)
            return False
        except (MissingBlocks, Refused):
            patience = end - asyncio.get_running_loop().time()
            if patience <= 0:
                raise
            await self.pilot.changed(patience)
            for member in [m for m in self.members if m.hop.address in self._lost]:
                self.members.remove(member)  # a node like any other again: the pilot knows from when on
                self.dismiss(member)
            self._lost = {}
            return False
        return True

    async def _pause_between_tries(self, end: float) -> None:
        """The first tries follow each other at once: each finds another record out of date.  A pilot that names the
        same dead nodes again and again must neither keep this client busy nor make it wait for ever."""
        self._tries += 1
        if self._tries > QUICK_TRIES:
            if asyncio.get_running_loop().time() > end:
                raise MissingBlocks(f"no chain held: {self._tries} times a node failed while it was put together")
            await asyncio.sleep(PAUSE_S)

    def reconsider(self, *, trunk: int, rounds_left: float) -> None:
        """Ask now and then whether a faster chain has appeared; if so, the next append goes its way."""
        now = asyncio.get_running_loop().time()
        if now - self._considered_at < RECONSIDER_S:
            return
        self._considered_at = now
        room = self.room.trunk + self.room.crown
        leaving = frozenset(self.pilot.without(self.hops, room=room, trunk=trunk, rounds_left=rounds_left))
        # Measurements come and go; what was better a while ago and still is will stay so.
        still, self._better_without = self._better_without & leaving, leaving
        for member in self.members:
            member.leaving |= member.hop.node in still

    def lose(self, hop: Hop, error: SwarmError) -> None:
        """A node of the chain is of no more use to it."""
        if any(member.hop == hop for member in self.members) and hop.address not in self._lost:
            log.info("%s", error)
            self._lost[hop.address] = self._why[hop.address] = error
            self.pilot.failed(hop.node, error)
            self._interrupt()

    async def watch(self) -> None:
        """Find frames that are lost though every node lives; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if self._in_flight and not self._interrupted.is_set():
                usual_s = self._traversal.deadline(0.0)
                late = overdue(self.members, min(self._in_flight), self._moved_at, usual_s, loop.time())
                if late is not None:
                    self.lose(*late)

    async def close(self) -> None:
        """Free the session on every node that still listens."""
        for member in self.members:
            self.dismiss(member)
        if self._link is not None:
            self._see_off(self._link)
        if self._goodbyes:
            await asyncio.wait(self._goodbyes, timeout=2 * GOODBYE_S)
        for task in self._goodbyes:
            task.cancel()

    def dismiss(self, member: Member) -> None:
        """Let a node go, in the background: it may be deaf."""
        self._background(member.control.say_goodbye())

    def control_of(self, hop: Hop) -> NodeControl:
        """A control stream to be, for a node of this chain."""
        return NodeControl(hop, self.session, self._hear, self._broken, self.pilot.answered)

    # ---------------------------------------------------------------- what nodes say

    def _hear(self, control: NodeControl, message: ControlDown) -> None:
        match message:
            case Answer():
                self._take_answer(control, message)
            case Fault(code=FaultCode.REPLAYED):
                pass  # a doubled frame, ignored by the node: nothing was lost
            case Opened():
                pass  # of an epoch that is over
            case Fault(session=session) if session != self.session:
                pass
            case Fault(code=FaultCode.DRAINING, fatal=False):
                self._member(control).leaving = True
            case Fault():
                self._blame(control, message)
            case _:
                self.lose(control.hop, Malformed(f"{control.hop} sent a {type(message).__name__} into a session"))

    def _take_answer(self, control: NodeControl, answer: Answer) -> None:
        if answer.session != self.session or answer.epoch != self.epoch:
            return
        waiting = self._answers.pop(answer.seq, None)
        if waiting is None or answer.seq != self.answered:
            self.lose(control.hop, Malformed(f"{control.hop} answered append {answer.seq} out of turn"))
        elif answer.tokens.size and int(answer.tokens.max()) >= self.target.vocab_size:
            self.lose(control.hop, Malformed(f"{control.hop} answered a token outside the vocabulary"))
        elif int(answer.alternatives.max(initial=0)) >= self.target.vocab_size:
            self.lose(control.hop, Malformed(f"{control.hop} sent an alternative outside the vocabulary"))
        elif not waiting.done():
            self.answered += 1
            self._moved_at = asyncio.get_running_loop().time()
            for member in self.members:
                member.proven, member.complaints = True, 0
            self._in_flight.pop(answer.seq, None)
            self._free.set()
            waiting.set_result(answer)

    def _blame(self, control: NodeControl, fault: Fault) -> None:
        """A node complains: of its way on, of what it was sent, or of itself."""
        if control.epoch != self.epoch:
            return  # of an epoch that is over
        index = next((i for i, member in enumerate(self.members) if member.control is control), None)
        if index is None or self._mending:
            self._complaints.append((control, fault))  # its place in the chain is known when the epoch begins
            return
        said = Refused(f"{control.hop} says: {fault.message}", fault.code)
        if fault.code == FaultCode.DOWNSTREAM and index + 1 < len(self.members):
            self._relink(self.members[index + 1], said)
            return
        if fault.code in {FaultCode.NOT_FINITE, FaultCode.MALFORMED, FaultCode.BAD_TREE} and index:
            # Either it lies or its upstream neighbour does; neither is needed to find out which.
            self.lose(self.members[index - 1].hop, said)
        self.lose(control.hop, said)

    def _relink(self, member: Member, said: SwarmError | None = None) -> None:
        """The link into a node broke; a new one may do.  One that breaks again at once means the node."""
        member.upstream, member.complaints = None, member.complaints + 1
        if member is self.members[0]:
            self._link = None
        if member.complaints > 1 or not member.proven:
            why = f"lost {member.hop}: it cannot be reached from the node before it ({said or 'the link broke'})"
            self.lose(member.hop, NodeLost(why, member.hop.address))
        self._interrupt()

    def _broken(self, control: NodeControl, error: SwarmError) -> None:
        """The stream to a node is of no use; the node itself may be."""
        member = next((member for member in self.members if member.control is control), None)
        if member is None:
            return
        if isinstance(error, TransportError):
            self._interrupt()
        else:
            self.lose(control.hop, error)

    # ---------------------------------------------------------------- epochs

    def _begin_epoch(self, members: list[Member]) -> None:
        self.members, self.answered = members, 0
        self._answers, self._in_flight, self._mending = {}, {}, False
        self._considered_at = asyncio.get_running_loop().time()
        self._lost = {address: error for address, error in self._lost.items() if address in self._addresses()}
        self._interrupted.clear()
        complaints, self._complaints = self._complaints, []
        for control, fault in complaints:
            self._blame(control, fault)
        if self._lost or any(member.control.broken for member in members):
            self._interrupt()
        self._raise_interruption()
        self._interrupted_at = 0.0

    async def _feed(self, trunk: Sequence[int]) -> Stream:
        """The link to the head; a new one, with the trunk replayed, if the head is new or the old link broke."""
        head = self.members[0]
        if not head.relinked and self._link is not None:
            return self._link
        if self._link is not None:
            self._see_off(self._link)
            self._link = None
        try:
            link = await self.transport.connect(head.hop.address, StreamKind.LINK)
            await link.send(LinkHello(PROTOCOL_VERSION, self.session, self.epoch, head.ticket))
            if not head.proven:
                for append in replay(self.epoch, trunk):
                    await link.send(append)
        except SwarmError as error:
            self.lose(head.hop, error)
            raise Interrupted("the chain lost its head") from None
        self._background(self._watch_link(link))
        return link

    async def _watch_link(self, link: Stream) -> None:
        """The head ends its link only when something is wrong; its control stream tells what, if it can."""
        with contextlib.suppress(SwarmError):
            await link.receive()
        if self._link is not link:
            return
        if self._mending:
            self._link = None  # a session begun anew ends the old one's link, and `_feed` dials in any case
        else:
            self._relink(self.members[0])

    def _interrupt(self) -> None:
        if self._interrupted.is_set():
            return
        self._interrupted_at = self._interrupted_at or asyncio.get_running_loop().time()
        self._interrupted.set()
        self._free.set()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(Interrupted("the chain lost a node"))
                waiting.exception()  # nobody may be waiting; then it is raised by the next append instead

    def _raise_interruption(self, *, leaving: bool = False) -> None:
        if self._interrupted.is_set() or (leaving and any(member.leaving for member in self.members)):
            raise Interrupted("the chain lost a node")

    def lost_of(self, hop: Hop) -> SwarmError | None:
        """Why a node was let go, if it was."""
        return self._lost.get(hop.address)

    def traversed(self, seconds: float) -> None:
        """A shipment took so long: what is overdue is measured by it."""
        self._traversal = self._traversal.saw(seconds)

    def _addresses(self) -> set[str]:
        return {member.hop.address for member in self.members}

    def _member(self, control: NodeControl) -> Member:
        return next(member for member in self.members if member.control is control)

    def _see_off(self, link: Stream) -> None:
        self._background(_end_quietly(link))

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)


async def _end_quietly(link: Stream) -> None:
    with contextlib.suppress(SwarmError, TimeoutError):
        await asyncio.wait_for(link.end(), GOODBYE_S)


@contextlib.asynccontextmanager
async def open_chain(
    transport: Transport, pilot: Pilot, target: Target, room: Room, *, patience_s: float = 0.0, alternatives: int = 0
) -> AsyncIterator[Chain]:
    """A session on the chain that `pilot` chooses; closed on leaving, whatever happened.  Its tail sends so many
    `alternatives` with every answered row.

    Raises MissingBlocks and Refused (full) when `patience_s` seconds brought no chain.
    """
    chain = Chain(target, pilot, transport, room, patience_s, alternatives)
    watching = asyncio.create_task(chain.watch())
    try:
        await chain.mend((), 0)
        yield chain
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await chain.close()
