"""`swarm bench outside`: ideas that stay outside the product, beside what the product does; one process, no swarm.

Rules of acceptance on the same contexts; AdaEDL's discount in the ranking of trees; lookahead decoding's pool beside
the tables of n-grams.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.model_files import load_tokenizer, read_shape, resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.sampling.acceptance import RULES
from treeswarm_bench.benchmarks.sampling.lookahead_pool import LookaheadPoolDrafter
from treeswarm_bench.benchmarks.sampling.sampling import (
    SEED,
    ArgmaxRule,
    GeneratedText,
    TokenizerEncoder,
    generate,
    ratio_of,
)
from treeswarm_bench.benchmarks.sampling.tree_model import CachedModel
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_client.drafters.expanded_tree import CandidateNodes
from treeswarm_client.drafters.model import ModelDrafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.provenance import machine_provenance

CHILDREN = (1, 2, 4, 8)
SIZES = (16, 64)
TEMPERATURES = (0.0, 1.0)
# AdaEDL's weight of the entropy: a node counts 1 − √(γ·H) of its children's chance.
GAMMAS = (0.02, 0.1, 0.2)
LEAST_DISCOUNT = 0.05


@dataclass(eq=False)
class AdaEdlDrafter(ModelDrafter):
    """The product's drafter, whose nodes count less where the draft is unsure (AdaEDL, arXiv 2410.18351)."""

    gamma: float = 0.2

    def _children(self, logits: torch.Tensor, positions: NDArray[np.int64]) -> CandidateNodes:
        nodes = super()._children(logits, positions)
        logprobs = torch.log_softmax(logits, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).numpy()
        bound = np.clip(1.0 - np.sqrt(self.gamma * entropy), LEAST_DISCOUNT, 1.0)
        return CandidateNodes(nodes.tokens, nodes.raw_scores, nodes.scores + np.log(bound)[:, None].astype(np.float32))


def _ada_edl(gamma: float, folder: Path) -> Drafter:
    drafter = AdaEdlDrafter.load(folder)
    drafter.gamma = gamma
    return drafter


MakeDrafter = Callable[[Path], Drafter]
DISCOUNTS: Mapping[str, MakeDrafter] = {
    "draft model": ModelDrafter.load,
    **{f"AdaEDL, γ = {gamma:g}": partial(_ada_edl, gamma) for gamma in GAMMAS},
}
POOLS: Mapping[str, MakeDrafter] = {
    "n-grams": lambda _: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter()]),
    "n-grams and pool": lambda _: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter(), LookaheadPoolDrafter()]),
    "pool alone": lambda _: LookaheadPoolDrafter(),
}


async def bench_outside(
    setup: BenchSetup, *, sizes: Sequence[int] = SIZES, temperatures: Sequence[float] = TEMPERATURES
) -> dict[str, Any]:
    """Return chances by rule and number of children, and tokens per round by drafter, size and temperature.

    `over_first` compares with the first drafter of each list on the same prompts; intervals hold nine of ten draws.
    """
    folder, draft = resolve_model(setup.model), resolve_model(setup.draft)
    target = CachedModel.load(folder)
    prompts = held_out_prompts(TokenizerEncoder(load_tokenizer(folder)), setup.prompts)
    vocab_size = read_shape(folder).vocab_size

    def texts(make: MakeDrafter, size: int, temperature: float) -> list[GeneratedText]:
        rule, made = ArgmaxRule(make(draft), vocab_size), []
        for sample, prompt in enumerate(prompts):
            rule.begin(prompt, temperature, sample)
            made.append(generate(target, rule, prompt, size, setup.tokens))
        return made

    rows, mismatches = [], 0
    sampled: list[list[int]] = []
    for drafters in (DISCOUNTS, POOLS):
        for temperature in temperatures:
            for size in sizes:
                made = {name: texts(make, size, temperature) for name, make in drafters.items()}
                first = next(iter(made.values()))
                sampled = [text.tokens for text in first] if temperature > 0 else sampled
                rows += [_row(temperature, size, name, each, first) for name, each in made.items()]
                mismatches += sum(_differ(a, b) for each in made.values() for a, b in zip(first, each, strict=True))
    whole = [[*prompt, *text] for prompt, text in zip(prompts, sampled, strict=False)]
    return {
        "bench": "outside",
        "acceptance": acceptance(target, CachedModel.load(draft), whole, setup.tokens),
        "rows": rows,
        "mismatches": mismatches,
        "provenance": machine_provenance() | {"model": setup.model, "draft": setup.draft, "dtype": "float32"},
    }


def acceptance(
    target: CachedModel, draft: CachedModel, texts: Sequence[Sequence[int]], places: int
) -> list[dict[str, Any]]:
    """Return each rule's chance that the next token is among 1, 2, 4 and 8 children, at the texts' last `places`.

    Temperature 1 for target and draft.
    """
    random = np.random.default_rng(SEED)
    chances: dict[tuple[str, int], list[float]] = {(name, k): [] for name in RULES for k in CHILDREN}
    for text in texts:
        rows = [_probs(model, text)[-places - 1 : -1] for model in (target, draft)]
        for target_probs, draft_probs in zip(*rows, strict=True):
            for (name, k), found in chances.items():
                found.append(RULES[name](target_probs, draft_probs, k, random))
    return [{"rule": name, "children": k, "chance": float(np.mean(found))} for (name, k), found in chances.items()]


def _probs(model: CachedModel, text: Sequence[int]) -> NDArray[np.float64]:
    """Return the distribution after each token of a text, float64 [tokens, vocab]."""
    model.begin(())
    logits = model.below(range(-1, len(text) - 1), text)
    return np.asarray(torch.softmax(logits.double(), -1).numpy())


def _row(
    temperature: float, size: int, name: str, texts: Sequence[GeneratedText], first: Sequence[GeneratedText]
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "size": size,
        "drafter": name,
        "tokens_per_round": sum(len(text.tokens) for text in texts) / sum(text.rounds for text in texts),
        "over_first": ratio_of(texts, first).as_dict(),
        "repeated_4grams": float(np.mean([repeated_4grams(text.tokens) for text in texts])),
    }


def _differ(a: GeneratedText, b: GeneratedText) -> bool:
    """Whether two texts differ where both have tokens."""
    return any(x != y for x, y in zip(a.tokens, b.tokens, strict=False))
