"""Batches as transformers has them, padded tensors, and as a swarm has them: one session a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm_client.hf.arguments import GenerateArguments


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """What `generate` was given."""

    ids: torch.Tensor
    """int64 [rows, length], padding included, on the CPU."""
    rows: tuple[list[int], ...]
    """Without their padding."""
    device: torch.device
    """Where the caller has them."""

    @property
    def length(self) -> int:
        """Of the padded rows."""
        return int(self.ids.shape[1])


def make_batch(inputs: Any, attention_mask: Any, asked: GenerateArguments) -> PromptBatch:
    """Rows of a tensor or nested list; None is the begin token.  Raises BadRequest for what is no left-padded batch."""
    if inputs is None:
        if asked.bos_id is None:
            raise BadRequest("there is no prompt, and the model has no begin token: give input_ids")
        inputs = [[asked.bos_id]]
    given = _as_tensor(inputs, "input_ids")
    ids = given.to("cpu", torch.int64)
    mask = _inferred_mask(ids, asked) if attention_mask is None else _as_tensor(attention_mask, "attention_mask").cpu()
    if mask.shape != ids.shape:
        raise BadRequest(f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}: they must be alike")
    kept = mask != 0
    if not bool((kept[:, 1:] >= kept[:, :-1]).all()):
        if attention_mask is None:
            raise BadRequest(
                f"the pad token {asked.pad_id} stands behind other tokens: give attention_mask to say what is padding"
            )
        raise BadRequest(
            "attention_mask hides tokens after others: a batch must be padded on the left; set "
            "tokenizer.padding_side = 'left'"
        )
    if not bool(kept.any(dim=1).all()):
        raise BadRequest("a row of the batch is empty: give every row some text to continue")
    rows = tuple(row[keep].tolist() for row, keep in zip(ids, kept, strict=True))
    return PromptBatch(ids, rows, given.device)


def unpack_inputs(inputs: Any, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask, where `inputs` may also be a tokenizer's whole output.  Raises BadRequest for two prompts."""
    if inputs is not None and input_ids is not None:
        raise BadRequest("both inputs and input_ids are given: give one")
    inputs = input_ids if inputs is None else inputs
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise BadRequest("inputs has no input_ids: give a tokenizer's output, or token ids")
        return inputs["input_ids"], inputs.get("attention_mask") if attention_mask is None else attention_mask
    return inputs, attention_mask


def check_token_types(token_type_ids: Any) -> None:
    """Some tokenizers add them; zeros change nothing.  Raises BadRequest for others."""
    if token_type_ids is not None and bool(torch.as_tensor(token_type_ids).any()):
        raise BadRequest("token_type_ids other than 0 mean nothing to a decoder: leave them out")


def join_continuations(prompts: PromptBatch, asked: GenerateArguments, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [rows × samples, longest]: each row's prompt with each of its samples, padded on the right."""
    longest = max(len(text) for text in texts)
    pad = 0 if asked.pad_id is None else asked.pad_id
    new = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], dtype=torch.int64)
    return torch.cat([prompts.ids.repeat_interleave(asked.samples, 0), new], 1).to(prompts.device)


def _as_tensor(values: Any, name: str) -> torch.Tensor:
    if isinstance(values, str):
        raise BadRequest(f"{name} is text: tokenize it first, `tokenizer(text, return_tensors='pt')`")
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"{name} is no rectangle of token ids ({error}): pad it, with return_tensors='pt'") from None
    if found.ndim == 1:
        found = found[None]
    if found.ndim != 2 or not found.numel() or found.is_floating_point():
        raise BadRequest(f"{name} is {found.dtype} {list(found.shape)}: give whole numbers, [rows, tokens]")
    return found


def _inferred_mask(ids: torch.Tensor, asked: GenerateArguments) -> torch.Tensor:
    """As transformers does: padding is what equals the pad token, unless that also ends texts."""
    if asked.pad_id is None or asked.pad_id in asked.eos_ids:
        return torch.ones_like(ids)
    return ids.ne(asked.pad_id).long()
