"""Several calls of `generate` that go on with one text."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from treeswarm.errors import BadRequest
from treeswarm_client.generation.run import Run
from treeswarm_client.hf.prompts import unpack_inputs

if TYPE_CHECKING:
    from treeswarm_client.hf.model import AutoSwarmModelForCausalLM, SwarmGenerateOutput


class InferenceSession:
    """One text, turn by turn: `generate` takes what is new and returns the whole.

        with model.inference_session() as session:
            session.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)
            session.generate(**tokenizer(" Then", return_tensors="pt"), max_new_tokens=20)

    Between turns the nodes keep the KV of the text, in whole units of 64 tokens and while they have room, for this
    client alone; so a turn costs little more than its new tokens, as `prefix_tokens` tells.  A tokenizer that puts a
    begin token before every text should not from the second turn on: `add_special_tokens=False`.
    """

    def __init__(self, model: "AutoSwarmModelForCausalLM") -> None:
        if model.client.client.prefix_scope == "none":
            raise BadRequest(
                "a session keeps its KV by sharing beginnings among one client's generations, which prefix_scope="
                "'none' forbids: open the model with prefix_scope='client'"
            )
        self._model = model
        self._open = True
        self.token_ids = torch.empty((1, 0), dtype=torch.int64)
        """The whole text so far, int64 [1, length]."""
        self.runs: list[Run] = []
        """One a turn."""

    @property
    def prefix_tokens(self) -> int:
        """How many tokens of the last turn's text the nodes had already."""
        return self.runs[-1].prefix_tokens if self.runs else 0

    def generate(
        self, inputs: Any = None, *, input_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> "torch.Tensor | SwarmGenerateOutput":
        """Append the new tokens (none: just go on) and continue; options as the model's `generate`.  A turn that fails
        leaves the text as it was.  Raises BadRequest for more than one row or sample, or padding."""
        if not self._open:
            raise BadRequest("this session is closed: open another with model.inference_session()")
        new, mask = unpack_inputs(inputs, input_ids, attention_mask)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise BadRequest("a session's text has no padding: leave attention_mask out")
        whole = self._with(new)
        as_output = options.pop("return_dict_in_generate", False)
        # Else a pad token within the text would be taken for padding.
        ones = None if whole is None else torch.ones_like(whole)
        out = self._model.generate(whole, attention_mask=ones, return_dict_in_generate=True, **options)
        if len(out.runs) != 1:
            raise BadRequest("a session continues one text: leave num_return_sequences out")
        self.token_ids = out.sequences
        self.runs.extend(out.runs)
        return out if as_output else out.sequences  # type: ignore[no-any-return]

    def close(self) -> None:
        """The nodes drop what they keep when they need the room, or this client is gone."""
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _with(self, new: Any) -> torch.Tensor | None:
        """The text so far and what is new."""
        if new is None:
            return self.token_ids if self.token_ids.numel() else None
        try:
            given = torch.as_tensor(new)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadRequest(f"the turn's tokens are no token ids ({error}): give a tokenizer's output") from None
        given = given[None] if given.ndim == 1 else given
        if given.ndim != 2 or given.shape[0] != 1:
            raise BadRequest(f"a session continues one text: {list(given.shape)} were given, not [1, tokens]")
        return torch.cat([self.token_ids.to(given.device), given.long()], 1)
