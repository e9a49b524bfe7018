"""Sessions with the same prompt share its KV on every node, which changes counters and not the text."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from tests.sim.test_recovery import TWICE, slow_links
from tests.support.toy_swarm import SPANS, ToySwarm, plain_text, toy_swarm

from treeswarm.protocol.messages import Description
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.spans import Span
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.config import NodeLimits
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.sessions.server_session import ServerSession

PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 5, 200)]
COUNT = 40
TEXT = plain_text(PROMPT, COUNT)
SHARED = 3 * PREFIX_TOKENS


def run_scenario(
    scenario: Callable[[ToySwarm], Coroutine[Any, Any, None]],
    spans: list[Span] = SPANS,
    limits: NodeLimits | None = None,
) -> None:
    """Run a scenario.  Afterwards only kept prefixes use memory."""

    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, limits, spans=spans) as swarm:
            async with asyncio.timeout(5000):
                await scenario(swarm)
            await asyncio.sleep(800)
            swarm.check_idle()

    run_virtually(run())


async def generate_text(swarm: ToySwarm, **options: Any) -> None:
    options = {"shared": "client", "patience_s": 60.0, "segment_rows": 50, **options}
    assert await swarm.generate(PROMPT, COUNT, **options) == TEXT


async def generate_concurrently(swarm: ToySwarm, count: int) -> None:
    await asyncio.gather(*(generate_text(swarm, seed=seed) for seed in range(count)))


def descriptions(swarm: ToySwarm) -> list[Description]:
    return [node.describe() for node in swarm.nodes.values()]


def hits(swarm: ToySwarm) -> list[tuple[int, int]]:
    return [(node.prefix_hits, node.prefix_tokens) for node in descriptions(swarm)]


def test_a_repeated_prompt_is_not_prefilled_again() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm, tree_size=0)
        before = [node.frames for node in descriptions(swarm)]
        assert before == [4 + COUNT - 1] * 3  # the prompt in four segments
        await generate_text(swarm, tree_size=0)
        assert [node.frames - count for node, count in zip(descriptions(swarm), before, strict=True)] == [
            1 + COUNT - 1
        ] * 3
        assert hits(swarm) == [(1, SHARED)] * 3
        await generate_text(swarm, shared="none")
        assert hits(swarm) == [(1, SHARED)] * 3

    run_scenario(scenario)


def test_concurrent_sessions_share_pages() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        free = [node.trunk_free for node in descriptions(swarm)]
        generating = asyncio.create_task(generate_concurrently(swarm, 5))
        while not all(node.shared_pages == SHARED // PAGE for node in descriptions(swarm)):
            assert not generating.done()
            await asyncio.sleep(0.01)
        while not all(node.sessions == 5 for node in descriptions(swarm)):
            await asyncio.sleep(0.01)
        # Each has one page of crown and one of its own text; what is shared counts once.
        assert [before - node.trunk_free for before, node in zip(free, descriptions(swarm), strict=True)] == [
            SHARED + 5 * 2 * PAGE
        ] * 3
        await generating
        assert hits(swarm) == [(5, 5 * SHARED)] * 3

    run_scenario(scenario)


def test_generated_text_is_shared_too() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        longer = [*PROMPT, *TEXT, 1, 2, 3]
        text = await swarm.generate(longer, 10, shared="client")
        assert text == plain_text(longer, 10)
        assert hits(swarm) == [(1, 3 * PREFIX_TOKENS)] * 3
        whole = [*PROMPT, *TEXT, *([4] * 40)]
        expected = plain_text(whole, 60)
        assert await swarm.generate(whole, 60, shared="client") == expected
        again = [*whole, *expected, 0]
        assert await swarm.generate(again, 10, shared="client") == plain_text(again, 10)
        assert hits(swarm)[0] == (3, (3 + 3 + 5) * PREFIX_TOKENS)

    run_scenario(scenario)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_shortest_prefix_of_all_nodes_is_used(place: int) -> None:
    """One node has a part of the prefix, or nothing: all nodes begin with what that one has."""

    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        node = list(swarm.nodes.values())[place]
        assert node.stage is not None
        kept = node.stage.store.prefixes
        kept._drop(next(iter(kept._units)))  # the oldest is the end of the text
        await generate_text(swarm)
        assert hits(swarm) == [(1, 2 * PREFIX_TOKENS)] * 3
        kept.clear()
        await generate_text(swarm)
        assert hits(swarm) == [(1, 2 * PREFIX_TOKENS)] * 3
        await generate_text(swarm)
        assert hits(swarm) == [(2, 5 * PREFIX_TOKENS)] * 3

    run_scenario(scenario)


def test_clients_share_only_in_the_scope_swarm() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm, secret=b"a" * 16)
        await generate_text(swarm, secret=b"b" * 16)
        assert hits(swarm) == [(0, 0)] * 3
        await generate_text(swarm, shared="swarm", secret=b"a" * 16)
        assert hits(swarm) == [(0, 0)] * 3
        await generate_text(swarm, shared="swarm", secret=b"b" * 16)
        assert hits(swarm) == [(1, SHARED)] * 3

    run_scenario(scenario)


def test_another_route_to_a_node_is_another_prefix() -> None:
    """KV computed from a wrong node's rows must not be used after that node is gone."""

    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        await swarm.stop(next(iter(swarm.nodes)))
        await swarm.start(SPANS[0])
        await generate_text(swarm)
        assert hits(swarm) == [(0, 0)] * 3

    run_scenario(scenario)


