"""The autoregressive head: one decoder layer that guesses the token after next from the target's states.

Input i is the target's state at row i, fused from several blocks, together with the embedding of the token after it.
Result i scores the token after that, and stands for the state of the next row where the target has computed none yet.
So the head goes on below its own guesses (EAGLE-3, arXiv 2503.01840).  Embedding and LM head are the target's own.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

EPSILON = 1e-6


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head."""

    hidden_size: int
    """Number of values in one state of the target."""
    taps: int
    """Number of blocks whose results are fused."""
    heads: int
    """Number of attention heads."""
    kv_heads: int
    """Number of heads of keys and values."""
    head_dim: int
    intermediate_size: int
    window: int
    """Number of rows, itself included, that a row attends to.  The training sees no longer distances."""


class SpeculatorHead(torch.nn.Module):
    """The weights of a head, and what one layer computes with them."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden_size, shape.heads * shape.head_dim
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=2 * shape.window,
        )
        self.fuse = torch.nn.Linear(shape.taps * hidden, hidden, bias=False)
        self.token_norm = LlamaRMSNorm(hidden, EPSILON)
        self.state_norm = LlamaRMSNorm(hidden, EPSILON)
        self.q_proj = torch.nn.Linear(2 * hidden, width, bias=False)
        self.k_proj = torch.nn.Linear(2 * hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = torch.nn.Linear(2 * hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = torch.nn.Linear(width, hidden, bias=False)
        self.mlp_norm = LlamaRMSNorm(hidden, EPSILON)
        self.mlp = LlamaMLP(config)
        self.result_norm = LlamaRMSNorm(hidden, EPSILON)
        self.rotary = LlamaRotaryEmbedding(config)

    def fused(self, states: torch.Tensor) -> torch.Tensor:
        """Return one state [..., hidden] of the states of all taps [..., taps · hidden], each normed by itself."""
        each = states.to(self.fuse.weight.dtype).view(*states.shape[:-1], self.shape.taps, -1)
        fused: torch.Tensor = self.fuse(rms_norm(each, each.shape[-1:], eps=EPSILON).flatten(-2))
        return fused

    def attention_inputs(
        self, state: torch.Tensor, embedded: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values [batch, heads, n, dim] of rows [batch, n, hidden] at positions int64 [n]."""
        inputs = torch.cat([self.token_norm(embedded), self.state_norm(state)], -1)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary(state, positions[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query, key, value

    def result(
        self,
        state: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the results [batch, n, hidden] of rows with these states; `mask` is bool [n, keys]."""
        attended = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=query.shape[1] != keys.shape[1]
        )
        state = state + self.o_proj(attended.transpose(1, 2).flatten(-2))
        result: torch.Tensor = state + self.mlp(self.mlp_norm(state))
        return result

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores [..., tokens] of the token after each row's next one, by an LM head [tokens, hidden]."""
        return linear(self.result_norm(result), lm_head)

    def unroll(self, states: torch.Tensor, embedded: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Return the results of `steps` steps over whole texts, [batch, n, hidden] each, as in drafting.

        `states` [batch, n, taps · hidden] are the target's, and `embedded` [batch, n, hidden] are the embeddings of the
        token after each row.  In step k, row i takes the result of step k - 1 at row i - 1 for its state, as a node k
        levels below a root does.  The first k - 1 rows of a step mean nothing.
        """
        count = states.shape[1]
        positions = torch.arange(count, device=states.device)
        state, results = self.fused(states), []
        all_keys: list[torch.Tensor] = []
        all_values: list[torch.Tensor] = []
        for step in range(steps):
            query, key, value = self.attention_inputs(state, embedded, positions)
            all_keys.append(key)
            all_values.append(value)
            mask = unrolled_mask(count, step, self.shape.window).to(states.device)
            results.append(self.result(state, query, torch.cat(all_keys, 2), torch.cat(all_values, 2), mask))
            state = torch.nn.functional.pad(results[-1][:, :-1], (0, 0, 1, 0))
        return results


@lru_cache(maxsize=32)
def unrolled_mask(count: int, step: int, window: int) -> torch.Tensor:
    """Return which keys each row of a step sees, bool [count, (step + 1) · count]; steps are counted from 0.

    Row i sees the target's rows up to i - step, which is where its root is, and one row of each step since.
    """
    rows, keys = torch.arange(count)[:, None], torch.arange(count)
    visible = [(keys <= rows - step) & (keys > rows - window)]
    visible += [keys == rows - (step - later) for later in range(1, step + 1)]
    return torch.cat(visible, 1)
