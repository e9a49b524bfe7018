"""Drafting with a small model: best-first trees, ranked by what the target is likely to choose."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from treeswarm.errors import ModelError
from treeswarm.noise import NoiseRows
from treeswarm.sampling import SamplingSettings
from treeswarm_client.drafters import tree_cache
from treeswarm_client.drafters.growth import Growth, grow
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.drafters.temperature import Temperature
from treeswarm_client.drafters.tree_cache import TreeCache

# Candidates kept per node as a label for τ: at τ < 1 the rest of the vocabulary weighs nothing.
LABEL_CANDIDATES = 64
PREFILL_ROWS = 512
# Where τ settles for a distilled draft: see docs/log.md.
GREEDY_PRIOR, SAMPLED_PRIOR = 0.5, 0.8
# SpecExec's discount of a level, part of its ranking.
RAW_DECAY = float(np.log(0.95))


@dataclass(frozen=True)
class DraftOptions:
    """What a benchmark may switch off to measure it; the defaults are what users get."""

    ranking: Literal["fitted", "raw"] = "fitted"
    """`raw`: the draft's own log-probabilities, discounted by depth, as SpecExec ranks."""
    shared_noise: bool = True
    """Rank sampled drafts with the target's own noise."""
    chain: bool = False
    """One best chain instead of a tree."""
    growth: Growth = Growth()


