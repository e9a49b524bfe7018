"""With real processes and real sockets, the swarm's text is the target's own."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.exact import bench_exact
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.reference import stock_greedy
from treeswarm_client.sync import SyncSwarmClient

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOKENS = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_node() -> AsyncIterator[LocalSwarm]:
    """Run the same target on one node."""
    async with local_swarm("demo", even_cuts(8, 1)) as swarm:
        yield swarm


async def test_greedy_text_is_the_stock_models(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft") as client:
        prompts = held_out_prompts(client, 2)
        stock = await stock_greedy(resolve_model("demo"), prompts, TOKENS, "float32")
        for size in (0, 24, 512):
            for prompt, expected in zip(prompts, stock.token_ids, strict=True):
                run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
                assert run.token_ids == expected, f"tree size {size}"
                assert run.stats is not None
                assert run.stats.committed == TOKENS
                assert (run.stats.traversals == TOKENS) == (size == 0)
        described = await client.describe_nodes(three_nodes.peers.split(","))
        assert all(node.frames > 0 for node in described.values())


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40}], ids=str)
async def test_text_of_a_seed_depends_on_neither_tree_nor_chain(
    three_nodes: LocalSwarm, one_node: LocalSwarm, sampling: dict[str, float]
) -> None:
    texts = set()
    for swarm in (three_nodes, one_node):
        async with SwarmClient(model="demo", peers=swarm.peers, draft="demo-draft") as client:
            for size in (0, 256):
                run = await client.generate(
                    "def read(self, size=-1):\n", max_new_tokens=TOKENS, tree_size=size, seed=11, **sampling
                )
                texts.add(tuple(run.token_ids))
    assert len(texts) == 1


async def test_different_seeds_give_different_texts(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft") as client:
        runs = [await client.generate("import ", max_new_tokens=16, temperature=1.0, seed=seed) for seed in range(4)]
        assert len({tuple(run.token_ids) for run in runs}) == 4


async def test_stream_says_which_tokens_came_in_one_traversal(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft", tree_size=16) as client:
        run = client.stream("class Queue:\n    def ", max_new_tokens=30)
        tokens = [token async for token in run]
        assert "".join(token.text for token in tokens) == run.text
        assert [token.id for token in tokens] == run.token_ids
        assert run.stats is not None
        assert tokens[-1].traversal == run.stats.traversals < len(tokens)
        time = run.stats.time
        assert time.draft + time.wire + time.queue + time.compute == pytest.approx(run.stats.seconds, rel=0.02)


@pytest.mark.slow  # seven processes load torch; `swarm bench exact` tests more cases
async def test_random_model_gives_the_stock_text(random_model: Path, random_draft: Path) -> None:
    setup = BenchSetup(str(random_model), str(random_draft), prompts=2, tokens=12)
    result = await bench_exact(setup, nodes=(1, 3), sizes=(0, 32))
    assert result["cases"] == 8
    assert result["mismatches"] == 0
    assert [node["blocks"] for node in result["provenance"][1]["nodes"]] == ["0:2", "2:3", "3:5"]


async def test_leaving_the_client_cancels_a_reader_in_another_task(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft") as client:
        run = client.stream("class Queue:\n    def ", max_new_tokens=1500, ignore_eos=True)

        async def read() -> None:
            async for _ in run:
                pass

        reading = asyncio.create_task(read())
        while not run.token_ids:
            await asyncio.sleep(0.01)
    assert run.iteration.ended.is_set()
    await asyncio.wait({reading})
    assert reading.cancelled()
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="none") as client:
        assert not any(node.sessions for node in (await client.describe_nodes()).values())


async def test_synchronous_client_streams_and_generates(three_nodes: LocalSwarm) -> None:
    def program() -> tuple[list[int], list[int]]:
        with SyncSwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft") as client:
            streamed = [token.id for token in client.stream("for i in ", max_new_tokens=12)]
            return streamed, client.generate("for i in ", max_new_tokens=12).token_ids

    streamed, whole = await asyncio.to_thread(program)
    assert streamed == whole
    assert len(streamed) > 1
