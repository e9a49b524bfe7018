"""How many tokens does a traversal buy?  Our ranking beside the best chain, SpecExec's ranking and its noise."""

import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import Bench, BenchSetup, bench_swarm
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter

TEMPERATURES = (0.0, 0.7, 1.0)
SIZES = (1, 4, 16, 64, 256, 1024)
SEED = 1
# Texts that repeat themselves flatter every drafter; the headline leaves them out.
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
    """Tokens a traversal by temperature, rule and size: over all texts, and over those that do not loop.

    `raw` is SpecExec's ranking (with its own independent noise where the target samples); `independent` is our fitted τ
    without the shared noise, and says nothing new under greedy.
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
    bench: Bench, prompts: list[list[int]], temperature: float, size: int, rule: str, options: DraftOptions
) -> dict[str, Any]:
    bench.client.use_drafter(ModelDrafter.load(resolve_model(bench.setup.draft), options=options))
    runs = [await bench.run(prompt, tree_size=size, temperature=temperature, seed=SEED) for prompt in prompts]
    # The prefill's traversal carries no tree: it is the same under every rule, and would dilute them all.
    buys = [(run.stats.committed - 1, run.stats.traversals - 1) for run in runs if run.stats]
    repeats = [repeated_4grams(run.token_ids) for run in runs]
    novel = [buy for buy, repeat in zip(buys, repeats, strict=True) if repeat < LOOPING]
    return {
        "temperature": temperature,
        "size": size,
        "rule": rule,
        "tokens_per_traversal": _per_traversal(buys),
        "novel_tokens_per_traversal": _per_traversal(novel),
        "novel_texts": len(novel),
        "acceptance": statistics.fmean(run.stats.acceptance or 0.0 for run in runs if run.stats),
        "repeated_4grams": statistics.fmean(repeats),
    }


def _per_traversal(buys: list[tuple[int, int]]) -> float | None:
    return sum(tokens for tokens, _ in buys) / sum(trips for _, trips in buys) if buys else None


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The comparisons that say whether the design holds, at 64 nodes where that was run."""
    found = {(r["temperature"], r["size"], r["rule"]): r["novel_tokens_per_traversal"] for r in rows}
    pairs = {
        "64 nodes over the best chain, greedy": ((0.0, 64, "ours"), (0.0, 64, "chain")),
        "fitted τ over raw ranking, greedy": ((0.0, 64, "ours"), (0.0, 64, "raw")),
        "shared over independent noise, T=1": ((1.0, 64, "ours"), (1.0, 64, "independent")),
        "shared noise over SpecExec's rule, T=1": ((1.0, 64, "ours"), (1.0, 64, "raw")),
        "T=1 over greedy": ((1.0, 64, "ours"), (0.0, 64, "ours")),
    }
    return {name: found[a] / found[b] for name, (a, b) in pairs.items() if found.get(a) and found.get(b)}
