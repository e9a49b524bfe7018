"""A node in figures: one frozen look at it, for its owner's panel and for Prometheus.  Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.engine.counters import Counters
from treeswarm_node.kv_cache.page_pool import PAGE


@dataclass(frozen=True)
class KVSnapshot:
    """Pages of KV cache, and who began on kept ones."""

    pages: int = 0
    free: int = 0
    """That a new session could have: in nobody's use, or only kept for later."""
    shared: int = 0
    """That several sessions read."""
    prefix_hits: int = 0
    prefix_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.pages * PAGE

    @property
    def free_tokens(self) -> int:
        return self.free * PAGE


@dataclass(frozen=True)
class NodeSnapshot:
    """Totals are since the node was started; those of `kv` since it loaded its blocks."""

    model: str
    node: str
    device: str
    address: str
    state: NodeState
    uptime_s: float
    blocks: int
    """Of the whole model."""
    span: Span | None = None
    numerics: NumericsClass | None = None
    """None: nothing was loaded yet."""
    rate: float = 0.0
    """Block-rows a second, as measured; 0 while nothing is loaded."""
    memory_bytes: int = 0
    """Of this process: on the device if that has memory of its own, else resident."""
    sessions: int = 0
    most_sessions: int = 0
    opened: int = 0
    resumed: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    streams: int = 0
    turned_away: Mapping[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    queue: int = 0
    """Steps that wait for the device."""
    kv: KVSnapshot = KVSnapshot()
    journal_bytes: int = 0
    journal_room: int = 0
    """Bytes for all journals."""
    sent: Mapping[str, int] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)
    peers: int = 0
    """Other nodes whose records are known."""
    disbelieved: Mapping[str, int] = field(default_factory=dict)
    """Records, by reason."""
    tenants: int = 0
    guest_connections: int = 0
    """Of strangers, on lent ports."""
    moves: int = 0
