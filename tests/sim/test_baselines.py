"""The baselines of the benches on a toy swarm: the star topology, and a loop that discards bonus tokens."""

import asyncio

import pytest
from tests.support.toy_swarm import BLOCKS, NUMERICS, VOCAB, GuessingDrafter, ToyRouter, ToySwarm, plain_text, toy_swarm

from treeswarm.errors import Refused
from treeswarm.protocol.messages import LinkHello
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_bench.benchmarks.wan.star_baseline import StarTransport
from treeswarm_bench.benchmarks.wan.strategies import WithoutBonus
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.chain.chain import open_chain
from treeswarm_client.chain.options import Reservation
from treeswarm_client.chain.shared_prompt import SharedPrompt
from treeswarm_client.discovery.route import Target
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.generation.stats import StatsRecorder

PROMPT = [1, 2, 3, 4, 0, 1, 2]
DELAY_S = 0.01


def slow_network() -> MemoryNetwork:
    network = MemoryNetwork(1)
    original = network.transport
    network.transport = lambda: EmulatedTransport(original(), LinkShape(DELAY_S))  # type: ignore[method-assign, assignment, return-value]
    return network


async def star_of(network: MemoryNetwork) -> StarTransport:
    star = StarTransport(network.transport())
    star.address = (await star.listen("127.0.0.1:0", star.relay)).address
    return star


async def seconds_per_token(swarm: ToySwarm) -> float:
    """Return the seconds per token of plain decoding, without the prefill."""
    durations = []
    for count in (10, 30):
        start = asyncio.get_running_loop().time()
        assert await swarm.generate(PROMPT, count, tree_size=0) == plain_text(PROMPT, count)
        durations.append(asyncio.get_running_loop().time() - start)
    return (durations[1] - durations[0]) / 20


def test_a_star_gives_the_same_text_over_two_links_per_node() -> None:
    async def run() -> None:
        network = slow_network()
        async with toy_swarm(network) as swarm:
            assert await seconds_per_token(swarm) == pytest.approx(4 * DELAY_S, rel=0.01)
            star = await star_of(network)
            network.transport = lambda: star  # type: ignore[method-assign, assignment, return-value]
            assert await seconds_per_token(swarm) == pytest.approx(6 * DELAY_S, rel=0.01)
            assert await swarm.generate(PROMPT, 40, tree_size=8) == plain_text(PROMPT, 40)
            await asyncio.sleep(60)
            swarm.check_idle()
            await star.close()

    run_virtually(run())


def test_a_star_refuses_links_of_other_sessions() -> None:
    async def run() -> None:
        network = MemoryNetwork(1)
        star = await star_of(network)
        link = await network.transport().connect(star.address, StreamKind.LINK)
        await link.send(LinkHello(1, bytes(16), 0, bytes(16)))
        with pytest.raises(Refused, match="links of its own sessions"):
            await link.receive()
        await star.close()

    run_virtually(run())


async def decoded(swarm: ToySwarm, loop: type[Generation], count: int) -> tuple[list[int], StatsRecorder]:
    settings = SamplingSettings()
    room = Reservation(len(PROMPT) + count, 7)
    target = Target(NUMERICS, BLOCKS, VOCAB, 4, 2048)
    shared = SharedPrompt(PROMPT, "none", b"s" * 16)
    drafter = GuessingDrafter(3)
    async with open_chain(
        swarm.network.transport(), ToyRouter(swarm), target, room, shared=shared, alternatives=drafter.alternatives
    ) as chain:
        builder = AppendBuilder(settings, 4, chain.epoch.number, chain.epoch.prefix_rows)
        limits, policy = GenerationLimits(count, frozenset()), FixedSizePolicy(6, drafts_ahead=False)
        generation = loop(chain=chain, drafter=drafter, builder=builder, limits=limits, policy=policy)
        text = [token async for news in generation.rounds(PROMPT, settings) for token in news.tokens]
        return text, generation.recorder


def test_a_loop_without_bonus_needs_more_traversals() -> None:
    async def run() -> None:
        async with toy_swarm(MemoryNetwork(1)) as swarm:
            text, meter = await decoded(swarm, WithoutBonus, 40)
            whole_text, whole = await decoded(swarm, Generation, 40)
            assert text == whole_text == plain_text(PROMPT, 40)
            assert meter.traversals > whole.traversals
            await asyncio.sleep(60)
            swarm.check_idle()

    run_virtually(run())
