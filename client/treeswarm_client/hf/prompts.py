"""Conversion between transformers' batches, padded tensors, and a swarm's, one session per row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm_client.hf.arguments import SpecialTokens


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """The prompts of one `generate` call."""

    ids: torch.Tensor
    """Token ids, int64 [rows, length], padding included, on the CPU."""
    rows: tuple[list[int], ...]
    """Token ids of each row without its padding."""
    device: torch.device
    """Device on which the caller has the ids, and gets the result."""

    @property
    def length(self) -> int:
        """Number of tokens of each padded row."""
        return int(self.ids.shape[1])


def make_batch(inputs: Any, attention_mask: Any, special: SpecialTokens) -> PromptBatch:
    """Return the prompts of a tensor or nested list of token ids, [rows, tokens]; None stands for the begin token.

    Raises BadRequest for anything but a left-padded batch.
    """
    if inputs is None:
        if special.bos_id is None:
            raise BadRequest("there is no prompt, and the model has no begin token: give input_ids")
        inputs = [[special.bos_id]]
    tensor = _as_tensor(inputs, "input_ids")
    ids = tensor.to("cpu", torch.int64)
    mask = _infer_mask(ids, special) if attention_mask is None else _as_tensor(attention_mask, "attention_mask").cpu()
    if mask.shape != ids.shape:
        raise BadRequest(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}: the shapes must be alike"
        )
    kept = mask != 0
    if not bool((kept[:, 1:] >= kept[:, :-1]).all()):
        if attention_mask is None:
            raise BadRequest(
                f"the pad token {special.pad_id} follows other tokens: give attention_mask to say what is padding"
            )
        raise BadRequest(
            "attention_mask hides tokens that follow others: pad the batch on the left, with "
            "tokenizer.padding_side = 'left'"
        )
    if not bool(kept.any(dim=1).all()):
        raise BadRequest("a row of the batch is empty: give every row some text to continue")
    rows = tuple(row[keep].tolist() for row, keep in zip(ids, kept, strict=True))
    return PromptBatch(ids, rows, tensor.device)


def unpack_inputs(inputs: Any, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Return token ids and attention mask; `inputs` may also be a tokenizer's whole output.

    Raises BadRequest if two prompts are given.
    """
    if inputs is not None and input_ids is not None:
        raise BadRequest("both inputs and input_ids are given: give one")
    inputs = input_ids if inputs is None else inputs
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise BadRequest("inputs has no input_ids: give a tokenizer's output, or token ids")
        return inputs["input_ids"], inputs.get("attention_mask") if attention_mask is None else attention_mask
    return inputs, attention_mask


def check_token_types(token_type_ids: Any) -> None:
    """Accept zeros, which some tokenizers add and which change nothing.  Raises BadRequest for other values."""
    if token_type_ids is not None and bool(torch.as_tensor(token_type_ids).any()):
        raise BadRequest("token_type_ids other than 0 mean nothing to a decoder: leave them out")


def join_continuations(
    prompts: PromptBatch, continuations: Sequence[Sequence[int]], *, samples: int, pad_id: int | None
) -> torch.Tensor:
    """Return each row's prompt followed by each of its samples, padded on the right.

    The result is int64 [rows × samples, length of the longest] on the caller's device.
    """
    longest = max(len(ids) for ids in continuations)
    pad = 0 if pad_id is None else pad_id
    padded = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in continuations], dtype=torch.int64)
    return torch.cat([prompts.ids.repeat_interleave(samples, 0), padded], 1).to(prompts.device)


def _as_tensor(values: Any, name: str) -> torch.Tensor:
    if isinstance(values, str):
        raise BadRequest(f"{name} is text: tokenize it first, with `tokenizer(text, return_tensors='pt')`")
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(
            f"{name} is not a rectangle of token ids ({error}): pad it, with return_tensors='pt'"
        ) from None
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or not tensor.numel() or tensor.is_floating_point():
        raise BadRequest(f"{name} is {tensor.dtype} {list(tensor.shape)}: give whole numbers, [rows, tokens]")
    return tensor


def _infer_mask(ids: torch.Tensor, special: SpecialTokens) -> torch.Tensor:
    """Return the mask that transformers would infer: pad tokens are padding, unless they also end texts."""
    if special.pad_id is None or special.pad_id in special.eos_ids:
        return torch.ones_like(ids)
    return ids.ne(special.pad_id).long()
