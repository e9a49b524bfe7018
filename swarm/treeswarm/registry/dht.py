"""hivemind's DHT as registry: no server, every node keeps a part of it.

A model has 16 keys, `treeswarm/<version>/<model digest>/<shard>`; under each, subkeys are node ids and values sealed
records.  A daemon's life is `dht_peer.DhtPeer`; when it has died, or talks to nobody any more, the registry begins
another one with the same identity and port.
"""

import asyncio
import contextlib
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest, SwarmError, TransportError, Unreachable
from treeswarm.protocol.messages import MAX_RECORD_BYTES
from treeswarm.protocol.records import LIFETIME_S, SealedRecord
from treeswarm.registry.book import BookRegistry
from treeswarm.registry.dht_peer import FARTHEST_S, REPLICAS, DhtPeer, check_hivemind, entry_rejection, shard_keys

log = logging.getLogger(__name__)

# A joining node is seen within seconds: what a client or a placement can still use.
POLL_S = 3.0
# A poll brings every record from each of its replicas, so its price grows with the swarm: beyond some 50 nodes polls
# become rarer instead.
POLL_BYTES_PER_S = 32_768
MEET_S = 10.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# Pauses between attempts to announce before the caller is told.
ATTEMPTS_S = (0.0, 0.5, 2.0)
# Before a node that wants to join is told that nobody is there: a peer on a machine busy with loading a model may not
# answer for ten seconds.
JOIN_PAUSES_S = (0.0, 1.0, 3.0, 10.0)
# Of others, by which the swarm is found again when those named at the start are gone.
MAX_REMEMBERED = 16


