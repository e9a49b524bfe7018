"""`swarm bench wan` as if client and nodes had a machine each.

Run `python -m treeswarm_bench.benchmarks.virtual_wan`; it prints the same JSON object.

The product's own client, drafters, planner, sessions and nodes, with the real models, in one process on a virtual
clock.  Whatever a device thread or a drafter computes takes the processor time that it really took, side by side with
all others; messages take their links' delay and rate, and what a hop was measured to cost besides.  So the figures are
those of machines of their own, whatever else this one does meanwhile.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treeswarm.keys import Identity
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.spans import Span
from treeswarm.registry import open_registry
from treeswarm.registry.book import BookRegistry
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks import wan_matrix as internet
from treeswarm_bench.benchmarks.common import Bench, BenchSetup
from treeswarm_bench.benchmarks.star_baseline import star_over
from treeswarm_bench.benchmarks.strategies import Around
from treeswarm_bench.benchmarks.wan_cells import SLOW_SHARE, Cell
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.model import ModelDrafter
from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.local_swarm import LocalSwarm, even_cuts
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import DeviceConfig, ModelConfig, NetworkConfig, NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.engine.model_runner import Computed, Runner, ThrottledRunner
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.own_record import OwnRecord
from treeswarm_node.reachability.reachability import Basis, PublicAddress
from treeswarm_node.sessions.server import NodeServer

# What a hop takes besides the model and the wire: `swarm bench overhead`, docs/benchmarks.md.
HOP_S = 0.0019
KV_TOKENS = 16_384


@dataclass(frozen=True, eq=False)
class Polled(Around):
    """Looks at the clock whenever it asks whether it has drafted enough."""

    clock: Callable[[], float]

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        def asked(promise: float) -> bool:
            self.clock()
            return should_stop(promise)

        return self.inner.propose(size, depth, asked)


@dataclass(frozen=True)
class Swift:
    """A device so many times as fast as this machine's."""

    runner: Runner
    times: float
    loop: VirtualClockLoop

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = time.thread_time()
        done = self.runner.run(segments)
        self.loop.forgive((time.thread_time() - start) * (1.0 - 1.0 / self.times))
        return done


@dataclass(frozen=True)
class World:
    """One cell's network, and how many times as fast as this machine its nodes are."""

    network: MemoryNetwork
    shape: LinkShape
    loop: VirtualClockLoop
    swift: float

    @classmethod
    def of(cls, cell: Cell, swift: float) -> "World":
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        link = LinkShape.parse(cell.link)
        return cls(MemoryNetwork(), replace(link, delay_s=link.delay_s + HOP_S), loop, swift)

    def line(self) -> EmulatedTransport:
        """Somebody's own."""
        return EmulatedTransport(self.network.transport(), self.shape)

    @contextlib.asynccontextmanager
    async def node(self, setup: BenchSetup, span: Span, share: float) -> AsyncIterator[str]:
        """One that serves; its address."""
        config = NodeConfig(
            ModelConfig(setup.model, span=span, dtype=setup.dtype),
            DeviceConfig(kv_tokens=KV_TOKENS, threads=1),
            NetworkConfig(listen="127.0.0.1:0", registry="none"),
        )
        async with contextlib.AsyncExitStack() as stack:
            line, identity = self.line(), Identity.ephemeral()
            stack.push_async_callback(line.close)
            node = NodeServer(line, config.limits)
            listener = await line.listen(config.network.listen, node.accept)
            stack.push_async_callback(listener.close)
            model = ModelInfo.find(setup.model)
            registry = await open_registry("none", model.config_digest, identity.node_id)
            assert isinstance(registry, BookRegistry)
            public = PublicAddress(listener.address, Basis.ASSUMED, False)
            record = OwnRecord(config, identity, model, node, DistanceSurvey(line), public)
            node.membership = Membership(identity, record.make, registry, registry)
            life = Lifecycle(record, node.membership)
            stack.push_async_callback(life.leave)
            stage = await life.join()
            stage.engine.clock = self.loop.clock
            if self.swift > 1.0:
                stage.engine.runner = Swift(stage.engine.runner, self.swift, self.loop)
            if share < 1.0:
                stage.engine.runner = ThrottledRunner(stage.engine.runner, share, self.loop.clock, self.loop.rest)
            for work in (node.sweep(), life.membership.run()):
                stack.push_async_callback(_end, asyncio.create_task(work))
            yield listener.address


@contextlib.asynccontextmanager
async def machines(swift: float, setup: BenchSetup, cell: Cell, plan: internet.Plan) -> AsyncIterator[internet.Field]:
    """A cell's swarm, everybody on a machine of their own."""
    world, model = World.of(cell, swift), resolve_model(setup.model)
    drafter = load_drafter(setup.draft, model)
    shares = dict.fromkeys(cell.slow, SLOW_SHARE)
    async with contextlib.AsyncExitStack() as stack:
        peers = ",".join(
            [
                await stack.enter_async_context(world.node(setup, span, shares.get(i, 1.0)))
                for i, span in enumerate(even_cuts(read_shape(model).blocks, setup.nodes))
            ]
        )
        told: dict[str, Any] = {"model": setup.model, "peers": peers, "prefix_scope": "none", "clock": world.loop.clock}
        line = world.line()
        stack.push_async_callback(line.close)
        ring = await stack.enter_async_context(BenchClient(transport=line, **told))
        star = ring
        if any(s.star for s in plan.strategies):
            way = await stack.enter_async_context(star_over(world.line()))
            star = await stack.enter_async_context(BenchClient(transport=way, **told))
        field = internet.Field.of(Bench(setup, LocalSwarm(), ring, cell.link), cell, plan, star, drafter)
        for contestant in field.contestants.values():
            for model_drafter in models_in(contestant.drafter):
                model_drafter.clock = world.loop.clock
            contestant.drafter = Polled(contestant.drafter, world.loop.clock)
        yield field


def models_in(drafter: Any) -> list[ModelDrafter]:
    """The draft models that it asks."""
    if isinstance(drafter, ModelDrafter):
        return [drafter]
    if isinstance(drafter, UnionDrafter):
        return [found for member in drafter.members for found in models_in(member)]
    return models_in(drafter.inner) if isinstance(drafter, Around) else []


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def bench(setup: BenchSetup, plan: internet.Plan, swift: float = 1.0) -> dict[str, Any]:
    """Cells of real delays, in as long as computing takes."""
    return await internet.bench_internet(setup, plan, say=internet.to_stderr, field_of=partial(machines, swift))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cells", "texts", "strategies"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","))
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--swift", type=float, default=1.0, help="nodes so many times as fast as this machine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup = BenchSetup(draft=args.draft, prompts=args.prompts, tokens=args.max_new_tokens)
    plan = internet.Plan.of(args.cells, args.texts, args.temperatures, args.strategies)
    started = time.perf_counter()
    result = run_virtually(bench(setup, plan, args.swift), work_s=None)
    result |= {
        "bench": "machines",
        "hop_s": HOP_S,
        "swift": args.swift,
        "real_minutes": (time.perf_counter() - started) / 60,
    }
    text = json.dumps(result)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
