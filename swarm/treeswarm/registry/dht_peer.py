"""The only module that uses hivemind: one run of its daemon, what is read and written, and what is refused.

hivemind's `DHTNode` runs in our own event loop, next to its daemon p2pd, a child process.  (The forked `hivemind.DHT`
is unusable here: one value that is too large kills it.)  All of hivemind is imported inside functions, because it
imports torch.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest, Malformed, TransportError
from treeswarm.extras import install_command
from treeswarm.keys import damaged_file, new_raw_key, write_private
from treeswarm.protocol.records import LIFETIME_S, RECORD_VERSION, SealedRecord
from treeswarm.registry.book import MAX_NODES, rejection_reason
from treeswarm.tasks import TaskSet, first_success
from treeswarm.wire.sealing import unseal

# One key with 12,000 subkeys returned 10,200 of them (2026-11-20): an answer holds at most 4 MiB.
SHARDS = 16
# Number of records of one shard that are kept here and taken in a poll.  16 shards of this size hold more nodes than a
# list of one model needs, with 2 MiB per shard.
MAX_SHARD = 4096
# Number of keys, of this and other models, that this node stores for the swarm.  An attacker can fill at most 0.7 GB of
# memory with them.
MAX_KEYS = 256
REPLICAS = 5
# hivemind gives up on a peer after 3 s.  A whole search in the DHT that takes this long is stuck in a dead daemon.
STUCK_S = 30.0
START_S = 20.0
# Both halves of an Ed25519 key.
ED25519_BYTES = 64
DIAL_S = 5.0
# Of so many connected peers one answers, unless the daemon or the network has failed.
MAX_PINGED = 8
# No honest record has an expiry further in the future.
FARTHEST_S = 2 * LIFETIME_S
# A program of Python's that becomes the program it is given, in a process group of its own.
OWN_GROUP = "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"

Validate = Callable[[Any], bool]


def shard_key(model: str, node: str) -> str:
    """Return the DHT key that a node's record is stored under."""
    return shard_keys(model)[int(node[:8], 16) % SHARDS]


@lru_cache(maxsize=MAX_KEYS)
def shard_keys(model: str) -> tuple[str, ...]:
    """Return all DHT keys of a model.

    They contain the record version: one entry that a peer cannot read spoils the whole answer for that peer.
    """
    return tuple(f"treeswarm/{RECORD_VERSION}/{model}/{shard}" for shard in range(SHARDS))


def dht_expiry(generation: int) -> float:
    """Return the time, in seconds since 1970, until which the DHT keeps a record of this generation.

    The DHT prefers entries with a later expiry, and the expiry follows from the generation alone.  So a newer record
    replaces an older one even within a second, and an attacker cannot block a node's newer records with a far expiry.
    """
    return generation / 1e6 + LIFETIME_S


@lru_cache(maxsize=MAX_NODES)
def entry_rejection(key: bytes, subkey: bytes, value: bytes, expiry: float, model: str) -> str:
    """Return the reason to reject a DHT entry, or an empty string if it is a valid record in its right place."""
    from hivemind.dht.routing import DHTID  # noqa: PLC0415
    from hivemind.utils import MSGPackSerializer  # noqa: PLC0415

    try:
        sealed = MSGPackSerializer.loads(value)
        node = MSGPackSerializer.loads(subkey) if subkey else None
    except Exception:  # msgpack raises many kinds of errors for malformed bytes.
        return "malformed"
    if not isinstance(sealed, bytes):
        return "malformed"
    try:
        record = unseal(sealed).record
    except Malformed as error:
        return rejection_reason(error, sealed)
    if DHTID.generate(shard_key(record.model, record.node)).to_bytes() != key or record.node != node:
        own_keys = {DHTID.generate(own_key).to_bytes() for own_key in shard_keys(model)}
        return "other-model" if key in own_keys and record.model != model else "misplaced"
    return "" if expiry == dht_expiry(record.generation) else "misdated"


def sealed_in(value: bytes) -> bytes:
    """Return the sealed record in the value of an entry that `entry_rejection` found valid."""
    from hivemind.utils import MSGPackSerializer  # noqa: PLC0415

    sealed = MSGPackSerializer.loads(value)
    assert isinstance(sealed, bytes)
    return sealed


@dataclass(eq=False)
class _Validator:
    """The interface that hivemind expects of a validator; see `DhtRegistry._is_believable`."""

    validate: Validate

    def sign_value(self, record: Any) -> Any:
        return record.value

    def strip_value(self, record: Any) -> Any:
        return record.value


@dataclass(eq=False)
class DhtPeer:
    """One run of the daemon, and the DHT node that uses it.  All methods raise TransportError."""

    p2p: Any
    node: Any
    _calls: TaskSet = field(default_factory=TaskSet)

    @classmethod
    async def start(cls, listen: Sequence[str], identity: Path, validate: Validate) -> "DhtPeer":
        """Start a daemon that listens at the multiaddresses `listen`, with the key file `identity`.

        Raises BadRequest: what keeps a daemon from starting is a problem of this machine.
        """
        from hivemind.dht.node import DHTNode  # noqa: PLC0415

        _make_identity(identity)
        p2p = None
        try:
            async with asyncio.timeout(START_S):
                # Other peers are dialled later: a daemon that reaches none of its initial peers does not start.
                p2p = await _daemon_class().create(
                    host_maddrs=listen,
                    identity_path=str(identity),
                    check_if_identity_free=False,
                    startup_timeout=START_S,
                )
                node = await DHTNode.create(
                    p2p,
                    num_replicas=REPLICAS,
                    record_validator=_Validator(validate),
                    # Caches would hide changes from a poll.
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    cache_refresh_before_expiry=0,
                )
        except Exception as error:  # hivemind has no common base exception, and none of its own may reach the caller.
            if p2p is not None:
                await _end(p2p)
            raise BadRequest(
                f"the DHT's daemon does not start at {', '.join(listen)} ({error or type(error).__name__}): "
                "if the port is taken, choose another, or use MQTT"
            ) from error
        node.protocol.storage.maxsize = MAX_KEYS
        node.protocol.call_find = _checked(node.protocol.call_find)
        return cls(p2p, node)

    @property
    def alone(self) -> bool:
        """Whether no other peer is known that answers."""
        return not self.node.protocol.routing_table.uid_to_peer_id

    async def is_useless(self) -> bool:
        """Return whether a new daemon may do better, when nothing gets through this one.

        That is so if the daemon is dead, or if it has connections that do not work.  Without any connection, a new
        daemon would reach no more peers than this one; and peers that answer refuse what they refuse.
        """
        try:
            connected = await self.connected()
            return bool(connected) and not await self.connect_any(connected[:MAX_PINGED])
        except TransportError:
            return True

    async def maddrs(self) -> tuple[str, ...]:
        """Return the multiaddresses of this peer that others can see."""
        return tuple(map(str, await self._call(partial(self.p2p.get_visible_maddrs, latest=True))))

    async def connected(self) -> list[str]:
        """Return the multiaddresses of the peers connected now.  Raises TransportError when the daemon is dead."""
        peers = await self._call(self.p2p.list_peers)
        return [f"{maddr}/p2p/{peer.peer_id}" for peer in peers for maddr in peer.addrs[:1]]

    def missing(self, maddrs: Iterable[str]) -> list[str]:
        """Return those of `maddrs` that are not in the routing table."""
        known = {str(peer) for peer in self.node.protocol.routing_table.peer_id_to_uid} | {str(self.p2p.peer_id)}
        return [maddr for maddr in maddrs if maddr.rpartition("/")[2] not in known]

    async def connect(self, maddrs: Sequence[str]) -> int:
        """Connect to the missing peers among `maddrs`.  Return how many of `maddrs` are known and answer."""
        answers = await asyncio.gather(*map(self._connect_one, self.missing(maddrs)))
        if any(answers):  # A peer that answered knows other peers.
            await self._call(partial(self.node.find_nearest_nodes, [self.node.node_id]))
        return sum(answers) + len(maddrs) - len(answers)

    async def connect_any(self, maddrs: Sequence[str]) -> bool:
        """Connect to the peer among `maddrs` that answers first.  Return whether any does.

        Dead addresses cost next to no time, as all are dialled side by side.
        """
        if not maddrs:
            return False

        async def connect(maddr: str) -> None:
            if not await self._connect_one(maddr):
                raise TransportError(f"no answer from {maddr}")

        try:
            await first_success([partial(connect, maddr) for maddr in maddrs])
        except ExceptionGroup:
            return False
        await self._call(partial(self.node.find_nearest_nodes, [self.node.node_id]))
        return True

    async def _connect_one(self, maddr: str) -> bool:
        from hivemind.p2p import PeerID  # noqa: PLC0415
        from hivemind.utils.multiaddr import Multiaddr  # noqa: PLC0415

        address, _, name = maddr.rpartition("/p2p/")
        with contextlib.suppress(TransportError):
            peer = PeerID.from_base58(name)
            # P2P has no public method to dial an address after its start.
            await self._call(partial(self.p2p._client.connect, peer, [Multiaddr(address)]), DIAL_S)
            return await self._call(partial(self.node.protocol.call_ping, peer)) is not None
        return False

    async def ask_clocks(self, most: int) -> dict[str, float]:
        """Ask up to `most` known peers for their time.  Return, by peer id, by how many seconds each is ahead."""
        from hivemind.proto import dht_pb2  # noqa: PLC0415

        protocol = self.node.protocol

        async def ask(peer: Any) -> float | None:
            with contextlib.suppress(TransportError):
                request = dht_pb2.PingRequest(peer=protocol.node_info, validate=False)
                reply = await self._call(partial(protocol.get_stub(peer).rpc_ping, request, timeout=DIAL_S), DIAL_S)
                return float(reply.dht_time) - time.time() if reply.dht_time else None
            return None

        peers = list(protocol.routing_table.peer_id_to_uid)[:most]
        answers = await asyncio.gather(*map(ask, peers))
        return {str(peer): ahead_s for peer, ahead_s in zip(peers, answers, strict=True) if ahead_s is not None}

    async def store(self, sealed: SealedRecord) -> bool:
        """Store a record.  Return whether another peer then has it, or a newer one of the same node.

        hivemind's own return value does not tell: it counts this peer's own copy, and is True after the daemon's death
        as well.
        """
        record = sealed.record
        key, expiry = shard_key(record.model, record.node), dht_expiry(record.generation)
        await self._call(partial(self.node.store, key, sealed.sealed, expiry, subkey=record.node))
        return await self._others_have(key, record.node, expiry)

    async def _others_have(self, key: str, subkey: str, expiry: float) -> bool:
        from hivemind.dht.routing import DHTID  # noqa: PLC0415

        key_id = DHTID.generate(key)
        nearest = await self._call(
            partial(self.node.find_nearest_nodes, [key_id], k_nearest=REPLICAS, exclude_self=True)
        )
        for peer in nearest[key_id].values():
            answer = await self._call(partial(self.node.protocol.call_find, peer, [key_id]))
            entries = answer[key_id][0] if answer else None
            entry = entries.value.get(subkey) if entries else None
            if entry is not None and entry.expiration_time >= expiry:
                return True
        return False

    async def read(self, keys: Sequence[str], known: Callable[[str], SealedRecord | None]) -> dict[str, bytes]:
        """Return the bytes stored for each node id, which may be no valid record.

        `known` returns the believed record of a node id, or None.
        """
        self._limit_shards()
        answer = await self._call(partial(self.node.get_many, keys, sufficient_expiration_time=float("inf")))
        shards = [entries.value for entries in answer.values() if entries and isinstance(entries.value, dict)]
        return {
            node: sealed
            for shard in shards
            # When an attacker floods a shard with nodes of their own, the nodes known before keep their place.
            for node, (sealed, _) in sorted(shard.items(), key=lambda item: known(item[0]) is None)[:MAX_SHARD]
            if isinstance(sealed, bytes)
        }

    def _limit_shards(self) -> None:
        for _, entries in self.node.protocol.storage.items():
            if hasattr(entries.value, "maxsize"):
                entries.value.maxsize = MAX_SHARD

    async def close(self) -> None:
        """Stop the daemon.

        hivemind's own shutdown asks the daemon first to remove its handlers, and waits without end for a dead daemon.
        """
        self.node.is_alive = False
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=DIAL_S)
        await _end(self.p2p)
        await self._calls.close()

    async def _call(self, call: Callable[[], Awaitable[Any]], timeout: float = STUCK_S) -> Any:
        """Make a call into hivemind.  Raises TransportError whatever it raises.

        The caller may be cancelled, but the call goes on: a cancelled search leaves tasks behind that wait without end.
        It is made in the task, not before: a peer that closes may end the task before its first step.
        """
        task = self._calls.start(_translated(call))  # the set looks at its error if the caller is cancelled before
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(task)
        except TimeoutError as error:
            raise _no_response(error) from error


