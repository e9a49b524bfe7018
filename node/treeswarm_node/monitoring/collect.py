"""Collect a node's figures from its parts."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from treeswarm.protocol.records import speculator_words
from treeswarm.transport.grpc import GrpcTransport
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.monitoring.snapshot import (
    ComputeSnapshot,
    KVSnapshot,
    NetworkSnapshot,
    NodeDescription,
    NodeSnapshot,
    SessionsSnapshot,
    SpanSnapshot,
)


@dataclass(frozen=True, eq=False)
class SnapshotCollector:
    """Reads the figures of a running node from its lifecycle and its transport."""

    lifecycle: Lifecycle
    transport: GrpcTransport
    started: float = field(default_factory=time.monotonic)
    """When the program was started, by `time.monotonic`."""

    async def read(self) -> NodeSnapshot:
        """Return the figures as of now.  Call it in the event loop, where everything that it reads changes."""
        lifecycle = self.lifecycle
        return NodeSnapshot(
            about=NodeDescription(
                model=lifecycle.config.model.name,
                node=lifecycle.record.identity.node_id,
                device=lifecycle.config.device.name,
                address=lifecycle.record.address.bare,
                blocks=lifecycle.record.model.shape.blocks,
            ),
            hosting=self._hosting(),
            uptime_s=time.monotonic() - self.started,
            compute=self._compute(),
            sessions=self._sessions(),
            kv=self._kv(),
            network=await self._network(),
        )

    def _hosting(self) -> SpanSnapshot:
        lifecycle, stage = self.lifecycle, self.lifecycle.node.stage
        return SpanSnapshot(
            state=lifecycle.node.state,
            span=lifecycle.record.span,
            numerics=lifecycle.record.numerics,
            rate=stage.rate if stage else 0.0,
            proposes=_speculator_words(stage),
            moves=lifecycle.moves,
            grace_left_s=lifecycle.node.grace_left_s,
            speculator=_speculator_state(stage),
        )

    def _compute(self) -> ComputeSnapshot:
        stage = self.lifecycle.node.stage
        return ComputeSnapshot(
            counters=replace(self.lifecycle.counters),
            queue=stage.engine.waiting if stage else 0,
            memory_bytes=memory_used(torch.device(self.lifecycle.config.device.name)),
        )

    def _sessions(self) -> SessionsSnapshot:
        node, sessions = self.lifecycle.node, self.lifecycle.node.sessions
        return SessionsSnapshot(
            open=len(sessions),
            limit=node.limits.sessions,
            opened=sessions.counters.opened,
            resumed=sessions.counters.resumed,
            refusals=dict(sessions.counters.refused),
            driven=node.driver.driven if node.driver is not None else 0,
            replay_log_bytes=sessions.replay_logs.used_bytes,
            replay_log_limit=sessions.replay_logs.total_bytes,
        )

    def _kv(self) -> KVSnapshot:
        stage = self.lifecycle.node.stage
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

    async def _network(self) -> NetworkSnapshot:
        node, traffic, lender = self.lifecycle.node, self.transport.traffic, self.lifecycle.node.port_lender
        return NetworkSnapshot(
            streams=node.streams,
            turned_away=dict(self.transport.refused),
            sent={kind.value: count for kind, count in traffic.sent.items()},
            received={kind.value: count for kind, count in traffic.received.items()},
            peers=len(await self.lifecycle.neighbours()),
            disbelieved=dict(self.lifecycle.membership.records.rejected),
            port_borrowers=lender.lease_count if lender else 0,
            lent_connections=lender.connections if lender else 0,
        )


def _speculator_state(stage: LoadedStage | None) -> str:
    """Return the state of a stage's speculator; one that was refused has lost its name."""
    if stage is None or stage.speculator is None:
        return ""
    return "proposing" if stage.speculator.name else "refused"


def _speculator_words(stage: LoadedStage | None) -> str:
    if stage is None or stage.speculator is None or not stage.speculator.name:
        return ""
    return speculator_words(stage.speculator.name, stage.speculator.agreement)


def memory_used(device: torch.device) -> int:
    """Return the bytes of the device's memory that this process uses; 0 if unknown.

    For a device without memory of its own, return the process's resident bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
