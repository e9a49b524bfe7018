"""`swarm bench flips`: how often 16-bit text changes with the shape of a batch, here and in plain transformers.

In 16 bits the target's own logits depend on the shape of the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, bench_swarm
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.reference import stock_forced, stock_greedy

SIZES = (0, 8, 64)


async def bench_flips(setup: BenchSetup, *, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Return flips per 1,000 tokens in bfloat16.

    In the swarm they are counted between tree sizes.  In stock transformers they are counted between decoding one token
    at a time and reading the same text at once.  Two texts are compared up to their first difference, which counts as
    one flip; after it, they are different texts.
    """
    setup = dataclasses.replace(setup, dtype="bfloat16")
    async with bench_swarm(setup) as bench:
        prompts = held_out_prompts(bench.client, setup.prompts)
        texts = {size: [(await bench.run(p, tree_size=size)).token_ids for p in prompts] for size in sizes}
        provenance = await bench.provenance()
    folder = resolve_model(setup.model)
    by_token = await stock_greedy(folder, prompts, setup.tokens, setup.dtype)
    at_once = await stock_forced(folder, prompts, by_token.token_ids, setup.dtype)
    return {
        "bench": "flips",
        "swarm_flips_per_1000": {
            f"{sizes[0]} against {size}": _flips_per_1000(texts[sizes[0]], texts[size]) for size in sizes[1:]
        },
        "transformers_flips_per_1000": 1000
        * sum(
            a != b
            for x, y in zip(by_token.token_ids, at_once.token_ids, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        / sum(map(len, by_token.token_ids)),
        "tokens": sum(map(len, by_token.token_ids)),
        "provenance": provenance,
    }


def _flips_per_1000(texts: list[list[int]], others: list[list[int]]) -> float:
    flips = compared = 0
    for a, b in zip(texts, others, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        flips += first is not None
        compared += len(a) if first is None else first + 1
    return 1000 * flips / compared
