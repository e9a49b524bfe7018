"""Judges what the nodes of a chain send and how their streams end, and drops the nodes that fail."""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest, Malformed, MissingBlocks, NodeLost, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import NO_TOKEN, Answer, ControlDown, Fault, FaultCode, Opened, Proposal
from treeswarm_client.chain.control_stream import GRANT_S, ControlHandlers, NodeControl
from treeswarm_client.chain.epoch import Epoch
from treeswarm_client.chain.member import ChainMember
from treeswarm_client.chain.options import SessionOptions
from treeswarm_client.chain.proposals import ProposalInbox
from treeswarm_client.discovery.route import Hop, Router

log = logging.getLogger(__name__)

# A node's control stream that breaks more often than that without an answer in between is not the network's fault.
MOST_BREAKS = 3
# More dead nodes in a row than this were never seen in a simulated swarm that loses a fifth of its nodes per hour.
QUICK_ATTEMPTS = 8
PAUSE_S = 0.5
# To give up the only holder of some blocks gains nothing while it may live: it keeps the session as long as a node may
# take to grant one.
ONLY_HOLDER_SILENCE_S = GRANT_S
# Faults of a node in what it received: the sender may have caused them.
BAD_INPUT = {FaultCode.NOT_FINITE, FaultCode.MALFORMED, FaultCode.BAD_TREE}


@dataclass(eq=False)
class RepairAttempts:
    """The attempts at repairing one chain since its last answer."""

    until: float
    """Time of the loop's clock, in seconds, at which the chain's patience ends."""
    failed: int = 0
    """Number of attempts that failed because another node failed meanwhile."""

    async def pause(self, last: SwarmError | None) -> None:
        """Count an attempt that failed, at last by the error `last`, and wait before the next one unless there were few
        so far.

        The first attempts follow each other at once, since each finds another record out of date.  A router that names
        the same dead nodes again and again must neither keep this client busy nor make it wait for ever.  Raises
        MissingBlocks when the patience has ended.
        """
        self.failed += 1
        if self.failed > QUICK_ATTEMPTS:
            if asyncio.get_running_loop().time() > self.until:
                reason = f" (at last: {last})" if last else ""
                words = f"no chain held: {self.failed} times a node failed while the chain was repaired{reason}"
                raise MissingBlocks(words)
            await asyncio.sleep(PAUSE_S)


@dataclass(eq=False)
class FailureCounts:
    """What has failed since the last answer.  Every answer replaces it."""

    attempts: RepairAttempts | None = None
    """Attempts at repairing the chain, or None before the first."""
    complaints: Counter[str] = field(default_factory=Counter)
    """Number of downstream nodes lost on a node's complaint about the link to them, by the complaining node's id."""
    breaks: Counter[str] = field(default_factory=Counter)
    """Number of breaks of control streams, by node id."""
    last: SwarmError | None = None
    """Why a node failed last."""


