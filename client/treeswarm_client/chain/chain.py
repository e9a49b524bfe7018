"""A session on a chain of nodes: appends to the head, answers from the tail, and a chain that changes under way.

Opening a session and going on after a loss are one procedure (`repair`): keep the nodes that surely have the trunk,
fill the gaps with others, begin a new epoch, replay the trunk to whoever lacks it.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Malformed, MissingBlocks, NodeLost, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import (
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
from treeswarm.session.replay import replay
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.control_stream import GOODBYE_S, NodeControl
from treeswarm_client.chain.head_link import HeadLink
from treeswarm_client.chain.in_flight import RowsInFlight
from treeswarm_client.chain.repair import ChainMember, Interrupted, Mender, Repair, RepairAttempts, Reservation
from treeswarm_client.chain.shared_prompt import SharedPrompt
from treeswarm_client.chain.stall_detection import find_stalled_hop
from treeswarm_client.chain.wait_events import OnWait, WaitEvents
from treeswarm_client.discovery.reroute import RerouteTimer
from treeswarm_client.discovery.round_trip import RoundTrip
from treeswarm_client.discovery.route import Hop, Router, Target
from treeswarm_client.planner.costs import ChainHop

log = logging.getLogger(__name__)

# How often a chain that waits for answers asks itself whether they are overdue.
WATCH_EVERY_S = 0.25
# A node's control stream that breaks more often than that without an answer in between is not the network's fault.
MOST_BREAKS = 3


@dataclass(eq=False)
class Chain:
    """One session.  Use `open_chain`; it needs `watch` running."""

    target: Target
    router: Router
    transport: Transport
    room: Reservation
    patience_s: float
    shared: SharedPrompt | None = None
    alternatives: int = 0
    """How many of the target's best tokens come with every answered row."""
    on_wait: OnWait = lambda _: None
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_ID_BYTES))
    epoch: int = -1
    members: list[ChainMember] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    _uplink: HeadLink = field(init=False)
    _waits: WaitEvents = field(init=False)
    _lost: dict[str, SwarmError] = field(default_factory=dict)
    """Nodes of the chain that are of no more use to it, by address."""
    _why: dict[str, SwarmError] = field(default_factory=dict)
    """The same, and those given up since, until the chain is whole again."""
    _interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    _interrupted_at: float = 0.0
    _on_their_way: RowsInFlight = field(default_factory=RowsInFlight)
    _second_thoughts: RerouteTimer = field(default_factory=RerouteTimer)
    _mending: bool = False
    _attempts: RepairAttempts | None = None
    """Since the last answer."""
    _replays: bool = False
    """In this epoch new nodes get the trunk before any append."""
    _complaints: dict[tuple[NodeControl, FaultCode], Fault] = field(default_factory=dict)
    """That came while the chain was mended, about the epoch to come."""
    _accused: Counter[str] = field(default_factory=Counter)
    """Nodes lost since the last answer, by who complained of the way to them."""
    _breaks: Counter[str] = field(default_factory=Counter)
    """Of nodes' control streams since the last answer."""
    _traversal: RoundTrip = RoundTrip()
    _goodbyes: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._uplink = HeadLink(self._link_broke, self._background)
        self._waits = WaitEvents(self.session, self.on_wait)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The chain as it is now."""
        return tuple(member.hop for member in self.members)

    @property
    def profiled_hops(self) -> tuple[ChainHop, ...]:
        """The same, and what each said of its speed."""
        return tuple(ChainHop(f"{m.hop.node} {m.hop.span}", m.profile) for m in self.members)

    @property
    def answered(self) -> int:
        """Appends of this epoch whose answers are here: every node has what they brought."""
        return self._on_their_way.answered

    @property
    def credit_rows(self) -> int:
        return min(member.credit_rows for member in self.members)

    @property
    def prefix_rows(self) -> int:
        """The prompt's first so many tokens every node had when the chain was opened."""
        return min(member.prefix_rows for member in self.members)

    @property
    def free_credit_rows(self) -> int:
        """Rows that may be shipped without waiting."""
        return self.credit_rows - self._on_their_way.rows

    def send_hint(self, trunk_length: int, tip: int) -> None:
        """Tell every node how far the walk has come: what waits there and does not hang below need not be computed."""
        for member in self.members:
            self._background(member.control.tell(Hint(self.session, trunk_length, tip)))

    async def append(self, append: Append) -> asyncio.Future[Answer]:
        """Ship one append as soon as credit allows; the future holds its answer.  Raises Interrupted."""
        while not self._interrupted.is_set() and not self._has_room(append):
            await self._on_their_way.change()
        self._raise_interruption(leaving=append.seq == 0 or not self._on_their_way)
        answer = self._on_their_way.leaves(append)
        if not await self._uplink.send(append, unless=self._interrupted):
            self._interrupt()
        self._raise_interruption()
        return answer

    def _has_room(self, append: Append) -> bool:
        """One append is always worth a try: a node that grants less than that says so, or is found stuck."""
        return not self._on_their_way or append.rows <= self.free_credit_rows

    async def repair(self, trunk: Sequence[int], tip: int) -> None:
        """Make the chain whole: every node then has the tokens `trunk`, whose last one is called `tip`, and no more.

        Waits up to the chain's patience for nodes to appear.  Raises MissingBlocks naming what nobody serves, or
        Refused (full) where nobody has room.
        """
        loop = asyncio.get_running_loop()
        started = self._interrupted_at or loop.time()
        before, self._replays = self.hops, bool(trunk)
        # Nodes that grant and then fail at once must not keep a client for ever: patience is one until an answer comes.
        if self._attempts is None:
            self._attempts = RepairAttempts(until=loop.time() + self.patience_s)
        else:
            await self._attempts.pause()
        with self._waits.told():
            while not await self._mended(trunk, tip, self._attempts):
                pass
        if before:
            left = [hop for hop in before if hop not in self.hops]
            gone = tuple((hop, str(self._why.get(hop.address, "it asked to leave"))) for hop in left)
            gained = tuple(hop for hop in self.hops if hop not in before)
            self.repairs.append(Repair(self.epoch, gone, gained, loop.time() - started))
        self._why.clear()

    async def _mended(self, trunk: Sequence[int], tip: int, tries: RepairAttempts) -> bool:
        """One try, in an epoch of its own."""
        self.epoch += 1
        self._mending, self._complaints = True, {}
        try:
            self._begin_epoch(await Mender(self).attempt(trunk, tip))
            await self._feed(trunk)
        except Interrupted:  # another node failed meanwhile: the next try goes without it
            await tries.pause()
            return False
        except (MissingBlocks, Refused) as error:
            patience = tries.until - asyncio.get_running_loop().time()
            if patience <= 0:
                raise
            self._waits.say(error, patience)
            await self.router.wait_for_change(patience)
            for member in [m for m in self.members if m.hop.address in self._lost]:
                self.members.remove(member)  # a node like any other again: the pilot knows from when on
                self.close_control(member)
            self._lost = {}
            return False
        return True

    def reroute_if_faster(self, *, trunk: int, rounds_left: float) -> None:
        """Ask now and then whether a faster chain has appeared; if so, the next append goes its way."""
        if not self._second_thoughts.due(asyncio.get_running_loop().time()):
            return
        room = self.room.trunk + self.room.crown
        leaving = self._second_thoughts.leave(
            self.router.nodes_to_leave(self.hops, room=room, trunk=trunk, rounds_left=rounds_left)
        )
        for member in self.members:
            member.leaving |= member.hop.node in leaving

    def drop_node(self, hop: Hop, error: SwarmError) -> None:
        """A node of the chain is of no more use to it."""
        member = next((member for member in self.members if member.hop == hop), None)
        if member is not None and hop.address not in self._lost:
            log.info("%s", error)
            self._lost[hop.address] = self._why[hop.address] = error
            self.router.report_failure(hop.node, member.excused(error))
            self._interrupt()

    async def watch(self) -> None:
        """Find frames that are lost though every node lives; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            out = self._on_their_way
            if out and not self._interrupted.is_set():
                usual_s = self._traversal.deadline(0.0)
                late = find_stalled_hop(
                    self.members, out.oldest, out.moved_at, usual_s, loop.time(), replays=self._replays
                )
                if late is not None:
                    self.drop_node(*late)

    async def close(self) -> None:
        """Free the session on every node that still listens."""
        for member in self.members:
            self.close_control(member)
        self._uplink.close()
        if self._goodbyes:
            await asyncio.wait(self._goodbyes, timeout=2 * GOODBYE_S)
        for task in self._goodbyes:
            task.cancel()

    def close_control(self, member: ChainMember) -> None:
        """Let a node go, in the background: it may be deaf."""
        self._background(member.control.close_session())

    def control_of(self, hop: Hop) -> NodeControl:
        """A control stream to be, for a node of this chain."""
        return NodeControl(hop, self.session, self._hear, self._broken, self.router.report_round_trip)

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
            case Fault():
                self._blame(control, message)
            case _:
                self.drop_node(control.hop, Malformed(f"{control.hop} sent a {type(message).__name__} into a session"))

    def _take_answer(self, control: NodeControl, answer: Answer) -> None:
        if answer.session != self.session or answer.epoch != self.epoch:
            return
        if self._mending or self._interrupted.is_set():
            return  # what was in flight is shipped again in the epoch to come
        if control is not self.members[-1].control:
            self.drop_node(control.hop, Malformed(f"{control.hop} answered, and is not the tail"))
            return
        if not self._on_their_way.is_due(answer.seq):
            self.drop_node(control.hop, Malformed(f"{control.hop} answered append {answer.seq} out of turn"))
        elif answer.tokens.size and int(answer.tokens.max()) >= self.target.vocab_size:
            self.drop_node(control.hop, Malformed(f"{control.hop} answered a token outside the vocabulary"))
        elif int(answer.alternatives.max(initial=0)) >= self.target.vocab_size:
            self.drop_node(control.hop, Malformed(f"{control.hop} sent an alternative outside the vocabulary"))
        else:
            for member in self.members:
                member.proven, member.complaints = True, 0
            self.router.report_traversal([member.hop.node for member in self.members])
            self._accused.clear()
            self._breaks.clear()
            self._attempts = None
            self._on_their_way.arrives(answer)

    def _blame(self, control: NodeControl, fault: Fault) -> None:
        """A node complains: of its way on, of what it was sent, or of itself."""
        index = next((i for i, member in enumerate(self.members) if member.control is control), None)
        if fault.code == FaultCode.DRAINING and not fault.fatal and index is not None:
            self.members[index].leaving = True
            return
        if control.epoch != self.epoch:
            return  # of an epoch that is over
        if index is None or self._mending:
            # Its place in the chain is known when the epoch begins.
            self._complaints.setdefault((control, fault.code), fault)
            return
        said = Refused(f"{control.hop} says: {fault.message}", fault.code)
        if fault.code == FaultCode.DOWNSTREAM and index + 1 < len(self.members):
            self._accuse(control, self.members[index + 1], said)
            return
        if fault.code in {FaultCode.NOT_FINITE, FaultCode.MALFORMED, FaultCode.BAD_TREE} and index:
            # Either it lies or its upstream neighbour does; neither is needed to find out which.
            self.drop_node(self.members[index - 1].hop, said)
        self.drop_node(control.hop, said)

    def _accuse(self, control: NodeControl, next_one: ChainMember, said: SwarmError) -> None:
        """The link between two nodes broke; one that loses two in a row by its word is let go as well."""
        self._relink(next_one, said)
        if self.loss_of(next_one.hop) is not None:
            self._accused[control.hop.node] += 1
        if self._accused[control.hop.node] > 1:
            self.drop_node(control.hop, said)

    def _relink(self, member: ChainMember, said: SwarmError | None = None) -> None:
        """The link into a node broke; a new one may do.  One that breaks again at once means the node."""
        member.upstream, member.complaints = None, member.complaints + 1
        if member is self.members[0]:
            self._uplink.close()
        if member.complaints > 1 or not member.proven:
            why = f"lost {member.hop}: it cannot be reached from the node before it ({said or 'the link broke'})"
            self.drop_node(member.hop, NodeLost(why, member.hop.address))
        self._interrupt()

    def _broken(self, control: NodeControl, error: SwarmError) -> None:
        """The stream to a node is of no use; the node itself may be."""
        member = next((member for member in self.members if member.control is control), None)
        if member is None:
            return
        self._breaks[control.hop.node] += 1
        if isinstance(error, TransportError) and self._breaks[control.hop.node] <= MOST_BREAKS:
            self._interrupt()
        else:
            self.drop_node(control.hop, error)

    # ---------------------------------------------------------------- epochs

    def _begin_epoch(self, members: list[ChainMember]) -> None:
        self.members, self._on_their_way, self._mending = members, RowsInFlight(), False
        self._second_thoughts.had_at = asyncio.get_running_loop().time()
        self._lost = {m.hop.address: self._lost[m.hop.address] for m in members if m.hop.address in self._lost}
        self._interrupted.clear()
        complaints, self._complaints = self._complaints, {}
        for (control, _), fault in complaints.items():
            self._blame(control, fault)
        for member in members:
            if member.control.broken is not None:
                self._broken(member.control, member.control.broken)
        if self._lost:
            self._interrupt()
        self._raise_interruption()
        self._interrupted_at = 0.0

    async def _feed(self, trunk: Sequence[int]) -> None:
        """Link up with the head; anew, with the trunk replayed, if the head is new or the old link broke."""
        head = self.members[0]
        if not head.relinked and self._uplink.connected:
            return
        hello = LinkHello(PROTOCOL_VERSION, self.session, self.epoch, head.ticket)
        try:
            await self._uplink.dial(self.transport, head.hop, hello)
            for append in () if head.proven else replay(self.epoch, trunk):
                if not await self._uplink.send(append, unless=self._interrupted):
                    self._interrupt()
                    break
        except SwarmError as error:
            self.drop_node(head.hop, error)
        self._raise_interruption()

    def _link_broke(self, why: SwarmError | None) -> None:
        if not self._mending:  # a session begun anew ends the old one's link, and `_feed` dials in any case
            self._relink(self.members[0], why)

    def _interrupt(self) -> None:
        if self._interrupted.is_set():
            return
        self._interrupted_at = self._interrupted_at or asyncio.get_running_loop().time()
        self._interrupted.set()
        self._on_their_way.interrupt()

    def _raise_interruption(self, *, leaving: bool = False) -> None:
        if self._interrupted.is_set() or (leaving and any(member.leaving for member in self.members)):
            raise Interrupted("the chain lost a node")

    def loss_of(self, hop: Hop) -> SwarmError | None:
        """Why a node was let go, if it was."""
        return self._lost.get(hop.address)

    def record_traversal(self, seconds: float) -> None:
        """A shipment took so long: what is overdue is measured by it."""
        self._traversal = self._traversal.with_sample(seconds)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)


async def _leave(chain: Chain, watching: "asyncio.Task[None]") -> None:
    await asyncio.wait({watching})
    await chain.close()


@contextlib.asynccontextmanager
async def open_chain(
    transport: Transport,
    router: Router,
    target: Target,
    room: Reservation,
    *,
    patience_s: float = 0.0,
    shared: SharedPrompt | None = None,
    alternatives: int = 0,
    on_wait: OnWait = lambda _: None,
) -> AsyncIterator[Chain]:
    """A session on the chain that `router` chooses, for the prompt `shared` if its KV may be shared; closed on leaving,
    whatever happened.  Its tail sends so many `alternatives` with every answered row.  `on_wait` hears of every wait.

    Raises MissingBlocks and Refused (full) when `patience_s` seconds brought no chain.
    """
    chain = Chain(target, router, transport, room, patience_s, shared, alternatives, on_wait)
    watching = asyncio.create_task(chain.watch())
    try:
        await chain.repair((), 0)
        yield chain
    finally:
        watching.cancel()
        # Whoever is cancelled once more meanwhile goes at once; the nodes hear a goodbye all the same.
        await asyncio.shield(_leave(chain, watching))
