"""The autoregressive head: one decoder layer that guesses the token after next from the target's states.

Input i is the target's state at row i, fused from several blocks, together with the embedding of the token after it.
Result i scores the token after that, and stands for the state of the next row where the target has computed none yet.
So the head goes on below its own guesses (EAGLE-3, arXiv 2503.01840).  A head that is trained here has the target's
embedding and LM head; a published one may have its own, and other norms (`HeadRecipe`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

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
FIRST_MATRIX = "fuse.weight"
"""Name of the matrix over the states of all taps."""


class TapNorm(StrEnum):
    """How the states of the taps are normed before they are fused."""

    UNWEIGHTED = "unweighted"
    """Each by itself, without weights: heads that are trained here."""
    NONE = "none"
    EACH = "each"
    """Each by itself, with weights: `fc_norm` of published heads."""
    JOINED = "joined"
    """All together, with weights: `norm_before_fc` of published heads."""


@dataclass(frozen=True)
class HeadRecipe:
    """How a head computes, as far as published heads differ from those that are trained here."""

    tap_norm: TapNorm = TapNorm.UNWEIGHTED
    norm_before_residual: bool = False
    """Whether the attention's result is added to the normed state, not to the state itself."""
    norm_output: bool = False
    """Whether the result is normed before it becomes the next row's state, not only before it is scored."""
    query_key_norm: bool = False
    """Whether queries and keys are normed in each attention head, as in Qwen3's layers."""
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    """Name of the MLP's activation function, as transformers knows it."""
    epsilon: float = EPSILON
    """Number that the norms add to a variance."""
    rope: Mapping[str, Any] | None = None
    """Transformers' parameters of the rotary embedding, or None for the default ones."""


TRAINED_HERE = HeadRecipe()


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head."""

    hidden_size: int
    """Number of values in one of the head's own states."""
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
    state_size: int | None = None
    """Number of values in one state of the target, or None if they are as many as in the head's own."""


class SpeculatorHead(torch.nn.Module):
    """The weights of a head, and what one layer computes with them."""

    def __init__(self, shape: HeadShape, recipe: HeadRecipe = TRAINED_HERE) -> None:
        super().__init__()
        self.shape, self.recipe = shape, recipe
        hidden, width, bias, epsilon = (
            shape.hidden_size, shape.heads * shape.head_dim, recipe.attention_bias, recipe.epsilon
        )  # fmt: skip
        state_size = shape.state_size or hidden
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=2 * shape.window,
            hidden_act=recipe.activation,
            mlp_bias=recipe.mlp_bias,
            rope_parameters=None if recipe.rope is None else dict(recipe.rope),
        )
        self.fuse = torch.nn.Linear(shape.taps * state_size, hidden, bias=False)
        if recipe.tap_norm is TapNorm.EACH:
            self.tap_norms = torch.nn.ModuleList(LlamaRMSNorm(state_size, epsilon) for _ in range(shape.taps))
        if recipe.tap_norm is TapNorm.JOINED:
            self.joined_norm = LlamaRMSNorm(shape.taps * state_size, epsilon)
        self.token_norm = LlamaRMSNorm(hidden, epsilon)
        self.state_norm = LlamaRMSNorm(hidden, epsilon)
        self.q_proj = torch.nn.Linear(2 * hidden, width, bias=bias)
        self.k_proj = torch.nn.Linear(2 * hidden, shape.kv_heads * shape.head_dim, bias=bias)
        self.v_proj = torch.nn.Linear(2 * hidden, shape.kv_heads * shape.head_dim, bias=bias)
        self.o_proj = torch.nn.Linear(width, hidden, bias=bias)
        if recipe.query_key_norm:
            self.query_norm = LlamaRMSNorm(shape.head_dim, epsilon)
            self.key_norm = LlamaRMSNorm(shape.head_dim, epsilon)
        self.mlp_norm = LlamaRMSNorm(hidden, epsilon)
        self.mlp = LlamaMLP(config)
        self.result_norm = LlamaRMSNorm(hidden, epsilon)
        self.rotary = LlamaRotaryEmbedding(config)

    def fused(self, states: torch.Tensor) -> torch.Tensor:
        """Return one state [..., hidden] of the states of all taps [..., taps · state], which are normed before."""
        each = states.to(self.fuse.weight.dtype).view(*states.shape[:-1], self.shape.taps, -1)
        fused: torch.Tensor = self.fuse(self._normed_taps(each))
        return fused

    def _normed_taps(self, each: torch.Tensor) -> torch.Tensor:
        """Return the states [..., taps, state] of the taps side by side, normed as the recipe says."""
        match self.recipe.tap_norm:
            case TapNorm.UNWEIGHTED:
                each = rms_norm(each, each.shape[-1:], eps=self.recipe.epsilon)
            case TapNorm.EACH:
                each = torch.stack([norm(each[..., i, :]) for i, norm in enumerate(self.tap_norms)], -2)
            case TapNorm.JOINED:
                return torch.as_tensor(self.joined_norm(each.flatten(-2)))
        return each.flatten(-2)

    def keep_columns(self, taps: range) -> list[torch.Tensor]:
        """Return the columns of `fuse` for these taps, [hidden, state] each, and forget the others.

        If some are forgotten, `fused` cannot be used any more.
        """
        columns = self.fuse.weight.data
        size = columns.shape[1] // self.shape.taps
        if len(taps) < self.shape.taps:
            columns = columns[:, taps.start * size : taps.stop * size].clone()
            self.fuse.weight = torch.nn.Parameter(columns, requires_grad=False)
        return [columns[:, start : start + size] for start in range(0, columns.shape[1], size)]

    def attention_inputs(
        self, state: torch.Tensor, embedded: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values [batch, heads, n, dim] of rows [batch, n, hidden] at positions int64 [n]."""
        inputs = torch.cat([self.token_norm(embedded), self.state_norm(state)], -1)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.recipe.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
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
        if self.recipe.norm_before_residual:
            state = self.state_norm(state)
        state = state + self.o_proj(attended.transpose(1, 2).flatten(-2))
        result: torch.Tensor = state + self.mlp(self.mlp_norm(state))
        return self.result_norm(result) if self.recipe.norm_output else result

    def normed(self, result: torch.Tensor) -> torch.Tensor:
        """Return results [..., hidden] as the LM head scores them."""
        normed: torch.Tensor = result if self.recipe.norm_output else self.result_norm(result)
        return normed

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores [..., tokens] of the token after each row's next one, by an LM head [tokens, hidden]."""
        return linear(self.normed(result), lm_head)

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
