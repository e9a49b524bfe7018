"""A session on a chain of nodes: appends go to the head, answers come from the tail, and failed nodes are replaced.

Opening a session and continuing it after a loss are one procedure, `Chain.repair`: keep the nodes that surely have the
trunk, fill the gaps with other nodes, begin a new epoch, and replay the trunk to the nodes that lack it.  `repair.py`
plans it, `repair_executor.py` carries it out, and `supervisor.py` judges which nodes have failed.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import MissingBlocks, NodeLost, Refused, SwarmError
from treeswarm.protocol.messages import Answer, Append, Hint, LinkHello
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.session.replay import replay
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.control_stream import CLOSE_S
from treeswarm_client.chain.epoch import Epoch
from treeswarm_client.chain.head_link import HeadLink
from treeswarm_client.chain.in_flight import Interrupted
from treeswarm_client.chain.member import ChainMember
from treeswarm_client.chain.options import Reservation, SessionOptions
from treeswarm_client.chain.proposals import ProposalInbox
from treeswarm_client.chain.repair import PlannedNode, Repair
from treeswarm_client.chain.repair_executor import RepairExecutor
from treeswarm_client.chain.shared_prompt import SharedPrompt
from treeswarm_client.chain.stall_detection import find_stalled_hop
from treeswarm_client.chain.supervisor import ONLY_HOLDER_SILENCE_S, ChainSupervisor, RepairAttempts
from treeswarm_client.chain.wait_events import OnWait, WaitEvents
from treeswarm_client.discovery.reroute import RerouteTimer
from treeswarm_client.discovery.round_trip import RoundTrip
from treeswarm_client.discovery.route import ANY_TAIL, Hop, Router, TailNeeds, Target
from treeswarm_client.discovery.tapping import hops_without_head

log = logging.getLogger(__name__)

# Seconds between checks for appends that are stuck.
WATCH_EVERY_S = 0.25
# Why a node that did not fail is not in the chain any more.
LEFT, RELIEVED = "it asked to leave", "other nodes of the chain serve its blocks now"


class Chain:
    """One session on a chain of nodes.  Create it with `open_chain`; it needs `watch` running."""

    def __init__(self, options: SessionOptions, router: Router, transport: Transport, on_wait: OnWait) -> None:
        """Create a chain without nodes; `repair` opens it."""
        self.options = options
        self.router = router
        self.waits = WaitEvents(options.session, on_wait)
        self.repairs: list[Repair] = []
        """Repairs of the chain so far, oldest first.  Opening it does not count."""
        self._background = TaskSet()
        self._supervisor = ChainSupervisor(options, router)
        self._executor = RepairExecutor(options, router, transport, self._supervisor, self._background)
        self._head_link = HeadLink(transport, self._supervisor.on_head_link_break, self._background)
        self._reroute_timer = RerouteTimer()
        self._without_head: tuple[Hop, ...] = ()
        """Nodes of the chain that lack the tail's head, as the user was told of them last."""
        self._traversal_time = RoundTrip()
        """Estimate of the duration of a traversal, by which stalls are recognised."""

    @property
    def target(self) -> Target:
        """The model that the chain serves."""
        return self.options.target

    @property
    def epoch(self) -> Epoch:
        """The current configuration of the chain."""
        return self._supervisor.epoch

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Nodes of the chain and their spans, head first."""
        return self.epoch.hops

    @property
    def proposals(self) -> ProposalInbox:
        """What the tail's speculator has proposed."""
        return self._supervisor.proposals

    @property
    def proposes(self) -> bool:
        """Whether the tail has said that it proposes trees, and gets what it reads: otherwise none is waited for."""
        members = self.epoch.members
        granted = bool(self.options.proposal_nodes and members and members[-1].proposal_nodes)
        return granted and not hops_without_head(self.hops)

    def send_hint(self, trunk_length: int, tip: int) -> None:
        """Tell every node how far the walk has come, in the background.

        Rows that wait there and do not descend from `tip` need not be computed.
        """
        for member in self.epoch.members:
            self._background.start(member.control.send_hint(Hint(self.options.session, trunk_length, tip)))

    async def append(self, append: Append) -> asyncio.Future[Answer]:
        """Ship one append as soon as the credit allows it, and return the future of its answer.

        While nothing is in flight an append is sent whatever its size, because waiting would free no credit.  A node
        that granted fewer rows reports that, or is found stalled.  Raises Interrupted if the chain needs a repair.
        """
        epoch, in_flight = self.epoch, self.epoch.in_flight
        while not in_flight.interrupted.is_set() and in_flight and append.rows > epoch.free_credit_rows:
            await in_flight.wait_for_change()
        # Between two traversals a node that asked to leave may be replaced; in the middle of one it still serves.
        epoch.raise_if_interrupted(may_leave=append.seq == 0 or not in_flight)
        answer = in_flight.add(append)
        if not await self._head_link.send(append, unless=in_flight.interrupted):
            in_flight.interrupt()
        epoch.raise_if_interrupted()
        return answer

    async def repair(self, trunk: Sequence[int], tip: int) -> None:
        """Make the chain whole: every node then has, or is sent, the tokens `trunk`, whose last one has the id `tip`.

        Waits up to the session's patience for nodes to appear.  Raises MissingBlocks naming the blocks without nodes,
        Refused (full) if all nodes that serve them are full, or BadRequest if no tail can apply the request's rules.
        """
        if self._supervisor.rejection is not None:
            raise self._supervisor.rejection
        loop = asyncio.get_running_loop()
        before, started = self.epoch.members, self.epoch.in_flight.interrupted_at or loop.time()
        attempts = self._supervisor.failures.attempts
        # Nodes that open a session and then fail at once must not occupy a client for ever: all repairs share one
        # patience until an answer comes.
        if attempts is None:
            attempts = RepairAttempts(until=loop.time() + self.options.patience_s)
            self._supervisor.failures.attempts = attempts
        else:
            await attempts.pause(self._supervisor.failures.last)
        with self.waits.ending_on_exit():
            while not await self._attempt_repair(trunk, tip, attempts):
                pass
        if before:
            self.repairs.append(self._describe_repair(before, loop.time() - started))
        self.epoch.loss_reasons.clear()

    def _describe_repair(self, before: Sequence[ChainMember], seconds: float) -> Repair:
        """Return the repair that has taken `seconds`, of a chain that had the nodes `before`."""
        nodes, served = {hop.node for hop in self.hops}, {member.hop for member in before}
        reasons = {
            member.hop: self.epoch.loss_reasons.get(member.hop.address, LEFT if member.leaving else RELIEVED)
            for member in before
            if member.hop.node not in nodes
        }
        lost = tuple((hop, str(reason)) for hop, reason in reasons.items())
        gained = tuple(hop for hop in self.hops if hop not in served)
        return Repair(self.epoch.number, lost, gained, seconds)

    async def _attempt_repair(self, trunk: Sequence[int], tip: int, attempts: RepairAttempts) -> bool:
        """Attempt the repair once, in a new epoch; return whether the chain is whole.

        If nodes are missing or full, wait for a change in the swarm until the patience ends, then raise the error.
        """
        loop = asyncio.get_running_loop()
        self._supervisor.epoch = self.epoch.next_attempt(replays=bool(trunk))
        try:
            plan, members = await self._executor.attempt(trunk, tip)
            self._reroute_timer.checked_at = loop.time()
            self._supervisor.begin_epoch(members)
            await self._connect_head(plan.head, trunk)
        except Interrupted:  # another node failed meanwhile: the next attempt leaves it out
            await attempts.pause(self._supervisor.failures.last)
            return False
        except (MissingBlocks, Refused) as error:
            remaining_s = attempts.until - loop.time()
            if remaining_s <= 0:
                raise
            self.waits.report(error, remaining_s)
            await self.router.wait_for_change(remaining_s)
            self._executor.close_control(self.epoch.forget_losses())
            return False
        if self.options.proposal_nodes:
            self._warn_of_missing_heads()
        return True

    def _warn_of_missing_heads(self) -> None:
        """Say which nodes keep the tail from proposing, once as long as they are the same."""
        lacking, before = hops_without_head(self.hops), self._without_head
        self._without_head = lacking
        if lacking and lacking != before:
            log.warning(
                "nothing is proposed: the tail's speculator reads the results of blocks %s, and %s cannot add theirs: "
                "start them with the same --speculator",
                ", ".join(map(str, self.hops[-1].taps)),
                ", ".join(map(str, lacking)),
            )

    async def _connect_head(self, head: PlannedNode, trunk: Sequence[int]) -> None:
        """Connect to the head if its link is new; replay the trunk to it if the node is new.  Raises Interrupted."""
        epoch, member = self.epoch, self.epoch.members[0]
        if not head.new_link and self._head_link.connected:
            return
        hello = LinkHello(PROTOCOL_VERSION, self.options.session, epoch.number, member.ticket)
        try:
            await self._head_link.connect(head.hop, hello)
            for append in replay(epoch.number, trunk) if head.new else ():
                if not await self._head_link.send(append, unless=epoch.in_flight.interrupted):
                    epoch.in_flight.interrupt()
                    break
        except SwarmError as error:
            self.drop_node(head.hop, error)
        epoch.raise_if_interrupted()

    def reroute_if_faster(self, *, trunk: int, rounds_left: float) -> None:
        """Look for a faster chain if it is time to.

        Nodes that a faster chain leaves out are marked as leaving; the next traversal then starts a repair without
        them.

        `trunk` is the number of committed tokens, `rounds_left` the expected number of rounds still to come.
        """
        if not self._reroute_timer.is_due(asyncio.get_running_loop().time()):
            return
        rows = self.options.reservation.rows
        candidates = self.router.nodes_to_leave(
            self.hops, room=rows, trunk=trunk, rounds_left=rounds_left, needs=self.options.needs
        )
        leaving = self._reroute_timer.confirm(candidates)
        for member in self.epoch.members:
            member.leaving |= member.hop.node in leaving

    def drop_node(self, hop: Hop, error: SwarmError) -> None:
        """Stop using a node of the chain because of `error`: the next append raises Interrupted."""
        self._supervisor.drop_node(hop, error)

    def record_traversal(self, seconds: float) -> None:
        """Learn how long a shipment took to be answered."""
        self._traversal_time = self._traversal_time.with_sample(seconds)

    async def watch(self) -> None:
        """Drop nodes at which an append is stuck although they still answer pings.  Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            epoch = self.epoch
            if epoch.in_flight and not epoch.in_flight.interrupted.is_set():
                self._report_silence(loop.time())
                stalled = find_stalled_hop(epoch, self._traversal_time.deadline(0.0), loop.time())
                if stalled is not None:
                    self.drop_node(*stalled)

    def _report_silence(self, now: float) -> None:
        """Report that the session waits for a silent node that alone serves its blocks, or that it does so no more."""
        if (overdue := self._supervisor.overdue_holder(now)) is None:
            self.waits.end(succeeded=True)
            return
        hop, silence_s = overdue
        words = f"nothing heard from {hop} for {silence_s:.0f} s, and no other node serves these blocks"
        self.waits.report(NodeLost(words, hop.address), max(0.0, ONLY_HOLDER_SILENCE_S - silence_s))

    async def close(self) -> None:
        """Free the session on every node that still listens."""
        self._executor.close_control(self.epoch.members)
        self._head_link.close()
        if self._background:
            await asyncio.wait(set(self._background), timeout=2 * CLOSE_S)
        self._background.cancel()


async def _close(chain: Chain, watching: "asyncio.Task[None]") -> None:
    await asyncio.wait({watching})
    await chain.close()


@contextlib.asynccontextmanager
async def open_chain(
    transport: Transport,
    router: Router,
    target: Target,
    reservation: Reservation,
    *,
    patience_s: float = 0.0,
    shared: SharedPrompt | None = None,
    alternatives: int = 0,
    proposal_nodes: int = 0,
    rules: RulesRequest | None = None,
    needs: TailNeeds = ANY_TAIL,
    alternative_logprobs: bool = False,
    on_wait: OnWait = lambda _: None,
) -> AsyncIterator[Chain]:
    """Open a session on a chain of nodes that `router` chooses; close it on leaving the context.

    `reservation` is what every node reserves; `shared` is the prompt, if its KV may be shared.  The tail sends the best
    `alternatives` tokens with every answered row, with `alternative_logprobs` also theirs, and proposes trees of up to
    `proposal_nodes` nodes if it has a speculator.  It applies `rules`, and every tail meets `needs`.  `on_wait` is
    called for every wait.  Raises MissingBlocks or Refused (full) if no chain could be formed within `patience_s`
    seconds.
    """
    options = SessionOptions(
        target, reservation, patience_s, shared, alternatives, proposal_nodes, rules, needs, alternative_logprobs
    )
    chain = Chain(options, router, transport, on_wait)
    watching = asyncio.create_task(chain.watch())
    try:
        await chain.repair((), 0)
        yield chain
    finally:
        watching.cancel()
        # If this task is cancelled once more meanwhile, it leaves at once, and the nodes' sessions are closed all the
        # same.
        await asyncio.shield(_close(chain, watching))
