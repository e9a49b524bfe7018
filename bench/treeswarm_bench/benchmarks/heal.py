"""`swarm bench heal`: how soon a client is served again after the only holder of some blocks was killed.

Three real nodes host half of the model each, so one half has a spare.  The only holder of the other half is killed.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm_bench.benchmarks.common import BenchSetup, percentiles
from treeswarm_bench.benchmarks.parts.brokers import MOSQUITTO, BrokerProcess
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm
from treeswarm_client.provenance import machine_provenance

RegistryKind = Literal["dht", "mqtt"]

NODES = 3
TOKENS = 2
# A hole is filled in half a minute and the time to load; the old rule took up to 20 minutes.
PATIENCE_S = 1500.0
KNOWN_S = 60.0
# What a node logs when it serves a span; the bench takes the loading time from it.
LOADED = re.compile(r"loaded blocks (\d+:\d+) in ([\d.]+) s")


@dataclass(frozen=True)
class Healing:
    """One kill and what followed."""

    blocks: str
    """Blocks that lost their only holder."""
    served_s: float
    """Seconds from the kill until a client received a text again."""
    filler: str | None
    """Address of the node that took the blocks over, or None if a client was not served."""
    error: str | None = None


@dataclass(eq=False)
class HealingSwarm:
    """Nodes of which all but one can be spared, and a client of them."""

    swarm: LocalSwarm
    registry: str
    length: int
    """Number of blocks of each node."""
    ended: set[str] = field(default_factory=set)
    """Addresses of killed nodes."""

    @property
    def living(self) -> list[LocalNode]:
        """The nodes that were not killed."""
        return [node for node in self.swarm.nodes if node.address not in self.ended]

    async def fill_up(self) -> None:
        """Start nodes, one after another, until there are NODES."""
        while len(self.living) < NODES:
            joins = self.living and self.registry == "dht:"
            registry = str(self.living[0].ready["join"]) if joins else self.registry
            await self.swarm.start("--num-blocks", str(self.length), "--registry", registry)

    def kill(self, record: NodeRecord) -> float:
        """Kill the node with this record, and return the time."""
        node = next(node for node in self.living if node.address == record.address)
        self.ended.add(node.address)
        os.kill(node.process.pid, signal.SIGKILL)
        return time.perf_counter()


async def bench_heal(setup: BenchSetup, *, kills: int, registry_kind: RegistryKind, seed: int) -> dict[str, Any]:
    """Kill the only holder of half of the model `kills` times.  Raises BadRequest without a broker for `mqtt`."""
    blocks = read_shape(resolve_model(setup.model)).blocks
    choice, healings = random.Random(seed), list[Healing]()
    async with contextlib.AsyncExitStack() as stack:
        registry = await stack.enter_async_context(_registry(registry_kind))
        flags = ("--grace", "10", "--verbose")
        swarm = await stack.enter_async_context(local_swarm(setup.model, [], dtype=setup.dtype, flags=flags))
        healing = HealingSwarm(swarm, registry, -(-blocks // 2))
        await healing.fill_up()
        peers = ",".join(node.pinned for node in healing.living)
        connecting = SwarmClient(setup.model, registry=peers, draft="none", tree_size=0, patience=PATIENCE_S)
        client = await stack.enter_async_context(connecting)
        for number in range(kills):
            await healing.fill_up()
            victim = choice.choice(await _only_holders(client, healing))
            healings.append(await _kill_and_ask(client, healing, victim))
            print(f"{number + 1} of {kills}: {healings[-1]}", file=sys.stderr, flush=True)
    # The nodes have ended, and with them their logs.
    logs = {node.address: (await node.errors).decode(errors="replace") for node in swarm.nodes}
    return _summary(healings, logs, setup, registry_kind, seed)


async def _kill_and_ask(client: SwarmClient, healing: HealingSwarm, victim: NodeRecord) -> Healing:
    killed_at = healing.kill(victim)
    try:
        await client.generate("def main():", max_new_tokens=TOKENS, ignore_eos=True)
    except SwarmError as error:
        return Healing(str(victim.span), time.perf_counter() - killed_at, None, f"{type(error).__name__}: {error}")
    served_s = time.perf_counter() - killed_at
    holders = [record for record in _online(client, healing) if record.span == victim.span]
    return Healing(str(victim.span), served_s, holders[0].address if holders else None)


async def _only_holders(client: SwarmClient, healing: HealingSwarm) -> list[NodeRecord]:
    """Return the nodes whose blocks no other node has, once all nodes are online and one of them can be spared.

    Raises TimeoutError after KNOWN_S seconds.
    """
    async with asyncio.timeout(KNOWN_S):
        while True:
            online = _online(client, healing)
            alone = [node for node in online if sum(other.span == node.span for other in online) == 1]
            if len(online) == NODES and len(alone) < NODES:
                return alone
            await client.view.wait_for_change(0.5)


def _online(client: SwarmClient, healing: HealingSwarm) -> list[NodeRecord]:
    """Return the records of living nodes that serve."""
    living = {node.address for node in healing.living}
    records = [sealed.record for sealed in client.view.snapshot]
    return [record for record in records if record.address in living and record.state is NodeState.ONLINE]


@contextlib.asynccontextmanager
async def _registry(kind: RegistryKind) -> AsyncIterator[str]:
    """Yield what the first node gives as `--registry`."""
    if kind == "dht":
        yield "dht:"
        return
    if MOSQUITTO is None:
        raise BadRequest("heal --registry-kind mqtt needs the broker mosquitto: install it, or give dht")
    broker = BrokerProcess("mosquitto")
    with tempfile.TemporaryDirectory(prefix="treeswarm-broker-") as folder:
        await broker.begin(Path(folder))
        try:
            yield str(broker.broker)
        finally:
            await broker.kill()


def _summary(
    healings: Sequence[Healing], logs: dict[str, str], setup: BenchSetup, kind: RegistryKind, seed: int
) -> dict[str, Any]:
    loads = {address: [float(s) for _, s in LOADED.findall(text)][1:] for address, text in logs.items()}
    healed = [healing for healing in healings if healing.filler is not None]
    # A node's first load is its join; each later one filled a hole, in this order.
    load_s = [loads[str(healing.filler)].pop(0) if loads.get(str(healing.filler)) else 0.0 for healing in healed]
    beyond = [healing.served_s - load for healing, load in zip(healed, load_s, strict=True)]
    return {
        "bench": "heal",
        "registry": kind,
        "seed": seed,
        "kills": len(healings),
        "healed": len(healed),
        "served_s": _distribution([healing.served_s for healing in healed]),
        "load_s": _distribution(load_s),
        "beyond_load_s": _distribution(beyond),
        "each": [
            {"blocks": healing.blocks, "served_s": round(healing.served_s, 2), "load_s": round(load, 2)}
            for healing, load in zip(healed, load_s, strict=True)
        ],
        "errors": [healing.error for healing in healings if healing.error],
        "well": len(healed) == len(healings),
        "provenance": machine_provenance() | {"model": setup.model, "dtype": setup.dtype},
    }


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    return percentiles(seconds) | ({"max": max(seconds)} if seconds else {})
