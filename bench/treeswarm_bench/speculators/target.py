"""The target of a speculator's training: its states and logits over whole texts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from treeswarm.errors import ModelError
from treeswarm_node.model.families.blocks import find_blocks


@dataclass(frozen=True, eq=False)
class TappedTarget:
    """A whole causal LM of transformers."""

    model: Any
    taps: tuple[int, ...]
    """Indices of the blocks whose results are the states."""

    @classmethod
    def load(cls, folder: Path, taps: Sequence[int], device: str, dtype: str) -> "TappedTarget":
        """Load a model directory.  `taps` may be empty for the last three blocks.  Raises ModelError."""
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        except Exception as error:  # transformers may raise anything that its parts raise
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"the model in '{folder}' cannot be loaded: {first_line}") from error
        blocks = len(find_blocks(model).layers)
        chosen = tuple(taps) or tuple(range(max(0, blocks - 3), blocks))
        if not all(0 <= tap < blocks for tap in chosen):
            raise ModelError(f"--taps {','.join(map(str, chosen))} are not blocks of this model, which has {blocks}")
        return cls(model.to(device).eval().requires_grad_(False), tuple(sorted(set(chosen))))

    @property
    def config(self) -> Any:
        """Config of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def lm_head(self) -> torch.Tensor:
        """LM head, [vocabulary, hidden]."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def embedding(self) -> torch.Tensor:
        """Embedding, [vocabulary, hidden]."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def is_tied(self) -> bool:
        """Whether LM head and embedding are one matrix."""
        return bool(self.config.tie_word_embeddings)

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states [batch, n, taps · hidden] and logits [batch, n, vocabulary] of texts int64 [batch, n]."""
        with self._recording() as results:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return torch.cat([results[tap] for tap in self.taps], -1), logits

    @contextmanager
    def _recording(self) -> Iterator[dict[int, torch.Tensor]]:
        """Yield what the tapped blocks return in a forward, by index."""
        results: dict[int, torch.Tensor] = {}
        layers = find_blocks(self.model).layers
        with ExitStack() as stack:
            for tap in self.taps:

                def keep(_: Any, __: Any, result: Any, tap: int = tap) -> None:
                    results[tap] = result[0] if isinstance(result, tuple | list) else result

                stack.callback(layers[tap].register_forward_hook(keep).remove)
            yield results
