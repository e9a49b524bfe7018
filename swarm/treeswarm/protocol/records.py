"""Records: what a node announces of itself.  The newest record of a node counts, until it expires.  Pure data."""

from dataclasses import dataclass, fields
from enum import StrEnum
from hashlib import sha256

from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate

RECORD_VERSION = 1
# A node that vanished is forgotten within five minutes.  Sessions and watchers notice it long before, by pings.
LIFETIME_S = 300
# There are four chances to replace a record before it is forgotten, and the load that it reports is never older.
ANNOUNCE_EVERY_S = LIFETIME_S / 5
# A record that is valid for longer is not accepted.  Twice the lifetime leaves room for clocks that differ.
MAX_LIFETIME_S = 2 * LIFETIME_S
# Longest network coordinate that is accepted; today's have four numbers, and a later release may need more.
COORDINATE_LENGTH = 6
# Stands for the digest of weights that a node has not read yet.
UNKNOWN_WEIGHTS = "0" * 64


class NodeState(StrEnum):
    """What a node is doing."""

    JOINING = "joining"
    """The node has chosen its span and loads it."""
    ONLINE = "online"
    DRAINING = "draining"
    """The node finishes its sessions and opens no new ones."""
    PAUSED = "paused"
    GONE = "gone"
    """The node has left: this record withdraws the ones before it."""


@dataclass(frozen=True)
class NodeRecord:
    """What one node announces.  Rates and times are its own measurements: used to plan, never trusted for a result."""

    key: bytes
    """Ed25519 public key, 32 bytes: the node's identity."""
    generation: int
    """Microseconds since 1970 when the record was made; a newer record replaces an older one."""
    expires: int
    """Seconds since 1970 at which the record expires."""
    state: NodeState
    address: str
    """Address of the node, `host:port`."""
    pin: str
    """Pin of the TLS key that answers at that address, 32 hex digits."""
    reachable: bool
    """True if another node has dialled the address."""
    name: str
    """Name of the model, for people."""
    model: str
    """Hex digest of the part of the model's config that numerics depend on."""
    numerics: NumericsClass
    span: Span
    blocks: int
    """Number of blocks of the whole model."""
    rate: float
    """Block-rows per second: rows per second through one block."""
    hop_s: float
    """Seconds that one traversal takes here whatever the span: queue, network stack, Python."""
    free_tokens: int
    """Number of KV rows that no session has reserved."""
    total_tokens: int
    """Number of KV rows in all."""
    coordinate: tuple[float, ...]
    """Network coordinate, in the order of the fields of `coordinates.Coordinate`; empty if none was measured."""
    software: str
    driver: DriverKind = DriverKind.NONE
    """Whether the node drives texts for clients, and with what it drafts."""
    speculator: str = ""
    """Kind of the speculator that proposes trees at this node, if it is a tail that has one, or ""."""
    agreement: float = 0.0
    """Share of held-out tokens that the speculator's first guess names, or 0 if that is not known."""
    tap_head: str = ""
    """Digest of the head whose taps the node adds where they are among its blocks, and reads if it is a tail, or ""."""
    taps: tuple[int, ...] = ()
    """Blocks that this head taps, rising."""
    rules: int = 0
    """Version of the rules that the node applies as a tail and takes as a driver, or 0 for none."""
    grammar: str = ""
    """Library that applies grammars at the node, with its version, or ""."""

    @property
    def position(self) -> Coordinate | None:
        """The node's network coordinate, or None if the record has none that this release can read."""
        return Coordinate(*self.coordinate) if len(self.coordinate) == len(fields(Coordinate)) else None

    @property
    def node(self) -> str:
        """Id of the node, 32 hex digits."""
        return node_id(self.key)

    @property
    def dial(self) -> str:
        """Address with pin, as a transport takes it."""
        return f"{self.address}#{self.pin}" if self.pin else self.address


@dataclass(frozen=True)
class SealedRecord:
    """A record and the signed bytes that it was read from, which every node may pass on."""

    record: NodeRecord
    sealed: bytes


def speculator_words(kind: str, agreement: float) -> str:
    """Return a speculator as people read it: its kind, and how often its first guess is right if that is known."""
    return f"{kind}, first guess right in {agreement:.0%} of cases" if agreement else kind


def node_id(key: bytes) -> str:
    """Return the id of the node with this public key: half of the key's SHA-256, in hex.

    It is short enough to be read out, and long enough that no second key with the same id can be found.
    """
    return sha256(key).hexdigest()[:32]
