"""Checks of a swarm as this machine sees it: its registry, whether its nodes answer, and this machine's clock."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from treeswarm.errors import SwarmError
from treeswarm.programs.health import Finding, check_clock
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.registry import peers_registry
from treeswarm.registry.clocks import ClockSample
from treeswarm.registry.diagnosis import MEANINGS, explain_no_nodes
from treeswarm.registry.seam import AsksClocks, Registry, Snapshot
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import Transport

# A DHT is polled every few seconds.  If no record has arrived by then, none will.
FIRST_RECORDS_S = 10.0
# Number of nodes that are dialled: enough to tell a network failure from a failed node.
DIALLED = 8


@dataclass(frozen=True)
class SwarmReport:
    """Result of `examine_swarm`."""

    findings: tuple[Finding, ...]
    answering: tuple[str, ...] = ()
    """Addresses of the nodes that answered a ping."""
    online: tuple[NodeRecord, ...] = ()
    """Records of the nodes that the registry lists as online."""


async def examine_swarm(
    opener: Callable[[], Awaitable[Registry]], transport: Transport, first_s: float = FIRST_RECORDS_S
) -> SwarmReport:
    """Open a registry, ping some of the nodes it lists, and close it again.

    `first_s` is the number of seconds to wait for the first record.
    """
    try:
        registry = await opener()
    except SwarmError as error:
        return SwarmReport((Finding.of_error("registry", error),))
    try:
        records = [sealed.record for sealed in await _first_records(registry, first_s)]
        online = [record for record in records if record.state is NodeState.ONLINE]
        finding = Finding.ok("registry", f"reachable, {len(records)} nodes known, {len(online)} online")
        if not records and any(reason in registry.rejected for reason in MEANINGS):
            finding = Finding.of_error("registry", explain_no_nodes(registry.report()))
        elif not records:
            next_step = (
                "check the name of the swarm and that a node of this model runs; "
                "this is normal for the first node of a swarm"
            )
            finding = Finding.warn("registry", "reachable, but it lists no node", next_step)
        node_findings, answering = await _check_nodes(online, transport)
        findings = (finding, *node_findings, check_clock(await _clock_samples(registry)))
        return SwarmReport(findings, answering, tuple(online))
    finally:
        await registry.close()


def peers_opener(spec: str, model: str | None, transport: Transport) -> Callable[[], Awaitable[Registry]]:
    """Return an opener for `examine_swarm` that asks the nodes at `H:P,H:P` or `static:H:P`.

    Raises BadRequest where `spec` is malformed.
    """
    peers = peers_registry(spec, transport, model)

    async def open_peers() -> Registry:
        try:
            await peers.start()
        except SwarmError:
            if not peers.rejected:
                raise
            # A node answered, but its records were rejected: the findings say why.
        return peers

    return open_peers


async def _clock_samples(registry: Registry) -> Sequence[ClockSample]:
    """Return what the registry knows of clocks; the peers of a DHT are asked, since it hides records of wrong dates."""
    asked: Sequence[ClockSample] = await registry.ask_clocks() if isinstance(registry, AsksClocks) else ()
    return asked or registry.report().samples


async def _first_records(registry: Registry, first_s: float) -> Snapshot:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0 if registry.rejected else first_s):
            async for snapshot in registry.watch():
                if snapshot:
                    return snapshot
    return await registry.snapshot()


async def _check_nodes(online: list[NodeRecord], transport: Transport) -> tuple[list[Finding], tuple[str, ...]]:
    dialled = random.sample(online, min(DIALLED, len(online)))
    if not dialled:
        return [], ()
    times_s = await asyncio.gather(*(_try_round_trip(transport, record.dial) for record in dialled))
    answers = {record.dial: s for record, s in zip(dialled, times_s, strict=True) if s is not None}
    silent = ", ".join(record.address for record in dialled if record.dial not in answers)
    next_step = (
        "if other machines reach them, check this machine's firewall and internet connection: "
        "`swarm status` lists every node"
    )
    if not answers:
        return [Finding.fail("nodes", f"none of {len(dialled)} nodes answers: {silent}", next_step)], ()
    message = f"{len(answers)} of {len(dialled)} nodes answer, the nearest in {1000 * min(answers.values()):.0f} ms"
    if silent:
        return [Finding.warn("nodes", f"{message}; no answer from {silent}", next_step)], tuple(answers)
    return [Finding.ok("nodes", message)], tuple(answers)


async def _try_round_trip(transport: Transport, address: str) -> float | None:
    """Return the round trip in seconds, or None if the node does not answer."""
    try:
        return await round_trip(transport, address)
    except (SwarmError, TimeoutError):
        return None
