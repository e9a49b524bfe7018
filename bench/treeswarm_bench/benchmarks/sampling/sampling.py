"""`swarm bench sampling`: shared noise beside rejection-sampled trees of the same size.

It counts tokens per round, in one process and without a swarm.
"""

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
from treeswarm_bench.benchmarks.sampling.rejection import ROOT, SampledTree, walk_by_rejection
from treeswarm_bench.benchmarks.sampling.sampled_trees import BestFirstShape, Shape, StaticShape
from treeswarm_bench.benchmarks.sampling.tree_model import CachedModel
from treeswarm_bench.benchmarks.texts import held_out_prompts, repeated_4grams
from treeswarm_bench.benchmarks.wan.statistics import RESAMPLES, Ratio, same_text
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.seam import Drafter, DraftTree, Verification
from treeswarm_client.provenance import machine_provenance

TEMPERATURES = (0.3, 0.7, 1.0)
SIZES = (16, 64)
SEED = 1
# Number of first texts that are not counted: our τ and the rivals' chances of acceptance are both learned on the way.
WARM_UP_PROMPTS = 2
OURS = {"shared": DraftOptions(), "independent": DraftOptions(shared_noise=False)}
RIVALS: dict[str, Shape] = {"static": StaticShape(), "best-first": BestFirstShape()}


class Rule(Protocol):
    """One way to draft and to accept."""

    def begin(self, prompt: Sequence[int], temperature: float, sample: int) -> None:
        """Begin another text."""
        ...

    def propose(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return parents (−1 for the root) and tokens of a tree below the text's last token, each int64 [n]."""
        ...

    def decide(self, logits: torch.Tensor) -> Walk:
        """Return the walk through the proposed tree.

        `logits` are the target's after the root and after each node, float32 [nodes + 1, vocab].
        """
        ...


@dataclass(frozen=True)
class GeneratedText:
    """The tokens that one rule generated after one prompt, and the number of rounds."""

    tokens: list[int]
    rounds: int

    @property
    def per_round(self) -> float:
        """Tokens per round, the bonus token included."""
        return len(self.tokens) / self.rounds


async def bench_sampling(
    setup: BenchSetup, *, sizes: Sequence[int] = SIZES, temperatures: Sequence[float] = TEMPERATURES
) -> dict[str, Any]:
    """Return tokens per round by temperature, size and rule; each rule continues the same prompts with its own texts.

    `shared` and `independent` are the product's drafter with and without the target's noise in its ranking.  Both must
    give the same texts, up to which of them ends first.  `static` and `best-first` are sampled without replacement and
    verified by rejection.  `ratios` take the better of these two in every cell, which is slightly in its favour.
    Intervals hold nine of ten draws of as many prompts.  Raises BadRequest for a temperature of 0 or a size below 1.
    """
    if min(temperatures) <= 0.0 or min(sizes) < 1:
        raise BadRequest("sampling compares trees of sampled text: give temperatures above 0 and sizes of at least 1")
    folder, draft = resolve_model(setup.model), resolve_model(setup.draft)
    target = CachedModel.load(folder)
    prompts = held_out_prompts(TokenizerEncoder(load_tokenizer(folder)), setup.prompts + WARM_UP_PROMPTS)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    mismatches = 0
    for temperature in temperatures:
        for size in sizes:
            texts_of = {
                name: _generate_texts(target, rule, prompts, temperature, size, setup.tokens)[WARM_UP_PROMPTS:]
                for name, rule in _fresh_rules(draft).items()
            }
            rows += [_row(temperature, size, name, texts) for name, texts in texts_of.items()]
            ratios.append({"temperature": temperature, "size": size} | _ratios(texts_of))
            mismatches += sum(
                not same_text({"shared": a.tokens, "independent": b.tokens})
                for a, b in zip(texts_of["shared"], texts_of["independent"], strict=True)
            )
    return {
        "bench": "sampling",
        "rows": rows,
        "ratios": ratios,
        "mismatches": mismatches,
        "provenance": machine_provenance() | {"model": setup.model, "draft": setup.draft, "dtype": "float32"},
    }


def _fresh_rules(draft: Path) -> dict[str, Rule]:
    """Return rules that have learned nothing: what a rule learns belongs to one temperature and size."""
    drafters = {name: ModelDrafter.load(draft, options=options) for name, options in OURS.items()}
    ours: dict[str, Rule] = {name: ArgmaxRule(drafter, drafter.vocab_size) for name, drafter in drafters.items()}
    return ours | {name: RejectionRule(CachedModel.load(draft), shape) for name, shape in RIVALS.items()}


def _generate_texts(
    target: CachedModel, rule: Rule, prompts: Sequence[list[int]], temperature: float, size: int, tokens: int
) -> list[GeneratedText]:
    texts = []
    for sample, prompt in enumerate(prompts):
        rule.begin(prompt, temperature, sample)
        texts.append(generate(target, rule, prompt, size, tokens))
    return texts


def generate(target: CachedModel, rule: Rule, prompt: Sequence[int], size: int, tokens: int) -> GeneratedText:
    """Run rounds until there are at least `tokens` new tokens; the rule must have begun.  The prefill is no round."""
    target.begin(prompt[:-1])
    text, rounds = list(prompt), 0
    while len(text) < len(prompt) + tokens:
        parents, drafted = rule.propose(size)
        decided = rule.decide(target.below([ROOT, *(parents + 1)], [text[-1], *drafted]))
        target.advance([0, *(node + 1 for node in decided.accepted)])
        text += [*drafted[list(decided.accepted)].tolist(), decided.bonus]
        rounds += 1
    return GeneratedText(text[len(prompt) :], rounds)


@dataclass(eq=False)
class ArgmaxRule:
    """A drafter and the product's rule: follow argmax(log p̃ + gumbel) through the tree, or argmax p̃ if greedy."""

    drafter: Drafter
    vocab_size: int
    _length: int = 0
    _settings: SamplingSettings = field(default_factory=SamplingSettings)
    _tree: DraftTree | None = None

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.vocab_size)

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
        answers = self._answers(tree, logits)
        decided = walk(tree.parents, tree.tokens, answers)
        best = logits.topk(self.drafter.alternatives).indices.numpy()
        self.drafter.observe(Verification(tree, answers, decided.accepted, decided.bonus, best))
        self._length += len(decided.accepted) + 1
        return decided

    def _answers(self, tree: DraftTree, logits: torch.Tensor) -> NDArray[np.int64]:
        """Return the target's token after the root and after each node, int64 [nodes + 1]."""
        if self._settings.greedy:
            return np.asarray(logits.argmax(1).numpy())
        levels = [0]
        """Number of levels below the root, for each row of `logits`."""
        for parent in tree.parents.tolist():
            levels.append(levels[parent + 1] + 1)
        noise = np.stack([self._noise.row(self._settings, self._length + level) for level in levels])
        logprobs = torch.log_softmax(logits / self._settings.temperature, -1).numpy()
        return np.asarray((logprobs + noise).argmax(1))


