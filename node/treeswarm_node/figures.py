"""A node in figures: one frozen look at it, for its owner's panel and for Prometheus."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from treeswarm.messages import NumericsClass
from treeswarm.records import NodeState
from treeswarm.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm_node.engine import Counters
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.pages import PAGE


@dataclass(frozen=True)
class KVFigures:
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
class Figures:
    """Totals are since the node was started; those of `kv` since it loaded its blocks."""

    model: str
    node: str
    device: str
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
    opened: int = 0
    resumed: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    streams: int = 0
    turned_away: Mapping[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    queue: int = 0
    """Steps that wait for the device."""
    kv: KVFigures = KVFigures()
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


@dataclass(frozen=True, eq=False)
class Gauge:
    """Where the figures are read off."""

    life: Lifecycle
    transport: GrpcTransport
    started: float = field(default_factory=time.monotonic)

    async def read(self) -> Figures:
        """As of now.  In the event loop, where all that is read changes."""
        life, node = self.life, self.life.node
        stage = node.stage
        return Figures(
            model=life.config.model,
            node=life.identity.node_id,
            device=life.config.device,
            state=node.state,
            uptime_s=time.monotonic() - self.started,
            blocks=life.model.shape.blocks,
            span=life.span,
            numerics=life.numerics,
            rate=stage.rate if stage else 0.0,
            memory_bytes=memory_used(torch.device(life.config.device)),
            sessions=len(node.sessions),
            opened=node.opened,
            resumed=node.resumed,
            refusals=dict(node.refusals),
            streams=node.streams,
            turned_away=dict(self.transport.refused),
            counters=life.counters,
            queue=stage.engine.waiting if stage else 0,
            kv=self._kv(),
            journal_bytes=node.journals.taken,
            journal_room=node.journals.total,
            sent={kind.value: count for kind, count in self.transport.traffic.sent.items()},
            received={kind.value: count for kind, count in self.transport.traffic.received.items()},
            peers=len(await life.neighbours()),
            disbelieved=dict(life.membership.known.rejected),
            tenants=node.landlord.tenants if node.landlord else 0,
            guest_connections=node.landlord.connections if node.landlord else 0,
            moves=life.moves,
        )

    def _kv(self) -> KVFigures:
        stage = self.life.node.stage
        if stage is None:
            return KVFigures()
        store = stage.store
        return KVFigures(
            pages=store.pool.pages,
            free=store.free_tokens // PAGE,
            shared=store.shared_pages,
            prefix_hits=store.prefixes.hits,
            prefix_tokens=store.prefixes.hit_tokens,
        )


def memory_used(device: torch.device) -> int:
    """Bytes that this process has of the device's memory, or of the machine's where they are the same; 0: not known."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
