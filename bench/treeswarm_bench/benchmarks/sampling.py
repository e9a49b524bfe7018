"""Shared noise beside rejection-sampled trees of the same size: tokens a round, in one process, without a swarm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from treeswarm.errors import BadRequest
from treeswarm.model_files import load_tokenizer, resolve_model
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows
from treeswarm.session.walk import Walk, walk
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.rejection import ROOT, SampledTree, walk_by_rejection
from treeswarm_bench.benchmarks.sampled_trees import BestFirstShape, Shape, StaticShape
from treeswarm_bench.benchmarks.statistics import RESAMPLES, Ratio, same_text
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.tree_model import CachedModel
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.seam import DraftTree, Verification
from treeswarm_client.provenance import machine_provenance

TEMPERATURES = (0.3, 0.7, 1.0)
SIZES = (16, 64)
SEED = 1
# Texts that are not counted: our τ and the rivals' chances of acceptance are both learned on the way.
WARM_UP_PROMPTS = 2
OURS = {"shared": DraftOptions(), "independent": DraftOptions(shared_noise=False)}
RIVALS: dict[str, Shape] = {"static": StaticShape(), "best-first": BestFirstShape()}


class Rule(Protocol):
    """One way to draft and to accept."""

    def begin(self, prompt: Sequence[int], temperature: float, sample: int) -> None:
        """A new text."""
        ...

    def propose(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parents (−1: the root) and tokens below the text's last token."""
        ...

    def decide(self, logits: torch.Tensor) -> Walk:
        """What of the proposal stays, by the target's logits after the root and after each node, float32
        [nodes + 1, vocab]."""
        ...


@dataclass(frozen=True)
class GeneratedText:
    """What one rule made of one prompt."""

    tokens: list[int]
    rounds: int

    @property
    def per_round(self) -> float:
        """Bonus included."""
        return len(self.tokens) / self.rounds


async def bench_sampling(
    setup: BenchSetup, *, sizes: Sequence[int] = SIZES, temperatures: Sequence[float] = TEMPERATURES
) -> dict[str, Any]:
    """Tokens a round by temperature, size and rule, each rule with its own texts after the same prompts.

    `shared` and `independent` are the product's drafter with and without the target's noise in its ranking; both must
    give the same texts, up to which of them ends first.  `static` and `best-first` are sampled without replacement and
    verified by rejection.  `ratios` take the better of the two in every cell, which flatters it a little.  Intervals
    hold nine of ten draws of as many prompts.  Raises BadRequest.
    """
    if min(temperatures) <= 0.0 or min(sizes) < 1:
        raise BadRequest("sampling compares trees of sampled text: give temperatures above 0 and sizes from 1 on")
    folder, draft = resolve_model(setup.model), resolve_model(setup.draft)
    target = CachedModel.load(folder)
    prompts = held_out_prompts(TokenizerEncoder(load_tokenizer(folder)), setup.prompts + WARM_UP_PROMPTS)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    mismatches = 0
    for temperature in temperatures:
        for size in sizes:
            found = {
                name: _texts(target, rule, prompts, temperature, size, setup.tokens)[WARM_UP_PROMPTS:]
                for name, rule in _rules(draft).items()
            }
            rows += [_row(temperature, size, name, texts) for name, texts in found.items()]
            ratios.append({"temperature": temperature, "size": size} | _ratios(found))
            mismatches += sum(
                not same_text({"shared": a.tokens, "independent": b.tokens})
                for a, b in zip(found["shared"], found["independent"], strict=True)
            )
    return {
        "bench": "sampling",
        "rows": rows,
        "ratios": ratios,
        "mismatches": mismatches,
        "provenance": machine_provenance() | {"model": setup.model, "draft": setup.draft, "dtype": "float32"},
    }


def _rules(draft: Path) -> dict[str, Rule]:
    """Fresh ones: what a rule learns belongs to one temperature and size."""
    ours: dict[str, Rule] = {
        name: ArgmaxRule(ModelDrafter.load(draft, options=options)) for name, options in OURS.items()
    }
    return ours | {name: RejectionRule(CachedModel.load(draft), shape) for name, shape in RIVALS.items()}


def _texts(
    target: CachedModel, rule: Rule, prompts: Sequence[list[int]], temperature: float, size: int, tokens: int
) -> list[GeneratedText]:
    texts = []
    for sample, prompt in enumerate(prompts):
        rule.begin(prompt, temperature, sample)
        texts.append(generate(target, rule, prompt, size, tokens))
    return texts


def generate(target: CachedModel, rule: Rule, prompt: Sequence[int], size: int, tokens: int) -> GeneratedText:
    """Rounds until there are at least `tokens` new tokens; the rule has begun.  The prefill is no round."""
    target.begin(prompt[:-1])
    text, rounds = list(prompt), 0
    while len(text) < len(prompt) + tokens:
        parents, drafted = rule.propose(size)
        found = rule.decide(target.below([ROOT, *(parents + 1)], [text[-1], *drafted]))
        target.advance([0, *(node + 1 for node in found.accepted)])
        text += [*drafted[list(found.accepted)].tolist(), found.bonus]
        rounds += 1
    return GeneratedText(text[len(prompt) :], rounds)


