"""Real nodes share the KV cache of a prompt: their counters show it, and the text stays the same."""

import asyncio

import pytest

from treeswarm.errors import BadRequest
from treeswarm.model_files import resolve_model
from treeswarm.protocol.messages import Description
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm
from treeswarm_client.reference import stock_greedy
from treeswarm_client.sync import SyncSwarmClient

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOKENS = 32
PROMPT = "".join(f"def read_{i}(self, size={i}):\n    return self.buffer[{i}:size]\n\n" for i in range(8))


async def describe(client: SwarmClient) -> list[Description]:
    return list((await client.describe_nodes()).values())


async def wait_until_free(client: SwarmClient, before: list[Description]) -> bool:
    for _ in range(100):
        if [node.trunk_free for node in await describe(client)] == [node.trunk_free for node in before]:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_second_identical_prompt_computes_its_last_rows_only(three_nodes: LocalSwarm) -> None:
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft="demo-draft") as client:
        prompt = client.encode(PROMPT)
        shared = (len(prompt) - 1) // PREFIX_TOKENS * PREFIX_TOKENS
        assert shared >= 2 * PREFIX_TOKENS
        (stock,) = (await stock_greedy(resolve_model("demo"), [prompt], TOKENS, "float32")).token_ids
        before = await describe(client)
        first = await client.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
        between = await describe(client)
        second = await client.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
        after = await describe(client)
        assert first.token_ids == second.token_ids == stock
        assert (first.prefix_tokens, second.prefix_tokens) == (0, shared)
        for old, mid, new in zip(before, between, after, strict=True):
            assert mid.prefix_hits == old.prefix_hits
            assert (new.prefix_hits - mid.prefix_hits, new.prefix_tokens - mid.prefix_tokens) == (1, shared)
        assert [run.recorder.traversal_times[0].rows for run in (first, second)] == [len(prompt), len(prompt) - shared]
        assert await wait_until_free(client, before)


@pytest.mark.parametrize("draft", ["none", "demo-draft"])
async def test_samples_of_one_prompt_share_one_prefill(three_nodes: LocalSwarm, draft: str) -> None:
    options = {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft=draft, prefix_scope="none") as client:
        alone = [await client.generate(PROMPT, sample=sample, **options) for sample in range(4)]
        before = await describe(client)
    async with SwarmClient(model="demo", peers=three_nodes.peers, draft=draft) as client:
        shared = (len(client.encode(PROMPT)) - 1) // PREFIX_TOKENS * PREFIX_TOKENS
        samples = asyncio.create_task(client.generate_many(PROMPT, n=4, **options))
        most = 0
        while not samples.done():
            most = max(most, *(node.shared_pages for node in await describe(client)))
        after = await describe(client)
        assert [run.token_ids for run in await samples] == [run.token_ids for run in alone]
        assert len({tuple(run.token_ids) for run in alone}) == 4
        for old, new in zip(before, after, strict=True):
            assert (new.prefix_hits - old.prefix_hits, new.prefix_tokens - old.prefix_tokens) == (3, 3 * shared)
        assert most == shared // PREFIX_TOKENS
        assert await wait_until_free(client, before)
        assert [node.shared_pages for node in await describe(client)] == [0] * 3


async def test_other_clients_share_prefixes_in_swarm_scope_only(three_nodes: LocalSwarm) -> None:
    runs = []
    for scope in ("client", "client", "swarm", "swarm"):
        async with SwarmClient(model="demo", peers=three_nodes.peers, prefix_scope=scope) as client:  # type: ignore[arg-type]
            runs.append(await client.generate(PROMPT, max_new_tokens=4, tree_size=0, ignore_eos=True))
    assert [run.prefix_tokens > 0 for run in runs] == [False, False, False, True]
    assert len({tuple(run.token_ids) for run in runs}) == 1


async def test_synchronous_client_generates_samples(three_nodes: LocalSwarm) -> None:
    def program() -> list[list[int]]:
        with SyncSwarmClient(model="demo", peers=three_nodes.peers) as client:
            runs = client.generate_many("for i in ", n=2, temperature=1.0, max_new_tokens=6, ignore_eos=True)
            return [run.token_ids for run in runs]

    first, second = await asyncio.to_thread(program)
    assert len(first) == len(second) == 6
    assert first != second


async def test_impossible_sharing_requests_are_refused(three_nodes: LocalSwarm) -> None:
    with pytest.raises(BadRequest, match="prefix scope 'all'"):
        await SwarmClient(model="demo", peers=three_nodes.peers, prefix_scope="all").__aenter__()  # type: ignore[arg-type]
    async with SwarmClient(model="demo", peers=three_nodes.peers) as client:
        with pytest.raises(BadRequest, match="at least 1"):
            await client.generate_many("x", n=0)
        with pytest.raises(BadRequest, match="empty"):
            await client.generate_many("", n=2)
