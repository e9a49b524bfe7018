"""hivemind's DHT as registry: there is no server, and every node stores a part of the records.

A model has 16 keys, `treeswarm/<version>/<model digest>/<shard>`.  Under each key, subkeys are node ids and values are
sealed records.  One run of the daemon is a `dht_peer.DhtPeer`.  When it has died, or no longer reaches any peer,
`dht_daemon.DhtDaemon` starts another one with the same identity and port.
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
from treeswarm.registry.clocks import ClockSample
from treeswarm.registry.dht_daemon import DhtDaemon
from treeswarm.registry.dht_peer import (
    FARTHEST_S,
    REPLICAS,
    DhtPeer,
    check_hivemind,
    entry_rejection,
    sealed_in,
    shard_keys,
)
from treeswarm.tasks import TaskSet, keep_running

log = logging.getLogger(__name__)

# Seconds between polls.  A joining node is seen within seconds, soon enough for a client or a placement to use it.
POLL_S = 3.0
# A poll brings every record from each of its replicas, so its cost grows with the swarm.  Beyond some 50 nodes, polls
# become rarer instead of larger per second.
POLL_BYTES_PER_S = 32_768
CONNECT_S = 10.0
# Number of addresses that a node which joins is told: with so many it finds the swarm though most of them are gone.
MAX_SHARED = 16
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# Number of peers whose clocks are compared with this machine's.
CLOCKS_ASKED = 8
# Seconds to wait before each attempt to announce, before the caller gets an error.
ATTEMPTS_S = (0.0, 0.5, 2.0)


@dataclass(eq=False)
class OwnRecords:
    """Records that this registry announces."""

    by_node: dict[str, SealedRecord] = field(default_factory=dict)
    unconfirmed: set[str] = field(default_factory=set)
    """Ids of the nodes whose record no other peer is known to have."""

    def put(self, sealed: SealedRecord) -> None:
        """Add a record, or replace the earlier one of its node."""
        self.by_node[sealed.record.node] = sealed
        self.unconfirmed.add(sealed.record.node)

    def remove(self, node: str) -> None:
        """Stop announcing a node."""
        self.by_node.pop(node, None)
        self.unconfirmed.discard(node)


@dataclass(eq=False)
class DhtRegistry(BookRegistry):
    """Announces in the DHT, polls it, and reconnects to it when the daemon or other peers fail."""

    daemon: DhtDaemon = field(init=False)
    temporary: contextlib.ExitStack = field(kw_only=True)
    """Removes, when it is closed, the key that was made because the caller gave no key file."""
    poll_s: float = POLL_S
    """Least number of seconds between polls."""
    _pause_s: float = POLL_S
    """Seconds between the last two polls."""
    _own: OwnRecords = field(default_factory=OwnRecords)
    _polled: dict[str, bytes] = field(default_factory=dict)
    """Records of the last poll, by node id."""
    _tasks: TaskSet = field(default_factory=TaskSet)

    @classmethod
    async def start(
        cls,
        model: str,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        identity: Path | None = None,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
        remembered: Sequence[str] = (),
    ) -> "DhtRegistry":
        """Join the DHT of `initial_peers`, or begin a new one without them.

        `remembered` are peers of an earlier run, which are tried where no initial peer answers or none is given.
        `identity` is the file of the daemon's key, which is created if it is missing.  Without a file, the key lasts as
        long as this registry.  Raises BadRequest or Unreachable.
        """
        check_hivemind()
        temporary = contextlib.ExitStack()
        if identity is None:
            identity = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="treeswarm-dht-"))) / "identity"
        registry = cls(model, clock, temporary=temporary, poll_s=poll_s)
        registry.daemon = DhtDaemon(
            tuple(initial_peers),
            tuple(listen),
            identity,
            registry._is_believable,
        )
        registry.daemon.remember(remembered)
        try:
            await registry.daemon.start()
            if not await registry.daemon.join() and initial_peers:
                raise Unreachable(
                    f"no DHT answers at {', '.join(initial_peers)}: check that they run and their ports are open, "
                    "or begin a new swarm with dht:"
                )
            await registry._poll()
        except BaseException:
            await registry.close()
            raise
        registry._tasks.start(keep_running("polling the DHT", registry._keep_polling))
        registry._tasks.start(keep_running("connecting to the DHT", registry._keep_connecting))
        return registry

    @property
    def lag_s(self) -> float:
        return 1.25 * self._pause_s + 1.0

    @property
    def visible_maddrs(self) -> tuple[str, ...]:
        """Multiaddresses at which others reach this peer's daemon: `/ip4/HOST/tcp/PORT/p2p/ID`."""
        return self.daemon.visible_maddrs

    def known_peers(self) -> list[str]:
        """Return the multiaddresses of other peers, the latest first, for `remembered` of a later run."""
        return self.daemon.known_peers()

    @property
    def port(self) -> int:
        """TCP port of the daemon, or 0 if it is not known."""
        match = re.search(r"/tcp/(\d+)/", f"{self.daemon.listen[0]}/")
        return int(match[1]) if match else 0

    @property
    def spec(self) -> str:
        """Value of `--registry` with which another node joins.  Its address is not loopback, if there is another."""
        external = [maddr for maddr in self.visible_maddrs if not maddr.startswith("/ip4/127.")]
        return f"dht:{(external or list(self.visible_maddrs))[0]}"

    @property
    def shared_spec(self) -> str:
        """Value of `--registry` with all addresses of this peer, loopback last, and of other peers."""
        own = sorted(self.visible_maddrs, key=lambda maddr: maddr.startswith("/ip4/127."))
        return f"dht:{','.join([*own, *self.known_peers()][:MAX_SHARED])}"

    async def announce(self, sealed: SealedRecord) -> None:
        """Announce a record, and return when another peer has it.

        Raises TransportError, and goes on trying in the background.
        """
        # hivemind would accept a value that is too large, and its daemon would not respond again.
        if len(sealed.sealed) > MAX_RECORD_BYTES:
            raise BadRequest(
                f"the record has {len(sealed.sealed)} bytes, at most {MAX_RECORD_BYTES} are allowed in the DHT: "
                "use a shorter address or model name"
            )
        self._own.put(sealed)
        await self.add_records([sealed.sealed])
        await self._publish(sealed)
        self._own.unconfirmed.discard(sealed.record.node)

    async def withdraw(self, sealed: SealedRecord) -> None:
        self._own.remove(sealed.record.node)
        await self.add_records([sealed.sealed])
        await self._publish(sealed)

    async def ask_clocks(self) -> list[ClockSample]:
        """Ask some peers for their time: where the clocks differ much, the DHT hides the records of either side."""
        with contextlib.suppress(TransportError):
            times = await self.daemon.peer.ask_clocks(CLOCKS_ASKED)
            return [ClockSample(f"DHT peer …{peer[-8:]}", ahead_s) for peer, ahead_s in times.items()]
        return []

    async def close(self) -> None:
        await self._tasks.close()
        await self.daemon.close()
        self.temporary.close()

    # ---- records in and out ------------------------------------------------------------------------------------

    async def _publish(self, sealed: SealedRecord) -> None:
        for pause_s in ATTEMPTS_S:
            await asyncio.sleep(pause_s)
            peer = self.daemon.peer
            with contextlib.suppress(TransportError):
                if await self._try_store(peer, sealed):
                    return
            if await peer.is_useless():
                with contextlib.suppress(SwarmError):
                    await self._replace_daemon(peer)
        problem = f"no other peer of the DHT has the record of {sealed.record.node} yet"
        if self.daemon.current is not None and not self.daemon.current.alone:
            raise Unreachable(f"{problem}, although peers answer: compare this machine's clock with others'")
        peers = ", ".join(self.daemon.known_peers()) or "its peers"
        raise Unreachable(f"{problem}, as none of {peers} answers: check this machine's network")

    async def _try_store(self, peer: DhtPeer, sealed: SealedRecord) -> bool:
        """Store a record, and return whether other peers have it.

        For the first node of a swarm, which has no other peers, its own copy is enough.
        """
        connected = await peer.connected()
        if peer.alone and (connected or self.daemon.initial_peers):
            await peer.connect(self.daemon.known_peers())
        return await peer.store(sealed) or (peer.alone and not connected and not self.daemon.initial_peers)

    async def _keep_polling(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            size, peer = 0, self.daemon.current
            try:
                size = await self._poll()
                pause_s = FIRST_PAUSE_S
            except SwarmError as error:
                log.info("%s; trying again in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                with contextlib.suppress(SwarmError):
                    await self._replace_daemon(peer)
                    continue
            cost_s = size * REPLICAS / POLL_BYTES_PER_S
            self._pause_s = min(max(self.poll_s, cost_s), LIFETIME_S / 2)
            await asyncio.sleep(self._pause_s * random.uniform(0.75, 1.25))

    async def _poll(self) -> int:
        """Read all shards, and return their size in bytes.  Raises TransportError where the daemon has failed."""
        peer = self.daemon.peer
        connected = await peer.connected()
        self.daemon.remember(connected)
        if peer.alone and connected and not await peer.connect(self.daemon.known_peers()):
            raise TransportError("no peer of the DHT answers although the daemon has connections")
        read = await peer.read(shard_keys(str(self.model)), self.book.get)
        # Verifying signatures takes time: records that the last poll returned already are skipped.
        news = [sealed for node, sealed in read.items() if self._polled.get(node) != sealed]
        self._polled = read
        await self.add_records(news)
        return sum(map(len, read.values()))

    # ---- staying connected -------------------------------------------------------------------------------------

    async def _keep_connecting(self) -> None:
        """Dial the initial peers that are missing: they may be back, or be the other half of a divided swarm."""
        while True:
            await asyncio.sleep(min(CONNECT_S, 2 * self.poll_s) * random.uniform(0.75, 1.25))
            with contextlib.suppress(TransportError):
                peer = self.daemon.peer
                missing = self.daemon.known_peers() if peer.alone else peer.missing(self.daemon.initial_peers)
                answered = missing and await peer.connect(missing)
                if answered or (self._own.unconfirmed and not peer.alone):
                    await self._announce_all()

    async def _announce_all(self) -> None:
        for node, sealed in list(self._own.by_node.items()):
            if await self.daemon.peer.store(sealed):
                self._own.unconfirmed.discard(node)

    async def _replace_daemon(self, failed: DhtPeer | None) -> None:
        """Start another daemon in place of `failed`, unless another task has done so, and announce again."""
        if not await self.daemon.replace(failed):
            return
        self._own.unconfirmed.update(self._own.by_node)  # Other peers may have failed too, with their copies.
        if (others := self.daemon.known_peers()) and await self.daemon.peer.connect(others):
            await self._announce_all()

    def _is_believable(self, entry: Any) -> bool:
        """Return whether an entry may be stored here, or accepted from a peer.  hivemind calls this.

        Only a record that its node signed, in its own place and with its own expiry, is accepted.  So an attacker
        cannot occupy a node's place with other bytes.  The answer is the same on every peer and at all times, except
        for expiries in the far future.  The reason is that a peer which stored one entry that others reject would have
        its whole answers rejected.
        """
        reason = entry_rejection(entry.key, entry.subkey, entry.value, entry.expiration_time, str(self.model))
        now = time.time()
        if not reason and not now - LIFETIME_S < entry.expiration_time < now + FARTHEST_S:
            self.book.add(sealed_in(entry.value))  # It is rejected, and tells of its node's clock.
            return bool(entry.expiration_time < now)
        if reason:
            self.book.reject(reason)
        return not reason