def test_kept_prefixes_give_way_to_new_sessions() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        for secret in range(30):
            await generate_text(swarm, secret=bytes([secret]) * 16)
        for node in swarm.nodes.values():
            assert node.stage is not None
            assert node.stage.store.free_tokens == 4096
            assert 1024 < node.stage.store.prefixes.idle_pages * PAGE <= 2048
            session = node.stage.store.open(4096 - PAGE, 1)
            assert not node.stage.store.prefixes.pages
            session.close()

    run_scenario(scenario)


def test_replay_logs_share_chunks_and_kept_ones_give_way() -> None:
    """There is room for two replay logs, or for one beside what is kept: every session has one."""
    row = 16
    room = row * (len(PROMPT) + COUNT + 7)

    async def scenario(swarm: ToySwarm) -> None:
        for secret in (b"a" * 16, b"a" * 16, b"b" * 16, b"c" * 16, b"c" * 16):
            generating = asyncio.create_task(generate_text(swarm, secret=secret))
            while not all(node.sessions for node in swarm.nodes.values()):
                await asyncio.sleep(0.01)
            for node in list(swarm.nodes.values())[:2]:
                assert next(iter(node.sessions.values())).memory.replay_log is not None
                assert node.sessions.replay_logs.used_bytes <= room + row * 10
            await generating
        assert hits(swarm) == [(2, 2 * SHARED)] * 3

    run_scenario(scenario, limits=NodeLimits(replay_log_bytes=room + row * 10))


@pytest.mark.parametrize("claimed", [4 * PREFIX_TOKENS, PREFIX_TOKENS + 1])
def test_a_node_that_claims_an_unrequested_prefix_is_left(claimed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: ToySwarm) -> None:
        faulty = list(swarm.nodes.values())[-1]
        honest = ServerSession.send_opened

        async def claim(hosted: ServerSession) -> None:
            if faulty.sessions.get(hosted.opening.id) is hosted:
                hosted.state.offered = claimed
            await honest(hosted)

        monkeypatch.setattr(ServerSession, "send_opened", claim)
        await generate_text(swarm)
        assert swarm.chain is not None
        assert swarm.nodes[swarm.chain.hops[-1].address] is not faulty

    run_scenario(scenario, spans=TWICE)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("at", [0, 1, 20])
def test_samples_of_one_prompt_survive_node_losses(places: tuple[int, ...], at: int) -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        generating = asyncio.create_task(generate_concurrently(swarm, 3))
        while swarm.chain is None or len(swarm.kept) < at or not swarm.chain.epoch.members:
            await asyncio.sleep(0.001)
        for address in [swarm.chain.hops[place].address for place in places]:
            await swarm.kill(address)
        await generating
        await generate_text(swarm)

    run_scenario(scenario, spans=TWICE)


def test_a_survivor_replays_from_a_shared_replay_log() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        swarm.chain = None
        generating = asyncio.create_task(generate_text(swarm))
        while swarm.chain is None or len(swarm.kept) < 10:
            await asyncio.sleep(0.001)
        head, middle, _ = [hop.address for hop in swarm.chain.hops]
        (hosted,) = swarm.nodes[head].sessions.values()
        assert hosted.memory.replay_log is not None
        assert [chunk.references for chunk in hosted.memory.replay_log._chunks] == [2] * 3
        await swarm.kill(middle)
        await generating
        (repair,) = swarm.chain.repairs
        assert [hop.address for hop, _ in repair.lost] == [middle]

    run_scenario(scenario, spans=TWICE)


def test_a_node_without_a_replay_log_counts_as_lost() -> None:
    async def scenario(swarm: ToySwarm) -> None:
        await generate_text(swarm)
        swarm.chain = None
        generating = asyncio.create_task(generate_text(swarm))
        while swarm.chain is None or len(swarm.kept) < 10:
            await asyncio.sleep(0.001)
        head, middle, _ = [hop.address for hop in swarm.chain.hops]
        (hosted,) = swarm.nodes[head].sessions.values()
        assert hosted.memory.replay_log is None
        await swarm.kill(middle)
        await generating
        assert {hop.address for hop, _ in swarm.chain.repairs[0].lost} == {head, middle}

    run_scenario(scenario, spans=TWICE, limits=NodeLimits(replay_log_bytes=0))


@pytest.mark.parametrize("seed", range(12))
def test_concurrent_prompts_survive_node_losses(seed: int) -> None:
    """Nodes also die during prefills that other sessions have already begun to use."""
    random = np.random.default_rng(seed)

    async def generate_later(swarm: ToySwarm, index: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        await generate_text(swarm, seed=index, segment_rows=int(random.integers(5, 70)))

    async def scenario(swarm: ToySwarm) -> None:
        waits = random.uniform(0, 0.8, 5).tolist()
        generating = asyncio.gather(*(generate_later(swarm, index, wait_s) for index, wait_s in enumerate(waits)))
        for _ in range(2):
            await asyncio.sleep(random.uniform(0.02, 0.5))
            address = list(swarm.nodes)[int(random.integers(len(swarm.nodes)))]
            span = swarm.spans[address]
            await swarm.kill(address)
            await swarm.start(span)
        await generating

    run_scenario(scenario, spans=TWICE)
