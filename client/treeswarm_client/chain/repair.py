"""One try at making a chain whole: keep who is sure to have the trunk, open the session on others, resume.

survivors      proven members whose control stream lives, or comes back
gaps           blocks between them; the pilot names nodes for each
open           on the new ones, which wait for the trunk to be replayed
resume         on the survivors, which cut back to the trunk; who stands before a gap replays its journal into it
"""

import asyncio
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Malformed, MissingBlocks, NodeLost, Refused, SwarmError
from treeswarm.protocol.messages import TICKET_BYTES, NextHop, Open, Profile, Resume, Resumption
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.control_stream import NodeControl
from treeswarm_client.chain.shared_prompt import SharedPrompt
from treeswarm_client.discovery.route import FORGOTTEN, Hop, Router, Target, gaps

# A living node whose stream broke answers within a few round trips; on a busy machine not much sooner than this.
LEAST_REATTACH_S = 1.0
# More dead nodes in a row than this were never seen in a simulated swarm that loses a fifth of its nodes an hour.
QUICK_TRIES = 8
PAUSE_S = 0.5


class Interrupted(SwarmError):
    """The chain lost a node, or one asked to leave: mend it and ship again.  Never reaches a user."""


@dataclass(frozen=True)
class Reservation:
    """What a session asks every node to reserve, in rows."""

    trunk: int
    crown: int


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
class ChainMember:
    """One node of a chain, and what the chain knows of it."""

    hop: Hop
    control: NodeControl
    ticket: bytes = b""
    credit_rows: int = 0
    profile: Profile = ()
    """How long its forwards take, as it told when it opened the session."""
    prefix_rows: int = 0
    """The prompt's first so many tokens it had already when the session was opened there."""
    proven: bool = False
    """An answer has passed through it: it has the whole trunk."""
    leaving: bool = False
    """It asked to be let go."""
    upstream: object = None
    """Who sends to it: a member, or the chain itself for the head; None where that link is not there or broke."""
    relinked: bool = True
    """Its upstream link is new in this epoch."""
    complaints: int = 0
    """About the link into it, since the last answer."""

    def excused(self, error: SwarmError) -> SwarmError:
        """What the pilot should know: a newcomer has nothing to have forgotten, and would be asked again at once."""
        if not self.proven and isinstance(error, Refused) and error.code in FORGOTTEN:
            return NodeLost(str(error), self.hop.address)
        return error


@dataclass(eq=False)
class RepairAttempts:
    """At mending one chain, until it is whole or its patience is over."""

    until: float
    interrupted: int = 0

    async def pause(self) -> None:
        """The first tries follow each other at once: each finds another record out of date.  A pilot that names the
        same dead nodes again and again must neither keep this client busy nor make it wait for ever: MissingBlocks."""
        self.interrupted += 1
        if self.interrupted > QUICK_TRIES:
            if asyncio.get_running_loop().time() > self.until:
                raise MissingBlocks(f"no chain held: {self.interrupted} times a node failed while it was put together")
            await asyncio.sleep(PAUSE_S)


class Mendable(Protocol):
    """What a mender needs of a chain."""

    target: Target
    router: Router
    transport: Transport
    room: Reservation
    alternatives: int
    session: bytes
    epoch: int
    members: list[ChainMember]
    shared: SharedPrompt | None

    def control_of(self, hop: Hop) -> NodeControl: ...
    def loss_of(self, hop: Hop) -> SwarmError | None: ...
    def drop_node(self, hop: Hop, error: SwarmError) -> None: ...
    def close_control(self, member: ChainMember) -> None: ...


