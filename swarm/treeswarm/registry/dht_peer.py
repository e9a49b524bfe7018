"""hivemind, at arm's length: one life of its daemon, what goes in and out of it, and what is refused.

hivemind's `DHTNode` runs in our own event loop, next to its daemon p2pd, a child process.  (The forked `hivemind.DHT`
is of no use here: one value too large kills it.)  All of hivemind is imported inside functions: it brings torch.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest, Malformed, TransportError
from treeswarm.keys import new_raw_key
from treeswarm.protocol.records import LIFETIME_S, RECORD_VERSION, SealedRecord
from treeswarm.registry.book import MAX_NODES, rejection_reason
from treeswarm.wire.sealing import unseal

# One key with 12,000 subkeys gave back 10,200 (2026-11-20): an answer holds at most 4 MiB.
SHARDS = 16
# Of one shard, kept here and taken in a poll: 16 of these are more nodes than a list of one model needs, 2 MiB a shard.
MAX_SHARD = 4096
# Of this and other models, that this node keeps for the swarm; an enemy can fill 0.7 GB of memory with them, not more.
MAX_KEYS = 256
REPLICAS = 5
# hivemind gives up on a peer after 3 s; a whole walk through the DHT that takes this long hangs in a dead daemon.
STUCK_S = 30.0
START_S = 20.0
DIAL_S = 5.0
# No honest record's date is further off.
FARTHEST_S = 2 * LIFETIME_S

Validate = Callable[[Any], bool]


def shard_key(model: str, node: str) -> str:
    """The key a node's record is under."""
    return shard_keys(model)[int(node[:8], 16) % SHARDS]


@lru_cache(maxsize=MAX_KEYS)
def shard_keys(model: str) -> tuple[str, ...]:
    """All keys of a model.  With the version: one entry that others cannot read spoils a whole answer to them."""
    return tuple(f"treeswarm/{RECORD_VERSION}/{model}/{shard}" for shard in range(SHARDS))


def dht_expiry(generation: int) -> float:
    """Until when the DHT keeps a record.  From the generation alone, since the DHT prefers later dates: so newer
    replaces older even within a second, and nobody keeps a node's place taken with a far date."""
    return generation / 1e6 + LIFETIME_S


@lru_cache(maxsize=MAX_NODES)
def entry_rejection(key: bytes, subkey: bytes, value: bytes, date: float, model: str) -> str:
    from hivemind.dht.routing import DHTID  # noqa: PLC0415
    from hivemind.utils import MSGPackSerializer  # noqa: PLC0415

    try:
        sealed = MSGPackSerializer.loads(value)
        node = MSGPackSerializer.loads(subkey) if subkey else None
    except Exception:  # whatever msgpack has to say of a stranger's bytes
        return "malformed"
    if not isinstance(sealed, bytes):
        return "malformed"
    try:
        record = unseal(sealed).record
    except Malformed as error:
        return rejection_reason(error, sealed)
    if DHTID.generate(shard_key(record.model, record.node)).to_bytes() != key or record.node != node:
        ours = {DHTID.generate(ours).to_bytes() for ours in shard_keys(model)}
        return "other-model" if key in ours and record.model != model else "misplaced"
    return "" if date == dht_expiry(record.generation) else "misdated"


@dataclass(eq=False)
class _Validator:
    """What hivemind asks of a validator; see `_believable`."""

    validate: Validate

    def sign_value(self, record: Any) -> Any:
        return record.value

    def strip_value(self, record: Any) -> Any:
        return record.value


