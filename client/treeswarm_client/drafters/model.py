"""Drafting with a small model: best-first trees, ranked by what the target is likely to choose."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.model_files import read_config
from treeswarm.programs.devices import AUTO, checkpoint_dtype, choose_device, choose_dtype, describe_machine
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.grammars import unpack_bits
from treeswarm.session.logit_edits import LogitEdits
from treeswarm.session.noise import NoiseRows
from treeswarm_client.drafters.draft_model import LARGEST_CONTEXT, DraftMemory, DraftModel, load_weights
from treeswarm_client.drafters.expanded_tree import NO_ROW, CandidateNodes, ExpandedTree
from treeswarm_client.drafters.model_tree import BEAM, ModelTree, ModelTreeOptions
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.tau import TauEstimate
from treeswarm_client.generation.draft_rules import DraftRules
from treeswarm_client.recent_samples import RecentSamples

log = logging.getLogger(__name__)

# Number of candidates kept per node as a label for τ; at τ < 1 the rest of the vocabulary has no weight.
LABEL_CANDIDATES = 64
# Values at which τ settles for a distilled draft: see docs/decisions/.
GREEDY_PRIOR, SAMPLED_PRIOR = 0.5, 0.8
# Seconds that a small draft's forward takes on a CPU.
FIRST_FORWARD_S = 0.002
# SpecExec's discount per level, which is part of its ranking.
RAW_DECAY = float(np.log(0.95))
# Sampling below this temperature is practically greedy, and logits divided by it would overflow.
COLDEST = 1e-4
# A tree is ranked by one τ.  Once the logarithm of the fitted τ has moved this far, nodes drafted ahead are drafted
# again.
TAU_DRIFT = 0.1
NO_ROWS, ROOT_ROW = np.empty(0, np.int64), np.array([NO_ROW])


@dataclass(frozen=True)
class DraftOptions:
    """Parts of the drafter that a benchmark may switch off; the defaults are what users get."""

    ranking: Literal["fitted", "raw"] = "fitted"
    """`fitted`: ranked with a fitted τ.  `raw`: ranked as SpecExec does, by the draft's own log-probabilities,
    discounted by depth."""
    shared_noise: bool = True
    """True to rank sampled drafts with the target's own noise."""
    chain: bool = False
    """True to draft one best chain instead of a tree."""
    tree: ModelTreeOptions = ModelTreeOptions()
    """How the tree grows."""


