"""`swarm bench driver`: the generation loop at a user far from the nodes, and on the head; on the virtual clock.

The product's own client, driver, drafters, planner and nodes run, each as if on a machine of its own.  The user's line
is charged where it sends, for both ways: a traversal that begins and ends there takes twice its length.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from treeswarm.model_files import HubOptions, read_shape, resolve_model
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_bench.benchmarks.wan.virtual import HOP_S, VirtualNetwork, VirtualNode, virtual_drafter
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually_in_thread
from treeswarm_client.client import SwarmClient
from treeswarm_client.driving.driver import TextDriver, find_kind
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.local_swarm import even_cuts
from treeswarm_node.config import DrivingConfig
from treeswarm_node.driving import ShortWay
from treeswarm_node.engine.loaded_stage import ModelInfo

PLACES = ((100.0, 10.0), (100.0, 25.0), (50.0, 10.0), (25.0, 25.0))
"""Milliseconds from the user to every node, and between two nodes, one way."""
SIZES: tuple[TreeSize, ...] = (0, 16, "auto")
# A coordinate settles within some twenty visits.
SURVEYS = 12


@dataclass(eq=False)
class DriverFigures:
    """What one way to drive took, over all texts of one tree size."""

    tokens: int = 0
    seconds: float = 0.0
    texts: list[list[int]] = field(default_factory=list)
    drivers: list[str] = field(default_factory=list)
    """Node that drove each text, or the client itself, and the reason."""

    def add(self, run: Run) -> None:
        """Count a run that has ended."""
        assert run.stats is not None
        self.tokens += run.stats.committed
        self.seconds += run.stats.seconds
        self.texts.append(run.token_ids)
        self.drivers.append(f"{'driver' if run.drivers else 'self'}: {run.drive_why}")


async def bench_driver(
    setup: BenchSetup, *, places: Sequence[tuple[float, float]] = PLACES, sizes: Sequence[TreeSize] = SIZES
) -> dict[str, Any]:
    """Measure tokens per second with the loop at the user, on the head, and where `auto` puts it."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = []
    for far_ms, near_ms in places:
        cell = _bench_place(setup, far_ms, near_ms, sizes)
        rows += await run_virtually_in_thread(cell, work_s=None)
    mismatches = sum(not row["same_text"] for row in rows)
    minutes = (time.perf_counter() - start) / 60
    return {"bench": "driver", "hop_s": HOP_S, "rows": rows, "mismatches": mismatches, "real_minutes": minutes}


async def _bench_place(
    setup: BenchSetup, far_ms: float, near_ms: float, sizes: Sequence[TreeSize]
) -> list[dict[str, Any]]:
    async with far_user(setup, far_ms / 1e3, near_ms / 1e3) as clients:
        prompts = held_out_prompts(clients["self"], setup.prompts)
        rows = []
        for size in sizes:
            figures = {name: DriverFigures() for name in clients}
            for prompt in prompts:
                for name, client in clients.items():  # in turns, so that drafters learn alike
                    options: dict[str, Any] = {"tree_size": size, "ignore_eos": True, "temperature": 0.8, "seed": 1}
                    figures[name].add(await client.generate(prompt, max_new_tokens=setup.tokens, **options))
            rate = {name: round(f.tokens / f.seconds, 2) for name, f in figures.items()}
            same = all(f.texts == figures["self"].texts for f in figures.values())
            chosen = figures["auto"].drivers[-1]
            place = {"far_ms": far_ms, "near_ms": near_ms, "tree_size": size}
            rows.append(place | {"tokens_per_s": rate, "same_text": same, "auto_drove": chosen})
        return rows


@contextlib.asynccontextmanager
async def far_user(setup: BenchSetup, far_s: float, near_s: float) -> AsyncIterator[dict[str, SwarmClient]]:
    """Run nodes `near_s` from one another, of which the head drives, and clients `far_s` from all of them.

    Yields the clients by where their loop runs: `self`, `driver`, `auto`.  A virtual clock must be running.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    network = VirtualNetwork(MemoryNetwork(), LinkShape(near_s + HOP_S), loop, 1.0)
    model = ModelInfo.find(setup.model)
    registry = MemoryRegistry(model.config_digest)
    async with contextlib.AsyncExitStack() as stack:
        spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
        driving = [DrivingConfig(offered=not i, draft=setup.draft) for i in range(len(spans))]
        nodes = [
            await stack.enter_async_context(network.node(setup, span, registry=registry, driving=drives))
            for span, drives in zip(spans, driving, strict=True)
        ]
        driver = _make_driver(setup, network, nodes[0])
        stack.push_async_callback(driver.close)
        await _survey(nodes)
        line = LinkShape(2 * far_s - near_s + HOP_S)
        clients = {}
        for name, drive in (("self", "self"), ("driver", nodes[0].address), ("auto", "auto")):
            transport = EmulatedTransport(network.network.transport(), line)
            stack.push_async_callback(transport.close)
            drafter = virtual_drafter(setup, loop.clock) if name == "self" else None
            client = SwarmClient(
                model=setup.model,
                registry=nodes[0].address,
                draft=setup.draft if name == "auto" else "ngram",
                drafter=drafter,
                drive=drive,
                transport=transport,
                prefix_scope="none",
                clock=loop.clock,
            )
            clients[name] = await stack.enter_async_context(client)
        yield clients


def _make_driver(setup: BenchSetup, network: VirtualNetwork, node: VirtualNode) -> TextDriver:
    clock = network.loop.clock
    direct = EmulatedTransport(network.network.transport(), LinkShape(HOP_S))
    client = partial(
        SwarmClient,
        model=setup.model,
        registry=node.address,
        drafter=virtual_drafter(setup, clock),
        drive="self",
        transport=ShortWay(node.server.transport, direct, lambda: node.address, node.address),
        clock=clock,
    )
    folder = resolve_model(setup.model)
    kind = find_kind(setup.draft, folder, setup.model, HubOptions())
    node.server.driver = driver = TextDriver(client, kind=kind)
    return driver


async def _survey(nodes: Sequence[VirtualNode]) -> None:
    """Let the nodes measure their distances, and announce what they found."""
    for _ in range(SURVEYS):
        for node in nodes:
            await node.lifecycle.record.survey.ping_some(await node.lifecycle.neighbours())
            await node.lifecycle.membership.announce()
