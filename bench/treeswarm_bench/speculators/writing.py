"""What a target writes itself, many texts at a time."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

WRITTEN_AT_ONCE = 192
"""Number of texts of one batch.  Each step reads all weights once, so many texts share that."""
# Rows that have ended are dropped once so large a share of a batch has: dropping copies the whole KV cache.
DROPPED_SHARE = 0.25


@torch.no_grad()
def write_texts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    temperature: float,
    seed: int,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Continue prompts until each text has `length` tokens or ends with an end token.  Return the whole texts.

    `ends` are further tokens that end a text.  At temperature 0 the likeliest token is taken.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    all_ends = torch.tensor(sorted({*end_tokens(model), *ends}) or [-1], device=device)
    longest = max(map(len, prompts))
    rows = np.zeros((len(prompts), longest), np.int64)
    seen = np.zeros_like(rows)
    for row, is_seen, prompt in zip(rows, seen, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
        is_seen[longest - len(prompt) :] = 1
    tokens, mask = torch.from_numpy(rows).to(device), torch.from_numpy(seen).to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    texts = [list(prompt) for prompt in prompts]
    writing = torch.arange(len(prompts), device=device)
    going_on = torch.tensor([len(prompt) < length for prompt in prompts], device=device)
    while bool(going_on.any()):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = next_tokens(logits, temperature, generator)
        for row, token, goes_on in zip(writing.tolist(), tokens.tolist(), going_on.tolist(), strict=True):
            if goes_on:
                texts[row].append(token)
        full = torch.tensor([len(texts[row]) >= length for row in writing.tolist()], device=device)
        going_on = going_on & ~full & ~torch.isin(tokens, all_ends)
        tokens, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if 0 < int(going_on.sum()) <= (1 - DROPPED_SHARE) * len(going_on):
            kept = going_on.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            writing, tokens, positions, mask = writing[kept], tokens[kept], positions[kept], mask[kept]
            going_on = going_on[kept]
    return texts


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end a text of this model."""
    end = model.generation_config.eos_token_id
    return set(end if isinstance(end, list) else [] if end is None else [end])


def next_tokens(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Return a token int64 [batch] for each row of logits [batch, vocabulary].

    Sampling inverts the cumulative distribution: torch.multinomial draws a random number per token of the vocabulary,
    which took a third of the time of writing.
    """
    if not temperature:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