@dataclass(eq=False)
class ModelDrafter:
    """A transformers causal LM as a drafter.  What it has learned (τ) outlives a generation; its context does not.

    A child's score is log_softmax((draft_logprobs + gumbel) / τ).  `draft_logprobs` are those at the request's
    temperature, and `gumbel` is the noise with which the target will choose (none if it is greedy).
    """

    model: Any
    vocab_size: int
    """Upper bound of the token ids that are guessed."""
    max_positions: int
    """Number of positions of the model's context."""
    options: DraftOptions = DraftOptions()
    name: str = "model"
    alternatives: int = 0
    _settings: SamplingSettings = field(default_factory=SamplingSettings)
    _rules: DraftRules | None = None
    _text: list[int] = field(default_factory=list)
    _memory: DraftMemory = field(init=False)
    """Which of its tokens the model remembers."""
    _tau_estimates: dict[bool, TauEstimate] = field(
        default_factory=lambda: {True: TauEstimate.fresh(GREEDY_PRIOR), False: TauEstimate.fresh(SAMPLED_PRIOR)}
    )
    """Estimates of τ, by whether the target is greedy."""
    _expanded: ExpandedTree | None = None
    """Nodes drafted below the text's last token, or None; if there are any, that token's row is in the trunk."""
    _tree: ModelTree | None = None
    """The tree that was proposed last below it."""
    _expander: "_LevelExpander" = field(init=False)
    """The expander of that tree."""
    ranking_tau: float = 1.0
    """The τ with which the last proposal was scored."""
    clock: Callable[[], float] = time.perf_counter
    """Returns the time in seconds."""
    _forwards: RecentSamples = RecentSamples()
    """Seconds of the last forwards of new nodes."""

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.vocab_size)
        self._draft = DraftModel(self.model, self.vocab_size)
        self._memory = DraftMemory(min(self.max_positions, LARGEST_CONTEXT))

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
        """Load a model directory.

        With the device `auto`, it is loaded onto a GPU if there is one, in the checkpoint's dtype; else as `dtype`
        says.  `vocab_size` is the target's; the draft's own may be padded beyond it.  `threads` sets the number of
        torch's threads for the whole process.  Raises ModelError, or UnsupportedModel if the layers cannot compute a
        tree.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if device == AUTO:
            device, dtype = _choose_device(folder, dtype)
        model = load_weights(folder, device, dtype)
        config = model.config.get_text_config()
        drafter = cls(
            model=model,
            vocab_size=min(int(config.vocab_size), vocab_size or int(config.vocab_size)),
            max_positions=int(getattr(config, "max_position_embeddings", None) or 2**20),
            options=options or DraftOptions(),
            name=folder.name,
        )
        drafter._draft.check_trees(drafter.name)
        return drafter

    @property
    def tau(self) -> float:
        """The τ fitted so far for the present settings; 1 if the ranking is raw."""
        return self._tau_estimates[self._settings.greedy].value if self.options.ranking == "fitted" else 1.0

    def copy_for_new_generation(self) -> Self:
        """See `CopyableDrafter`; the copy has the same weights and the same τ."""
        return replace(self, _text=[], _expanded=None, _tree=None, _rules=None)

    def obey(self, rules: DraftRules | None) -> None:
        """See `ObeysRules`."""
        self._rules = rules

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """See `Drafter`."""
        self._settings = settings
        self._text = list(prompt)
        # The text may continue the last one, of which the model remembers a part.
        fresh, kept = DraftMemory(self._memory.context), self._memory
        memories = [memory.for_length(len(self._text)) for memory in (fresh, kept)]
        self._remember(max(memories, key=self._known_rows))
        self._draft.feed(self._unread[:-1])

    def _remember(self, memory: DraftMemory) -> None:
        """Remember the tokens that `memory` holds, and forget the rows of all others."""
        self._memory = memory
        # The last token is the root of the next tree: its row is computed when its children are asked for.
        self._forget_after(max(min(self._known_rows(memory), self._remembered - 1), 0))

    def _known_rows(self, memory: DraftMemory) -> int:
        """Return how many rows of the cache are those of the tokens of the text that `memory` holds."""
        known, tokens = self._draft.text, memory.of(self._text)
        return next(
            (i for i, (old, new) in enumerate(zip(known, tokens, strict=False)) if old != new),
            min(len(known), len(tokens)),
        )

    @property
    def _remembered(self) -> int:
        """Number of tokens of the text that the model remembers."""
        return self._memory.rows(len(self._text))

    @property
    def _unread(self) -> list[int]:
        """The last remembered tokens of the text, which the model has not read yet."""
        return self._memory.of(self._text)[len(self._draft.text) :]

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """See `Drafter`."""
        options, chain = self.options.tree, self.options.chain
        if size < 1 or depth < 1 or not self._text:
            return NO_TREE
        self._forget_the_middle()
        depth = min(depth, size if chain else options.depth, self._memory.context - self._remembered)
        options = replace(options, width=1 if chain else options.width, depth=depth)
        if self._tree is None or (self._tree.size, self._tree.options) != (size, options):
            expanded, width = self._expanded_tree(), options.width
            self._tree = ModelTree(size, options, expanded.root.tokens[0, :width], expanded.root.scores[0, :width])
            self._expander = _LevelExpander(self, expanded, width)

        def stop(visits: float) -> bool:
            return should_stop(visits / self._forwards.location(FIRST_FORWARD_S))

        return self._tree.grow(self._expander, stop, self._expander.is_free)

    def _forget_the_middle(self) -> None:
        """Make room for a tree, if the text has outgrown the model's context."""
        memory = self._memory.for_length(len(self._text))
        if memory != self._memory:
            self._remember(memory)

    def observe(self, verification: Verification) -> None:
        """See `Drafter`."""
        path = [int(verification.tree.tokens[node]) for node in verification.accepted]
        self._text += [*path, verification.bonus]
        expanded, self._expanded = self._expanded, None
        self._tree = None
        if expanded is None:
            return
        self._learn_tau(expanded, verification)
        moves = expanded.row_moves(path, verification.bonus)
        reusable = len(moves.to_trunk) > len(path) and abs(math.log(self.tau / self.ranking_tau)) < TAU_DRIFT
        walked = [*path, verification.bonus][: len(moves.to_trunk)]
        self._draft.keep(walked, moves.to_trunk, moves.kept if reusable else moves.kept[:0])
        if reusable:
            self._expanded = expanded.rerooted(moves)
        elif len(self._draft.text) == self._remembered:
            self._forget_after(self._remembered - 1)  # The root's logits are gone, so its row is computed again.

    def _expanded_tree(self) -> ExpandedTree:
        """Return the nodes expanded below the text's last token, at least that token itself."""
        if self._expanded is None:
            self.ranking_tau = self.tau
            unread, start = self._unread, self.clock()
            logits = self._draft.feed(unread)
            if len(unread) <= BEAM:
                self._record_forward(self.clock() - start)
            self._expanded = ExpandedTree(self.children(logits, np.array([len(self._text)]), self._edits()))
        return self._expanded

    def expand(
        self,
        expanded: ExpandedTree,
        parents: NDArray[np.int64],
        tokens: NDArray[np.int64],
        depth: NDArray[np.int64],
    ) -> None:
        """Compute n new nodes of `expanded` in one forward.

        The nodes are below the rows `parents` and on the levels `depth` below the root, [n] each.
        """
        start, before = self.clock(), len(expanded)
        logits = self._draft.add_nodes(expanded.add(parents, tokens), tokens, self._remembered - 1 + depth)
        edits = self._edits(expanded, np.arange(before, len(expanded)))
        expanded.add_candidates(self.children(logits, len(self._text) + depth, edits))
        self._record_forward(self.clock() - start)

    def _record_forward(self, seconds: float) -> None:
        """Learn how long a forward of few tokens takes.

        The forward of the root counts too: a drafter that overestimates forwards would make no others.
        """
        self._forwards = self._forwards.updated(seconds)

    def _learn_tau(self, expanded: ExpandedTree, verification: Verification) -> None:
        """Learn τ: every verified node that the draft has expanded too is a label."""
        rows = np.concatenate([[0], expanded.rows_of(verification.tree) + 1])
        answers = np.asarray(verification.answers, np.int64)
        nodes = np.flatnonzero(((rows > 0) | (np.arange(len(rows)) == 0)) & (answers != UNANSWERED))
        candidates = expanded.candidates().select(rows[nodes])
        is_answer = candidates.tokens == answers[nodes][:, None]
        labelled = is_answer.any(1)
        estimate = self._tau_estimates[self._settings.greedy]
        self._tau_estimates[self._settings.greedy] = estimate.with_labels(
            candidates.raw_scores[labelled], is_answer[labelled].argmax(1)
        )

    def _forget_after(self, length: int) -> None:
        self._expanded = self._tree = None
        self._draft.cut(length)

    def _edits(self, expanded: ExpandedTree | None = None, rows: NDArray[np.int64] = ROOT_ROW) -> LogitEdits | None:
        """Return what the text's rules change after crown rows, by default after the text's last token."""
        if self._rules is None:
            return None
        parents, tokens = (NO_ROWS, NO_ROWS) if expanded is None else expanded.nodes
        return self._rules.edits(parents, tokens, rows)

    def children(
        self, logits: torch.Tensor, positions: NDArray[np.int64], edits: LogitEdits | None = None
    ) -> CandidateNodes:
        """Return the best tokens for each of the `positions` in the text, [n], given `logits`, [n, vocab].

        `edits` are what the rules of the text change there.
        """
        with self._draft.fitting_threads():
            return self._children(logits if edits is None else _edited(logits, edits), positions)

    @torch.inference_mode()
    def _children(self, logits: torch.Tensor, positions: NDArray[np.int64]) -> CandidateNodes:
        settings, options, tau = self._settings, self.options, self.ranking_tau
        # Only differences of logits count: the softmax below removes what a log-softmax here would.
        base = logits if settings.greedy else logits / max(settings.temperature, COLDEST)
        if options.ranking == "fitted" and options.shared_noise and not settings.greedy:
            distinct, inverse = np.unique(positions, return_inverse=True)
            noise = np.stack([self._noise.row(settings, int(position)) for position in distinct])
            base = base + torch.from_numpy(noise[inverse]).to(base.device)
        top = base.topk(min(max(LABEL_CANDIDATES, options.tree.width), base.shape[-1]))
        scores = top.values / tau - torch.logsumexp(base / tau, -1, keepdim=True)
        if options.ranking == "raw":
            scores += RAW_DECAY
        return CandidateNodes(top.indices.cpu().numpy(), top.values.cpu().numpy(), scores.cpu().numpy())


