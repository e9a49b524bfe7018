"""Generations on a virtual clock over networks from perfect to terrible, by seeded schedules."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.toy_swarm import plain_text, toy_swarm

from treeswarm.errors import MissingBlocks, SwarmError
from treeswarm.protocol.messages import Answer, Append
from treeswarm.session.session import NodeSession
from treeswarm.session.steps import Step
from treeswarm.session.walk import Walk, walk
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import Faults, MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.drafters.seam import UNANSWERED
from treeswarm_client.generation import round_in_flight as flight
from treeswarm_client.generation.round_in_flight import RoundInFlight

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 40
LINKS = frozenset({StreamKind.LINK})


def generate(faults: Faults, seed: int = 0, **options: Any) -> list[int]:
    async def run() -> list[int]:
        network = MemoryNetwork(seed, faults)
        async with toy_swarm(network) as swarm:
            text = await swarm.generate(PROMPT, COUNT, seed=seed, **options)
            await asyncio.sleep(60)
            swarm.check_idle()
            return text

    return run_virtually(run())


@pytest.mark.parametrize("tree_size", [0, 1, 3, 17])
def test_any_tree_gives_the_plain_text(tree_size: int) -> None:
    assert generate(Faults(), tree_size=tree_size) == plain_text(PROMPT, COUNT)


@pytest.mark.parametrize("seed", range(12))
def test_frames_late_doubled_and_out_of_order_change_nothing(seed: int) -> None:
    faults = Faults(double=0.3, delay=0.5, max_delay_s=2.0, kinds=LINKS)
    assert generate(faults, seed, tree_size=9) == plain_text(PROMPT, COUNT)


@pytest.mark.parametrize("faults", [Faults(), Faults(double=0.2, delay=0.4, max_delay_s=1.0, kinds=LINKS)])
def test_sessions_that_share_forwards_do_not_mix(faults: Faults) -> None:
    async def run() -> None:
        async with toy_swarm(MemoryNetwork(3, faults)) as swarm:
            prompts = [[i % 5, 1, (2 * i) % 5] for i in range(12)]
            texts = await asyncio.gather(
                *(swarm.generate(prompt, 20, seed=i, tree_size=i) for i, prompt in enumerate(prompts))
            )
            assert texts == [plain_text(prompt, 20) for prompt in prompts]
            first = next(iter(swarm.nodes.values())).stage
            assert first is not None
            counters = first.engine.counters
            assert counters.forward_sessions > counters.forwards

    run_virtually(run())


@pytest.mark.parametrize("seed", range(8))
def test_an_error_after_a_lost_frame_keeps_the_right_text(seed: int) -> None:
    faults = Faults(drop=0.04, cut=0.03, delay=0.2, max_delay_s=0.5, kinds=LINKS)

    async def run() -> None:
        network = MemoryNetwork(seed, faults)
        async with toy_swarm(network) as swarm:
            try:
                await swarm.generate(PROMPT, COUNT, seed=seed)
            except MissingBlocks as error:
                assert str(error)
            assert swarm.kept == plain_text(PROMPT, COUNT)[: len(swarm.kept)]
            await asyncio.sleep(60)
            swarm.check_idle()

    run_virtually(run())


def test_a_cancelled_generation_frees_its_sessions() -> None:
    async def run() -> None:
        async with toy_swarm(MemoryNetwork()) as swarm:
            generating = asyncio.create_task(swarm.generate(PROMPT, 1000))
            while len(getattr(swarm, "kept", [])) < 5:
                await asyncio.sleep(0)
            generating.cancel()
            await asyncio.gather(generating, return_exceptions=True)
            await asyncio.sleep(1)
            swarm.check_idle()

    run_virtually(run())


def test_a_traversal_costs_one_way_latency_per_hop_and_one_more() -> None:
    """With 25 ms links a traversal takes four one-way latencies on the virtual clock."""

    async def run() -> None:
        network = MemoryNetwork()
        original = network.transport
        network.transport = lambda: EmulatedTransport(original(), LinkShape(0.025))  # type: ignore[method-assign, assignment, return-value]
        async with toy_swarm(network) as swarm:
            loop = asyncio.get_running_loop()
            took = []
            for count in (1, 11):
                start = loop.time()
                assert await swarm.generate(PROMPT, count, tree_size=0, segment_rows=64) == plain_text(PROMPT, count)
                took.append(loop.time() - start)
            assert took[1] - took[0] == pytest.approx(10 * 4 * 0.025, rel=0.01)

    run_virtually(run())


def test_waiting_rows_that_a_walk_has_left_are_not_computed() -> None:
    async def run() -> int:
        async with toy_swarm(MemoryNetwork()) as swarm:
            assert await swarm.generate(PROMPT, COUNT, tree_size=24) == plain_text(PROMPT, COUNT)
            return sum(node.describe().skipped_rows for node in swarm.nodes.values())

    assert run_virtually(run(), work_s=0.2) > 0


class TestPlantedMistakes:
    """Each mistake must change the text or end in an error."""

    def differs(self, faults: Faults | None = None) -> bool:
        try:
            return generate(faults or Faults(), seed=1, tree_size=9) != plain_text(PROMPT, COUNT)
        except (SwarmError, AssertionError):
            return True

    def test_the_text_is_right_without_a_mistake(self) -> None:
        assert not self.differs()
        assert not self.differs(Faults(double=1.0, kinds=LINKS))

    def test_dropping_the_bonus_token_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def greedy_for_trees(parents: Any, tokens: Any, answers: Any) -> Walk:
            right_walk = walk(parents, tokens, answers)
            whole = right_walk.accepted and right_walk.bonus != UNANSWERED
            return replace(right_walk, bonus=int(tokens[right_walk.accepted[-1]])) if whole else right_walk

        monkeypatch.setattr(flight, "walk", greedy_for_trees)
        assert self.differs()

    def test_answers_shifted_by_one_node_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = RoundInFlight.add_answer

        def shifted(self: RoundInFlight, answer: Answer) -> None:
            honest(self, replace(answer, tokens=np.roll(answer.tokens, 1)))

        monkeypatch.setattr(RoundInFlight, "add_answer", shifted)
        assert self.differs()

    def test_applying_a_doubled_frame_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = NodeSession.receive

        def forgetful(self: NodeSession, append: Append) -> list[Step]:
            self._appends.next_seq = min(self._appends.next_seq, append.seq)
            return honest(self, append)

        monkeypatch.setattr(NodeSession, "receive", forgetful)
        assert self.differs(Faults(double=1.0, kinds=LINKS))
