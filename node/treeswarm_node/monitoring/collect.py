"""Reads a node's figures off its parts."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from treeswarm.transport.grpc import GrpcTransport
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.monitoring.snapshot import KVSnapshot, NodeSnapshot


@dataclass(frozen=True, eq=False)
class SnapshotCollector:
    """Where the figures are read off."""

    life: Lifecycle
    transport: GrpcTransport
    started: float = field(default_factory=time.monotonic)

    async def read(self) -> NodeSnapshot:
        """As of now.  In the event loop, where all that is read changes."""
        life, node = self.life, self.life.node
        stage = node.stage
        return NodeSnapshot(
            model=life.config.model.name,
            node=life.identity.node_id,
            device=life.config.device.name,
            address=life.address.bare,
            state=node.state,
            uptime_s=time.monotonic() - self.started,
            blocks=life.model.shape.blocks,
            span=life.span,
            numerics=life.numerics,
            rate=stage.rate if stage else 0.0,
            memory_bytes=memory_used(torch.device(life.config.device.name)),
            sessions=len(node.sessions),
            most_sessions=node.limits.sessions,
            opened=node.sessions.counters.opened,
            resumed=node.sessions.counters.resumed,
            refusals=dict(node.sessions.counters.refused),
            streams=node.streams,
            turned_away=dict(self.transport.refused),
            counters=replace(life.counters),
            queue=stage.engine.waiting if stage else 0,
            kv=self._kv(),
            journal_bytes=node.sessions.replay_logs.used_bytes,
            journal_room=node.sessions.replay_logs.total_bytes,
            sent={kind.value: count for kind, count in self.transport.traffic.sent.items()},
            received={kind.value: count for kind, count in self.transport.traffic.received.items()},
            peers=len(await life.neighbours()),
            disbelieved=dict(life.membership.records.rejected),
            tenants=node.port_lender.lease_count if node.port_lender else 0,
            guest_connections=node.port_lender.connections if node.port_lender else 0,
            moves=life.moves,
        )

    def _kv(self) -> KVSnapshot:
        stage = self.life.node.stage
        if stage is None:
            return KVSnapshot()
        store = stage.store
        return KVSnapshot(
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
