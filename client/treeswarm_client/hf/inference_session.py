"""A text that several calls of `generate` continue."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from treeswarm.errors import BadRequest
from treeswarm_client.chain.shared_prompt import PrefixScope
from treeswarm_client.generation.run import Run
from treeswarm_client.hf.output import SwarmGenerateOutput
from treeswarm_client.hf.prompts import unpack_inputs


class InferenceSession:
    """One text, continued turn by turn: `generate` takes the new tokens and returns the whole text.

        with model.inference_session() as session:
            session.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)
            session.generate(**tokenizer(" Then", return_tensors="pt"), max_new_tokens=20)

    Between turns the nodes keep the KV cache of the text, in whole units of 64 tokens and while they have room, for
    this client alone.  So a turn costs little more than its new tokens, as `prefix_tokens` shows.  A tokenizer that
    puts a begin token before every text should not do so from the second turn on: `add_special_tokens=False`.
    """

    def __init__(self, generate: Callable[..., Any], prefix_scope: PrefixScope) -> None:
        """Continue texts with `generate`, the method of a model whose client shares prefixes by `prefix_scope`.

        Raises BadRequest if the client shares no prefixes.
        """
        if prefix_scope == "none":
            raise BadRequest(
                "a session needs the nodes to keep its KV cache, and prefix_scope='none' forbids that: open the model "
                "with prefix_scope='client'"
            )
        self._generate = generate
        self._open = True
        self.token_ids = torch.empty((1, 0), dtype=torch.int64)
        """Token ids of the whole text so far, int64 [1, length]."""
        self.runs: list[Run] = []
        """The generations so far, one per turn."""

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens of the last turn's text that the nodes had in their caches."""
        return self.runs[-1].prefix_tokens if self.runs else 0

    def generate(
        self, inputs: Any = None, *, input_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> torch.Tensor | SwarmGenerateOutput:
        """Append the new tokens, if any, and continue the text; options are those of the model's `generate`.

        Returns the whole text, int64 [1, length], or a SwarmGenerateOutput with `return_dict_in_generate`.  A turn that
        fails leaves the text as it was.  Raises BadRequest for more than one row or sample, and for padding.
        """
        if not self._open:
            raise BadRequest("this session is closed: open another with model.inference_session()")
        new_ids, mask = unpack_inputs(inputs, input_ids, attention_mask)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise BadRequest("the attention_mask hides tokens, but a session's text has no padding: leave it out")
        whole = self._append(new_ids)
        as_output = options.pop("return_dict_in_generate", False)
        # Without this mask, a pad token within the text would be taken for padding.
        ones = None if whole is None else torch.ones_like(whole)
        output = self._generate(whole, attention_mask=ones, return_dict_in_generate=True, **options)
        if len(output.runs) != 1:
            raise BadRequest("a session continues one text: leave num_return_sequences out")
        self.token_ids = output.sequences
        self.runs.extend(output.runs)
        return output if as_output else output.sequences  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the session.  The nodes drop its KV cache when they need the room, or when this client is gone."""
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, new_ids: Any) -> torch.Tensor | None:
        """Return the text so far with the new tokens behind it, or None if both are empty."""
        if new_ids is None:
            return self.token_ids if self.token_ids.numel() else None
        try:
            ids = torch.as_tensor(new_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadRequest(f"the turn's input holds no token ids ({error}): give a tokenizer's output") from None
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != 1:
            raise BadRequest(f"the turn's input has shape {list(ids.shape)}: a session takes one text, [1, tokens]")
        return torch.cat([self.token_ids.to(ids.device), ids.long()], 1)
