"""Sessions with the same prompt share its KV on every node: the nodes' counters show it, the text does not."""

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


def live(
    story: Callable[[ToySwarm], Coroutine[Any, Any, None]],
    spans: list[Span] = SPANS,
    limits: NodeLimits | None = None,
) -> None:
    """Afterwards nobody owns anything but the kept prefixes, and without them nothing is in use."""

    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, limits, spans=spans) as swarm:
            async with asyncio.timeout(5000):
                await story(swarm)
            await asyncio.sleep(800)
            swarm.check_idle()

    run_virtually(run())


async def say(swarm: ToySwarm, **options: Any) -> None:
    options = {"shared": "client", "patience_s": 60.0, "segment_rows": 50, **options}
    assert await swarm.generate(PROMPT, COUNT, **options) == TEXT


async def say_at_once(swarm: ToySwarm, count: int) -> None:
    await asyncio.gather(*(say(swarm, seed=seed) for seed in range(count)))


def told(swarm: ToySwarm) -> list[Description]:
    return [node.describe() for node in swarm.nodes.values()]


def hits(swarm: ToySwarm) -> list[tuple[int, int]]:
    return [(node.prefix_hits, node.prefix_tokens) for node in told(swarm)]


def test_a_second_prompt_is_not_prefilled_again() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm, tree_size=0)
        before = [node.frames for node in told(swarm)]
        assert before == [4 + COUNT - 1] * 3  # the prompt in four segments
        await say(swarm, tree_size=0)
        assert [node.frames - count for node, count in zip(told(swarm), before, strict=True)] == [1 + COUNT - 1] * 3
        assert hits(swarm) == [(1, SHARED)] * 3
        await say(swarm, shared="none")
        assert hits(swarm) == [(1, SHARED)] * 3

    live(story)


def test_sessions_side_by_side_read_the_same_pages() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        free = [node.trunk_free for node in told(swarm)]
        talking = asyncio.create_task(say_at_once(swarm, 5))
        while not all(node.shared_pages == SHARED // PAGE for node in told(swarm)):
            assert not talking.done()
            await asyncio.sleep(0.01)
        while not all(node.sessions == 5 for node in told(swarm)):
            await asyncio.sleep(0.01)
        # Each has one page of crown and one of its own text; what is shared counts once.
        assert [before - node.trunk_free for before, node in zip(free, told(swarm), strict=True)] == [
            SHARED + 5 * 2 * PAGE
        ] * 3
        await talking
        assert hits(swarm) == [(5, 5 * SHARED)] * 3

    live(story)


def test_what_was_generated_is_shared_as_well() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        longer = [*PROMPT, *TEXT, 1, 2, 3]
        text = await swarm.generate(longer, 10, shared="client")
        assert text == plain_text(longer, 10)
        assert hits(swarm) == [(1, 3 * PREFIX_TOKENS)] * 3
        whole = [*PROMPT, *TEXT, *([4] * 40)]
        said = plain_text(whole, 60)
        assert await swarm.generate(whole, 60, shared="client") == said
        again = [*whole, *said, 0]
        assert await swarm.generate(again, 10, shared="client") == plain_text(again, 10)
        assert hits(swarm)[0] == (3, (3 + 3 + 5) * PREFIX_TOKENS)

    live(story)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nodes_that_have_less_of_it_are_agreed_with(place: int) -> None:
    """One has nothing left, or a part: all begin where that one is."""

    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        node = list(swarm.nodes.values())[place]
        assert node.stage is not None
        kept = node.stage.store.prefixes
        kept._drop(next(iter(kept._units)))  # the oldest is the end of the text
        await say(swarm)
        assert hits(swarm) == [(1, 2 * PREFIX_TOKENS)] * 3
        kept.clear()
        await say(swarm)
        assert hits(swarm) == [(1, 2 * PREFIX_TOKENS)] * 3
        await say(swarm)
        assert hits(swarm) == [(2, 5 * PREFIX_TOKENS)] * 3

    live(story)


def test_strangers_share_nothing_unless_both_say_so() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm, secret=b"a" * 16)
        await say(swarm, secret=b"b" * 16)
        assert hits(swarm) == [(0, 0)] * 3
        await say(swarm, shared="swarm", secret=b"a" * 16)
        assert hits(swarm) == [(0, 0)] * 3
        await say(swarm, shared="swarm", secret=b"b" * 16)
        assert hits(swarm) == [(1, SHARED)] * 3

    live(story)


def test_another_way_to_a_node_is_another_prefix() -> None:
    """What a node computed wrongly must not outlive it on the nodes behind it."""

    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        await swarm.stop(next(iter(swarm.nodes)))
        await swarm.start(SPANS[0])
        await say(swarm)
        assert hits(swarm) == [(0, 0)] * 3

    live(story)


