"""`swarm bench trees`: the number of tokens per traversal.

Our ranking is compared with the best chain, and with SpecExec's ranking and noise; the draft model with n-grams, and
with both in one tree.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm.model_files import resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm, bench_swarm
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.wan.statistics import RESAMPLES, Ratio
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.selection.automatic import WITH_NGRAM

TEMPERATURES = (0.0, 0.7, 1.0)
SIZES = (1, 4, 16, 64, 256, 1024)
SEED = 1
# Texts that repeat themselves make every drafter look good, so the headline leaves them out.
LOOPING = 0.3

Cell = tuple[float, int, str]
"""Temperature, number of nodes, and rule."""


def _ranked(options: DraftOptions, setup: BenchSetup) -> Drafter:
    return ModelDrafter.load(resolve_model(setup.draft), options=options)


def _named(suffix: str, setup: BenchSetup) -> Drafter:
    name = f"{setup.draft}{WITH_NGRAM}" if suffix else "ngram"
    return load_drafter(name, resolve_model(setup.model))


RULES: Mapping[str, Callable[[BenchSetup], Drafter]] = {
    "ours": partial(_ranked, DraftOptions()),
    "chain": partial(_ranked, DraftOptions(chain=True)),
    "raw": partial(_ranked, DraftOptions(ranking="raw", shared_noise=False)),
    "independent": partial(_ranked, DraftOptions(shared_noise=False)),
    "ngram": partial(_named, ""),
    "union": partial(_named, WITH_NGRAM),
}


@dataclass(frozen=True)
class TextCounts:
    """Figures of one text, its prefill left out: that traversal has no tree and is the same under every rule."""

    tokens: int
    """Number of tokens after the first."""
    traversals: int
    repeated_4grams: float

    @property
    def is_novel(self) -> bool:
        """Whether the text does not repeat itself much."""
        return self.repeated_4grams < LOOPING


async def bench_trees(
    setup: BenchSetup, *, sizes: Sequence[int] = SIZES, temperatures: Sequence[float] = TEMPERATURES
) -> dict[str, Any]:
    """Return tokens per traversal by temperature, rule and size, over all texts and over those that do not loop.

    `raw` is SpecExec's ranking, with independent noise of its own where the target samples.  `independent` is our
    fitted τ without the shared noise; under greedy it would equal ours.  `ngram` drafts without a model, and `union`
    with both in one tree.  Intervals hold nine of ten draws of as many prompts.
    """
    counts: dict[Cell, list[TextCounts]] = {}
    rows = []
    async with bench_swarm(setup) as bench:
        prompts = held_out_prompts(bench.client, setup.prompts)
        for temperature in temperatures:
            for size in sizes:
                for rule in RULES:
                    if rule == "independent" and temperature == 0:
                        continue
                    texts, acceptance = await _measure(bench, prompts, temperature, size, rule)
                    counts[temperature, size, rule] = texts
                    rows.append(_row(temperature, size, rule, texts) | {"acceptance": acceptance})
        ratios = _ratios(counts)
        return {"bench": "trees", "rows": rows, "ratios": ratios, "provenance": await bench.provenance()}


async def _measure(
    bench: BenchSwarm, prompts: list[list[int]], temperature: float, size: int, rule: str
) -> tuple[list[TextCounts], float]:
    """Generate every text with a drafter that has learned nothing; return the counts, and the mean acceptance."""
    bench.client.use_drafter(RULES[rule](bench.setup))
    runs = [await bench.run(prompt, tree_size=size, temperature=temperature, seed=SEED) for prompt in prompts]
    texts = [
        TextCounts(run.stats.committed - 1, run.stats.traversals - 1, repeated_4grams(run.token_ids))
        for run in runs
        if run.stats
    ]
    return texts, statistics.fmean(run.stats.acceptance or 0.0 for run in runs if run.stats)


def _row(temperature: float, size: int, rule: str, texts: Sequence[TextCounts]) -> dict[str, Any]:
    novel = [text for text in texts if text.is_novel]
    return {
        "temperature": temperature,
        "size": size,
        "rule": rule,
        "tokens_per_traversal": _per_traversal(texts),
        "novel_tokens_per_traversal": _per_traversal(novel),
        "novel_texts": len(novel),
        "repeated_4grams": statistics.fmean(text.repeated_4grams for text in texts),
        "texts": [[text.tokens, text.traversals, round(text.repeated_4grams, 3)] for text in texts],
    }


def _per_traversal(texts: Sequence[TextCounts]) -> float | None:
    """Return tokens per traversal, or None for no texts."""
    return sum(text.tokens for text in texts) / sum(text.traversals for text in texts) if texts else None


def _ratios(counts: Mapping[Cell, list[TextCounts]]) -> dict[str, dict[str, Any]]:
    """Return the comparisons that show whether the design works, over texts that do not loop.

    Rules are compared where trees of 64 nodes were measured, the union with the draft model alone at every size.
    """
    pairs: dict[str, tuple[Cell, Cell]] = {
        "64 nodes over the best chain, greedy": ((0.0, 64, "ours"), (0.0, 64, "chain")),
        "fitted τ over raw ranking, greedy": ((0.0, 64, "ours"), (0.0, 64, "raw")),
        "shared over independent noise, T=1": ((1.0, 64, "ours"), (1.0, 64, "independent")),
        "shared noise over SpecExec's rule, T=1": ((1.0, 64, "ours"), (1.0, 64, "raw")),
        "T=1 over greedy": ((1.0, 64, "ours"), (0.0, 64, "ours")),
    }
    for temperature, size, rule in counts:
        if rule == "union":
            name = f"union over its draft model alone, T={temperature:g}, {size} nodes"
            pairs[name] = ((temperature, size, "union"), (temperature, size, "ours"))
    measured = {name: (counts[a], counts[b]) for name, (a, b) in pairs.items() if a in counts and b in counts}
    ratios = {name: ratio_of(over, under) for name, (over, under) in measured.items()}
    return {name: ratio.as_dict() for name, ratio in ratios.items() if ratio is not None}


def ratio_of(over: Sequence[TextCounts], under: Sequence[TextCounts]) -> Ratio | None:
    """Return the ratio of tokens per traversal on the same novel prompts, resampled in pairs, or None for no prompt.

    A prompt is left out if either rule's text loops: where a text ends depends on the rule, by some tokens.
    """
    novel = [(a, b) for a, b in zip(over, under, strict=True) if a.is_novel and b.is_novel]
    if not novel:
        return None
    figures = np.array([(a.tokens, a.traversals, b.tokens, b.traversals) for a, b in novel], np.float64)
    drawn = np.random.default_rng(0).integers(0, len(novel), (RESAMPLES if len(novel) > 1 else 0, len(novel)))
    return Ratio(float(_ratio(figures.sum(0))), np.asarray(_ratio(figures[drawn].sum(1).T)))


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((sums[0] / sums[1]) / (sums[2] / sums[3]))