@dataclass(eq=False)
class ChainSupervisor:
    """Holds the current epoch of one session, and changes it as nodes answer, complain and fail."""

    options: SessionOptions
    router: Router
    epoch: Epoch = field(default_factory=Epoch)
    failures: FailureCounts = field(default_factory=FailureCounts)
    proposals: ProposalInbox = field(default_factory=ProposalInbox)
    rejection: BadRequest | None = None
    """Why no chain can serve the request, or None: its rules cannot be applied by any tail."""
    """What the tail's speculator has proposed."""

    def control_of(self, hop: Hop) -> NodeControl:
        """Return a control stream, not connected yet, for a node of this chain."""
        handlers = ControlHandlers(
            self._on_message, self._on_stream_break, self._on_silence, self.router.report_round_trip
        )
        return NodeControl(hop, self.options.session, handlers)

    def drop_node(self, hop: Hop, error: SwarmError) -> None:
        """Stop using a node of the chain, report its failure to the router, and interrupt the epoch.

        Of a node that only opens the session, nothing but the error is kept.
        """
        self.failures.last = error
        member = next((member for member in self.epoch.members if member.hop == hop), None)
        if member is not None and self.epoch.loss_of(hop) is None:
            log.info("%s", error)
            self.epoch.add_loss(hop, error)
            self.router.report_failure(hop.node, member.failure_to_report(error))

    def is_replaceable(self, hop: Hop) -> bool:
        """Return whether other nodes could serve the blocks of one of the chain's nodes, or of a new one, now.

        They may be nodes of the chain, which open the session again then.  A node that has failed lately is no
        replacement: where the one that was lost hangs, the one that opens the session in its place would be given up
        for it as soon as its machine is late.
        """
        lost = {other.node for other in self.epoch.hops if self.epoch.loss_of(other) is not None}
        return self.router.has_spare(hop.span, avoid={hop.node, *lost}, needs=self.options.needs)

    def overdue_holder(self, now: float) -> tuple[Hop, float] | None:
        """Return a node that is kept although it is silent, with the seconds of its silence, or None."""
        for member in self.epoch.members:
            heartbeat = member.control.heartbeat
            if member.control.broken is None and heartbeat.is_overdue(now):
                return member.hop, heartbeat.silence_s(now)
        return None

    def begin_epoch(self, members: list[ChainMember]) -> None:
        """Begin the epoch that was forming, with these nodes.  Raises Interrupted if one of them has failed already."""
        forming = self.epoch
        self.epoch = forming.begun_with(members)
        for (control, _), fault in forming.postponed.items():
            self._on_fault(control, fault)
        for member in members:
            if member.control.broken is not None:
                self._on_stream_break(member.control, member.control.broken)
        if self.epoch.lost:
            self.epoch.in_flight.interrupt()
        self.epoch.raise_if_interrupted()

    def on_head_link_break(self, error: SwarmError | None) -> None:
        """Note that the client's link to the head ended.

        While an epoch is forming this means nothing: a node that resumes a session ends the link of the old epoch, and
        the client then connects anew in any case.
        """
        if not self.epoch.forming:
            self._relink(self.epoch.members[0], error)

    def _on_message(self, control: NodeControl, message: ControlDown) -> None:
        match message:
            case Answer():
                self._on_answer(control, message)
            case Proposal() if self.options.proposal_nodes:
                self._on_proposal(control, message)
            case Fault(code=FaultCode.REPLAYED):
                pass  # the node ignored a doubled frame: nothing was lost
            case Opened():
                pass  # the grant of an earlier epoch
            case Fault(session=session) if session != self.options.session:
                pass
            case Fault():
                self._on_fault(control, message)
            case _:
                error = Malformed(f"{control.hop} sent a {type(message).__name__} into a session")
                self.drop_node(control.hop, error)

    def _on_answer(self, control: NodeControl, answer: Answer) -> None:
        epoch = self.epoch
        if answer.session != self.options.session or answer.epoch != epoch.number:
            return
        if epoch.forming or epoch.in_flight.interrupted.is_set():
            return  # what was in flight is shipped again in the next epoch
        if problem := self._problem_of(control, answer):
            self.drop_node(control.hop, Malformed(f"{control.hop} {problem}"))
            return
        self.router.report_traversal([hop.node for hop in epoch.hops])
        self.failures = FailureCounts()
        epoch.record_answer(answer)

    def _on_proposal(self, control: NodeControl, proposal: Proposal) -> None:
        epoch = self.epoch
        if proposal.session != self.options.session or proposal.epoch != epoch.number or epoch.forming:
            return
        if control is not epoch.members[-1].control:
            problem = "proposed a tree, and is not the tail"
        elif len(proposal.tokens) > self.options.proposal_nodes:
            problem = f"proposed {len(proposal.tokens)} nodes, {self.options.proposal_nodes} were asked for"
        elif int(proposal.tokens.max(initial=0)) >= self.options.target.vocab_size:
            problem = "proposed a token outside the vocabulary"
        else:
            self.proposals.add(proposal)
            return
        self.drop_node(control.hop, Malformed(f"{control.hop} {problem}"))

    def _problem_of(self, control: NodeControl, answer: Answer) -> str | None:
        """Return how an answer breaks the contract, or None."""
        vocab_size = self.options.target.vocab_size
        if control is not self.epoch.members[-1].control:
            return "answered, and is not the tail"
        if not self.epoch.in_flight.is_due(answer.seq):
            return f"answered append {answer.seq} out of turn"
        tokens = answer.tokens if self.options.rules is None else answer.tokens[answer.tokens != NO_TOKEN]
        if tokens.size and int(tokens.max()) >= vocab_size:
            return "answered a token outside the vocabulary"
        best = [answer.alternatives] if answer.scored is None else [answer.alternatives, answer.scored.alternatives]
        if max(int(ids.max(initial=0)) for ids in best) >= vocab_size:
            return "sent an alternative outside the vocabulary"
        if self.options.alternative_logprobs and answer.alternative_logprobs.size < len(answer.ids):
            return "sent no log-probabilities of the best tokens"
        return None

    def _on_fault(self, control: NodeControl, fault: Fault) -> None:
        """Judge a node's report of a fault: in its downstream link, in what it received, or in itself."""
        epoch, index = self.epoch, self.epoch.index_of(control)
        if fault.code == FaultCode.DRAINING and not fault.fatal and index is not None:
            epoch.members[index].leaving = True
            return
        if control.epoch != epoch.number:
            return  # the report is about an earlier epoch
        if index is None or epoch.forming:
            # The node's place in the chain is known once the epoch has begun.
            epoch.postponed.setdefault((control, fault.code), fault)
            return
        error = Refused(f"{control.hop} says: {fault.message}", fault.code)
        if fault.code == FaultCode.BAD_RULES and self.options.rules is not None:
            # Another tail would say the same.  The repair that follows ends the request.
            self.rejection = BadRequest(f"the rules of this request cannot be applied: {fault.message}")
            epoch.in_flight.interrupt()
            return
        if fault.code == FaultCode.DOWNSTREAM and index + 1 < len(epoch.members):
            self._on_complaint(control, epoch.members[index + 1], error)
            return
        if fault.code in BAD_INPUT and index:
            # Either this node or its upstream neighbour is wrong.  The chain goes on without both.
            self.drop_node(epoch.members[index - 1].hop, error)
        self.drop_node(control.hop, error)

    def _on_complaint(self, control: NodeControl, downstream: ChainMember, error: SwarmError) -> None:
        """Renew the link between two nodes.  A node by whose word two downstream nodes in a row are lost is dropped."""
        self._relink(downstream, error)
        if self.epoch.loss_of(downstream.hop) is not None:
            self.failures.complaints[control.hop.node] += 1
        if self.failures.complaints[control.hop.node] > 1:
            self.drop_node(control.hop, error)

    def _relink(self, member: ChainMember, error: SwarmError | None) -> None:
        """Have the broken link into a node renewed.  If it breaks again before an answer, the node is dropped."""
        member.upstream, member.link_failures = None, member.link_failures + 1
        if member.link_failures > 1 or not member.proven:
            reason = f"lost {member.hop}: the node before it cannot reach it ({error or 'the link broke'})"
            self.drop_node(member.hop, NodeLost(reason, member.hop.address))
        self.epoch.in_flight.interrupt()

    def _on_silence(self, control: NodeControl, silence_s: float) -> bool:
        """Return whether to give up a node that is silent: not soon, if it alone serves its blocks.

        The node may be one that opens the session now.
        """
        if silence_s > ONLY_HOLDER_SILENCE_S or self.is_replaceable(control.hop):
            return True
        self.router.report_silence(control.hop.node)
        return False

    def _on_stream_break(self, control: NodeControl, error: SwarmError) -> None:
        """Repair the chain after a control stream broke.  The node itself may live; then the stream is opened again."""
        if self.epoch.index_of(control) is None:
            return
        self.failures.breaks[control.hop.node] += 1
        if isinstance(error, TransportError) and self.failures.breaks[control.hop.node] <= MOST_BREAKS:
            self.epoch.in_flight.interrupt()
        else:
            self.drop_node(control.hop, error)
