"""`swarm bench virtual-wan`: `swarm bench wan` as if the client and every node had a machine of their own.

It runs the product's own client, drafters, planner, sessions and nodes, with the real models, in one process on a
virtual clock.  What a device thread or a drafter computes takes the processor time that it really took, in parallel
with all others.  Messages take the delay and the rate of their link, and what a hop was measured to cost besides.  So
the figures are those of separate machines, whatever else this machine does meanwhile.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from treeswarm.keys import Identity
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.spans import Span
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.bench_client import BenchClient
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm
from treeswarm_bench.benchmarks.wan.cells import SLOW_SHARE, Cell
from treeswarm_bench.benchmarks.wan.matrix import CellSwarm, MatrixPlan, bench_matrix, print_to_stderr
from treeswarm_bench.benchmarks.wan.star_baseline import star_over
from treeswarm_bench.benchmarks.wan.strategies import WrappedDrafter
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually_in_thread
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.model import ModelDrafter
from treeswarm_client.drafters.seam import Drafter, DraftTree, ShouldStop, never_stop
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.local_swarm import LocalSwarm, even_cuts
from treeswarm_client.planner.policy import TreePolicy
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import DeviceConfig, DrivingConfig, ModelConfig, NetworkConfig, NodeConfig
from treeswarm_node.engine.loaded_stage import LoadedStage, ModelInfo
from treeswarm_node.engine.model_runner import Computed, Runner, ThrottledRunner
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.own_record import OwnRecord
from treeswarm_node.reachability.reachability import Basis, PublicAddress
from treeswarm_node.sessions.server import NodeServer
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

# What a message takes on each of the four links of three nodes besides the model and the link: 2.87 ms per node outside
# the device, by `swarm bench overhead` (docs/benchmarks.md).
HOP_S = 0.00287 * 3 / 4
KV_TOKENS = 16_384
NO_DRIVER = DrivingConfig()


async def bench_virtual_wan(setup: BenchSetup, plan: MatrixPlan, *, swift: float) -> dict[str, Any]:
    """Measure the cells of `plan`, with nodes `swift` times as fast as this machine.

    It takes as long as computing takes: delays of links pass at once.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    matrix = bench_matrix(setup, plan, report=print_to_stderr, open_swarm=partial(virtual_cell_swarm, swift))
    result = await run_virtually_in_thread(matrix, work_s=None)
    minutes = (time.perf_counter() - start) / 60
    return result | {"bench": "machines", "hop_s": HOP_S, "swift": swift, "real_minutes": minutes}


@dataclass(frozen=True, eq=False)
class ClockReadingDrafter(WrappedDrafter):
    """A drafter that reads the clock, and so lets its time pass, whenever it asks whether it has drafted enough."""

    clock: Callable[[], float]

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        def read_clock_first(promise: float) -> bool:
            self.clock()
            return should_stop(promise)

        return self.inner.propose(size, depth, read_clock_first)


@dataclass(frozen=True, eq=False)
class ChargedPolicy:
    """A policy whose decisions take the processor time that they really take, as the client's own loop would wait.

    The whole network stands still meanwhile, which is a little more than the planner costs where nodes compute.
    """

    inner: TreePolicy
    loop: VirtualClockLoop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **options)
            finally:
                self.loop.now += time.thread_time() - start

        return timed


@dataclass(frozen=True)
class FasterRunner:
    """A model runner whose device is `times` times as fast as this machine."""

    runner: Runner
    times: float
    loop: VirtualClockLoop

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = time.thread_time()
        computed = self.runner.run(segments)
        self.loop.discount((time.thread_time() - start) * (1.0 - 1.0 / self.times))
        return computed


@dataclass(frozen=True)
class FlatRunner:
    """A model runner whose forwards take the same time, however many rows they have: the shape of a GPU's."""

    runner: Runner
    forward_s: float
    loop: VirtualClockLoop

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        start = time.thread_time()
        computed = self.runner.run(segments)
        self.loop.discount(time.thread_time() - start)
        self.loop.sleep_in_work(self.forward_s)
        return computed


class FlatSpeculator:
    """A speculator whose forwards take the same time each; all else is the inner one's."""

    def __init__(self, inner: Speculator, forward_s: float, loop: VirtualClockLoop) -> None:
        self._inner, self._forward_s, self._loop = inner, forward_s, loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        trees = self._inner.propose(request)
        while True:
            start = time.thread_time()
            tree = next(trees, None)
            self._loop.discount(time.thread_time() - start)
            if tree is None:
                return
            self._loop.sleep_in_work(self._forward_s)
            yield tree


