"""Compute a span's forward pass: embedding, decoder blocks, logits.

There is no code per model family: transformers' own modules run.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from treeswarm_node.attention.base import Attention, TorchReference
from treeswarm_node.attention.interface import IMPLEMENTATION, register
from treeswarm_node.attention.latent import unexpanded
from treeswarm_node.attention.metadata import Batch, Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.families.extra_inputs import OF_STREAMS, ExtraInputs
from treeswarm_node.model.families.kv_shapes import attentions_of, check_cuts, kv_givers, kv_shapes
from treeswarm_node.model.families.rotary import Rotary
from treeswarm_node.model.loaded_span import LoadedSpan


class SpanModel:
    """Computes a loaded span, with a KV cache of `kv_tokens` rows.

    Without another `attention`, the reference computes it.  A SpanModel must be used from one thread at a time.
    """

    def __init__(self, loaded: LoadedSpan, kv_tokens: int, attention: Attention | None = None) -> None:
        register()
        self.loaded = loaded
        self.attention = attention or TorchReference()
        loaded.skeleton.set_attn_implementation(IMPLEMENTATION)
        self.base = loaded.skeleton.base_model
        self.layers = list(self.base.layers[loaded.span.start : loaded.span.end])
        self.rotary = Rotary(self.base)
        self.extra_inputs = ExtraInputs(self.base)
        givers = kv_givers(self.base.layers)
        check_cuts(loaded.span, givers, self.blocks)
        hosted = range(loaded.span.start, loaded.span.end)
        self.kv_givers = {taker: giver for taker, giver in givers.items() if taker in hosted}
        """Layer whose keys and values each layer of the span reads that keeps none of its own."""
        self.store = KVStore(kv_shapes(self.layers), kv_tokens, loaded.dtype, loaded.device, self.kv_givers)
        self._first = _FirstLayer()
        # The final norm's weights may not be here; some models norm embeddings by the same module, without weights.
        norm = torch.nn.Identity() if next(self.base.norm.parameters(), None) is not None else self.base.norm
        self._embed = _with_children(self.base, layers=torch.nn.ModuleList([self._first]), norm=norm)
        self._head = _Head(loaded) if loaded.is_tail else None

    @property
    def blocks(self) -> int:
        """Number of decoder blocks of the whole model."""
        return self.loaded.blocks

    @property
    def hidden_size(self) -> int:
        """Number of values in one row of activations."""
        return int(self.loaded.config.hidden_size) * self.extra_inputs.streams

    @property
    def kv_shapes(self) -> list[KVShape]:
        """Shapes of KV rows that occur in the span, each once."""
        return list(dict.fromkeys(layer.shape for layer in self.store.layers.values()))

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.dtype

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def depends_on_text_alone(self) -> bool:
        """Whether K and V are the same in all sessions with the same text.

        With longrope they depend on the session's room as well.
        """
        return not self.rotary.depends_on_room

    @property
    def attention_name(self) -> str:
        """Name of the attention adapter."""
        return self.attention.name

    def linears(self) -> list[torch.nn.Linear]:
        """Return the linear layers of the blocks and the head whose layout may change.

        Quantized ones are not included, nor is a head whose weights are the hosted embedding.
        """
        parts = [*self.layers, *([self._head.module] if self._head else [])]
        linears = [module for part in parts for module in part.modules() if type(module) is torch.nn.Linear]
        embedding = self.loaded.skeleton.get_input_embeddings()
        return [linear for linear in linears if linear.weight is not embedding.weight]

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the activations [n, hidden] of token ids int64 [n], scaled as the family's embedding does."""
        if not len(tokens):
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
        self._embed(input_ids=tokens[None], use_cache=False)
        return self.extra_inputs.to_rows(self._first.hidden).to(self.dtype)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], hidden: torch.Tensor) -> torch.Tensor:
        """Run the segments' blocks on their concatenated rows, and return the activations; both are [ΣT, hidden].

        All segments must have the same span.  Every segment's commit happens first.  In each layer, all K and V of the
        batch are written before any row attends.  A step may therefore see rows of an earlier step of its session in
        the same forward.
        """
        for segment in segments:
            segment.kv.commit(segment.step)
        if not len(hidden):
            return hidden
        batch = make_batch(segments, self.store, self.device)
        rotations = self.rotary(hidden, batch, [segment.kv for segment in segments])
        inputs = self.extra_inputs.of_rows(np.concatenate([segment.step.tokens for segment in segments]))
        span = segments[0].span
        state = self.extra_inputs.to_state(hidden)
        for index in range(span.start, span.end):
            self.loaded.load_block(index)
            layer = self.base.layers[index]
            rotation, extra = rotations[self.rotary.kind_of(index)], inputs.of_block(index)
            state = run_layer(layer, state, rotation, batch, self.attention, extra)
        return self.extra_inputs.to_rows(state)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits float32 [n, vocab] of final activations [n, hidden]; norm and head run in float32."""
        assert self._head is not None
        return self._head(hidden)


def run_layer(
    layer: torch.nn.Module,
    state: torch.Tensor,
    rotation: Any,
    batch: Batch,
    attention: Attention,
    extra: Mapping[str, Any],
) -> torch.Tensor:
    """Run one decoder layer on activations [1, ΣT, hidden] with `attention`, and return the activations."""
    with unexpanded(attentions_of(layer)):
        output = layer(
            state,
            position_embeddings=rotation,
            attention_mask=None,
            position_ids=batch.positions,
            past_key_values=None,
            use_cache=False,
            treeswarm=(attention, batch),
            **extra,
        )
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _Head:
    """Computes final norm and LM head in float32, with the family's own scaling and capping of logits."""

    def __init__(self, loaded: LoadedSpan) -> None:
        skeleton, base = loaded.skeleton, loaded.skeleton.base_model
        self._norm = copy.deepcopy(base.norm).float()
        output = skeleton.get_output_embeddings()
        name = _name_of(skeleton, output)
        self.module = output if loaded.dtype == torch.float32 else copy.deepcopy(output).float()
        # The head exists once: in 16 bits the skeleton's own is freed, unless it is an embedding that the span needs.
        setattr(skeleton, name, self.module)
        embedding = skeleton.get_input_embeddings()
        is_used = loaded.span.start == 0 or embedding in ExtraInputs(base).modules
        if not is_used and embedding.weight.device.type != "meta":
            embedding.weight = torch.nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
        self._extra, self._dtype, self._last = ExtraInputs(base), loaded.dtype, _LastLayer()
        merging = {name: copy.deepcopy(getattr(base, name)).float() for name in OF_STREAMS if hasattr(base, name)}
        self._end = _with_children(base, layers=torch.nn.ModuleList([self._last]), norm=self._norm, **merging)
        self._final = _FinalActivations()
        self._model = _with_children(skeleton, **{skeleton.base_model_prefix: self._final, name: self.module})

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self._final.hidden = self._normalize(hidden.float())
        logits: torch.Tensor = self._model(inputs_embeds=self._final.hidden, use_cache=False).logits[0]
        return logits.float()

    def _normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return final activations [1, n, dim].  The decoder's own code merges several rows per token."""
        if self._extra.streams == 1:
            normed: torch.Tensor = self._norm(hidden)
            return normed[None]
        self._last.hidden = self._extra.to_state(hidden)
        embedded = torch.zeros_like(self._last.hidden[0], dtype=self._dtype)
        final: torch.Tensor = self._end(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return final


class _FirstLayer(torch.nn.Module):
    """Takes the place of the decoder's layers, and keeps what the first one would get."""

    hidden: torch.Tensor

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.hidden = hidden
        return hidden


class _LastLayer(torch.nn.Module):
    """Takes the place of the decoder's layers, and returns activations that the last one computed before."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.hidden


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):  # type: ignore[misc]  # transformers has no types
    """Holds every field of a decoder's output that any causal-LM head reads."""

    shared_kv_states: Any = None


class _FinalActivations(torch.nn.Module):
    """Replaces the decoder in the causal LM, and returns activations that were computed before."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self.hidden)


def _with_children(module: torch.nn.Module, **children: torch.nn.Module) -> Any:
    """Return a shallow copy of `module` with some of its children replaced; everything else is shared."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **children}
    return changed


def _name_of(parent: torch.nn.Module, child: torch.nn.Module) -> str:
    return next(name for name, module in parent.named_children() if module is child)