@dataclass(eq=False)
class DhtPeer:
    """One life of the daemon, and the DHT node that speaks through it.  Verbs raise TransportError."""

    p2p: Any
    node: Any
    _asked: set[asyncio.Future[Any]] = field(default_factory=set)

    @classmethod
    async def start(cls, listen: Sequence[str], identity: Path, believable: Validate) -> "DhtPeer":
        """Raises BadRequest: what keeps a daemon from starting is a matter of this machine."""
        from hivemind.dht.node import DHTNode  # noqa: PLC0415
        from hivemind.p2p import P2P  # noqa: PLC0415

        p2p = None
        try:
            _make_identity(identity)
            async with asyncio.timeout(START_S):
                # Others are dialled later: a daemon that starts with none of its peers there gives up.
                p2p = await P2P.create(
                    host_maddrs=listen,
                    identity_path=str(identity),
                    check_if_identity_free=False,
                    startup_timeout=START_S,
                )
                node = await DHTNode.create(
                    p2p,
                    num_replicas=REPLICAS,
                    record_validator=_Validator(believable),
                    # Caches would hide from a poll what changed.
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    cache_refresh_before_expiry=0,
                )
        except Exception as error:  # hivemind has no one exception; none of them may cross this border
            if p2p is not None:
                await _end(p2p)
            raise BadRequest(
                f"the DHT's daemon does not start at {', '.join(listen)} ({error or type(error).__name__}): "
                "is the port taken? Choose another, or use MQTT"
            ) from error
        node.protocol.storage.maxsize = MAX_KEYS
        node.protocol.call_find = _distrusting(node.protocol.call_find)
        return cls(p2p, node)

    @property
    def alone(self) -> bool:
        """Knows of nobody who answers."""
        return not self.node.protocol.routing_table.uid_to_peer_id

    async def useless(self) -> bool:
        """Dead, or with connections (asked when nothing gets through them).  Where nobody is to be seen at all, another
        daemon would see no more."""
        try:
            return bool(await self.met())
        except TransportError:
            return True

    async def maddrs(self) -> tuple[str, ...]:
        return tuple(map(str, await self._ask(self.p2p.get_visible_maddrs(latest=True))))

    async def met(self) -> list[str]:
        """Addresses of the peers connected now.  Raises TransportError when the daemon is dead."""
        peers = await self._ask(self.p2p.list_peers())
        return [f"{maddr}/p2p/{peer.peer_id}" for peer in peers for maddr in peer.addrs[:1]]

    def missing(self, maddrs: Iterable[str]) -> list[str]:
        """Those among them that this peer knows nothing of."""
        known = {str(peer) for peer in self.node.protocol.routing_table.peer_id_to_uid} | {str(self.p2p.peer_id)}
        return [maddr for maddr in maddrs if maddr.rpartition("/")[2] not in known]

    async def meet(self, maddrs: Sequence[str]) -> int:
        """Dial and greet; returns how many answered."""
        answers = await asyncio.gather(*map(self._meet_one, self.missing(maddrs)))
        if any(answers):  # whoever answered knows others
            await self._ask(self.node.find_nearest_nodes([self.node.node_id]))
        return sum(answers) + len(maddrs) - len(answers)

    async def _meet_one(self, maddr: str) -> bool:
        from hivemind.p2p import PeerID  # noqa: PLC0415
        from hivemind.utils.multiaddr import Multiaddr  # noqa: PLC0415

        where, _, name = maddr.rpartition("/p2p/")
        with contextlib.suppress(TransportError):
            peer = PeerID.from_base58(name)
            # P2P has no public way to dial an address later than at its start.
            await self._ask(self.p2p._client.connect(peer, [Multiaddr(where)]), DIAL_S)
            return await self._ask(self.node.protocol.call_ping(peer)) is not None
        return False

    async def store(self, sealed: SealedRecord) -> bool:
        """Whether another peer has the record afterwards, or a newer one of the same node.

        hivemind's own yes means nothing: it counts this peer's own copy, and says it after the daemon's death as well.
        """
        record = sealed.record
        key, date = shard_key(record.model, record.node), dht_expiry(record.generation)
        await self._ask(self.node.store(key, sealed.sealed, date, subkey=record.node))
        return await self._others_have(key, record.node, date)

    async def _others_have(self, key: str, subkey: str, date: float) -> bool:
        from hivemind.dht.routing import DHTID  # noqa: PLC0415

        key_id = DHTID.generate(key)
        nearest = await self._ask(self.node.find_nearest_nodes([key_id], k_nearest=REPLICAS, exclude_self=True))
        for peer in nearest[key_id].values():
            found = await self._ask(self.node.protocol.call_find(peer, [key_id]))
            entries = found[key_id][0] if found else None
            entry = entries.value.get(subkey) if entries else None
            if entry is not None and entry.expiration_time >= date:
                return True
        return False

    async def read(self, keys: Sequence[str], known: Callable[[str], SealedRecord | None]) -> dict[str, bytes]:
        """Node ids and what is said to be their records."""
        self._forget_surplus()
        found = await self._ask(self.node.get_many(keys, sufficient_expiration_time=float("inf")))
        shards = [entries.value for entries in found.values() if entries and isinstance(entries.value, dict)]
        return {
            node: sealed
            for shard in shards
            # When somebody floods a shard with nodes of his own, those known before keep their place.
            for node, (sealed, _) in sorted(shard.items(), key=lambda item: known(item[0]) is None)[:MAX_SHARD]
            if isinstance(sealed, bytes)
        }

    def _forget_surplus(self) -> None:
        for _, entries in self.node.protocol.storage.items():
            if hasattr(entries.value, "maxsize"):
                entries.value.maxsize = MAX_SHARD

    async def close(self) -> None:
        """hivemind's own way asks the daemon first to forget its handlers, and waits for ever for a dead one."""
        self.node.is_alive = False
        if self._asked:
            await asyncio.wait(self._asked, timeout=DIAL_S)
        await _end(self.p2p)
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)

    async def _ask(self, answer: Awaitable[Any], timeout: float = STUCK_S) -> Any:
        """Await something of hivemind's.  Raises TransportError whatever it raises.

        Who asks may be cancelled; hivemind's walks may not: a cancelled one leaves tasks that wait for ever.
        """
        task = asyncio.ensure_future(answer)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(task)
        except Exception as error:  # OSError, RuntimeError, KeyError and its daemon's own; none may cross this border
            raise TransportError(f"the DHT's daemon does not do its part ({error or type(error).__name__})") from error


