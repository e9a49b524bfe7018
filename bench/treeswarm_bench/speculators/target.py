"""The target of a speculator's training: its states and logits over whole texts, and what it writes itself."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], length: int, *, sampled: bool, seed: int) -> list[list[int]]:
        """Continue prompts until each text has `length` tokens or ends.  Return the whole texts."""
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [] if end is None else [end])
        padding = next(iter(ends), 0)
        rows = np.full((len(prompts), longest), padding, np.int64)
        mask = np.zeros_like(rows)
        for row, seen, prompt in zip(rows, mask, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
            seen[longest - len(prompt) :] = 1
        device = self.model.device
        written: NDArray[np.int64] = (
            self.model.generate(
                torch.from_numpy(rows).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max(1, length - min(map(len, prompts))),
                do_sample=sampled,
                pad_token_id=padding,
                **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {"top_p": None, "temperature": None}),
            )
            .cpu()
            .numpy()
        )
        texts = []
        for prompt, row in zip(prompts, written, strict=True):
            added = row[longest:].tolist()
            stop = next((i + 1 for i, token in enumerate(added) if token in ends), len(added))
            texts.append([*prompt, *added[:stop]][:length])
        return texts
