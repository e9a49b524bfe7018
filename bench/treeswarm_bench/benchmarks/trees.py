"""`swarm bench trees`: the number of tokens per traversal.

Our ranking is compared with the best chain, and with SpecExec's ranking and noise.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm, bench_swarm
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter

TEMPERATURES = (0.0, 0.7, 1.0)
SIZES = (1, 4, 16, 64, 256, 1024)
SEED = 1
# Texts that repeat themselves make every drafter look good, so the headline leaves them out.
LOOPING = 0.3
RULES = {
    "ours": DraftOptions(),
    "chain": DraftOptions(chain=True),
    "raw": DraftOptions(ranking="raw", shared_noise=False),
    "independent": DraftOptions(shared_noise=False),
}


async def bench_trees(
    setup: BenchSetup, *, sizes: Sequence[int] = SIZES, temperatures: Sequence[float] = TEMPERATURES
) -> dict[str, Any]:
    """Return tokens per traversal by temperature, rule and size, over all texts and over those that do not loop.

    `raw` is SpecExec's ranking, with independent noise of its own where the target samples.  `independent` is our
    fitted τ without the shared noise; under greedy it would equal ours.
    """
    rows = []
    async with bench_swarm(setup) as bench:
        prompts = held_out_prompts(bench.client, setup.prompts)
        for temperature in temperatures:
            for size in sizes:
                for rule, options in RULES.items():
                    if rule == "independent" and temperature == 0:
                        continue
                    rows.append(await _row(bench, prompts, temperature, size, rule, options))
        return {"bench": "trees", "rows": rows, "ratios": _ratios(rows), "provenance": await bench.provenance()}


async def _row(
    bench: BenchSwarm, prompts: list[list[int]], temperature: float, size: int, rule: str, options: DraftOptions
) -> dict[str, Any]:
    bench.client.use_drafter(ModelDrafter.load(resolve_model(bench.setup.draft), options=options))
    runs = [await bench.run(prompt, tree_size=size, temperature=temperature, seed=SEED) for prompt in prompts]
    # The prefill's traversal has no tree: it is the same under every rule, and would dilute the differences.
    counts = [(run.stats.committed - 1, run.stats.traversals - 1) for run in runs if run.stats]
    repeats = [repeated_4grams(run.token_ids) for run in runs]
    novel = [count for count, repeat in zip(counts, repeats, strict=True) if repeat < LOOPING]
    return {
        "temperature": temperature,
        "size": size,
        "rule": rule,
        "tokens_per_traversal": _per_traversal(counts),
        "novel_tokens_per_traversal": _per_traversal(novel),
        "novel_texts": len(novel),
        "acceptance": statistics.fmean(run.stats.acceptance or 0.0 for run in runs if run.stats),
        "repeated_4grams": statistics.fmean(repeats),
    }


def _per_traversal(counts: list[tuple[int, int]]) -> float | None:
    """Return tokens per traversal, from the tokens and traversals of each text; None for no texts."""
    if not counts:
        return None
    return sum(tokens for tokens, _ in counts) / sum(traversals for _, traversals in counts)


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the comparisons that show whether the design works, where trees of 64 nodes were measured."""
    by_row = {(r["temperature"], r["size"], r["rule"]): r["novel_tokens_per_traversal"] for r in rows}
    pairs = {
        "64 nodes over the best chain, greedy": ((0.0, 64, "ours"), (0.0, 64, "chain")),
        "fitted τ over raw ranking, greedy": ((0.0, 64, "ours"), (0.0, 64, "raw")),
        "shared over independent noise, T=1": ((1.0, 64, "ours"), (1.0, 64, "independent")),
        "shared noise over SpecExec's rule, T=1": ((1.0, 64, "ours"), (1.0, 64, "raw")),
        "T=1 over greedy": ((1.0, 64, "ours"), (0.0, 64, "ours")),
    }
    return {name: by_row[a] / by_row[b] for name, (a, b) in pairs.items() if by_row.get(a) and by_row.get(b)}