def test_a_kept_prefix_is_in_nobodys_way() -> None:
    async def story(swarm: ToySwarm) -> None:
        for secret in range(30):
            await say(swarm, secret=bytes([secret]) * 16)
        for node in swarm.nodes.values():
            assert node.stage is not None
            assert node.stage.store.free_tokens == 4096
            assert 1024 < node.stage.store.prefixes.idle_pages * PAGE <= 2048
            session = node.stage.store.open(4096 - PAGE, 1)
            assert not node.stage.store.prefixes.pages
            session.close()

    live(story)


def test_journals_share_what_they_have_in_common_and_kept_ones_give_way() -> None:
    """Room for two journals, or for one beside what is kept: nobody is without one."""
    row = 16
    room = row * (len(PROMPT) + COUNT + 7)

    async def story(swarm: ToySwarm) -> None:
        for secret in (b"a" * 16, b"a" * 16, b"b" * 16, b"c" * 16, b"c" * 16):
            talking = asyncio.create_task(say(swarm, secret=secret))
            while not all(node.sessions for node in swarm.nodes.values()):
                await asyncio.sleep(0.01)
            for node in list(swarm.nodes.values())[:2]:
                assert next(iter(node.sessions.values())).memory.replay_log is not None
                assert node.sessions.replay_logs.used_bytes <= room + row * 10
            await talking
        assert hits(swarm) == [(2, 2 * SHARED)] * 3

    live(story, limits=NodeLimits(replay_log_bytes=room + row * 10))


@pytest.mark.parametrize("claimed", [4 * PREFIX_TOKENS, PREFIX_TOKENS + 1])
def test_a_node_that_claims_what_it_was_not_asked_for_is_left(claimed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(swarm: ToySwarm) -> None:
        liar = list(swarm.nodes.values())[-1]
        honest = ServerSession.send_opened

        async def lie(hosted: ServerSession) -> None:
            if liar.sessions.get(hosted.opening.id) is hosted:
                hosted.state.offered = claimed
            await honest(hosted)

        monkeypatch.setattr(ServerSession, "send_opened", lie)
        await say(swarm)
        assert swarm.chain is not None
        assert swarm.nodes[swarm.chain.hops[-1].address] is not liar

    live(story, spans=TWICE)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("at", [0, 1, 20])
def test_forks_of_a_prompt_survive_their_nodes(places: tuple[int, ...], at: int) -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        talking = asyncio.create_task(say_at_once(swarm, 3))
        while swarm.chain is None or len(swarm.kept) < at or not swarm.chain.epoch.members:
            await asyncio.sleep(0.001)
        for address in [swarm.chain.hops[place].address for place in places]:
            await swarm.kill(address)
        await talking
        await say(swarm)

    live(story, spans=TWICE)


def test_a_survivor_feeds_its_successor_from_the_shared_journal() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        swarm.chain = None
        talking = asyncio.create_task(say(swarm))
        while swarm.chain is None or len(swarm.kept) < 10:
            await asyncio.sleep(0.001)
        head, middle, _ = [hop.address for hop in swarm.chain.hops]
        (hosted,) = swarm.nodes[head].sessions.values()
        assert hosted.memory.replay_log is not None
        assert [chunk.references for chunk in hosted.memory.replay_log._chunks] == [2] * 3
        await swarm.kill(middle)
        await talking
        (repair,) = swarm.chain.repairs
        assert [hop.address for hop, _ in repair.lost] == [middle]

    live(story, spans=TWICE)


def test_a_node_without_the_shared_journal_counts_as_lost() -> None:
    async def story(swarm: ToySwarm) -> None:
        await say(swarm)
        swarm.chain = None
        talking = asyncio.create_task(say(swarm))
        while swarm.chain is None or len(swarm.kept) < 10:
            await asyncio.sleep(0.001)
        head, middle, _ = [hop.address for hop in swarm.chain.hops]
        (hosted,) = swarm.nodes[head].sessions.values()
        assert hosted.memory.replay_log is None
        await swarm.kill(middle)
        await talking
        assert {hop.address for hop, _ in swarm.chain.repairs[0].lost} == {head, middle}

    live(story, spans=TWICE, limits=NodeLimits(replay_log_bytes=0))


@pytest.mark.parametrize("seed", range(12))
def test_prompts_side_by_side_while_nodes_die(seed: int) -> None:
    """Also in the middle of prefills that others have already begun on."""
    random = np.random.default_rng(seed)

    async def late(swarm: ToySwarm, index: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        await say(swarm, seed=index, segment_rows=int(random.integers(5, 70)))

    async def story(swarm: ToySwarm) -> None:
        waits = random.uniform(0, 0.8, 5).tolist()
        talking = asyncio.gather(*(late(swarm, index, wait_s) for index, wait_s in enumerate(waits)))
        for _ in range(2):
            await asyncio.sleep(random.uniform(0.02, 0.5))
            address = list(swarm.nodes)[int(random.integers(len(swarm.nodes)))]
            span = swarm.spans[address]
            await swarm.kill(address)
            await swarm.start(span)
        await talking

    live(story, spans=TWICE)