def _make_identity(path: Path) -> None:
    """libp2p's form of an Ed25519 key, unless there is one.  (hivemind's own maker takes a second, for RSA.)"""
    from hivemind.proto import crypto_pb2  # noqa: PLC0415

    if path.exists():
        return
    data = b"".join(new_raw_key())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=data).SerializeToString())


def _distrusting(call_find: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """hivemind has entries validated, and believes what a peer puts around them: a size that is no number would end
    every search with an error, and a date without end would end it with this one peer's answer."""

    async def careful(peer: Any, keys: Any) -> Any:
        found = await call_find(peer, keys)
        for key, (entries, nearest) in list((found or {}).items()):
            if entries is not None and not entries.expiration_time < time.time() + FARTHEST_S:
                found[key] = None, nearest
            elif entries is not None:
                entries.value.maxsize = float("inf")
        return found

    return careful


async def _end(p2p: Any) -> None:
    try:
        async with asyncio.timeout(DIAL_S):
            await p2p.shutdown()
    except TimeoutError:  # it asks the daemon to go; one that hangs has to be told
        p2p._child.kill()
        await p2p._child.wait()
    control = p2p._client and p2p._client.control
    for task in (control._read_task, control._write_task) if control else ():
        if task.done() and not task.cancelled():
            task.exception()  # looked at, or asyncio tells everyone that it died with its daemon


def check_hivemind() -> None:
    try:
        from hivemind.utils.logging import use_hivemind_log_handler  # noqa: PLC0415
    except ImportError:
        raise BadRequest(
            "the DHT needs hivemind: pip install 'treeswarm[dht]'.  Windows has none: use MQTT (mqtts://…) or "
            "static addresses there"
        ) from None
    logging.addLevelName(logging.WARNING, "WARNING")  # it calls it WARN, for the whole program
    use_hivemind_log_handler("nowhere")  # its words go where ours go …
    logging.getLogger("hivemind").setLevel(logging.ERROR)  # … and a peer that left is no news to anyone
