"""A text, and a draft model that agrees with it as often as a script says, without weights.

The draft's logits and the target's tokens are seeded functions of the place in the text.  So every policy meets the
same text and the same luck.  The product's `ModelDrafter` drafts from it: only the forward is scripted.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm_bench.benchmarks.disturbed.world import World
from treeswarm_client.drafters.draft_model import TreeCache
from treeswarm_client.drafters.model import ModelDrafter

VOCAB = 40
PROMPT = 16
LENGTH = 1600
# A text's luck repeats after this many tokens, so that fixed sizes are timed over one such period alone.
PERIOD = 256
# Number of tokens after which a text that changes does so.
STRETCH = 128
# A draft's probabilities: often sure of one token, sometimes of none.
SURE, UNSURE, REST = 1.2, 0.6, 0.5
# The target follows the draft's probabilities sharpened by this temperature, as a draft distilled from it sees it.
TARGET_TAU = 0.6
AGREEMENT = {"good": (0.97, 0.97), "poor": (0.0, 0.0), "changing": (0.97, 0.0)}
"""Chance that the target's token is one of those that the draft considers, by stretches in turn."""


@dataclass(frozen=True, eq=False)
class ScriptedText:
    """The tokens of a text, and the logits of a draft at every place."""

    name: str
    tokens: NDArray[np.int64]
    """The prompt and the target's tokens after it, int64 [PROMPT + LENGTH]."""
    logits: NDArray[np.float32]
    """The draft's logits after each token of the text, float32 [PROMPT + LENGTH, VOCAB]."""
    elsewhere: NDArray[np.float32]
    """The draft's logits off the text's path, by position and token, float32 [some, VOCAB]."""
    answers_elsewhere: NDArray[np.int64]
    """The target's tokens off the text's path, by the same, int64 [some]."""

    @property
    def prompt(self) -> list[int]:
        return [int(token) for token in self.tokens[:PROMPT]]

    def row_elsewhere(self, positions: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of the tables that holds for a token off the path, int64 [n]."""
        return (positions * 131 + tokens * 17) % len(self.elsewhere)

    def answers(
        self, positions: NDArray[np.int64], tokens: NDArray[np.int64], on_path: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Return the target's token after each tree node, int64 [n]."""
        return np.where(
            on_path, self.tokens[positions + 1], self.answers_elsewhere[self.row_elsewhere(positions, tokens)]
        )

    def stretches(self, until: int) -> list[tuple[int, int, bool]]:
        """Return first token, end and goodness of the stretches of the text's first `until` generated tokens."""
        first, second = AGREEMENT[self.name]
        if first == second:
            return [(0, until, first > 0)]
        starts = range(0, until, STRETCH)
        return [(s, min(until, s + STRETCH), (second if (s // STRETCH) % 2 else first) > 0) for s in starts]


@cache
def scripted_text(name: str, seed: int) -> ScriptedText:
    rng = np.random.default_rng(seed)  # texts of one seed differ only in how often the draft is right
    count = PROMPT + LENGTH + 1
    logits, chosen = _distributions(rng, count)
    elsewhere, chosen_elsewhere = _distributions(rng, 997)
    places = np.arange(count) - PROMPT + 1
    first, second = AGREEMENT[name]
    agreement = np.where((places // STRETCH) % 2 == 1, second, first)
    agrees = rng.random(count) < agreement
    after = np.where(agrees, chosen, logits.argmin(1))
    in_period = np.where(places < 0, np.arange(count), PROMPT - 1 + places % PERIOD)
    logits, after = logits[in_period], after[in_period]
    tokens = np.concatenate([rng.integers(VOCAB, size=PROMPT), after[PROMPT - 1 :]])
    answers = np.where(rng.random(997) < max(first, second), chosen_elsewhere, elsewhere.argmin(1))
    return ScriptedText(name, tokens, logits, elsewhere, answers)


def _distributions(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return seeded logits [count, VOCAB], and one token drawn from each row's sharpened distribution."""
    sure = rng.beta(SURE, UNSURE, size=count)
    shares = rng.dirichlet(np.full(VOCAB - 1, REST), size=count) * (1 - sure[:, None])
    probabilities = np.concatenate([sure[:, None], shares], 1) + 1e-6
    probabilities = rng.permuted(probabilities, axis=1)
    sharp = probabilities ** (1 / TARGET_TAU)
    sums = np.cumsum(sharp / sharp.sum(1, keepdims=True), 1)
    chosen = (rng.random(count)[:, None] < sums).argmax(1)
    return np.log(probabilities).astype(np.float32), chosen


@dataclass(frozen=True, eq=False)
class ScriptedDraft:
    """The forward of a draft model: it looks its logits up, and takes the time that the world says."""

    text: ScriptedText
    world: World
    device: torch.device = torch.device("cpu")

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Return no weights."""
        return ()

    def get_input_embeddings(self) -> SimpleNamespace:
        """Return what has one row per token."""
        return SimpleNamespace(weight=torch.empty(VOCAB, 1))

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        treeswarm_cache: TreeCache,
        logits_to_keep: int,
        **_: Any,
    ) -> SimpleNamespace:
        """Return the logits after each row (after the last `logits_to_keep`, if not 0), as transformers' models do.

        The cache stores for each row whether its token is the text's own there.  The prompt takes no time.
        """
        tokens, positions = input_ids[0].numpy(), position_ids[0].numpy()
        if positions[0] > 0:
            self.world.draft_level(len(tokens))
        right = torch.from_numpy(self.text.tokens[positions] == tokens)[None, :, None].float()
        rights, _values = treeswarm_cache.write(0, right, right)
        sees_wrong = rights[0, :, 0] == 0
        if treeswarm_cache.mask is not None:
            sees_wrong = (treeswarm_cache.mask & sees_wrong[None]).any(1)
        else:
            sees_wrong = sees_wrong.any()[None]
        elsewhere = self.text.elsewhere[self.text.row_elsewhere(positions, tokens)]
        logits = np.where(sees_wrong.numpy()[:, None], elsewhere, self.text.logits[positions])
        return SimpleNamespace(logits=torch.from_numpy(logits[-logits_to_keep:])[None])


def scripted_drafter(text: ScriptedText, world: World) -> ModelDrafter:
    """Return the product's drafter over a scripted forward."""
    return ModelDrafter(ScriptedDraft(text, world), VOCAB, 2**20, name="scripted", clock=world.loop.clock)