@dataclass(eq=False)
class ArgmaxRule:
    """The product's drafter and the product's rule: follow argmax(log p̃ + gumbel) through the tree."""

    drafter: ModelDrafter
    _length: int = 0
    _settings: SamplingSettings = field(default_factory=SamplingSettings)
    _tree: DraftTree | None = None

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.drafter.vocab_size)

    def begin(self, prompt: Sequence[int], temperature: float, sample: int) -> None:
        self._settings = SamplingSettings(temperature=temperature, seed=SEED, sample=sample)
        self._length = len(prompt)
        self.drafter.begin(prompt, self._settings)

    def propose(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        self._tree = tree = self.drafter.propose(size, size)
        return tree.parents, tree.tokens

    def decide(self, logits: torch.Tensor) -> Walk:
        tree = self._tree
        assert tree is not None, "decided before it proposed"
        below = [0]
        """Levels below the root, by place in `logits`."""
        for parent in tree.parents.tolist():
            below.append(below[parent + 1] + 1)
        noise = np.stack([self._noise.row(self._settings, self._length + level) for level in below])
        logprobs = torch.log_softmax(logits / self._settings.temperature, -1).numpy()
        answers = (logprobs + noise).argmax(1)
        found = walk(tree.parents, tree.tokens, answers)
        self.drafter.observe(Verification(tree, answers, found.accepted, found.bonus))
        self._length += len(found.accepted) + 1
        return found


@dataclass(eq=False)
class RejectionRule:
    """Trees sampled from the draft at the target's temperature, verified by rejection.  Its shape learns."""

    draft: CachedModel
    shape: Shape
    _temperature: float = 1.0
    _root: int = 0
    _row_of: dict[int, int] = field(default_factory=dict)
    """A node's row in the draft's crown; leaves that nobody asked about have none."""
    _tree: SampledTree | None = None

    def begin(self, prompt: Sequence[int], temperature: float, sample: int) -> None:
        self._random = np.random.default_rng((SEED, sample))
        self._temperature = temperature
        self._root = prompt[-1]
        self.draft.begin(prompt[:-1])

    def propose(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        self._row_of = {}
        root_probs = self._expand([ROOT], [ROOT], [self._root])[0]
        self._tree = tree = self.shape.grow(size, root_probs, self._expand, self._random)
        return tree.parents, tree.tokens

    def decide(self, logits: torch.Tensor) -> Walk:
        assert self._tree is not None, "decided before it proposed"
        found, trials = walk_by_rejection(self._tree, self._probs(logits), self._random)
        self.shape = self.shape.updated(trials)
        known = [node for node in (ROOT, *found.accepted) if node in self._row_of]
        # Only the last of the path can be a leaf.
        more = [int(self._tree.tokens[node]) for node in found.accepted if node not in self._row_of]
        self.draft.advance([self._row_of[node] for node in known], more)
        self._root = found.bonus
        return found

    def _expand(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        rows = [self._row_of.get(parent, ROOT) for parent in parents]
        self._row_of.update({node: len(self._row_of) + i for i, node in enumerate(nodes)})
        return self._probs(self.draft.below(rows, tokens))

    def _probs(self, logits: torch.Tensor) -> NDArray[np.float64]:
        return np.asarray(torch.softmax(logits.double() / self._temperature, -1).numpy())


@dataclass(frozen=True, eq=False)
class TokenizerEncoder:
    tokenizer: Tokenizer

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer.encode(prompt).ids)


def _row(temperature: float, size: int, rule: str, texts: Sequence[GeneratedText]) -> dict[str, Any]:
    tokens, rounds = sum(len(text.tokens) for text in texts), sum(text.rounds for text in texts)
    return {
        "temperature": temperature,
        "size": size,
        "rule": rule,
        "tokens_per_round": Ratio(tokens / rounds, _drawn(texts)).as_dict(),
        "rounds": rounds,
        "repeated_4grams": float(np.mean([repeated_4grams(text.tokens) for text in texts])),
    }


def _ratios(found: dict[str, list[GeneratedText]]) -> dict[str, Any]:
    rival = max(RIVALS, key=lambda name: _pooled(found[name]))
    return {
        "better_rival": rival,
        "shared_over_rival": ratio_of(found["shared"], found[rival]).as_dict(),
        "shared_over_independent": ratio_of(found["shared"], found["independent"]).as_dict(),
    }


def ratio_of(ours: Sequence[GeneratedText], theirs: Sequence[GeneratedText]) -> Ratio:
    """Tokens a round, ours over theirs, with prompts resampled in pairs."""
    return Ratio(_pooled(ours) / _pooled(theirs), _drawn(ours) / _drawn(theirs))


def _pooled(texts: Sequence[GeneratedText]) -> float:
    return sum(len(text.tokens) for text in texts) / sum(text.rounds for text in texts)


def _drawn(texts: Sequence[GeneratedText]) -> NDArray[np.float64]:
    """Tokens a round of prompts drawn with replacement, the same draws for the same number of prompts."""
    if len(texts) < 2:
        return np.empty(0)
    drawn = np.random.default_rng(0).integers(0, len(texts), (RESAMPLES, len(texts)))
    tokens, rounds = np.array([(len(text.tokens), text.rounds) for text in texts], np.float64).T
    return np.asarray(tokens[drawn].sum(1) / rounds[drawn].sum(1))