async def _translated(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call into hivemind.  Raises TransportError: peers and daemons that are gone are no bugs to log."""
    try:
        return await call()
    except Exception as error:  # OSError, RuntimeError, KeyError and the daemon's own
        raise _no_response(error) from error


def _no_response(error: Exception) -> TransportError:
    return TransportError(f"the DHT's daemon does not respond ({error or type(error).__name__})")


def _daemon_class() -> Any:
    """Return hivemind's P2P, but with a daemon in a process group of its own.

    Ctrl-C on a terminal reaches the whole group.  A node that leaves still needs its daemon, to withdraw its record.
    """
    from hivemind.p2p import P2P  # noqa: PLC0415

    class OwnGroupP2P(P2P):  # type: ignore[misc]
        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            command: list[str] = P2P._make_process_args(*args, **kwargs)
            return [sys.executable, "-I", "-S", "-c", OWN_GROUP, *command]

    return OwnGroupP2P


def _make_identity(path: Path) -> None:
    """Write an Ed25519 key in libp2p's format, unless the file exists.  Raises BadRequest, also for a damaged file.

    hivemind's own generator takes a second, as it makes an RSA key.
    """
    from hivemind.proto import crypto_pb2  # noqa: PLC0415

    try:
        if not path.exists():
            key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=b"".join(new_raw_key()))
            write_private(path, key.SerializeToString())
        elif not _is_dht_key(path.read_bytes()):
            raise damaged_file("key file of the DHT peer", path, "", "the node is then another peer of the DHT")
    except OSError as error:
        raise BadRequest(f"the key file of the DHT peer {path} can be neither read nor created ({error})") from None


def _is_dht_key(data: bytes) -> bool:
    """Return whether these bytes are an Ed25519 key in libp2p's format, which is what `_make_identity` writes."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415
    from hivemind.proto import crypto_pb2  # noqa: PLC0415

    try:
        key = crypto_pb2.PrivateKey.FromString(data)
    except DecodeError:
        return False
    return key.key_type == crypto_pb2.KeyType.Ed25519 and len(key.data) == ED25519_BYTES


def _checked(call_find: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap `call_find` so that it checks what a peer puts around the entries.

    hivemind validates the entries, and trusts the dictionary around them.  A size that is not a number would end every
    search with an error.  An expiry without limit would end the search with this one peer's answer.
    """

    async def checked_find(peer: Any, keys: Any) -> Any:
        answer = await call_find(peer, keys)
        for key, (entries, nearest) in list((answer or {}).items()):
            if entries is not None and not entries.expiration_time < time.time() + FARTHEST_S:
                answer[key] = None, nearest
            elif entries is not None:
                entries.value.maxsize = float("inf")
        return answer

    return checked_find


async def _end(p2p: Any) -> None:
    try:
        async with asyncio.timeout(DIAL_S):
            await p2p.shutdown()
    except TimeoutError:  # `shutdown` asks the daemon to exit; one that hangs must be killed.
        p2p._child.kill()
        await p2p._child.wait()
    control = p2p._client and p2p._client.control
    for task in (control._read_task, control._write_task) if control else ():
        if task.done() and not task.cancelled():
            task.exception()  # Retrieved, because asyncio would log that it ended with an error.


def check_hivemind() -> None:
    """Check that hivemind is installed, and quieten its logging.  Raises BadRequest if it is missing."""
    try:
        from hivemind.utils.logging import use_hivemind_log_handler  # noqa: PLC0415
    except ImportError:
        raise BadRequest(
            f"the DHT needs hivemind: {install_command('dht')}.  On Windows, where hivemind does not exist, use "
            "MQTT (mqtts://…) or static addresses"
        ) from None
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames it to WARN for the whole program.
    use_hivemind_log_handler("nowhere")  # Its messages go to this program's handlers …
    logging.getLogger("hivemind").setLevel(logging.ERROR)  # … without those about peers that disconnected.
