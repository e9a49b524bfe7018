"""Keeps a DHT daemon running: a failed one is replaced by another with the same identity and address."""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treeswarm.errors import TransportError
from treeswarm.registry.dht_peer import DhtPeer, Validate

log = logging.getLogger(__name__)

# Seconds to wait before each attempt to join, before the node gets an error.  A peer on a machine that is
# busy with loading a model may not answer for ten seconds.
JOIN_PAUSES_S = (0.0, 1.0, 3.0, 10.0)
# Number of addresses of other peers that are remembered.  With them the swarm is found again when the initial peers are
# gone.
MAX_REMEMBERED = 16


@dataclass(eq=False)
class DhtDaemon:
    """The present daemon, and the addresses by which its successors find the swarm again."""

    initial_peers: tuple[str, ...]
    """Multiaddresses of the peers named at the start; empty for the first node of a swarm."""
    listen: tuple[str, ...]
    """Multiaddresses to listen at."""
    identity: Path
    """File of the daemon's key."""
    validate: Validate
    """Decides which entries this peer stores and accepts."""
    visible_maddrs: tuple[str, ...] = ()
    """Multiaddresses at which others reach the daemon: `/ip4/HOST/tcp/PORT/p2p/ID`."""
    current: DhtPeer | None = None
    _remembered: tuple[str, ...] = ()
    _replacing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def peer(self) -> DhtPeer:
        """The present daemon.  Raises TransportError if none runs."""
        if self.current is None:
            raise TransportError("the DHT's daemon is not running")
        return self.current

    def known_peers(self) -> list[str]:
        """Return the multiaddresses of all other peers that are remembered."""
        maddrs = dict.fromkeys((*self.initial_peers, *self._remembered))
        return [maddr for maddr in maddrs if maddr not in self.visible_maddrs]

    def remember(self, maddrs: Sequence[str]) -> None:
        """Remember the addresses of connected peers, the latest first."""
        self._remembered = tuple(dict.fromkeys((*maddrs, *self._remembered)))[:MAX_REMEMBERED]

    async def start(self) -> None:
        """Start a daemon.  Raises BadRequest, TransportError."""
        self.current = await DhtPeer.start(self.listen, self.identity, self.validate)
        self.visible_maddrs = await self.current.maddrs()
        if port := re.search(r"/tcp/(\d+)/", self.visible_maddrs[0]):  # The next daemon gets the same address.
            self.listen = tuple(re.sub(r"/tcp/0$", f"/tcp/{port[1]}", maddr) for maddr in self.listen)

    async def join(self) -> bool:
        """Connect to one of the initial peers, with several attempts, or to one that is remembered.

        Return whether any answers.  The first node of a swarm, which has no initial peers, tries once.
        """
        if not self.initial_peers:
            return await self.peer.connect_any(self._remembered)
        for pause_s in JOIN_PAUSES_S:
            await asyncio.sleep(pause_s)
            if await self.peer.connect_any(self.initial_peers):
                return True
            if await self.peer.connect_any(self._remembered):
                log.warning(
                    "none of %s answers: joined through peers of this node's last run", ", ".join(self.initial_peers)
                )
                return True
        return False

    async def replace(self, failed: DhtPeer | None) -> bool:
        """Start another daemon in place of `failed`.

        Return False, and do nothing, if another task has replaced it meanwhile.  Raises BadRequest, TransportError.
        """
        async with self._replacing:
            if self.current is not failed:
                return False
            if failed is not None:
                log.warning("the DHT's daemon (p2pd) failed: another one is started at the same address")
                await failed.close()
            await self.start()
        return True

    async def close(self) -> None:
        """Stop the daemon."""
        async with self._replacing:
            if self.current is not None:
                await self.current.close()
            self.current = None