@dataclass(eq=False)
class ModelDrafter:
    """A transformers causal LM as a drafter.  What it learned (τ) outlives a generation; its context does not."""

    model: Any
    vocab_size: int
    max_positions: int
    options: DraftOptions = DraftOptions()
    name: str = "model"
    _settings: SamplingSettings = field(default_factory=SamplingSettings)
    _text: list[int] = field(default_factory=list)
    _cache: TreeCache = field(default_factory=TreeCache)
    _cached: list[int] = field(default_factory=list)
    """The tokens whose K and V are the cache's trunk."""
    _temperatures: dict[bool, Temperature] = field(
        default_factory=lambda: {True: Temperature.fresh(GREEDY_PRIOR), False: Temperature.fresh(SAMPLED_PRIOR)}
    )
    """By whether the target is greedy."""
    _round: "_Round | None" = None

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.vocab_size)

    @classmethod
    def load(
        cls, folder: Path, *, device: str = "cpu", dtype: str = "float32", options: DraftOptions | None = None
    ) -> Self:
        """Load a model directory.  Raises ModelError."""
        tree_cache.register()
        transformers.utils.logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"the draft in '{folder}' cannot be loaded: {str(error).splitlines()[0]}") from error
        model.set_attn_implementation(tree_cache.IMPLEMENTATION)
        config = model.config
        return cls(
            model=model.to(device).eval().requires_grad_(False),
            vocab_size=int(config.vocab_size),
            max_positions=int(getattr(config, "max_position_embeddings", 2**20)),
            options=options or DraftOptions(),
            name=folder.name,
        )

    @property
    def tau(self) -> float:
        """τ as fitted so far for the present settings."""
        return self._temperatures[self._settings.greedy].value

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._settings = settings
        self._text = list(prompt)
        self._round = None
        common = next(
            (i for i, (old, new) in enumerate(zip(self._cached, self._text, strict=False)) if old != new),
            min(len(self._cached), len(self._text)),
        )
        # The last token is the root of the next tree: its row is computed when its children are asked for.
        self._cache.cut(min(common, len(self._text) - 1))
        self._cached = self._text[: self._cache.trunk]
        if len(self._text) < self.max_positions:
            self._feed(self._text[len(self._cached) : -1])

    def propose(self, size: int, depth: int) -> DraftTree:
        deepest = size if self.options.chain else self.options.growth.depth
        depth = min(depth, deepest, self.max_positions - len(self._text))
        if size == 0 or depth < 1:
            self._round = None
            return NO_TREE
        root_logits = self._feed(self._text[len(self._cached) :])
        self._round = current = _Round(self, self._children(root_logits, np.array([len(self._text)])))
        width = 1 if self.options.chain else self.options.growth.width
        growth = Growth(beam=self.options.growth.beam, width=width, depth=depth)
        tokens, scores = current.first_children(width)
        grown = grow(size, tokens, scores, current.expand, growth)
        current.numbers = grown.numbers
        return grown.tree

    def observe(self, tree: DraftTree, answers: NDArray[np.int64], accepted: Sequence[int], bonus: int) -> None:
        if self._round is not None and len(tree):
            self._learn(self._round, answers)
            rows = self._round.rows_of_path(accepted)
            self._cache.keep(np.array(rows, np.int64))
            self._cached += [int(tree.tokens[i]) for i in accepted[: len(rows)]]
        else:
            self._cache.keep(np.empty(0, np.int64))
        self._text += [*(int(tree.tokens[i]) for i in accepted), bonus]
        self._round = None

    def _learn(self, current: "_Round", answers: NDArray[np.int64]) -> None:
        """Every verified node that the draft also expanded is a label for τ."""
        scores, candidates, chosen = current.labels(answers)
        hit = candidates == chosen[:, None]
        known = hit.any(1)
        key = self._settings.greedy
        self._temperatures[key] = self._temperatures[key].learned(scores[known], hit[known].argmax(1))

    def _feed(self, tokens: list[int]) -> torch.Tensor | None:
        """Add tokens to the cached trunk; the last one's logits float32 [1, vocab], None without tokens."""
        logits = None
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = tokens[start : start + PREFILL_ROWS]
            before, count = self._cache.trunk, len(part)
            self._cache.used = self._cache.trunk = before + count
            self._cache.mask = (
                torch.ones(count, before + count, dtype=torch.bool).tril(before).to(self.model.device)
                if count > 1
                else None
            )
            logits = self._forward(np.array(part), np.arange(before, before + count), last=True)
            self._cached += part
        return logits

    @torch.inference_mode()
    def _forward(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], *, last: bool = False) -> torch.Tensor:
        """Logits float32 [n, vocab], or [1, vocab] of the last row."""
        device = self.model.device
        output = self.model(
            input_ids=torch.from_numpy(tokens).to(device)[None],
            position_ids=torch.from_numpy(positions).to(device)[None],
            use_cache=False,
            logits_to_keep=1 if last else 0,
            treeswarm_cache=self._cache,
        )
        logits: torch.Tensor = output.logits[0, :, : self.vocab_size].float()
        return logits

    @torch.inference_mode()
    def _children(self, logits: torch.Tensor | None, positions: NDArray[np.int64]) -> "_Candidates":
        """Rank the tokens that may stand at `positions` (one a row)."""
        assert logits is not None
        settings, options = self._settings, self.options
        base = torch.log_softmax(logits if settings.greedy else logits / settings.temperature, -1)
        if options.ranking == "fitted" and options.shared_noise and not settings.greedy:
            distinct, inverse = np.unique(positions, return_inverse=True)
            noise = np.stack([self._noise.row(settings, int(position)) for position in distinct])
            base = base + torch.from_numpy(noise).to(base.device)[torch.from_numpy(inverse).to(base.device)]
        fitted = options.ranking == "fitted"
        top = base.topk(min(LABEL_CANDIDATES, base.shape[-1]))
        scores = (
            top.values / self.tau - torch.logsumexp(base / self.tau, -1, keepdim=True)
            if fitted
            else top.values + RAW_DECAY
        )
        return _Candidates(top.indices.cpu().numpy(), top.values.cpu().numpy(), scores.cpu().numpy())


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Of some nodes, the best next tokens [n, m], their scores before τ, and their conditional log-scores."""

    tokens: NDArray[np.int64]
    before: NDArray[np.float32]
    scores: NDArray[np.float32]


class _Round:
    """One proposal under way: which node has which row of the cache, who is above whom, what was predicted where.

    Row r of the round's bookkeeping is crown row `trunk + r` of the cache.
    """

    def __init__(self, drafter: ModelDrafter, root: _Candidates) -> None:
        self._drafter = drafter
        self._candidates = [root]
        self._row_of: dict[int, int] = {}
        self._above = np.zeros((0, 0), np.bool_)
        self.numbers = np.empty(0, np.int64)

    def first_children(self, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The root's."""
        return self._candidates[0].tokens[0, :width], self._candidates[0].scores[0, :width]

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        drafter, cache = self._drafter, self._drafter._cache
        old, new = len(self._above), len(nodes)
        above = np.zeros((old + new, old + new), np.bool_)
        above[:old, :old] = self._above
        for i, (node, parent) in enumerate(zip(nodes.tolist(), parents.tolist(), strict=True)):
            if parent >= 0:
                above[old + i] = above[self._row_of[parent]]
            above[old + i, old + i] = True
            self._row_of[node] = old + i
        self._above = above
        cache.used = cache.trunk + old + new
        mask = np.concatenate([np.ones((new, cache.trunk), np.bool_), above[old:]], 1)
        cache.mask = torch.from_numpy(mask).to(drafter.model.device)
        root = len(drafter._text) - 1
        children = drafter._children(drafter._forward(tokens, root + depth), root + depth + 1)
        self._candidates.append(children)
        width = 1 if drafter.options.chain else drafter.options.growth.width
        return children.tokens[:, :width], children.scores[:, :width]

    def labels(self, answers: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Scores before τ [n, m] and candidate tokens [n, m] of the root and every expanded node of the tree, and the
        target's token at each."""
        before = np.concatenate([c.before for c in self._candidates])
        tokens = np.concatenate([c.tokens for c in self._candidates])
        rows, places = [0], [0]
        for i, number in enumerate(self.numbers.tolist()):
            if number in self._row_of:
                rows.append(self._row_of[number] + 1)
                places.append(i + 1)
        return before[rows], tokens[rows], answers[places]

    def rows_of_path(self, accepted: Sequence[int]) -> list[int]:
        """Cache rows of the accepted nodes, up to the first that was never expanded."""
        trunk = self._drafter._cache.trunk
        rows: list[int] = []
        for node in accepted:
            row = self._row_of.get(int(self.numbers[node]))
            if row is None:
                break
            rows.append(trunk + row)
        return rows
