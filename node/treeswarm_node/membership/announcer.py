"""This node among the others: what it says of itself, what it knows of them, and whose orders it takes."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from treeswarm.errors import Refused, SwarmError
from treeswarm.keys import Signer, verify
from treeswarm.protocol.messages import FaultCode, Manage
from treeswarm.protocol.records import LIFETIME_S, NodeRecord, NodeState, SealedRecord
from treeswarm.registry.book import BookRegistry
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm.wire.sealing import seal

log = logging.getLogger(__name__)

# A record lives five minutes; four chances to replace it before it is forgotten, and loads no older than this.
ANNOUNCE_EVERY_S = LIFETIME_S / 5
RETRY_S = 5.0
# A node that fills up and empties all the time does not say so each time.
LEAST_PAUSE_S = 5.0
# Between two words to one watcher: a large swarm changes all the time, and a client replans in seconds at best.
TELL_EVERY_S = 0.5
# An order older than this may be somebody's recording of it.
ORDER_AGE_S = 60.0
ORDER_PREFIX = b"treeswarm manage\n"
WITHDRAWING = {NodeState.DRAINING, NodeState.PAUSED, NodeState.GONE}
ACTIONS = {
    "pause": "pausing: its sessions go on elsewhere, then it frees its memory and serves nothing until "
    "`swarm-node resume`",
    "resume": "resuming: unless it serves already, it loads its blocks and serves again; `swarm-node pause` undoes it",
    "drain": "leaving for good: its sessions go on elsewhere, then the program ends; only starting it anew undoes that",
}
"""The owner's orders, and what the node says it does now."""

MakeRecord = Callable[[int, int], NodeRecord]
"""The node's record as of now, given its generation and expiry."""


@dataclass(eq=False)
class Membership:
    """`run` keeps it going; without a registry a node still tells of itself."""

    signer: Signer
    make_record: MakeRecord
    known: BookRegistry
    """All that is believed, this node's own record included: the registry itself, where there is one."""
    registry: Registry | None = None
    orders: asyncio.Queue[str] = field(default_factory=lambda: asyncio.Queue(4))
    _last_order: int = 0
    _last_said: int = 0
    _due: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Keep this node announced; until cancelled."""
        while True:
            self._due.clear()
            await self.announce()
            try:
                # Jitter, so that nodes started together do not speak together for ever.
                async with asyncio.timeout(ANNOUNCE_EVERY_S * random.uniform(0.8, 1.2)):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def announce(self) -> None:
        """Say now how things stand.  A registry that cannot be reached is tried again later."""
        sealed = await self._renew()
        if self.registry is not None:
            try:
                await self.registry.announce(sealed)
            except SwarmError as error:
                if await self._somebody_misses(sealed):
                    log.warning("not announced, will try again: %s", error)
                asyncio.get_running_loop().call_later(RETRY_S, self._due.set)

    def changed(self) -> None:
        """Things have changed that others choose by, such as room: announce, if not just done, then a little later."""
        since_s = time.time() - self._last_said / 1e6
        asyncio.get_running_loop().call_later(max(0.0, LEAST_PAUSE_S - since_s), self._due.set)

    async def leave(self) -> None:
        """Withdraw: the last record says that the node is gone."""
        sealed = await self._renew()
        assert sealed.record.state is NodeState.GONE
        if self.registry is not None:
            try:
                await self.registry.withdraw(sealed)
            except SwarmError as error:
                if await self._somebody_misses(sealed):
                    log.warning("not withdrawn, the record will expire: %s", error)
                else:
                    log.info("left; nobody else was there to be told")

    async def _somebody_misses(self, sealed: SealedRecord) -> bool:
        """What was not told: that the last node of a swarm stops serving is no news to anybody."""
        return sealed.record.state not in WITHDRAWING or bool(await self.other_nodes())

    async def other_nodes(self) -> Snapshot:
        """Everyone else."""
        return tuple(s for s in await self.known.snapshot() if s.record.key != self.signer.public_key)

    async def tell(self, *, everyone: bool) -> AsyncIterator[tuple[bytes, ...]]:
        """Sealed records: all of them first, then what is new, farewells too."""
        told: dict[str, int] = {}
        async for _ in self.known.watch():
            news = [
                sealed
                for sealed in self.known.book.unexpired()
                if (everyone or sealed.record.key == self.signer.public_key)
                and told.get(sealed.record.node) != sealed.record.generation
            ]
            told = {sealed.record.node: sealed.record.generation for sealed in self.known.book.unexpired()}
            if news:
                yield tuple(sealed.sealed for sealed in news)
            await asyncio.sleep(TELL_EVERY_S)

    def manage(self, order: Manage) -> str:
        """Take the owner's order.  Raises Refused unless this node's own key signed it, just now."""
        if order.action not in ACTIONS:
            raise Refused(f"'{order.action}' is no order: give one of {', '.join(ACTIONS)}", FaultCode.MALFORMED)
        if not verify(self.signer.public_key, order.signature, order_bytes(order.action, order.stamp)):
            raise Refused("the order is not signed by this node's identity", FaultCode.REFUSED)
        if order.stamp <= self._last_order or abs(time.time() - order.stamp / 1e6) > ORDER_AGE_S:
            raise Refused("the order is old: check this machine's clock and give it again", FaultCode.REFUSED)
        self._last_order = order.stamp
        try:
            self.orders.put_nowait(order.action)
        except asyncio.QueueFull:
            raise Refused("the node is still busy with earlier orders", FaultCode.TOO_MANY) from None
        return ACTIONS[order.action]

    async def _renew(self) -> SealedRecord:
        now = time.time()
        self._last_said = int(now * 1e6)
        sealed = seal(self.make_record(int(now * 1e6), int(now) + LIFETIME_S), self.signer)
        await self.known.add_records([sealed.sealed])
        return sealed


def order_bytes(action: str, stamp: int) -> bytes:
    """What an owner signs."""
    return ORDER_PREFIX + f"{action}\n{stamp}".encode()
