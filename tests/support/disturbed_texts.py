"""Texts of a real model in one process on a virtual clock, while nodes of the chain or the driver die."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treeswarm.model_files import resolve_model
from treeswarm.protocol.spans import Span
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.wan.virtual import HOP_S, VirtualNetwork, VirtualNode
from treeswarm_bench.virtual_clock import VirtualClockLoop, run_virtually_in_thread
from treeswarm_client.client import SwarmClient
from treeswarm_client.drafters import load_drafter
from treeswarm_client.driving.driver import TextDriver
from treeswarm_client.generation.run import Run
from treeswarm_node.config import DrivingConfig
from treeswarm_node.driving import ShortWay
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

HEAD, MIDDLE, TAIL = Span(0, 3), Span(3, 5), Span(5, 8)
LINK_S, USER_S = 0.005, 0.02
TREE = 12
# A chance at which walks follow some proposals to their end and leave others at once.
LUCK = 0.6


@dataclass(frozen=True)
class Disturbance:
    """What happens while one text is written."""

    victim: str
    """`none`, `tail`, `middle` or `driver`."""
    temperature: float

    @property
    def span(self) -> Span:
        """Blocks of the node that dies: the driver hosts the head's."""
        return {"tail": TAIL, "middle": MIDDLE, "driver": HEAD}[self.victim]


@dataclass(frozen=True)
class WrittenText:
    """What became of one text."""

    token_ids: list[int]
    traversals: int
    recoveries: int
    """Number of repairs of the chain, and of losses of a driver."""
    proposals: int
    """Number of trees that the tails proposed meanwhile."""


@dataclass(eq=False)
class LuckySpeculator:
    """A speculator that names the next tokens of a known text in some cases, and otherwise what a head guesses."""

    inner: Speculator
    texts: Sequence[Sequence[int]]
    """Prompts with their texts."""
    proposed: int = 0
    """Number of proposals so far."""

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(1)
        for name in ("name", "agreement", "taps", "window", "new_memory"):
            setattr(self, name, getattr(self.inner, name))

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        *_, tree = self.inner.propose(request)
        self.proposed += 1
        known = [text[request.root_position + 1 :][:4] for text in self.texts if self._is_at(text, request)]
        if known and known[0] and self._random.random() < LUCK:
            count = len(known[0])
            scores = -0.1 * np.arange(count, dtype=np.float32)
            tree = SpeculatedTree(np.arange(-1, count - 1), np.array(known[0], np.int64), scores)
        yield tree

    def _is_at(self, text: Sequence[int], request: SpeculationRequest) -> bool:
        end = request.root_position + 1
        return list(text[end - len(request.next_tokens) : end]) == request.next_tokens.tolist()