@dataclass(eq=False)
class DhtRegistry(BookRegistry):
    """Announces in the DHT, polls it, and stays part of it whatever happens to the daemon or to other peers."""

    initial_peers: tuple[str, ...] = field(kw_only=True)
    listen: tuple[str, ...] = field(kw_only=True)
    identity: Path = field(kw_only=True)
    temporary: tempfile.TemporaryDirectory[str] = field(kw_only=True)
    poll_s: float = POLL_S
    visible_maddrs: tuple[str, ...] = ()
    """Where others reach this peer's daemon: `/ip4/HOST/tcp/PORT/p2p/ID`."""
    _peer: DhtPeer | None = None
    _rebuilding: asyncio.Lock = field(default_factory=asyncio.Lock)
    _own: dict[str, SealedRecord] = field(default_factory=dict)
    _unkept: set[str] = field(default_factory=set)
    """Of our own, those that no other peer was seen to have."""
    _polled: dict[str, bytes] = field(default_factory=dict)
    _remembered: tuple[str, ...] = ()
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        model: str,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        identity: Path | None = None,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
    ) -> "DhtRegistry":
        """Join the DHT of `initial_peers`, or begin one.  `identity` is the file of the daemon's key, made if it is
        missing; without one, the key lasts as long as this registry.  Raises BadRequest or Unreachable."""
        check_hivemind()
        temporary = tempfile.TemporaryDirectory(prefix="treeswarm-dht-")
        registry = cls(
            model,
            clock,
            initial_peers=tuple(initial_peers),
            listen=tuple(listen),
            identity=identity or Path(temporary.name) / "identity",
            temporary=temporary,
            poll_s=poll_s,
        )
        try:
            await registry._begin()
            if initial_peers and not await registry._meet_patiently(initial_peers):
                raise Unreachable(
                    f"no DHT answers at {', '.join(initial_peers)}: check that they run and their ports are open, "
                    "or begin a new swarm with dht:"
                )
            await registry._poll()
        except BaseException:
            await registry.close()
            raise
        registry._tasks = [
            asyncio.create_task(registry._keep_polling()),
            asyncio.create_task(registry._keep_meeting()),
        ]
        return registry

    async def _meet_patiently(self, initial_peers: Sequence[str]) -> int:
        for pause_s in JOIN_PAUSES_S:
            await asyncio.sleep(pause_s)
            if met := await self._life.meet(initial_peers):
                return met
        return 0

    @property
    def spec(self) -> str:
        """What another node gives as `--registry` to join: an address from outside, if there is one."""
        outside = [maddr for maddr in self.visible_maddrs if not maddr.startswith("/ip4/127.")]
        return f"dht:{(outside or list(self.visible_maddrs))[0]}"

    async def announce(self, sealed: SealedRecord) -> None:
        """Returns when others have it.  Raises TransportError, and goes on trying by itself."""
        if len(sealed.sealed) > MAX_RECORD_BYTES:  # hivemind would say yes, and its daemon would talk to nobody again
            raise BadRequest(f"a record of {len(sealed.sealed)} bytes, at most {MAX_RECORD_BYTES} go into the DHT")
        self._own[sealed.record.node] = sealed
        self._unkept.add(sealed.record.node)
        await self.add_records([sealed.sealed])
        await self._publish(sealed)
        self._unkept.discard(sealed.record.node)

    async def withdraw(self, sealed: SealedRecord) -> None:
        self._own.pop(sealed.record.node, None)
        self._unkept.discard(sealed.record.node)
        await self.add_records([sealed.sealed])
        await self._publish(sealed)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with self._rebuilding:
            if self._peer is not None:
                await self._peer.close()
            self._peer = None
        self.temporary.cleanup()

    # ---- what is told and heard --------------------------------------------------------------------------------

    async def _publish(self, sealed: SealedRecord) -> None:
        for pause in ATTEMPTS_S:
            await asyncio.sleep(pause)
            life = self._life
            with contextlib.suppress(TransportError):
                if await self._kept(life, sealed):
                    return
            if await life.useless():
                with contextlib.suppress(SwarmError):
                    await self._rebuild(life)
        raise Unreachable(
            f"nobody else in the DHT has the record of {sealed.record.node} yet: "
            f"none of {', '.join(self._acquaintances()) or 'its peers'} answers; check this machine's network"
        )

    async def _kept(self, life: DhtPeer, sealed: SealedRecord) -> bool:
        """Store it, and see whether others have it; whoever begins a swarm is content with having it himself."""
        met = await life.met()
        if life.alone:
            await life.meet(self._acquaintances())
        return await life.store(sealed) or (life.alone and not met and not self.initial_peers)

    async def _keep_polling(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            taken, life = 0, self._peer
            try:
                taken = await self._poll()
                pause = FIRST_PAUSE_S
            except SwarmError as error:
                log.info("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                with contextlib.suppress(SwarmError):
                    await self._rebuild(life)
                    continue
            price = taken * REPLICAS / POLL_BYTES_PER_S
            await asyncio.sleep(min(max(self.poll_s, price), LIFETIME_S / 2) * random.uniform(0.75, 1.25))

    async def _poll(self) -> int:
        """Read all shards; returns the bytes of it.  Raises TransportError where the daemon is of no use any more."""
        life = self._life
        met = await life.met()
        self._remembered = tuple(dict.fromkeys((*met, *self._remembered)))[:MAX_REMEMBERED]
        if life.alone and met and not await life.meet(self._acquaintances()):
            raise TransportError("the DHT's daemon has connections, and nobody answers over them")
        read = await life.read(shard_keys(str(self.model)), self.book.of)
        # Signatures cost: what the last poll brought already is not looked at again.
        news = [sealed for node, sealed in read.items() if self._polled.get(node) != sealed]
        self._polled = read
        await self.add_records(news)
        return sum(map(len, read.values()))

    # ---- staying part of it ------------------------------------------------------------------------------------

    @property
    def _life(self) -> DhtPeer:
        if self._peer is None:
            raise TransportError("the DHT's daemon is not running")
        return self._peer

    def _acquaintances(self) -> list[str]:
        known = dict.fromkeys((*self.initial_peers, *self._remembered))
        return [maddr for maddr in known if maddr not in self.visible_maddrs]

    async def _keep_meeting(self) -> None:
        """Dial who was named at the start and is missing: a peer come back, or the other half of a swarm in two."""
        while True:
            await asyncio.sleep(min(MEET_S, 2 * self.poll_s) * random.uniform(0.75, 1.25))
            with contextlib.suppress(TransportError):
                life = self._life
                missing = self._acquaintances() if life.alone else life.missing(self.initial_peers)
                met = missing and await life.meet(missing)
                if met or (self._unkept and not life.alone):
                    await self._announce_all()

    async def _announce_all(self) -> None:
        for node, sealed in list(self._own.items()):
            if await self._life.store(sealed):
                self._unkept.discard(node)

    async def _begin(self) -> None:
        self._peer = await DhtPeer.start(self.listen, self.identity, self._believable)
        self.visible_maddrs = await self._peer.maddrs()
        if port := re.search(r"/tcp/(\d+)/", self.visible_maddrs[0]):  # the next life has the same address
            self.listen = tuple(re.sub(r"/tcp/0$", f"/tcp/{port[1]}", maddr) for maddr in self.listen)

    async def _rebuild(self, failed: DhtPeer | None) -> None:
        """Another daemon in place of one that failed; nothing if somebody has done so meanwhile."""
        async with self._rebuilding:
            if self._peer is not failed:
                return
            log.info("starting the DHT's daemon anew")
            if failed is not None:
                await failed.close()
            await self._begin()
            self._unkept.update(self._own)  # others may have died with it, and their copies with them
        if (others := self._acquaintances()) and await self._life.meet(others):
            await self._announce_all()

    def _believable(self, entry: Any) -> bool:
        """Whether an entry may be kept here, or taken from a peer.  Asked by hivemind.

        Nothing but a record that its node signed, in its own place and with its own date: so nobody can keep a node's
        place taken with rubbish.  The answer is the same for everyone, always (but for absurdly late dates): a peer
        that kept one entry others refuse would have its whole answers refused.
        """
        doubt = entry_rejection(entry.key, entry.subkey, entry.value, entry.expiration_time, str(self.model))
        if not doubt and entry.expiration_time > time.time() + FARTHEST_S:
            doubt = "from-the-future"
        if doubt:
            self.rejected[doubt] += 1
        return not doubt
