"""Drafting with a small model: best-first trees, ranked by what the target is likely to choose."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows
from treeswarm_client.drafters import tree_cache
from treeswarm_client.drafters.expanded_tree import NO_ROW, CandidateNodes, ExpandedTree
from treeswarm_client.drafters.model_tree import BEAM, ModelTree, ModelTreeOptions
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.tau import TauEstimate
from treeswarm_client.drafters.tree_cache import TreeCache

# Candidates kept per node as a label for τ: at τ < 1 the rest of the vocabulary weighs nothing.
LABEL_CANDIDATES = 64
PREFILL_ROWS = 512
# Where τ settles for a distilled draft: see docs/log.md.
GREEDY_PRIOR, SAMPLED_PRIOR = 0.5, 0.8
# A small draft's forward on a CPU, and how far each one moves what the next is believed to take.
FIRST_FORWARD_S, FORWARD_STEP = 0.002, 1 / 8
# One forward tells of no more than so many times the usual: a machine that was suspended is not a slow one.
FARTHEST = 4.0
# SpecExec's discount of a level, part of its ranking.
RAW_DECAY = float(np.log(0.95))
# Below it sampling is greedy in all but name, and logits divided by it would overflow.
COLDEST = 1e-4
# A tree is ranked by one τ.  When the fitted one has moved so far (of its logarithm), what was drafted ahead is drafted
# anew.
TAU_DRIFT = 0.1
# Of logits, relative to their largest: rows of a tree against the same tokens as a text.
PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class DraftOptions:
    """What a benchmark may switch off to measure it; the defaults are what users get."""

    ranking: Literal["fitted", "raw"] = "fitted"
    """`raw`: the draft's own log-probabilities, discounted by depth, as SpecExec ranks."""
    shared_noise: bool = True
    """Rank sampled drafts with the target's own noise."""
    chain: bool = False
    """One best chain instead of a tree."""
    growth: ModelTreeOptions = ModelTreeOptions()


