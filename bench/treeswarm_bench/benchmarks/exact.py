"""`swarm bench exact`: whether the swarm's greedy text is the target's own.

The expected text comes from a stock transformers model in a process of its own.
"""

from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm, bench_swarm
from treeswarm_bench.benchmarks.texts import chat_prompts, held_out_prompts
from treeswarm_client.prompt_encoder import load_prompt_encoder
from treeswarm_client.reference import NEAR_TIE, StockTexts, stock_forced, stock_greedy

NODES = (1, 2, 3)
SIZES = (0, 1, 8, 64, 512)


async def bench_exact(
    setup: BenchSetup, *, nodes: Sequence[int] = NODES, sizes: Sequence[int] = SIZES, chat: bool = False
) -> dict[str, Any]:
    """Run every prompt on every number of nodes and with every tree size; count `cases`, `mismatches`, `near_ties`.

    The prompts are held-out code, or with `chat` questions that the model's chat template writes.
    """
    cases = 0
    mismatches: list[dict[str, int]] = []
    near_ties: list[dict[str, int]] = []
    provenance: list[dict[str, Any]] = []
    stock: StockTexts | None = None
    for count in nodes:
        async with bench_swarm(setup, nodes=count) as bench:
            prompts = _prompts(bench, chat=chat)
            stock = stock or await stock_greedy(resolve_model(setup.model), prompts, setup.tokens, setup.dtype)
            for size in sizes:
                different = await _different_texts(bench, prompts, stock, size)
                cases += len(prompts)
                for prompt, text in different:
                    case = {"nodes": count, "tree_size": size, "prompt": prompts.index(prompt)}
                    (near_ties if await _only_near_ties(setup, prompt, text) else mismatches).append(case)
            provenance.append(await bench.provenance())
    assert stock is not None
    return {
        "bench": "exact",
        "cases": cases,
        "mismatches": len(mismatches),
        "near_ties": len(near_ties),
        "mismatched": mismatches,
        "near_tied": near_ties,
        "tokens_per_case": setup.tokens,
        "stock": {"dtype": setup.dtype, "versions": stock.versions},
        "provenance": provenance,
    }


def _prompts(bench: BenchSwarm, *, chat: bool) -> list[list[int]]:
    if not chat:
        return held_out_prompts(bench.client, bench.setup.prompts)
    return chat_prompts(load_prompt_encoder(bench.setup.model, resolve_model(bench.setup.model)), bench.setup.prompts)


async def _different_texts(
    bench: BenchSwarm, prompts: list[list[int]], stock: StockTexts, size: int
) -> list[tuple[list[int], list[int]]]:
    """Return the prompts whose text differs from the stock model's, each with the swarm's text."""
    different = []
    for prompt, expected in zip(prompts, stock.token_ids, strict=True):
        run = await bench.run(prompt, tree_size=size)
        if run.token_ids != expected:
            different.append((prompt, run.token_ids))
    return different


async def _only_near_ties(setup: BenchSetup, prompt: list[int], text: list[int]) -> bool:
    """Return whether the stock model, given the swarm's text, disagrees only where its two best logits nearly tie."""
    forced = await stock_forced(resolve_model(setup.model), [prompt], [text], setup.dtype)
    choices = zip(text, forced.token_ids[0], forced.gaps[0], strict=True)
    return all(ours == theirs or gap < NEAR_TIE for ours, theirs, gap in choices)
