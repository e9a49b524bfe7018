"""What a node says of itself to everyone: one small record, newest wins, none outlives its date.  Pure data."""

from dataclasses import dataclass, fields
from enum import StrEnum
from hashlib import sha256

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate

RECORD_VERSION = 1
# Announced again at half of it; so a node that vanished is forgotten within five minutes.  What kills a session is
# found by heartbeats long before.
LIFETIME_S = 300
# A record promising to live for longer is no honest one; twice the lifetime leaves room for clocks that differ.
MAX_LIFETIME_S = 2 * LIFETIME_S
COORDINATE_LENGTH = 6
# The digest of weights that a node has not read yet.
UNKNOWN_WEIGHTS = "0" * 64


class NodeState(StrEnum):
    """Where a node stands in its life."""

    JOINING = "joining"
    """Has chosen its span, and loads."""
    ONLINE = "online"
    DRAINING = "draining"
    """Finishes what it has; opens nothing new."""
    PAUSED = "paused"
    GONE = "gone"
    """Withdraws the records before it."""


@dataclass(frozen=True)
class NodeRecord:
    """One node.  Rates and times are its own measurements: hints for planning, never trusted for a result."""

    key: bytes
    """Ed25519 public key, 32 bytes: the node's identity."""
    generation: int
    """Microseconds since 1970 when it was made: newer replaces older."""
    expires: int
    """Seconds since 1970."""
    state: NodeState
    address: str
    """`host:port`."""
    pin: str
    """What the TLS key on that address hashes to, 32 hex digits."""
    reachable: bool
    """Another node has dialled the address."""
    name: str
    """Of the model, for people."""
    model: str
    """Hex digest of the numerics-relevant config."""
    numerics: NumericsClass
    span: Span
    blocks: int
    """Of the whole model."""
    rate: float
    """Block-rows a second: rows a second through one block."""
    hop_s: float
    """What one traversal pays here whatever the span: queue, network stack, Python.  Seconds."""
    free_tokens: int
    total_tokens: int
    coordinate: tuple[float, ...]
    """Network coordinate, as `coordinates.Coordinate` lists it; empty where none was measured."""
    software: str

    @property
    def position(self) -> Coordinate | None:
        """The node's network coordinate; None where the record gives none that this release can read."""
        return Coordinate(*self.coordinate) if len(self.coordinate) == len(fields(Coordinate)) else None

    @property
    def node(self) -> str:
        """The node's id: 32 hex digits."""
        return node_id(self.key)

    @property
    def dial(self) -> str:
        """The address with its pin, as a transport takes it."""
        return f"{self.address}#{self.pin}" if self.pin else self.address


@dataclass(frozen=True)
class SealedRecord:
    """A record and the signed bytes it was read from, which anyone may pass on."""

    record: NodeRecord
    sealed: bytes


def node_id(key: bytes) -> str:
    """Half of the key's SHA-256 in hex: short enough to read out, long enough that nobody finds a second key."""
    return sha256(key).hexdigest()[:32]
