"""The scripted chain of `swarm bench disturbed` takes the time that the product's chain and nodes take."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.toy_swarm import NUMERICS, ToyRouter, ToySwarm

from treeswarm.protocol.records import NodeState
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.benchmarks.disturbed.chain import profile
from treeswarm_bench.benchmarks.disturbed.play import SEGMENT_ROWS, FirstTreeSeen, Size, play, policy_of_size
from treeswarm_bench.benchmarks.disturbed.text import VOCAB, ScriptedText, scripted_drafter, scripted_text
from treeswarm_bench.benchmarks.disturbed.world import BYTES_PER_S, MESSAGE_S, NODES, ROW_BYTES, Script, Slowdown, World
from treeswarm_bench.virtual_clock import VirtualClockLoop, no_time, run_virtually
from treeswarm_client.chain.chain import open_chain
from treeswarm_client.chain.options import Reservation
from treeswarm_client.discovery.route import Target
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.sessions.server import NodeServer

BLOCKS = len(NODES)
TOKENS = 64


@dataclass
class ScriptedRunner:
    """Answers as the text says, and takes the time that the world says."""

    name: str
    text: ScriptedText
    world: World

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        rows = sum(segment.step.rows for segment in segments)
        seconds = self.world.work_s(self.name, self.world.forward_base_s(rows)) if rows else 0.0
        self.world.loop.sleep_in_work(seconds)
        return [self._step(segment) for segment in segments]

    def _step(self, segment: Segment) -> Computed:
        """Store in the place of keys whether a row's path is the text's own."""
        step, kv = segment.step, segment.kv
        kv.commit(step)
        right = self.text.tokens[step.positions] == step.tokens
        self._keys(kv)[torch.from_numpy(kv.new_rows(step))] = torch.from_numpy(right).float()
        if segment.span.end < BLOCKS:
            return Computed(hidden=b"\0" * ROW_BYTES * step.rows)
        on_path = right & (True if step.append.prefill else self._sees_only_right(segment))
        tokens = self.text.answers(step.positions, step.tokens.astype(np.int64), on_path)[step.answered]
        return Computed(tokens=tokens, logprobs=np.zeros(len(tokens), np.float32))

    def _sees_only_right(self, segment: Segment) -> NDArray[np.bool_]:
        keys, kv = self._keys(segment.kv), segment.kv
        crowns = [keys[torch.from_numpy(kv.crown_rows(np.flatnonzero(row)))] for row in segment.step.visible]
        return np.array([bool(crown.all()) for crown in crowns], np.bool_)

    def _keys(self, kv: SessionKV) -> torch.Tensor:
        return kv.store.layers[0].keys[0, :, 0]


@contextlib.asynccontextmanager
async def scripted_swarm(text: ScriptedText, world: World) -> AsyncIterator[ToySwarm]:
    """Start three of the product's nodes, each with one block."""
    swarm = ToySwarm(MemoryNetwork(), NodeLimits())
    async with contextlib.AsyncExitStack() as stack:
        for place, name in enumerate(NODES):
            store = KVStore({0: KVShape(1, 1, 1)}, 8192, torch.float32, torch.device("cpu"))
            engine = Engine(ScriptedRunner(name, text, world), swarm.limits.budget, clock=world.loop.clock)
            span = Span(place, place + 1)
            served = ServedSpan(span, BLOCKS, VOCAB, 4, 2048, "scripted", NUMERICS, "scripted", ROW_BYTES)
            transport = emulated(swarm.network, world.script)
            stage = LoadedStage(served, engine, store, 1.0, profile(1.0))
            node = NodeServer(transport, swarm.limits, stage=stage, state=NodeState.ONLINE)
            listener = await transport.listen("192.0.2.1:0", node.accept)  # as on a machine of its own
            for work in (engine.run(), node.sweep()):
                stack.callback(asyncio.create_task(work).cancel)
            stack.push_async_callback(transport.close)
            stack.push_async_callback(listener.close)
            stack.push_async_callback(node.close)
            swarm.spans[listener.address] = span
        yield swarm


def emulated(network: MemoryNetwork, script: Script) -> EmulatedTransport:
    return EmulatedTransport(network.transport(), LinkShape(script.delay_s + MESSAGE_S, 8 * BYTES_PER_S))


async def play_on_nodes(script: Script, text: ScriptedText, size: Size) -> tuple[list[int], float]:
    """Generate on the product's chain.  Returns the tokens per round, and the seconds of all rounds."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.meter = no_time
    world = World(script, loop, 0)
    target = Target(NUMERICS, BLOCKS, VOCAB, 4, 2048)
    room = Reservation(len(text.prompt) + TOKENS + 1, 257)
    counts: list[int] = []
    async with (
        scripted_swarm(text, world) as swarm,
        open_chain(emulated(swarm.network, script), ToyRouter(swarm), target, room) as chain,
    ):
        generation = Generation(
            chain=chain,
            drafter=FirstTreeSeen(scripted_drafter(text, world), world),
            builder=AppendBuilder(SamplingSettings(), SEGMENT_ROWS, chain.epoch.number, 0),
            limits=GenerationLimits(TOKENS + 1, frozenset()),
            policy=policy_of_size(size, world),
            clock=loop.clock,
        )
        async for committed in generation.rounds(text.prompt, SamplingSettings()):
            if committed.traversal == 1:
                world.origin_s = loop.now
            else:
                counts.append(len(committed.tokens))
                seconds = world.now
    return counts, seconds


@pytest.mark.parametrize(
    ("script", "size"),
    [
        (Script(0.025), 0),
        (Script(0.025), 16),
        (Script(0.025), "auto"),
        # With 10 or 50 times the two part once, at a decision that hangs on a tenth of a millisecond.
        (Script(0.001, first_draft=100.0), "auto"),
        (Script(0.1, slowdowns=(Slowdown(NODES[:1], 6.0, 1.0, 5.0),)), "auto"),
    ],
    ids=["plain", "fixed", "auto", "first draft", "slow node"],
)
def test_scripted_chain_takes_the_time_of_nodes(script: Script, size: Size) -> None:
    text = scripted_text("good", 0)
    counts, seconds = run_virtually(play_on_nodes(script, text, size), work_s=None)
    played = play(script, text, size, tokens=TOKENS)
    assert counts == [each.tokens for each in played.rounds]
    assert played.seconds == pytest.approx(seconds, rel=0.02)
