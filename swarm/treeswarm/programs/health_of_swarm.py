"""Findings about a swarm, as seen from here: its registry, whether its nodes answer, and what they say of the time."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from treeswarm.errors import SwarmError
from treeswarm.programs.health import Finding, clock
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.registry import peers_registry
from treeswarm.registry.seam import Registry, Snapshot
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport

# A DHT is polled each few seconds; who has heard of nobody by then will hear of nobody.
FIRST_RECORDS_S = 10.0
# Nodes dialled: enough to tell a dead network from a dead node.
DIALLED = 8


@dataclass(frozen=True)
class SwarmSeen:
    """What was found, and the addresses of nodes that answer."""

    findings: tuple[Finding, ...]
    answering: tuple[str, ...] = ()
    online: tuple[NodeRecord, ...] = ()


async def examine_swarm(
    opening: Callable[[], Awaitable[Registry]], transport: Transport, first_s: float = FIRST_RECORDS_S
) -> SwarmSeen:
    """Open a registry, dial some of the nodes that it knows, and close it again."""
    try:
        registry = await opening()
    except SwarmError as error:
        return SwarmSeen((Finding.of_error("registry", error),))
    try:
        others = [sealed.record for sealed in await _first_records(registry, first_s)]
        online = [record for record in others if record.state is NodeState.ONLINE]
        found = Finding.ok("registry", f"reachable, {len(others)} nodes known, {len(online)} online")
        if not others:
            step = "check that it is the swarm meant and that a node of this model runs; the first node has no others"
            found = Finding.warn("registry", "reachable, but it knows no node", step)
        nodes, answering = await _nodes(online, transport)
        ages = [time.time() - record.generation / 1e6 for record in others]
        return SwarmSeen((found, *nodes, clock(ages, registry.rejected)), answering, tuple(online))
    finally:
        await registry.close()


def asking(spec: str, model: str | None, transport: Transport) -> Callable[[], Awaitable[Registry]]:
    """For `examine_swarm`: ask nodes, `H:P,H:P` or `static:H:P`.  Raises BadRequest."""
    peers = peers_registry(spec, transport, model)

    async def ask() -> Registry:
        try:
            await peers.start()
        except SwarmError:
            if not peers.rejected:
                raise  # else somebody answered: that nothing was believed is the clock's fault, and told there
        return peers

    return ask


async def _first_records(registry: Registry, first_s: float) -> Snapshot:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0 if registry.rejected else first_s):
            async for known in registry.watch():
                if known:
                    return known
    return await registry.snapshot()


async def _nodes(online: list[NodeRecord], transport: Transport) -> tuple[list[Finding], tuple[str, ...]]:
    some = random.sample(online, min(DIALLED, len(online)))
    if not some:
        return [], ()
    took = await asyncio.gather(*(_round_trip(transport, record.dial) for record in some))
    answers = {record.dial: s for record, s in zip(some, took, strict=True) if s is not None}
    silent = ", ".join(record.address for record in some if record.dial not in answers)
    step = "if other machines reach them, look at this one's firewall and way out: `swarm status` names each"
    if not answers:
        return [Finding.fail("nodes", f"none of {len(some)} answers: {silent}", step)], ()
    said = f"{len(answers)} of {len(some)} answer, the nearest in {1000 * min(answers.values()):.0f} ms"
    if silent:
        return [Finding.warn("nodes", f"{said}; silent: {silent}", step)], tuple(answers)
    return [Finding.ok("nodes", said)], tuple(answers)


async def _round_trip(transport: Transport, address: str) -> float | None:
    """Seconds; None where nobody answers."""
    try:
        return await round_trip(transport, address)
    except (SwarmError, TimeoutError):
        return None