@dataclass(frozen=True)
class VirtualNetwork:
    """The network of one cell, and how fast its nodes are."""

    network: MemoryNetwork
    shape: LinkShape
    loop: VirtualClockLoop
    swift: float
    """How many times as fast as this machine the nodes are."""
    flat_s: float = 0.0
    """Seconds that a node's forward takes whatever its rows, or 0 if it takes what it takes on this machine."""

    @classmethod
    def of(cls, cell: Cell, swift: float, flat_s: float = 0.0) -> "VirtualNetwork":
        """Return a network with the cell's links; the virtual clock's loop must be running."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        link = LinkShape.parse(cell.link)
        return cls(MemoryNetwork(), replace(link, delay_s=link.delay_s + HOP_S), loop, swift, flat_s)

    def transport(self) -> EmulatedTransport:
        """Return a transport of one program, which no other one shares."""
        return EmulatedTransport(self.network.transport(), self.shape)

    @contextlib.asynccontextmanager
    async def node(
        self,
        setup: BenchSetup,
        span: Span,
        share: float = 1.0,
        *,
        registry: MemoryRegistry | None = None,
        driving: DrivingConfig = NO_DRIVER,
    ) -> AsyncIterator["VirtualNode"]:
        """Run a node that serves `span` and lends a share of its device.

        It announces itself in `registry`, or where no other node looks.  What `driving` says is in its record; the
        driver itself is the caller's to make.
        """
        config = NodeConfig(
            ModelConfig(
                setup.model,
                span=span,
                dtype=setup.dtype,
                quantization="none",
                activations="",
                speculator=setup.speculator,
            ),
            DeviceConfig("cpu", kv_tokens=KV_TOKENS, threads=1),
            NetworkConfig(listen="127.0.0.1:0", registry="none"),
            driving=driving,
        )
        async with contextlib.AsyncExitStack() as stack:
            transport, identity = self.transport(), Identity.ephemeral()
            stack.push_async_callback(transport.close)
            node = NodeServer(transport, config.limits)
            listener = await transport.listen(config.network.listen, node.accept)
            stack.push_async_callback(listener.close)
            model = ModelInfo.find(setup.model)
            registry = registry or MemoryRegistry(model.config_digest)
            public = PublicAddress(listener.address, Basis.ASSUMED, False)
            record = OwnRecord(config, identity, model, node, DistanceSurvey(transport), public)
            membership = Membership(identity, record.make, registry, registry)
            node.membership = membership
            lifecycle = Lifecycle(record, membership)
            stack.push_async_callback(lifecycle.leave)
            stage = await lifecycle.join()
            stage.engine.clock = self.loop.clock
            if self.swift > 1.0:
                stage.engine.runner = FasterRunner(stage.engine.runner, self.swift, self.loop)
            if self.flat_s:
                stage.engine.runner = FlatRunner(stage.engine.runner, self.flat_s, self.loop)
                node.stage = flat_stage(stage, len(span), self.flat_s, self.loop)
            if share < 1.0:
                clock, sleep = self.loop.clock, self.loop.sleep_in_work
                stage.engine.runner = ThrottledRunner(stage.engine.runner, share, clock, sleep)
            for work in (node.sweep(), membership.run()):
                stack.push_async_callback(_end, asyncio.create_task(work))
            yield VirtualNode(listener.address, node, lifecycle)


def flat_stage(stage: LoadedStage, blocks: int, forward_s: float, loop: VirtualClockLoop) -> LoadedStage:
    """Return a stage that says that its forwards take `forward_s` each, and whose speculator's take as one block does.

    Heads have one layer.
    """
    profile = tuple((rows, round(forward_s * 1e6)) for rows, _ in stage.profile)
    if stage.speculator is None:
        return replace(stage, profile=profile)
    flat = cast(Speculator, FlatSpeculator(stage.speculator, forward_s / blocks, loop))
    return replace(stage, profile=profile, speculator=flat)


@dataclass(frozen=True, eq=False)
class VirtualNode:
    """A running node."""

    address: str
    server: NodeServer
    lifecycle: Lifecycle


@contextlib.asynccontextmanager
async def virtual_cell_swarm(swift: float, setup: BenchSetup, cell: Cell, plan: MatrixPlan) -> AsyncIterator[CellSwarm]:
    """Run the swarm of one cell, each program as if on a machine of its own."""
    network, model = VirtualNetwork.of(cell, swift), resolve_model(setup.model)
    drafter = load_drafter(setup.draft, model)
    shares = dict.fromkeys(cell.slow, SLOW_SHARE)
    clock = network.loop.clock
    async with contextlib.AsyncExitStack() as stack:
        spans = even_cuts(read_shape(model).blocks, setup.nodes)
        nodes = [network.node(setup, span, shares.get(i, 1.0)) for i, span in enumerate(spans)]
        peers = ",".join([(await stack.enter_async_context(node)).address for node in nodes])
        options: dict[str, Any] = {"model": setup.model, "peers": peers, "prefix_scope": "none", "clock": clock}
        transport = network.transport()
        stack.push_async_callback(transport.close)
        ring = await stack.enter_async_context(BenchClient(transport=transport, **options))
        star = ring
        if any(strategy.star for strategy in plan.strategies):
            relay = await stack.enter_async_context(star_over(network.transport()))
            star = await stack.enter_async_context(BenchClient(transport=relay, **options))
        swarm = CellSwarm.of(BenchSwarm(setup, LocalSwarm(), ring, cell.link), cell, plan, star, drafter)
        for contestant in swarm.contestants.values():
            for model_drafter in draft_models(contestant.drafter):
                model_drafter.clock = clock
            contestant.drafter = ClockReadingDrafter(contestant.drafter, clock)
            contestant.charged = partial(charged, network.loop)
        yield swarm


def charged(loop: VirtualClockLoop, policy: TreePolicy) -> TreePolicy:
    """Return a policy that decides as `policy` does, and whose own time counts."""
    return cast(TreePolicy, ChargedPolicy(policy, loop))


def virtual_drafter(setup: BenchSetup, clock: Callable[[], float]) -> Drafter:
    """Load the setup's drafter, which reads the virtual clock."""
    drafter = load_drafter(setup.draft, resolve_model(setup.model))
    for model_drafter in draft_models(drafter):
        model_drafter.clock = clock
    return ClockReadingDrafter(drafter, clock)


def draft_models(drafter: Drafter) -> list[ModelDrafter]:
    """Return the draft models that a drafter asks."""
    if isinstance(drafter, ModelDrafter):
        return [drafter]
    if isinstance(drafter, UnionDrafter):
        return [model for member in drafter.members for model in draft_models(member)]
    return draft_models(drafter.inner) if isinstance(drafter, WrappedDrafter) else []


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
