"""The recorder adds up traversals and walks, and a run can be ended while another task iterates it."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.generation.stats import StatsRecorder
from treeswarm_client.planner.policy import Round

TREE = DraftTree(np.array([-1, 0, 0]), np.array([5, 6, 7]), np.zeros(3, np.float32))


def round_of(tree: DraftTree, accepted: tuple[int, ...]) -> Round:
    return Round(tree, Walk(accepted, 9), len(tree), len(tree), 0.1, 0.1, (), unbroken=True)


def test_a_traversal_counts_first_queues_and_all_compute() -> None:
    recorder = StatsRecorder()
    first = (HopTiming(1000, 2000, 4, 1), HopTiming(3000, 4000, 4, 1))
    second = (HopTiming(50_000, 500, 2, 1), HopTiming(50_000, 700, 2, 1))
    recorder.add_traversal(0.2, [first, second])
    (traversal,) = recorder.traversal_times
    assert traversal.queue_s == pytest.approx(0.004)
    assert traversal.compute_s == pytest.approx(0.0072)
    assert (traversal.seconds, traversal.rows) == (0.2, 6)
    assert recorder.traversals == 1


def test_the_parts_of_the_time_add_up_to_the_whole() -> None:
    recorder = StatsRecorder(committed=8, draft_s=0.1)
    for _ in range(2):
        recorder.add_traversal(0.4, [(HopTiming(50_000, 100_000, 4, 1),)])
    stats = recorder.summary(1.0)
    assert (stats.traversals, stats.tokens_per_traversal, stats.tokens_per_second) == (2, 4.0, 8.0)
    assert stats.time.queue == pytest.approx(0.1)
    assert stats.time.compute == pytest.approx(0.2)
    assert stats.time.draft + stats.time.wire + stats.time.queue + stats.time.compute == pytest.approx(1.0)


def test_acceptance_counts_only_rounds_with_a_tree() -> None:
    recorder = StatsRecorder()
    recorder.add_walk(round_of(NO_TREE, ()))
    assert recorder.summary(1.0).acceptance is None
    recorder.add_walk(round_of(TREE, (0, 1)))
    recorder.add_walk(round_of(TREE, ()))
    stats = recorder.summary(1.0)
    assert stats.acceptance == pytest.approx(2 / 4)
    assert stats.drafted == 6


def test_a_run_ends_while_another_task_iterates_it() -> None:
    async def run_and_end() -> None:
        freed = asyncio.Event()

        async def stream() -> AsyncGenerator[Token, None]:
            run.iteration.task = asyncio.current_task()
            try:
                await asyncio.Event().wait()
                yield Token(1, "", 0.0, 1)
            finally:
                run.iteration.ended.set()
                freed.set()

        run = Run(stream(), [1, 2])
        iterating = asyncio.create_task(anext(run.tokens))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await run.end(1.0)
        assert freed.is_set()
        with pytest.raises(asyncio.CancelledError):
            await iterating

    asyncio.run(run_and_end())