@dataclass(eq=False)
class Mender:
    """One try, for one epoch of `chain`."""

    chain: Mendable

    async def attempt(self, trunk: Sequence[int], tip: int) -> list[ChainMember]:
        """The members of the chain from this epoch on.

        Raises Interrupted when a node failed (it is out of the next try), MissingBlocks and Refused (full) where the
        pilot knows no way.
        """
        members = self._fill_gaps(await self._survivors())
        self._give_tickets(members)
        new, old = [m for m in members if not m.proven], [m for m in members if m.proven]
        resumption = Resumption(len(trunk), tip)
        try:
            await self._all(new, [self._open(m, members, resumption) for m in new])
            await self._all(old, [self._resume(m, members, resumption) for m in old])
        except BaseException:
            self._dismiss(new)
            raise
        self._dismiss([m for m in self.chain.members if m not in members])
        for upstream, member in zip([self.chain, *members], members, strict=False):
            member.upstream = upstream
        return members

    # ---------------------------------------------------------------- who

    async def _survivors(self) -> list[ChainMember]:
        kept = [m for m in self.chain.members if m.proven and self.chain.loss_of(m.hop) is None]
        detached = [m for m in kept if m.control.broken is not None]
        await asyncio.gather(*(self._reattach(m) for m in detached))
        return [m for m in kept if self.chain.loss_of(m.hop) is None]

    async def _reattach(self, member: ChainMember) -> None:
        """The stream broke; the node may live, and then it has the session still."""
        patience = member.control.round_trip.deadline(LEAST_REATTACH_S)
        why = member.control.broken
        try:
            async with asyncio.timeout(patience):
                await member.control.connect(self.chain.transport)
        except (SwarmError, TimeoutError):
            self.chain.drop_node(member.hop, NodeLost(f"lost {member.hop}: {why}", member.hop.address))

    def _fill_gaps(self, kept: list[ChainMember]) -> list[ChainMember]:
        """Those who ask to leave may, if the model is whole without them."""
        try:
            return self._filled([m for m in kept if not m.leaving])
        except (MissingBlocks, Refused):
            if not any(m.leaving for m in kept):
                raise
        for member in kept:
            member.leaving = False
        return self._filled(kept)

    def _filled(self, kept: list[ChainMember]) -> list[ChainMember]:
        chain = self.chain
        members = list(kept)
        avoid = {m.hop.node for m in chain.members if m in kept or m.leaving or chain.loss_of(m.hop) is not None}
        for index, gap in reversed(gaps([m.hop.span for m in kept], chain.target.blocks)):
            hops = chain.router.route(
                gap,
                before=kept[index - 1].hop.node if index else None,
                after=kept[index].hop.node if index < len(kept) else None,
                room=chain.room.trunk + chain.room.crown,
                avoid=avoid,
            )
            avoid |= {hop.node for hop in hops}
            members[index:index] = [ChainMember(hop, chain.control_of(hop)) for hop in hops]
        return members

    def _give_tickets(self, members: list[ChainMember]) -> None:
        """A link whose ends are not what they were gets a new one, so that the old link's frames stay out."""
        for upstream, member in zip([self.chain, *members], members, strict=False):
            member.relinked = member.upstream is not upstream
            if member.relinked:
                member.ticket = secrets.token_bytes(TICKET_BYTES)

    def _dismiss(self, members: Sequence[ChainMember]) -> None:
        for member in members:
            self.chain.close_control(member)

    # ---------------------------------------------------------------- how

    async def _open(self, member: ChainMember, members: list[ChainMember], resumption: Resumption) -> None:
        chain = self.chain
        await member.control.connect(chain.transport)
        after = _after(member, members)
        prefix = None
        if chain.shared is not None and not resumption.trunk_length:
            prefix = chain.shared.at([m.hop.node for m in members[: members.index(member) + 1]])
        granted = await member.control.ask(
            Open(
                version=PROTOCOL_VERSION,
                session=chain.session,
                epoch=chain.epoch,
                span=member.hop.span,
                numerics=chain.target.numerics,
                trunk_room=chain.room.trunk,
                crown_room=chain.room.crown,
                ticket=member.ticket,
                next_hop=_next_hop(after),
                resumption=resumption,
                forwards_replay=after is not None and not after.proven,
                prefix=prefix,
                alternatives=chain.alternatives,
            )
        )
        member.credit_rows, member.profile = granted.credit_rows, granted.profile
        member.prefix_rows = granted.prefix_rows
        if granted.prefix_rows % PREFIX_TOKENS or granted.prefix_rows > (prefix.rows if prefix else 0):
            raise Malformed(f"{member.hop} claims {granted.prefix_rows} tokens of the prompt, which were not asked for")

    async def _resume(self, member: ChainMember, members: list[ChainMember], resumption: Resumption) -> None:
        after = _after(member, members)
        granted = await member.control.ask(
            Resume(
                version=PROTOCOL_VERSION,
                session=self.chain.session,
                epoch=self.chain.epoch,
                resumption=resumption,
                ticket=member.ticket,
                next_hop=_next_hop(after),
                replays=after is not None and not after.proven,
            )
        )
        member.credit_rows = granted.credit_rows

    async def _all(self, members: Sequence[ChainMember], work: Sequence[Coroutine[None, None, None]]) -> None:
        """At once; who fails is out.  Raises Interrupted if anybody did."""
        results = await asyncio.gather(*work, return_exceptions=True)
        failed = [(member, error) for member, error in zip(members, results, strict=True) if error is not None]
        for member, error in failed:
            if not isinstance(error, SwarmError):
                raise error
            self.chain.drop_node(member.hop, error)
            if not member.proven:
                self.chain.router.report_failure(member.hop.node, member.excused(error))
        if failed:
            raise Interrupted("a node failed while the chain was mended")


def _after(member: ChainMember, members: list[ChainMember]) -> ChainMember | None:
    place = members.index(member) + 1
    return members[place] if place < len(members) else None


def _next_hop(after: ChainMember | None) -> NextHop | None:
    return NextHop(after.hop.address, after.ticket) if after else None