def _edited(logits: torch.Tensor, edits: LogitEdits) -> torch.Tensor:
    """Return logits [n, vocab] as rules change them."""
    edits, changed = edits.within(logits.shape[1]), logits.clone()
    columns = torch.from_numpy(edits.tokens).to(logits.device)
    after = torch.from_numpy(edits.edited(logits.index_select(1, columns).cpu().numpy())).to(logits.device)
    changed.index_copy_(1, columns, after)
    if edits.masks is not None:
        excluded = ~torch.from_numpy(unpack_bits(edits.masks, logits.shape[1])).to(logits.device)
        excluded[excluded.all(1)] = False  # after the end of a text no guess is right, and one must be named
        changed.masked_fill_(excluded, -torch.inf)
    return changed


class _LevelExpander:
    """The `ExpandLevel` of one tree: translates the numbers of the tree's nodes to rows of the `ExpandedTree`."""

    def __init__(self, drafter: ModelDrafter, expanded: ExpandedTree, width: int) -> None:
        self._drafter, self._expanded, self._width = drafter, expanded, width
        self._row_of: dict[int, int] = {-1: NO_ROW}
        """Row of each node, by its number in the tree."""

    def __call__(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        above = self._rows_of(parents)
        rows = self._expanded.rows(above, tokens)
        new = rows == NO_ROW
        if new.any():
            rows[new] = len(self._expanded) + np.arange(new.sum())
            self._drafter.expand(self._expanded, above[new], tokens[new], depth[new])
        self._row_of.update(zip(nodes.tolist(), rows.tolist(), strict=True))
        candidates = self._expanded.candidates().select(rows + 1)
        return candidates.tokens[:, : self._width], candidates.scores[:, : self._width]

    def is_free(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which nodes have a row already, so that their children cost no forward, bool [n]."""
        has_row: NDArray[np.bool_] = self._expanded.rows(self._rows_of(parents), tokens) != NO_ROW
        return has_row

    def _rows_of(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self._row_of[node] for node in nodes.tolist()], np.int64)


def _choose_device(folder: Path, dtype: str) -> tuple[str, str]:
    """Return the device for a draft model, and its dtype there: on a CPU `dtype`."""
    machine = describe_machine(torch)
    device = choose_device(AUTO, machine)
    if device.name != "cpu":
        dtype, _ = choose_dtype(AUTO, device.name, machine, checkpoint_dtype(read_config(folder)))
    log.info("the draft model computes on %s in %s (auto: %s)", device.name, dtype, device.why)
    return device.name, dtype