@dataclass(eq=False)
class DisturbedSwarm:
    """A chain of three nodes, each of which is replaced by a new one after it has died."""

    setup: BenchSetup
    draft: str
    texts: Sequence[Sequence[int]]
    network: VirtualNetwork
    registry: MemoryRegistry
    nodes: dict[Span, VirtualNode] = field(default_factory=dict)
    speculators: list[LuckySpeculator] = field(default_factory=list)
    """Those of all tails so far."""
    _stops: dict[Span, contextlib.AsyncExitStack] = field(default_factory=dict)

    async def start(self, span: Span) -> None:
        """Start the node of a span; the head's also drives."""
        stop, drives = contextlib.AsyncExitStack(), span == HEAD
        driving = DrivingConfig(offered=drives)
        node = await stop.enter_async_context(
            self.network.node(self.setup, span, registry=self.registry, driving=driving)
        )
        stage = node.server.ready_stage()
        if stage.speculator is not None:
            self.speculators.append(LuckySpeculator(stage.speculator, self.texts))
            object.__setattr__(stage, "speculator", self.speculators[-1])
        if drives:
            node.server.driver = driver = self._driver(node)
            stop.push_async_callback(driver.close)
        await node.lifecycle.membership.announce()
        self.nodes[span], self._stops[span] = node, stop

    async def replace(self, span: Span) -> contextlib.AsyncExitStack:
        """Cut a node off as if its machine lost power, and start another one; return what ends the first."""
        stop = self._stops[span]
        self.network.network.disconnect_host(self.nodes[span].address)
        await self.start(span)
        return stop

    async def stop(self) -> None:
        """Stop all nodes."""
        for stop in self._stops.values():
            await stop.aclose()

    def _driver(self, node: VirtualNode) -> TextDriver:
        direct = EmulatedTransport(self.network.network.transport(), LinkShape(HOP_S))
        client = partial(
            SwarmClient,
            model=self.setup.model,
            registry=node.address,
            drafter=load_drafter(self.draft, resolve_model(self.setup.model)),
            drive="self",
            transport=ShortWay(node.server.transport, direct, lambda: node.address, node.address),
            clock=self.network.loop.clock,
        )
        return TextDriver(client)

    async def write(self, prompt: Sequence[int], count: int, how: Disturbance, *, by_node: bool) -> WrittenText:
        """Write one text, through the driver or by the client's own loop, and disturb it after a third."""
        before, stops = sum(each.proposed for each in self.speculators), contextlib.AsyncExitStack()
        transport = EmulatedTransport(self.network.network.transport(), LinkShape(USER_S + HOP_S))
        client = SwarmClient(
            model=self.setup.model,
            # A client asks every node that it knows, so the one named may die.
            registry=self.nodes[MIDDLE].address,
            drafter=load_drafter("ngram" if by_node else self.draft, resolve_model(self.setup.model)),
            drive=self.nodes[HEAD].address if by_node else "self",
            transport=transport,
            prefix_scope="none",
            clock=self.network.loop.clock,
            patience=60.0,
        )
        async with stops, client:
            run = client.stream(
                prompt, max_new_tokens=count, tree_size=TREE, temperature=how.temperature, seed=3, ignore_eos=True
            )
            await _write_to_the_end(run, count // 3, how, self, stops)
        await transport.close()
        assert run.stats is not None
        proposed = sum(each.proposed for each in self.speculators) - before
        return WrittenText(run.token_ids, run.stats.traversals, len(run.recorder.recoveries), proposed)


async def _write_to_the_end(
    run: Run, disturbed_at: int, how: Disturbance, swarm: DisturbedSwarm, stops: contextlib.AsyncExitStack
) -> None:
    is_disturbed = how.victim == "none"
    async for _ in run:
        if not is_disturbed and len(run.token_ids) >= disturbed_at:
            is_disturbed = True
            ended = await swarm.replace(how.span)
            stops.push_async_callback(ended.aclose)  # its record stays until the text has ended


@contextlib.asynccontextmanager
async def _disturbed_swarm(
    setup: BenchSetup, draft: str, texts: Sequence[Sequence[int]]
) -> AsyncIterator[DisturbedSwarm]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    network = VirtualNetwork(MemoryNetwork(), LinkShape(LINK_S + HOP_S), loop, 1.0)
    registry = MemoryRegistry(ModelInfo.find(setup.model).config_digest)
    swarm = DisturbedSwarm(setup, draft, texts, network, registry)
    try:
        for span in (HEAD, MIDDLE, TAIL):
            await swarm.start(span)
        yield swarm
    finally:
        await swarm.stop()


def write_texts(
    draft: str,
    prompt: Sequence[int],
    known: Mapping[float, Sequence[int]],
    hows: Sequence[Disturbance],
    *,
    by_node: bool,
    head: Path,
) -> list[WrittenText]:
    """Write the text of a prompt by the demo model several times in one swarm, each time disturbed in another way.

    `known` are the texts by temperature; lucky speculators, which begin with the untrained head `head`, know them.
    """
    torch.set_num_threads(1)
    speculator = str(head) if draft.startswith("tail") else "none"
    setup = BenchSetup(model="demo", dtype="float32", speculator=speculator)
    texts = [[*prompt, *text] for text in known.values()]

    async def run() -> list[WrittenText]:
        async with _disturbed_swarm(setup, draft, texts) as swarm:
            count = len(known[0.0])
            return [await swarm.write(prompt, count, how, by_node=by_node) for how in hows]

    written: list[WrittenText] = asyncio.run(run_virtually_in_thread(run(), work_s=None))
    return written


async def plain_text(prompt: Sequence[int], count: int, **sampling: Any) -> list[int]:
    """Return the text of plain decoding on one node with all blocks, undisturbed."""

    async def run() -> list[int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        network, setup = VirtualNetwork(MemoryNetwork(), LinkShape(LINK_S), loop, 1.0), BenchSetup(model="demo")
        async with network.node(setup, Span(0, 8)) as node:
            options: dict[str, Any] = {"peers": node.address, "draft": "none", "transport": network.transport()}
            async with SwarmClient(model="demo", clock=loop.clock, **options) as client:
                written = await client.generate(prompt, max_new_tokens=count, tree_size=0, ignore_eos=True, **sampling)
                return written.token_ids

    return await run_virtually_in_thread(run(), work_s=None)
