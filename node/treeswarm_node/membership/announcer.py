"""Announce this node's record, pass on the records of others, and take the owner's orders."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from treeswarm.errors import Refused, SwarmError
from treeswarm.keys import Signer, verify
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.node_messages import Manage
from treeswarm.protocol.records import ANNOUNCE_EVERY_S, LIFETIME_S, NodeRecord, NodeState, SealedRecord
from treeswarm.registry.book import BookRegistry
from treeswarm.registry.clocks import CLOCK_SKEW_S
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm.wire.sealing import seal
from treeswarm_node.membership.clock_watch import ClockWatch

log = logging.getLogger(__name__)

RETRY_S = 5.0
# A node that fills up and empties all the time does not announce each change.
MIN_PAUSE_S = 5.0
# Between two messages to one watcher: a large swarm changes all the time, and a client replans in seconds at best.
UPDATE_EVERY_S = 0.5
# An older order may be a recording that is sent again.
ORDER_AGE_S = 60.0
ORDER_PREFIX = b"treeswarm manage\n"
WITHDRAWING = {NodeState.DRAINING, NodeState.PAUSED, NodeState.GONE}
ACTIONS = {
    "pause": "pausing: its sessions move to other nodes, then it frees its memory and serves nothing until "
    "`swarm-node resume`",
    "resume": "resuming: unless it serves already, it loads its blocks and serves again; `swarm-node pause` undoes it",
    "drain": "leaving for good: its sessions move to other nodes, then the program ends; only a new start undoes that",
}
"""The owner's orders, each with the reply that says what the node does now."""

MakeRecord = Callable[[int, int], NodeRecord]
"""Return the node's record as of now, given its generation and expiry."""


@dataclass(eq=False)
class Membership:
    """Keeps this node's record announced while `run` runs.

    Without a registry, it still sends the record to watchers.
    """

    signer: Signer
    make_record: MakeRecord
    records: BookRegistry
    """All believed records, this node's own included; the registry itself, if there is one."""
    registry: Registry | None = None
    clocks: ClockWatch | None = None
    """Compares this machine's clock with those of clients, or None if nothing does."""
    orders: asyncio.Queue[str] = field(default_factory=lambda: asyncio.Queue(4))
    """Orders of the owner that the node has yet to obey."""
    _last_order: int = 0
    """Stamp of the last order taken, in microseconds since 1970."""
    _last_announced: int = 0
    """Generation of the record made last: its time in microseconds since 1970."""
    _due: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Keep this node announced until cancelled."""
        while True:
            self._due.clear()
            await self.announce()
            try:
                # Jitter, so that nodes started together do not announce together every time.
                async with asyncio.timeout(ANNOUNCE_EVERY_S * random.uniform(0.8, 1.2)):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def announce(self) -> None:
        """Announce the node's current state.  If the registry cannot be reached, `run` tries again later."""
        sealed = await self._renew()
        if self.registry is not None:
            try:
                await self.registry.announce(sealed)
            except SwarmError as error:
                if self.clocks is not None and await self.clocks.is_wrong():
                    log.info("the record could not be announced, as this machine's clock is wrong: %s", error)
                elif await self._is_missed(sealed):
                    log.warning("the record could not be announced, trying again in %.0f s: %s", RETRY_S, error)
                asyncio.get_running_loop().call_later(RETRY_S, self._due.set)

    def announce_soon(self) -> None:
        """Announce a change that others choose nodes by, such as room, at least MIN_PAUSE_S after the last record."""
        since_s = time.time() - self._last_announced / 1e6
        asyncio.get_running_loop().call_later(min(MIN_PAUSE_S, max(0.0, MIN_PAUSE_S - since_s)), self._due.set)

    def announce_at_once(self) -> None:
        """Have `run` announce the node now: its record is wrong."""
        self._due.set()

    async def leave(self) -> None:
        """Withdraw from the swarm: the last record says that the node is gone."""
        sealed = await self._renew()
        assert sealed.record.state is NodeState.GONE
        if self.registry is not None:
            try:
                await self.registry.withdraw(sealed)
            except SwarmError as error:
                if await self._is_missed(sealed):
                    log.warning("the record could not be withdrawn and will expire: %s", error)
                else:
                    log.info("left the swarm, which has no other node")

    async def _is_missed(self, sealed: SealedRecord) -> bool:
        """Return whether any node needs this record: no node needs the last one's message that it stops serving."""
        return sealed.record.state not in WITHDRAWING or bool(await self.other_nodes())

    async def other_nodes(self) -> Snapshot:
        """Return the records of all other nodes."""
        return tuple(s for s in await self.records.snapshot() if s.record.key != self.signer.public_key)

    async def watch_records(self, *, everyone: bool) -> AsyncIterator[tuple[bytes, ...]]:
        """Yield sealed records: all of them first, then those that changed, also of nodes that left.

        Without `everyone`, only this node's own record is yielded.
        """
        sent: dict[str, int] = {}
        async for _ in self.records.watch():
            updates = [
                sealed
                for sealed in self.records.book.unexpired()
                if (everyone or sealed.record.key == self.signer.public_key)
                and sent.get(sealed.record.node) != sealed.record.generation
            ]
            sent = {sealed.record.node: sealed.record.generation for sealed in self.records.book.unexpired()}
            if updates:
                yield tuple(sealed.sealed for sealed in updates)
            await asyncio.sleep(UPDATE_EVERY_S)

    def manage(self, order: Manage) -> str:
        """Take an order of the owner and return the reply.

        Raises Refused unless this node's own key signed the order within the last minute, after the order before.
        """
        if order.action not in ACTIONS:
            raise Refused(f"unknown order '{order.action}': give one of {', '.join(ACTIONS)}", FaultCode.MALFORMED)
        if not verify(self.signer.public_key, order.signature, order_bytes(order.action, order.stamp)):
            raise Refused("the order is not signed by this node's identity", FaultCode.REFUSED)
        if order.stamp <= self._last_order or abs(time.time() - order.stamp / 1e6) > ORDER_AGE_S:
            raise Refused("the order is old: check this machine's clock and give it again", FaultCode.REFUSED)
        self._last_order = order.stamp
        try:
            self.orders.put_nowait(order.action)
        except asyncio.QueueFull:
            raise Refused("the node is still busy with earlier orders: try again later", FaultCode.TOO_MANY) from None
        return ACTIONS[order.action]

    async def _renew(self) -> SealedRecord:
        now = time.time()
        # After the clock was set back by a little, others still know a newer record.  Those of a clock that was far
        # ahead, nobody believed, and they would keep this node out until that time.
        is_close = self._last_announced < (now + CLOCK_SKEW_S) * 1e6
        self._last_announced = max(int(now * 1e6), self._last_announced + 1) if is_close else int(now * 1e6)
        sealed = seal(self.make_record(self._last_announced, int(now) + LIFETIME_S), self.signer)
        await self.records.replace_own(sealed)
        return sealed


def order_bytes(action: str, stamp: int) -> bytes:
    """Return the bytes that an owner signs to give an order; `stamp` is in microseconds since 1970."""
    return ORDER_PREFIX + f"{action}\n{stamp}".encode()