@dataclass(eq=False)
class ModelDrafter:
    """A transformers causal LM as a drafter.  What it learned (τ) outlives a generation; its context does not.

    A child's score is log_softmax((log p + gumbel) / τ): p the draft's probabilities at the request's temperature,
    gumbel the noise that the target will choose with (none under greedy).
    """

    model: Any
    vocab_size: int
    """Guesses are below it."""
    max_positions: int
    options: DraftOptions = DraftOptions()
    name: str = "model"
    alternatives: int = 0
    _settings: SamplingSettings = field(default_factory=SamplingSettings)
    _text: list[int] = field(default_factory=list)
    _cached: list[int] = field(default_factory=list)
    """The tokens whose K and V are the cache's trunk."""
    _temperatures: dict[bool, TauEstimate] = field(
        default_factory=lambda: {True: TauEstimate.fresh(GREEDY_PRIOR), False: TauEstimate.fresh(SAMPLED_PRIOR)}
    )
    """By whether the target is greedy."""
    _lookahead: ExpandedTree | None = None
    """What was drafted below the text's last token, whose row is in the trunk then."""
    _tree: ModelTree | None = None
    """The tree that was proposed last below it."""
    _expander: "_LevelExpander" = field(init=False)
    """Of that tree."""
    ranked_by: float = 1.0
    """The τ of the last proposal's scores."""
    clock: Callable[[], float] = time.perf_counter
    _forward_s: float = FIRST_FORWARD_S
    """What a forward of new nodes takes, smoothed."""

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.vocab_size)
        self._cache = TreeCache(device=self.model.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        options: DraftOptions | None = None,
        vocab_size: int | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load a model directory; `vocab_size` is the target's, where the draft's may be padded beyond it.

        `threads` sets torch's for the whole process.  Raises ModelError, or UnsupportedModel for layers that cannot
        compute a tree.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        tree_cache.register()
        transformers.utils.logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
            model.set_attn_implementation(tree_cache.IMPLEMENTATION)
        except Exception as error:  # transformers raises whatever its parts raise
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"the draft in '{folder}' cannot be loaded: {first_line}") from error
        config = model.config.get_text_config()
        drafter = cls(
            model=model.to(device).eval().requires_grad_(False),
            vocab_size=min(int(config.vocab_size), vocab_size or int(config.vocab_size)),
            max_positions=int(getattr(config, "max_position_embeddings", None) or 2**20),
            options=options or DraftOptions(),
            name=folder.name,
        )
        drafter._prove()
        return drafter

    @property
    def tau(self) -> float:
        """τ as fitted so far for the present settings; 1 where ranking is raw."""
        return self._temperatures[self._settings.greedy].value if self.options.ranking == "fitted" else 1.0

    def copy_for_new_generation(self) -> Self:
        """One for a generation beside this one: the same weights and the same τ, a context of its own."""
        return replace(self, _text=[], _cached=[], _lookahead=None, _tree=None)

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._settings = settings
        self._text = list(prompt)
        common = next(
            (i for i, (old, new) in enumerate(zip(self._cached, self._text, strict=False)) if old != new),
            min(len(self._cached), len(self._text)),
        )
        # The last token is the root of the next tree: its row is computed when its children are asked for.
        self._forget_after(max(min(common, len(self._text) - 1), 0))
        if len(self._text) < self.max_positions:
            self._feed(self._text[len(self._cached) : -1])

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        growth, chain = self.options.growth, self.options.chain
        depth = min(depth, size if chain else growth.depth, self.max_positions - len(self._text))
        if size < 1 or depth < 1 or not self._text:
            return NO_TREE
        growth = replace(growth, width=1 if chain else growth.width, depth=depth)
        if self._tree is None or (self._tree.size, self._tree.growth) != (size, growth):
            lookahead, width = self._rooted(), growth.width
            first = lookahead.root
            self._tree = ModelTree(size, growth, first.tokens[0, :width], first.scores[0, :width])
            self._expander = _LevelExpander(self, lookahead, width)
        return self._tree.grow(
            self._expander, lambda visits: should_stop(visits / self._forward_s), self._expander.known
        )

    def observe(self, verification: Verification) -> None:
        path = [int(verification.tree.tokens[node]) for node in verification.accepted]
        self._text += [*path, verification.bonus]
        lookahead, self._lookahead = self._lookahead, None
        self._tree = None
        if lookahead is None:
            return
        self._learn(lookahead, verification)
        moved = lookahead.moved(path, verification.bonus)
        warm = len(moved.to_trunk) > len(path) and abs(math.log(self.tau / self.ranked_by)) < TAU_DRIFT
        self._cache.keep(moved.to_trunk, moved.kept if warm else moved.kept[:0])
        self._cached += [*path, verification.bonus][: len(moved.to_trunk)]
        if warm:
            self._lookahead = lookahead.below(moved)
        elif len(self._cached) == len(self._text):
            self._forget_after(len(self._text) - 1)  # the root's logits are gone: its row is computed again

    def _rooted(self) -> ExpandedTree:
        """What is known below the text's last token; at least its own candidates."""
        if self._lookahead is None:
            self.ranked_by = self.tau
            unread, start = self._text[len(self._cached) :], self.clock()
            logits = self._feed(unread)
            if len(unread) <= BEAM:
                self._took(self.clock() - start)
            self._lookahead = ExpandedTree(self.children(logits, np.array([len(self._text)])))
        return self._lookahead

    def expand(
        self,
        lookahead: ExpandedTree,
        parents: NDArray[np.int64],
        tokens: NDArray[np.int64],
        depth: NDArray[np.int64],
    ) -> None:
        """One forward: new nodes, below parents' rows, `depth` levels below the root."""
        start = self.clock()
        self._cache.add_crown(lookahead.add(parents, tokens))
        positions = len(self._text) - 1 + depth
        lookahead.learn(self.children(self._forward(tokens, positions), positions + 1))
        self._took(self.clock() - start)

    def _took(self, seconds: float) -> None:
        """A forward of few tokens.  The root's counts too: who believes forwards to be dear makes no others."""
        self._forward_s += FORWARD_STEP * (min(seconds, FARTHEST * self._forward_s) - self._forward_s)

    def _learn(self, lookahead: ExpandedTree, verification: Verification) -> None:
        """Every verified node that the draft also expanded is a label for τ."""
        rows = np.concatenate([[0], lookahead.rows_of(verification.tree) + 1])
        answers = np.asarray(verification.answers, np.int64)
        known = np.flatnonzero(((rows > 0) | (np.arange(len(rows)) == 0)) & (answers != UNANSWERED))
        found = lookahead.candidates().of(rows[known])
        hit = found.tokens == answers[known][:, None]
        told = hit.any(1)
        key = self._settings.greedy
        self._temperatures[key] = self._temperatures[key].learned(found.before[told], hit[told].argmax(1))

    def _forget_after(self, length: int) -> None:
        self._lookahead = self._tree = None
        self._cache.cut(length)
        del self._cached[length:]

    def _feed(self, tokens: list[int]) -> torch.Tensor:
        """Add tokens to the cached trunk; logits float32 [1, vocab] after the last one, [0, vocab] without tokens."""
        logits = torch.empty(0, self.vocab_size)
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = tokens[start : start + PREFILL_ROWS]
            before = self._cache.trunk
            self._cache.add_trunk(len(part))
            logits = self._forward(np.array(part), np.arange(before, before + len(part)), last=True)
            self._cached += part
        return logits

    @torch.inference_mode()
    def _forward(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], *, last: bool = False) -> torch.Tensor:
        """Logits float32 [n, vocab] of the rows last added to the cache, or [1, vocab] of the last row."""
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
    def children(self, logits: torch.Tensor, positions: NDArray[np.int64]) -> CandidateNodes:
        """Rank the tokens that may stand at `positions` (one a row of `logits`)."""
        settings, options, tau = self._settings, self.options, self.ranked_by
        # The softmax below takes away what log p would have; only the differences count.
        base = logits if settings.greedy else logits / max(settings.temperature, COLDEST)
        if options.ranking == "fitted" and options.shared_noise and not settings.greedy:
            distinct, inverse = np.unique(positions, return_inverse=True)
            noise = np.stack([self._noise.row(settings, int(position)) for position in distinct])
            base = base + torch.from_numpy(noise[inverse]).to(base.device)
        top = base.topk(min(max(LABEL_CANDIDATES, options.growth.width), base.shape[-1]))
        scores = top.values / tau - torch.logsumexp(base / tau, -1, keepdim=True)
        if options.ranking == "raw":
            scores += RAW_DECAY
        return CandidateNodes(top.indices.cpu().numpy(), top.values.cpu().numpy(), scores.cpu().numpy())

    def _prove(self) -> None:
        """A node of a tree must get the logits it gets at the end of a text: layers that keep their state elsewhere
        than in K and V would draft nonsense without a word.  Raises UnsupportedModel."""
        text, sibling = [1 % self.vocab_size, 2 % self.vocab_size], 3 % self.vocab_size
        try:
            self._feed(text[:1])
            visible = np.array([[True, False, False], [False, True, False], [False, True, True]])
            self._cache.add_crown(visible)
            in_tree = self._forward(np.array([sibling, text[1], sibling]), np.array([1, 1, 2]))[-1]
            self._forget_after(0)
            in_text = self._feed([*text, sibling])[-1]
        except Exception as error:  # whatever a layer raises that meets our attention
            raise UnsupportedModel(f"the draft '{self.name}' cannot draft trees: {error}") from error
        finally:
            self._forget_after(0)
        off = float((in_tree - in_text).abs().max() / in_text.abs().max().clamp_min(1e-6))
        if not off <= PROOF_TOLERANCE.get(self.model.dtype, 1e-3):
            raise UnsupportedModel(
                f"the draft '{self.name}' cannot draft trees: a node's logits are {off:.1%} off those of the same "
                "tokens as a text, so some of its layers are not plain attention; name another draft, or none"
            )


class _LevelExpander:
    """One growth's view of the lookahead: growth counts nodes, the lookahead knows rows.  See `growth.ExpandLevel`."""

    def __init__(self, drafter: ModelDrafter, lookahead: ExpandedTree, width: int) -> None:
        self._drafter, self._lookahead, self._width = drafter, lookahead, width
        self._row_of: dict[int, int] = {-1: NO_ROW}
        """By the growth's number."""

    def __call__(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        lookahead = self._lookahead
        above = self._rows_of(parents)
        rows = lookahead.rows(above, tokens)
        new = rows == NO_ROW
        if new.any():
            rows[new] = len(lookahead) + np.arange(new.sum())
            self._drafter.expand(lookahead, above[new], tokens[new], depth[new])
        self._row_of.update(zip(nodes.tolist(), rows.tolist(), strict=True))
        found = lookahead.candidates().of(rows + 1)
        return found.tokens[:, : self._width], found.scores[:, : self._width]

    def known(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        here: NDArray[np.bool_] = self._lookahead.rows(self._rows_of(parents), tokens) != NO_ROW
        return here

    def _rows_of(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self._row_of[node] for node in nodes.tolist()], np.int64)
