"""Real nodes host a model with latent attention and routing buffers: its text is stock's, even if a node is killed."""

from pathlib import Path

import pytest
from tests.node.model.test_latent_attention import latent_model
from tests.processes.conftest import save_tokenizer

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm
from treeswarm_client.reference import stock_greedy

TOKENS = 48
PROMPT = "the 7 quick brown foxes jump over 49 lazy dogs\n" * 8


@pytest.mark.slow  # five processes load torch; test_latent_attention.py covers the rest in one
async def test_text_is_stocks_when_a_node_is_killed(tmp_path: Path) -> None:
    vocab_size = save_tokenizer(tmp_path)
    latent_model("deepseek_v3", vocab_size=vocab_size, eos_token_id=0).save_pretrained(tmp_path)
    spans = [Span(0, 1), Span(1, 3), Span(3, 4), Span(1, 3)]
    async with (
        local_swarm(str(tmp_path), spans) as swarm,
        SwarmClient(str(tmp_path), peers=swarm.peers, draft="ngram") as client,
    ):
        prompt = client.encode(PROMPT)
        (stock,) = (await stock_greedy(tmp_path, [prompt], TOKENS, "float32")).token_ids
        run = client.stream(prompt, max_new_tokens=TOKENS, tree_size=8, ignore_eos=True)
        killed = None
        async for _ in run:
            if killed is None and len(run.token_ids) >= 8:
                assert run.chain is not None
                address = run.chain.hops[1].address.partition("#")[0]
                killed = next(node for node in swarm.nodes if node.address == address)
                killed.process.kill()
        assert run.token_ids == stock
        assert run.chain is not None
        assert run.chain.repairs, "the text ended before the node was missed"
        again = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=8, ignore_eos=True)
        assert again.token_ids == stock
