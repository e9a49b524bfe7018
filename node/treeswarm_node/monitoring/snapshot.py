"""A node's figures at one moment, for its owner's panel and for Prometheus.  Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.engine.counters import Counters
from treeswarm_node.kv_cache.page_pool import PAGE


@dataclass(frozen=True)
class NodeDescription:
    """What stays the same while a node runs, except for its address."""

    model: str
    """Name of the model, as the owner gave it."""
    node: str
    """The node's id."""
    device: str
    """Name of the device that computes, such as `cuda`."""
    address: str
    """Address at which others reach the node, without a pin."""
    blocks: int
    """Number of blocks of the whole model."""


@dataclass(frozen=True)
class SpanSnapshot:
    """What a node hosts."""

    state: NodeState
    """State that the node announces."""
    span: Span | None = None
    """Blocks hosted, or None if none was chosen yet."""
    numerics: NumericsClass | None = None
    """Numerics class of the hosted blocks, or None if nothing was loaded yet."""
    rate: float = 0.0
    """Block-rows per second, as measured; 0 while nothing is loaded."""
    proposes: str = ""
    """Speculator that proposes trees, in words, or "" if there is none."""
    moves: int = 0
    """Number of moves to other blocks."""
    grace_left_s: float | None = None
    """Seconds that open sessions still have to move to other nodes, or None unless the node drains."""
    speculator: str = ""
    """State of the speculator, `proposing` or `refused`, or an empty string if there is none."""


@dataclass(frozen=True)
class ComputeSnapshot:
    """The device's work, and the memory used."""

    counters: Counters = field(default_factory=Counters)
    """Totals of all forwards."""
    queue: int = 0
    """Number of steps that wait for the device."""
    memory_bytes: int = 0
    """Bytes that this process uses: of the device's memory if it has its own, else resident."""


@dataclass(frozen=True)
class SessionsSnapshot:
    """Sessions, and the memory for their replay logs."""

    open: int = 0
    """Number of sessions open now."""
    limit: int = 0
    """Number of sessions that may be open at once."""
    opened: int = 0
    """Number of sessions opened so far."""
    resumed: int = 0
    """Number of sessions that continued here after another node was lost."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Number of sessions refused, by reason."""
    driven: int = 0
    """Number of texts driven for clients."""
    replay_log_bytes: int = 0
    """Bytes kept or reserved for replay logs."""
    replay_log_limit: int = 0
    """Bytes available for all replay logs."""


@dataclass(frozen=True)
class KVSnapshot:
    """Pages of the KV cache, and use of the prefix cache."""

    pages: int = 0
    """Number of pages in all."""
    free: int = 0
    """Number of pages that a new session could have: unused, or only kept in the prefix cache."""
    shared: int = 0
    """Number of pages that several sessions read."""
    prefix_hits: int = 0
    """Number of sessions that began on pages from the prefix cache."""
    prefix_tokens: int = 0
    """Number of tokens that those sessions did not compute again."""

    @property
    def tokens(self) -> int:
        """Number of KV rows in all."""
        return self.pages * PAGE

    @property
    def free_tokens(self) -> int:
        """Number of KV rows that a new session could have."""
        return self.free * PAGE


@dataclass(frozen=True)
class NetworkSnapshot:
    """Streams, traffic, known nodes and lent ports."""

    streams: int = 0
    """Number of control and link streams open now."""
    turned_away: Mapping[str, int] = field(default_factory=dict)
    """Number of streams ended with an error and of peers with a wrong key, by reason."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Bytes sent, by kind of stream."""
    received: Mapping[str, int] = field(default_factory=dict)
    """Bytes received, by kind of stream."""
    peers: int = 0
    """Number of other nodes whose records are known."""
    disbelieved: Mapping[str, int] = field(default_factory=dict)
    """Number of records rejected, by reason."""
    port_borrowers: int = 0
    """Number of nodes that borrow a port here."""
    lent_connections: int = 0
    """Number of connections on lent ports."""


@dataclass(frozen=True)
class NodeSnapshot:
    """All figures of a node.

    Totals count from the start of the program; those of `kv` from the loading of the present blocks.
    """

    about: NodeDescription
    hosting: SpanSnapshot
    uptime_s: float
    """Seconds since the program was started."""
    compute: ComputeSnapshot = field(default_factory=ComputeSnapshot)
    sessions: SessionsSnapshot = field(default_factory=SessionsSnapshot)
    kv: KVSnapshot = KVSnapshot()
    network: NetworkSnapshot = field(default_factory=NetworkSnapshot)
