"""In 16 bits the target itself moves with the shape of a batch: how often, here and in plain transformers?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, bench_swarm
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.reference import stock_forced, stock_greedy

SIZES = (0, 8, 64)


async def bench_flips(setup: BenchSetup, *, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Flips per 1,000 tokens in bfloat16: between tree sizes of the swarm, and in stock transformers between decoding
    one token at a time and reading the same text at once.

    Two texts are compared up to their first difference, which counts as one flip; after it they are other texts.
    """
    setup = dataclasses.replace(setup, dtype="bfloat16")
    async with bench_swarm(setup) as bench:
        prompts = held_out_prompts(bench.client, setup.prompts)
        texts = {size: [(await bench.run(p, tree_size=size)).token_ids for p in prompts] for size in sizes}
        provenance = await bench.provenance()
    folder = resolve_model(setup.model)
    one = await stock_greedy(folder, prompts, setup.tokens, setup.dtype)
    wide = await stock_forced(folder, prompts, one.token_ids, setup.dtype)
    return {
        "bench": "flips",
        "swarm_flips_per_1000": {
            f"{sizes[0]} against {size}": _flips(texts[sizes[0]], texts[size]) for size in sizes[1:]
        },
        "transformers_flips_per_1000": 1000
        * sum(a != b for x, y in zip(one.token_ids, wide.token_ids, strict=True) for a, b in zip(x, y, strict=True))
        / sum(map(len, one.token_ids)),
        "tokens": sum(map(len, one.token_ids)),
        "provenance": provenance,
    }


def _flips(one: list[list[int]], other: list[list[int]]) -> float:
    flips = compared = 0
    for a, b in zip(one, other, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        flips += first is not None
        compared += len(a) if first is None else first + 1
    return 1000 * flips / compared
