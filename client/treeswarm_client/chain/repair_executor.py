"""Executes one attempt of a repair: reattach survivors, plan, open new nodes, resume survivors, close the others."""

import asyncio
import itertools
import secrets
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Malformed, MissingBlocks, NodeLost, Refused, SwarmError
from treeswarm.protocol.messages import TICKET_BYTES, NextHop, Open, Opened, Resume, Resumption
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapRequest
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.control_stream import GRANT_S
from treeswarm_client.chain.in_flight import Interrupted
from treeswarm_client.chain.member import CLIENT, ChainMember
from treeswarm_client.chain.options import SessionOptions
from treeswarm_client.chain.repair import MemberState, RepairPlan, plan_repair
from treeswarm_client.chain.supervisor import ChainSupervisor
from treeswarm_client.discovery.route import Hop, Router
from treeswarm_client.discovery.tapping import hops_without_head, tapping_hops

# A living node whose stream broke answers within a few round trips; on a busy machine not much sooner than this.
LEAST_REATTACH_S = 1.0


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What one attempt sends to the nodes."""

    plan: RepairPlan
    members: list[ChainMember]
    """Nodes of the plan, in the same order."""
    resumption: Resumption

    def next_hop(self, index: int) -> NextHop | None:
        """Return where a node sends its activations, or None for the tail."""
        if index + 1 == len(self.members):
            return None
        following = self.members[index + 1]
        return NextHop(following.hop.address, following.ticket)


@dataclass(eq=False)
class RepairExecutor:
    """Carries out repairs of one chain."""

    options: SessionOptions
    router: Router
    transport: Transport
    supervisor: ChainSupervisor
    background: TaskSet
    """Tasks that close control streams."""

    async def attempt(self, trunk: Sequence[int], tip: int) -> tuple[RepairPlan, list[ChainMember]]:
        """Form the supervisor's current epoch: return its plan and its nodes, which then have or await the trunk.

        `trunk` are the tokens that every proven node has; `tip` is the id of the last of them.  Raises Interrupted if a
        node failed (the next attempt avoids it), MissingBlocks or Refused (full) if the router finds no nodes.
        """
        before = self.supervisor.epoch.members
        survivors = await self._reattach_survivors(before)
        plan = self._plan(before, survivors)
        members = self._members_of(plan, survivors)
        attempt = _Attempt(plan, members, Resumption(len(trunk), tip))
        new = [index for index, node in enumerate(plan.nodes) if node.new]
        old = [index for index, node in enumerate(plan.nodes) if not node.new]
        opened = [members[index] for index in new]
        reopened = [member for member in before if member.hop in plan.reopened]
        for member in reopened:
            member.proven = False  # Its node drops the trunk as soon as it opens the session again.
        try:
            await self._all(opened, [self._open(attempt, index) for index in new])
            await self._all([members[index] for index in old], [self._resume(attempt, index) for index in old])
        except BaseException:
            self.close_control(opened)
            raise
        self.close_control([member for member in before if member.hop in plan.closed])
        for member in reopened:
            self.background.start(member.control.end())
        members[0].upstream = CLIENT
        for upstream, member in itertools.pairwise(members):
            member.upstream = upstream.hop
        return plan, members

    def close_control(self, members: Sequence[ChainMember]) -> None:
        """Close the session on nodes, in the background: they may not respond."""
        for member in members:
            self.background.start(member.control.close_session())

    # ---------------------------------------------------------------- which nodes

    async def _reattach_survivors(self, members: Sequence[ChainMember]) -> list[ChainMember]:
        """Return the nodes that have the trunk, their broken control streams opened again."""
        lost = self.supervisor.epoch.loss_of
        survivors = [member for member in members if member.proven and lost(member.hop) is None]
        detached = [member for member in survivors if member.control.broken is not None]
        await asyncio.gather(*(self._reattach(member) for member in detached))
        return [member for member in survivors if lost(member.hop) is None]

    async def _reattach(self, member: ChainMember) -> None:
        """Open a broken control stream again: the node may live, and then it still has the session."""
        reason = member.control.broken
        try:
            now = asyncio.get_running_loop().time()
            patience_s = member.control.heartbeat.patience_s(LEAST_REATTACH_S, now)
            async with asyncio.timeout(patience_s if self.supervisor.is_replaceable(member.hop) else GRANT_S):
                await member.control.connect(self.transport)
        except (SwarmError, TimeoutError):
            self.supervisor.drop_node(member.hop, NodeLost(f"lost {member.hop}: {reason}", member.hop.address))

    def _plan(self, members: Sequence[ChainMember], survivors: Sequence[ChainMember]) -> RepairPlan:
        states = [MemberState(m.hop, m.proven, m.leaving, m.upstream) for m in members]
        try:
            plan = plan_repair(states, self.supervisor.epoch.lost, self.options.target.blocks, self._find_route)
        except (MissingBlocks, Refused):
            _keep(survivors)
            raise
        staying = {node.hop for node in plan.nodes if not node.new}
        # Nodes that asked to leave and cannot be replaced stay: without this, the next append would start a repair.
        _keep([member for member in survivors if member.hop in staying])
        return plan

    def _find_route(self, gap: Span, before: str | None, after: str | None, avoid: Collection[str]) -> Sequence[Hop]:
        rows, needs = self.options.reservation.rows, self.options.needs
        return self.router.route(gap, before=before, after=after, room=rows, avoid=avoid, needs=needs)

    def _members_of(self, plan: RepairPlan, survivors: Sequence[ChainMember]) -> list[ChainMember]:
        """Return the plan's nodes as members, with new tickets for new links."""
        by_hop = {member.hop: member for member in survivors}
        members = []
        for node in plan.nodes:
            member = ChainMember(node.hop, self.supervisor.control_of(node.hop)) if node.new else by_hop[node.hop]
            if node.new_link:
                member.ticket = secrets.token_bytes(TICKET_BYTES)
            members.append(member)
        return members

    # ---------------------------------------------------------------- open and resume

    async def _open(self, attempt: _Attempt, index: int) -> None:
        options, member = self.options, attempt.members[index]
        await member.control.connect(self.transport)
        prefix = None
        if options.shared is not None and not attempt.resumption.trunk_length:
            prefix = options.shared.prefix_at([m.hop.node for m in attempt.members[: index + 1]])
        granted = await member.control.request(
            Open(
                version=PROTOCOL_VERSION,
                session=options.session,
                epoch=self.supervisor.epoch.number,
                span=member.hop.span,
                numerics=options.target.numerics,
                trunk_room=options.reservation.trunk,
                crown_room=options.reservation.crown,
                ticket=member.ticket,
                next_hop=attempt.next_hop(index),
                resumption=attempt.resumption,
                forwards_replay=attempt.plan.nodes[index].sends_trunk,
                prefix=prefix,
                alternatives=options.alternatives,
                proposal_nodes=options.proposal_nodes if self._asks_for_proposals(attempt, index) else 0,
                taps=self._taps_to_add(attempt, index),
                rules=options.rules if _is_tail(attempt, index) else None,
                alternative_logprobs=options.alternative_logprobs,
            )
        )
        self._check_rules(attempt, index, granted)
        member.credit_rows, member.profile = granted.credit_rows, granted.profile
        member.prefix_rows, member.proposal_nodes = granted.prefix_rows, granted.proposal_nodes
        if granted.prefix_rows % PREFIX_TOKENS or granted.prefix_rows > (prefix.rows if prefix else 0):
            raise Malformed(f"{member.hop} claims {granted.prefix_rows} tokens of the prompt, which were not asked for")

    def _asks_for_proposals(self, attempt: _Attempt, index: int) -> bool:
        """Return whether a node is the tail and has a speculator: others, older releases included, are never asked."""
        return _is_tail(attempt, index) and bool(attempt.members[index].hop.speculator)

    def _check_rules(self, attempt: _Attempt, index: int, granted: Opened) -> None:
        """Raise Malformed if a tail does not confirm the rules of the request: its text would not obey them."""
        rules, hop = self.options.rules, attempt.members[index].hop
        if rules is not None and _is_tail(attempt, index) and granted.rules_digest != rules.digest:
            raise Malformed(f"{hop} does not apply the rules of this request: its release may differ from this one")

    def _taps_to_add(self, attempt: _Attempt, index: int) -> TapRequest | None:
        """Return what a node adds to the sums of taps, or None where the chain has none: others are never asked."""
        hops, options = [member.hop for member in attempt.members], self.options
        if not options.proposal_nodes or hops_without_head(hops) or hops[index] not in tapping_hops(hops):
            return None
        return TapRequest(hops[-1].tap_head, len(options.shared.prompt) if options.shared else 0)

    async def _resume(self, attempt: _Attempt, index: int) -> None:
        member = attempt.members[index]
        granted = await member.control.request(
            Resume(
                version=PROTOCOL_VERSION,
                session=self.options.session,
                epoch=self.supervisor.epoch.number,
                resumption=attempt.resumption,
                ticket=member.ticket,
                next_hop=attempt.next_hop(index),
                replays=attempt.plan.nodes[index].sends_trunk,
                taps=self._taps_to_add(attempt, index),
            )
        )
        self._check_rules(attempt, index, granted)
        member.credit_rows = granted.credit_rows

    async def _all(self, members: Sequence[ChainMember], requests: Sequence[Coroutine[None, None, None]]) -> None:
        """Run one request per member at once, and drop the members whose request fails.  Raise Interrupted if any.

        A proven member whose control stream broke meanwhile is not dropped: the supervisor counts the break, and the
        next attempt opens the stream again.
        """
        results = await asyncio.gather(*requests, return_exceptions=True)
        failed = [(member, error) for member, error in zip(members, results, strict=True) if error is not None]
        for member, error in failed:
            if not isinstance(error, SwarmError):
                raise error
            if member.proven and isinstance(error, LinkBroken):
                continue
            self.supervisor.drop_node(member.hop, error)
            if not member.proven:
                self.router.report_failure(member.hop.node, member.failure_to_report(error))
        if failed:
            raise Interrupted("a node failed while the chain was repaired")


def _is_tail(attempt: _Attempt, index: int) -> bool:
    return index + 1 == len(attempt.members)


def _keep(members: Sequence[ChainMember]) -> None:
    for member in members:
        member.leaving = False