@dataclass(eq=False)
class RejectionRule:
    """Trees sampled from the draft at the target's temperature, verified by rejection.  The shape learns."""

    draft: CachedModel
    shape: Shape
    _temperature: float = 1.0
    _root: int = 0
    _row_of: dict[int, int] = field(default_factory=dict)
    """Row of each node in the draft's crown; leaves that were not expanded have none."""
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
        decided, trials = walk_by_rejection(self._tree, self._probs(logits), self._random)
        self.shape = self.shape.updated(trials)
        expanded = [node for node in (ROOT, *decided.accepted) if node in self._row_of]
        # Only the last node of the path can be a leaf.
        more = [int(self._tree.tokens[node]) for node in decided.accepted if node not in self._row_of]
        self.draft.advance([self._row_of[node] for node in expanded], more)
        self._root = decided.bonus
        return decided

    def _expand(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        rows = [self._row_of.get(parent, ROOT) for parent in parents]
        self._row_of.update({node: len(self._row_of) + i for i, node in enumerate(nodes)})
        return self._probs(self.draft.below(rows, tokens))

    def _probs(self, logits: torch.Tensor) -> NDArray[np.float64]:
        return np.asarray(torch.softmax(logits.double() / self._temperature, -1).numpy())


@dataclass(frozen=True, eq=False)
class TokenizerEncoder:
    """An encoder of prompts around a tokenizer."""

    tokenizer: Tokenizer

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer.encode(prompt).ids)


def _row(temperature: float, size: int, rule: str, texts: Sequence[GeneratedText]) -> dict[str, Any]:
    tokens, rounds = sum(len(text.tokens) for text in texts), sum(text.rounds for text in texts)
    return {
        "temperature": temperature,
        "size": size,
        "rule": rule,
        "tokens_per_round": Ratio(tokens / rounds, _resampled(texts)).as_dict(),
        "rounds": rounds,
        "repeated_4grams": float(np.mean([repeated_4grams(text.tokens) for text in texts])),
    }


def _ratios(texts_of: dict[str, list[GeneratedText]]) -> dict[str, Any]:
    rival = max(RIVALS, key=lambda name: _pooled(texts_of[name]))
    return {
        "better_rival": rival,
        "shared_over_rival": ratio_of(texts_of["shared"], texts_of[rival]).as_dict(),
        "shared_over_independent": ratio_of(texts_of["shared"], texts_of["independent"]).as_dict(),
    }


def ratio_of(ours: Sequence[GeneratedText], theirs: Sequence[GeneratedText]) -> Ratio:
    """Return the ratio of tokens per round, ours over theirs, with prompts resampled in pairs."""
    return Ratio(_pooled(ours) / _pooled(theirs), _resampled(ours) / _resampled(theirs))


def _pooled(texts: Sequence[GeneratedText]) -> float:
    return sum(len(text.tokens) for text in texts) / sum(text.rounds for text in texts)


def _resampled(texts: Sequence[GeneratedText]) -> NDArray[np.float64]:
    """Return tokens per round of prompts drawn with replacement, float64 [RESAMPLES], or nothing for one prompt.

    The draws are the same for the same number of prompts.
    """
    if len(texts) < 2:
        return np.empty(0)
    drawn = np.random.default_rng(0).integers(0, len(texts), (RESAMPLES, len(texts)))
    tokens, rounds = np.array([(len(text.tokens), text.rounds) for text in texts], np.float64).T
    return np.asarray(tokens[drawn].sum(1) / rounds[drawn].sum(1))
