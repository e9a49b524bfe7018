"""Looking at a swarm: who announces itself in a registry, and who answers this client, how fast."""

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

# So many handshakes fit beside each other into a home's uplink, and into one event loop without waiting for each other.
AT_ONCE = 32
# The first finds buffers cold, and any of them may wait for another node's handshake on this side.
PINGS = 3
# For all nodes together; those not asked by then are shown without a latency.
TOGETHER_S = 20.0
# A latency does not change faster, and thousands of watchers must not keep a node busy answering.
PROBE_AGAIN_S = 10.0


@dataclass(eq=False)
class Prober:
    """Looks at one swarm again and again, and remembers for a while who answered."""

    registry: Registry
    transport: Transport
    wanted: ModelFilter | None = None
    _probes: dict[str, tuple[str, float, Probe]] = field(default_factory=dict)
    """By node: the address asked, when, and how it answered."""

    async def fresh_overview(self) -> Overview:
        """As things stand now, whatever time that takes."""
        await self.probe_due()
        return await self.current_overview()

    async def current_overview(self) -> Overview:
        """As the registry and the latest answers have it, at once."""
        peers = self.registry if isinstance(self.registry, PeersRegistry) else None
        addresses = await self._addresses()
        return make_overview(
            [sealed.record for sealed in await self.registry.snapshot()],
            {node: probe for node, (asked, _, probe) in self._probes.items() if addresses.get(node) == asked},
            wanted=self.wanted,
            refused=self.registry.rejected,
            silent={address: str(error) for address, error in peers.unanswered.items()} if peers else {},
        )

    async def probe_due(self) -> bool:
        """Ping those whose answer is old or was given at another address; whether there were any."""
        now = asyncio.get_running_loop().time()
        addresses = await self._addresses()
        self._probes = {node: known for node, known in self._probes.items() if addresses.get(node) == known[0]}
        fresh = {node for node, (_, asked_at, _) in self._probes.items() if now < asked_at + PROBE_AGAIN_S}
        due = {node: address for node, address in addresses.items() if node not in fresh}
        for node, probe in (await probe_all(self.transport, due)).items():
            self._probes[node] = (due[node], now, probe)
        return bool(due)

    async def _addresses(self) -> dict[str, str]:
        """Where to ask the nodes that are of interest."""
        dials = self.registry.dial_addresses if isinstance(self.registry, PeersRegistry) else {}
        records = [sealed.record for sealed in await self.registry.snapshot()]
        return {r.node: dials.get(r.node) or r.dial for r in records if self._is_wanted(r)}

    def _is_wanted(self, record: NodeRecord) -> bool:
        return self.wanted is None or (record.model, record.blocks) == (self.wanted.digest, self.wanted.blocks)


async def swarm_overview(registry: Registry, transport: Transport, wanted: ModelFilter | None = None) -> Overview:
    """Who is out there, what they serve, which blocks nobody serves, and how far everyone is from here."""
    return await Prober(registry, transport, wanted).fresh_overview()


async def probe_all(transport: Transport, addresses: Mapping[str, str]) -> dict[str, Probe]:
    """Ping nodes, some at once; both mappings go by node.  Those that time was too short for are left out."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def take_turn(address: str) -> Probe:
        async with turns:
            return await probe(transport, address)

    asked = {node: asyncio.create_task(take_turn(address)) for node, address in addresses.items()}
    try:
        if asked:
            await asyncio.wait(asked.values(), timeout=TOGETHER_S)
        return {node: task.result() for node, task in asked.items() if task.done()}
    finally:
        for task in asked.values():
            task.cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)


async def probe(transport: Transport, address: str) -> Probe:
    """Ping one node; never raises."""
    try:
        return Probe(await round_trip(transport, address, PINGS))
    except TimeoutError:
        return Probe(None, f"no answer within {ANSWER_S:.0f} s")
    except SwarmError as error:
        return Probe(None, str(error))
