"""A whole causal LM that reads trees below a text it remembers.

Benches without a swarm use it as the target and as the draft model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from treeswarm_client.drafters import draft_model
from treeswarm_client.drafters.draft_model import TreeCache


def _no_rows() -> NDArray[np.bool_]:
    return np.empty((0, 0), np.bool_)


@dataclass(eq=False)
class CachedModel:
    """A transformers model in float32 with a tree-shaped KV cache: the text's rows, then those of a tree below it."""

    model: Any
    _cache: TreeCache = field(default_factory=TreeCache)
    _visible: NDArray[np.bool_] = field(default_factory=_no_rows)
    """Which rows of the tree each of its rows sees, bool [rows, rows]."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a model directory."""
        transformers.utils.logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return cls.of(model)

    @classmethod
    def of(cls, model: Any) -> Self:
        """Wrap a loaded model, and replace its attention."""
        draft_model.register()
        model.set_attn_implementation(draft_model.IMPLEMENTATION)
        return cls(model.eval().requires_grad_(False))

    def begin(self, text: Sequence[int]) -> None:
        """Forget text and tree, and read another text, which may be empty."""
        self._cache.cut(0)
        self._visible = _no_rows()
        self._read(text)

    def below(self, parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add rows to the tree and return the logits after each, float32 [n, vocab].

        `parents` are rows of the tree, which may be added in the same call but before their children; −1 is the text.
        """
        old, rows = len(self._visible), len(self._visible) + len(tokens)
        visible = np.zeros((rows, rows), np.bool_)
        visible[:old, :old] = self._visible
        for row, parent in enumerate(parents, old):
            if parent >= 0:
                visible[row] = visible[parent]
            visible[row, row] = True
        self._visible = visible
        self._cache.add_crown(visible[old:])
        return self._forward(tokens, self._cache.trunk + visible[old:].sum(1) - 1)

    def advance(self, path: Sequence[int], more: Sequence[int] = ()) -> None:
        """Append a path of the tree's rows to the text, then the tokens `more`, and forget the rest of the tree."""
        self._cache.keep(np.array(path, np.int64), np.empty(0, np.int64))
        self._visible = _no_rows()
        self._read(more)

    def _read(self, tokens: Sequence[int]) -> None:
        if len(tokens):
            before = self._cache.trunk
            self._cache.add_trunk(len(tokens))
            self._forward(tokens, np.arange(before, before + len(tokens)))

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], positions: NDArray[np.int64]) -> torch.Tensor:
        output = self.model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
            treeswarm_cache=self._cache,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits
