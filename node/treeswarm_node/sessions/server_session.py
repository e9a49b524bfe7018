"""One session on this node: appends come in on a link, the device computes them, results go downstream.

`NodeSession` (in `treeswarm.session.session`) decides what an append means; `ServerSession` does the I/O around it.  A
session lives through epochs, because its neighbours may change.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

from treeswarm.errors import Refused, SwarmError, TransportError
from treeswarm.protocol.messages import (
    Append,
    FaultCode,
    HopTiming,
    LinkWelcome,
    NextHop,
    Opened,
    Proposal,
    Resume,
)
from treeswarm.session.session import NodeSession
from treeswarm.session.steps import Step
from treeswarm.tasks import TaskSet, cancelled
from treeswarm.transport.seam import Stream
from treeswarm_node.engine.engine import WaitingStep
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.engine.step_rules import SessionRules
from treeswarm_node.sessions.compression import decompress_rows, run_by_size
from treeswarm_node.sessions.downstream import Downstream, ToClient, ToNextNode
from treeswarm_node.sessions.session_parts import Opening, SessionClient, SessionEpoch, SessionMemory
from treeswarm_node.sessions.speculation import SessionSpeculation

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ServerSession:
    """Everything that one session holds on this node, from its creation until `fail` or `free`.

    It dials its downstream node and sends results as soon as it exists.  `fail` and `free` may be called again.
    """

    opening: Opening
    state: NodeSession
    """State machine that turns appends into steps."""
    memory: SessionMemory
    client: SessionClient
    speculation: SessionSpeculation | None = None
    """Proposes trees below the ends of walks, or None unless this node is the tail and was asked for proposals."""
    rules: SessionRules | None = None
    """Rules of the text, or None unless this node is the tail and was given some."""
    epoch: SessionEpoch = field(init=False)
    _tasks: TaskSet = field(default_factory=TaskSet)
    _link_readers: set[asyncio.Task[None]] = field(default_factory=set)
    """Tasks that read from upstream links.  The transport started them."""
    _ending: asyncio.Task[None] | None = None
    """Task that frees everything, or None while the session lives."""
    _credit_returned: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when results were sent on or the session ends: a replay that waits for room looks again."""
    _resuming: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a resumption runs."""

    def __post_init__(self) -> None:
        request = self.opening.request
        self.epoch = SessionEpoch(request, self._make_downstream(request.next_hop))
        self.epoch.forwarding = self._tasks.start(self._forward_results(self.epoch))

    @property
    def ended(self) -> bool:
        return self._ending is not None

    @property
    def progress(self) -> tuple[int, int, int]:
        """Numbers of appends received, sent on and replayed in the current epoch, as a pong reports them."""
        return self.state.received, self.epoch.forwarded, self.epoch.replayed

    async def read_link(self, link: Stream, *, compresses: bool = False) -> None:
        """Take appends from an upstream link until it ends, or until a new epoch has another ticket.

        `compresses` says that the upstream node may compress rows, and waits to hear that this node decompresses them.
        Raises the error that made the session fail.
        """
        ticket, reader = self.epoch.ticket, asyncio.current_task()
        assert reader is not None
        self._link_readers.add(reader)
        # A task of its own: on a slow line the welcome may wait long for its turn, and appends must not wait with it.
        welcome = asyncio.create_task(_send_link_welcome(link)) if compresses else None
        try:
            while (append := await link.receive()) is not None and not self.ended:
                if not isinstance(append, Append):
                    raise Refused(
                        f"a link carries appends after its hello, not {type(append).__name__}", FaultCode.MALFORMED
                    )
                await self._take(await _plain_rows(append, self.state.terms.row_bytes))
        except TransportError:
            log.info("session %s: the upstream link broke", self.opening.name)
        except SwarmError as error:
            await self.fail(error)
            raise
        except asyncio.CancelledError:
            if not self.ended and self.epoch.ticket == ticket:
                raise
            reader.uncancel()  # The session cancelled its readers: that ends this stream, and nothing else.
        finally:
            self._link_readers.discard(reader)
            if welcome is not None:
                await cancelled(welcome)

    async def resume(self, request: Resume, control: Stream) -> None:
        """Begin a new epoch, perhaps with other neighbours.  Raises Refused if the session cannot go on in it."""
        async with self._resuming:
            length = request.resumption.trunk_length
            _check_resume(self.state, self.memory, request)
            self.epoch.stalled = True
            self.opening.engine.discard_waiting(self.state)
            await self.opening.engine.wait_until_idle(self.state)
            if self.ended:
                raise Refused("the session ended meanwhile", FaultCode.UNKNOWN_SESSION)
            self.state.check_resumption(request.epoch, request.resumption)
            # Nothing is awaited from here until the new epoch is in place, so that no append arrives between the two.
            previous = self.epoch
            if previous.forwarding is not None:
                previous.forwarding.cancel()
            self.memory.truncate(length)
            if self.speculation is not None:
                self.speculation.truncate(length)
            self.memory.prefix_recorder = None
            self.state.resume(request.epoch, request.resumption)
            if request.replays and self.memory.replay_log is None:
                raise Refused("this node has no room any more for the session's replay log", FaultCode.NO_JOURNAL)
            self.client.attach(control)
            keeps = previous.keeps_downstream(request)
            downstream = previous.downstream if keeps else self._make_downstream(request.next_hop)
            self.epoch = SessionEpoch(request, downstream)
            if previous.ticket != request.ticket:
                _cancel_others(self._link_readers)  # Their frames belong to the old epoch.
            if not keeps:
                self._tasks.start(previous.end_downstream())
            await previous.wait_stopped()
            self._credit_returned.set()
            if self.ended:
                raise Refused("the session ended meanwhile", FaultCode.UNKNOWN_SESSION)
            self.epoch.forwarding = self._tasks.start(self._forward_results(self.epoch))
        log.info("session %s resumes in epoch %d from %d tokens", self.opening.name, request.epoch, length)

    async def fail(self, error: SwarmError) -> None:
        """Report the error to the client, and free everything."""
        if not self.ended:
            log.warning("session %s failed: %s", self.opening.name, error)
            self.begin_end()
            await self.client.send_fault(self.opening.id, error, fatal=True)
        await self.free()

    async def free(self) -> None:
        """Give the session's memory back, once no forward touches it."""
        await asyncio.shield(self.begin_end())

    def begin_end(self) -> asyncio.Task[None]:
        """Start to free the session, and return the task that does so: it runs on if its caller is cancelled."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._release())
            self.opening.on_end()
            self._credit_returned.set()
            self.opening.engine.discard_waiting(self.state)
            self._tasks.cancel()
        return self._ending

    async def _release(self) -> None:
        await self.opening.engine.wait_until_idle(self.state)
        self.memory.close()
        await self.epoch.downstream.end()
        _cancel_others(self._link_readers)

    async def send_opened(self) -> None:
        """Tell the client that the session is open in its current epoch."""
        terms = self.state.terms
        proposal_nodes = self.speculation.size if self.speculation is not None else 0
        digest = self.rules.request.digest if self.rules is not None else b""
        opened = Opened(
            self.opening.id, terms.epoch, terms.credit_rows, self.opening.profile, self.state.offered, proposal_nodes,
            digest,
        )  # fmt: skip
        await self.client.control.send(opened)

    async def _take(self, append: Append) -> None:
        """Submit the steps that an append makes due to the engine.

        A replay first waits while more replayed rows than the credit are not yet sent on.  An append that was received
        before is reported to the client and ignored.
        """
        self.client.last_request_at = arrived = asyncio.get_running_loop().time()
        while append.replay and not self.ended and self.state.replayed_rows > self.state.terms.credit_rows:
            self._credit_returned.clear()
            await self._credit_returned.wait()
        if self.ended or self.epoch.stalled:
            return
        offered = self.state.offered
        try:
            steps = self.state.receive(append)
        except Refused as error:
            if error.code != FaultCode.REPLAYED:
                raise
            await self.client.send_fault(self.opening.id, error, fatal=False)
            return
        # The trunk began with all the offered rows of the prefix cache; the client uses as many as all its nodes have.
        if offered and steps and steps[0].append.prefix < offered:
            self.memory.truncate(steps[0].append.prefix)
        for step in steps:
            speculates = self.speculation is not None
            sums_from = self.epoch.sums_from(self.opening.tap_slice, replay=append.replay)
            work = WaitingStep(
                self.state, self.memory.kv, self.opening.span, step, self._take_result, arrived, speculates, sums_from,
                None if self.rules is None else self.rules.prepare(step),
            )  # fmt: skip
            self.opening.engine.submit(work)

    def _take_result(self, step: Step, computed: Computed, timing: HopTiming) -> None:
        if not self.ended and step.append.epoch == self.epoch.number:
            self.epoch.results.put_nowait((step, computed, timing))

    async def _forward_results(self, epoch: SessionEpoch) -> None:
        """Send the epoch's results downstream in order, after the replay log if the downstream node needs that."""
        try:
            if epoch.replays and self.memory.replay_log is not None:
                for append in self.memory.replay_log.replay(epoch.number):
                    await epoch.downstream.replay(self.memory.with_sums(append) if epoch.request.taps else append)
                    epoch.replayed += 1
            while True:
                step, computed, timing = await epoch.results.get()
                if computed.error is not None:
                    raise computed.error
                self.memory.record(step, computed)
                if epoch.forwards_replay or not step.append.replay:
                    await epoch.downstream.send(step, computed, (*step.append.timings, timing))
                self.state.finish(step)
                self._speculate(step, computed)
                if step.append.replay:
                    epoch.replayed += 1
                else:
                    epoch.forwarded += 1
                self._credit_returned.set()
        except TransportError as error:
            self._report_broken_link(error)
        except SwarmError as error:
            await self.fail(error)

    def _speculate(self, step: Step, computed: Computed) -> None:
        """Let the speculator read a computed step, whose answer is sent, and propose a tree if the walk has an end."""
        if self.speculation is None:
            return
        try:
            if not self.speculation.follow(step, computed):
                return
        except Exception:  # what only guesses must not end a session
            log.exception("session %s speculates no more", self.opening.name)
            self.speculation = None
            return

        def deliver(proposal: Proposal) -> None:
            if not self.ended and proposal.epoch == self.epoch.number:
                self._tasks.start(self.client.send_proposal(proposal))

        job = self.speculation.make_job(self.opening.id, self.epoch.number, deliver)
        self.opening.engine.submit_job(self.state, job)

    def _make_downstream(self, next_hop: NextHop | None) -> Downstream:
        if next_hop is None:
            return ToClient(self.opening.id, self.client.control)

        def on_broken(error: SwarmError) -> None:
            if self.epoch.downstream is downstream:
                self._report_broken_link(error)

        replay_log = self.memory.replay_log
        downstream = ToNextNode(
            session=self.opening.id,
            epoch=self.state.terms.epoch,
            hop=next_hop,
            transport=self.opening.transport,
            warm_up=self.state.terms.crown_room * (replay_log.row_bytes if replay_log is not None else 0),
            on_broken=on_broken,
            value_bytes=self.opening.value_bytes_to(next_hop.address),
        )
        return downstream

    def _report_broken_link(self, error: SwarmError) -> None:
        """Report the broken downstream link to the client, which picks a replacement.  The session stays open.

        The fault has the code DOWNSTREAM whatever the error is, so that the client knows that it is about the link.
        """
        if not self.epoch.link_broken and not self.ended:
            self.epoch.link_broken = True
            log.info("session %s: the downstream link broke: %s", self.opening.name, error)
            fault = Refused(str(error), FaultCode.DOWNSTREAM)
            self._tasks.start(self.client.send_fault(self.opening.id, fault, fatal=False))


def _check_resume(state: NodeSession, memory: SessionMemory, request: Resume) -> None:
    """Raise Refused if the session cannot resume as requested."""
    if request.replays and memory.replay_log is None:
        raise Refused("this node had no room for a replay log of the session", FaultCode.NO_JOURNAL)
    state.check_resumption(request.epoch, request.resumption)
    have, need = memory.kv.trunk_length, request.resumption.trunk_length
    if need > have:
        raise Refused(f"this node has {have} tokens of the session, {need} are needed", FaultCode.NO_JOURNAL)


def _cancel_others(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel all of these tasks but the one that calls."""
    for task in tasks - {asyncio.current_task()}:
        task.cancel()


async def _plain_rows(append: Append, row_bytes: int) -> Append:
    """Return the append with its rows decompressed, before anything counts their bytes.  Raises Malformed."""
    if not append.planes:
        return append
    return await run_by_size(decompress_rows, append, row_bytes, append.rows * row_bytes)


async def _send_link_welcome(link: Stream) -> None:
    """Tell the upstream node that this node decompresses rows."""
    with contextlib.suppress(SwarmError):  # The task that reads from this link reports its errors.
        await link.send(LinkWelcome(unpacks=True))
