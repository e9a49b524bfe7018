"""Probe a swarm: which nodes a registry announces, which of them answer this client, and how fast."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from treeswarm.errors import SwarmError
from treeswarm.protocol.records import NodeRecord
from treeswarm.registry.peers import PeersRegistry
from treeswarm.registry.seam import Registry
from treeswarm.transport.ping import ANSWER_S, round_trip
from treeswarm.transport.seam import Transport
from treeswarm_client.discovery.overview import ModelFilter, Overview, Probe, make_overview

# So many handshakes at once fit into a home's uplink, and into one event loop without waiting for each other.
AT_ONCE = 32
# The first finds buffers cold, and any of them may wait for another node's handshake on this side.
PINGS = 3
# Seconds for all nodes together; those not pinged by then are shown without a latency.
TOGETHER_S = 20.0
# A latency does not change faster, and thousands of watchers must not keep a node busy with answering.
PROBE_AGAIN_S = 10.0


@dataclass(eq=False)
class Prober:
    """Probes one swarm repeatedly, and remembers answers for 10 s."""

    registry: Registry
    transport: Transport
    model_filter: ModelFilter | None = None
    """The one model to show, or None for all."""
    _probes: dict[str, tuple[str, float, Probe]] = field(default_factory=dict)
    """Address pinged, time and result of the last ping, by node id."""

    async def fresh_overview(self) -> Overview:
        """Ping the nodes that are due, and return the overview.  May take up to 20 s."""
        await self.probe_due()
        return await self.current_overview()

    async def current_overview(self) -> Overview:
        """Return the overview by the registry and the latest answers, without pinging."""
        peers = self.registry if isinstance(self.registry, PeersRegistry) else None
        addresses = await self._addresses()
        return make_overview(
            [sealed.record for sealed in await self.registry.snapshot()],
            {node: probe for node, (address, _, probe) in self._probes.items() if addresses.get(node) == address},
            model_filter=self.model_filter,
            refused=self.registry.rejected,
            silent={address: str(error) for address, error in peers.unanswered.items()} if peers else {},
        )

    async def probe_due(self) -> bool:
        """Ping nodes whose last answer is 10 s old or came from another address; return whether there were any."""
        now = asyncio.get_running_loop().time()
        addresses = await self._addresses()
        self._probes = {node: entry for node, entry in self._probes.items() if addresses.get(node) == entry[0]}
        fresh = {node for node, (_, probed_at, _) in self._probes.items() if now < probed_at + PROBE_AGAIN_S}
        due = {node: address for node, address in addresses.items() if node not in fresh}
        for node, probe in (await probe_all(self.transport, due)).items():
            self._probes[node] = (due[node], now, probe)
        return bool(due)

    async def _addresses(self) -> dict[str, str]:
        """Return the addresses of the nodes to show, by node id."""
        dials = self.registry.dial_addresses if isinstance(self.registry, PeersRegistry) else {}
        records = [sealed.record for sealed in await self.registry.snapshot()]
        return {r.node: dials.get(r.node) or r.dial for r in records if self._is_shown(r)}

    def _is_shown(self, record: NodeRecord) -> bool:
        shown = self.model_filter
        return shown is None or (record.model, record.blocks) == (shown.digest, shown.blocks)


async def swarm_overview(registry: Registry, transport: Transport, model_filter: ModelFilter | None = None) -> Overview:
    """Return the nodes, what they serve, the blocks without nodes, and the latency of each node."""
    return await Prober(registry, transport, model_filter).fresh_overview()


async def probe_all(transport: Transport, addresses: Mapping[str, str]) -> dict[str, Probe]:
    """Ping nodes, up to 32 at once, and return the results by node id.

    `addresses` maps node ids to addresses.  Nodes that could not be pinged within 20 s are left out.
    """
    turns = asyncio.Semaphore(AT_ONCE)

    async def take_turn(address: str) -> Probe:
        async with turns:
            return await probe(transport, address)

    tasks = {node: asyncio.create_task(take_turn(address)) for node, address in addresses.items()}
    try:
        if tasks:
            await asyncio.wait(tasks.values(), timeout=TOGETHER_S)
        return {node: task.result() for node, task in tasks.items() if task.done()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def probe(transport: Transport, address: str) -> Probe:
    """Ping one node.  A failure is a result, not an exception."""
    try:
        return Probe(await round_trip(transport, address, PINGS))
    except TimeoutError:
        return Probe(None, f"no answer within {ANSWER_S:.0f} s")
    except SwarmError as error:
        return Probe(None, str(error))
