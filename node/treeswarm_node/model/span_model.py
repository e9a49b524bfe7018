"""A span's forward pass: embed, decoder blocks, logits.  No code per model family: transformers' own modules run."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention import base as seam
from treeswarm_node.attention.metadata import Batch, Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVShape, KVStore, SessionKV
from treeswarm_node.model.loaded_span import LoadedSpan

# Rotary embeddings that look at the largest position of a call; only one of them can be pinned per session.
PINNED_ROPE, REFUSED_ROPE = "longrope", "dynamic"


class SpanModel:
    """`loaded`, with a KV cache of `kv_tokens` rows; with the reference attention, if no other.  For one thread."""

    def __init__(self, loaded: LoadedSpan, kv_tokens: int, attention: seam.Attention | None = None) -> None:
        seam.register()
        self.loaded = loaded
        self.attention = attention or seam.TorchReference()
        loaded.skeleton.set_attn_implementation(seam.IMPLEMENTATION)
        self.base = loaded.skeleton.base_model
        self.layers = list(self.base.layers[loaded.span.start : loaded.span.end])
        self.rotary = _Rotary(self.base)
        self.kv_shape = kv_shape(self.layers, loaded)
        self.store = KVStore(len(self.layers), self.kv_shape, kv_tokens, loaded.dtype, loaded.device)
        self._embed = _with_children(self.base, layers=torch.nn.ModuleList(), norm=torch.nn.Identity())
        self._head = _Head(loaded) if loaded.is_tail else None

    @property
    def blocks(self) -> int:
        """Of the whole model."""
        return self.loaded.blocks

    @property
    def hidden_size(self) -> int:
        return int(self.loaded.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.dtype

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def depends_on_text_alone(self) -> bool:
        """Whether K and V are the same in every session with the same text: longrope looks at the room as well."""
        return not self.rotary.pinned

    @property
    def attention_name(self) -> str:
        return self.attention.name

    def linears(self) -> list[torch.nn.Linear]:
        """Of the layers and the head, as transformers made them: quantized ones are none."""
        parts = [*self.layers, *([self._head.module] if self._head else [])]
        return [module for part in parts for module in part.modules() if type(module) is torch.nn.Linear]

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [n] to activations [n, hidden], with whatever scaling the family applies."""
        if not len(tokens):
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
        embedded: torch.Tensor = self._embed(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        return embedded.to(self.dtype)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], hidden: torch.Tensor) -> torch.Tensor:
        """Run the segments' blocks (the same for all) on their concatenated rows, [ΣT, hidden] in and out.

        Every segment's commit happens first, then all K and V of the batch are written before anything attends, so
        that a step may see the rows of an earlier step of its session in the same forward.
        """
        for segment in segments:
            segment.kv.commit(segment.step)
        if not len(hidden):
            return hidden
        batch = make_batch(segments, self.store, self.loaded.span.start, self.device)
        rotations = self.rotary(hidden, batch, [segment.kv for segment in segments])
        span = segments[0].span
        state = hidden[None]
        for index in range(span.start, span.end):
            self.loaded.load_block(index)
            layer = self.base.layers[index]
            state = run_layer(layer, state, rotations[self.rotary.kind_of(index)], batch, self.attention)
        return state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final activations [n, hidden] to logits float32 [n, vocab]; norm and head run in float32."""
        assert self._head is not None
        return self._head(hidden)


def run_layer(
    layer: torch.nn.Module, state: torch.Tensor, rotation: Any, batch: Batch, attention: seam.Attention
) -> torch.Tensor:
    """One decoder layer on [1, ΣT, hidden], with our attention behind it."""
    output = layer(
        state,
        position_embeddings=rotation,
        attention_mask=None,
        position_ids=batch.positions,
        past_key_values=None,
        use_cache=False,
        treeswarm=(attention, batch),
    )
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _Rotary:
    """Rotary tables per layer kind, computed so that no session's depend on another's length."""

    def __init__(self, base: torch.nn.Module) -> None:
        rotary = getattr(base, "rotary_emb", None)
        if rotary is None:
            raise UnsupportedModel("the model has no rotary position embedding of its own")
        self._rotary = rotary
        config: Any = base.config
        by_layer = isinstance(getattr(rotary, "layer_types", None), list | set | tuple)
        self._kinds: list[str | None] = list(config.layer_types) if by_layer else [None] * int(config.num_hidden_layers)
        types = getattr(rotary, "rope_type", "default")
        self._types = set(types.values()) if isinstance(types, dict) else {types}
        if any(REFUSED_ROPE in str(kind) for kind in self._types):
            raise UnsupportedModel("RoPE of type 'dynamic' changes with the longest session of a batch")

    def kind_of(self, block: int) -> str | None:
        """The key of a block's table."""
        return self._kinds[block]

    def __call__(self, hidden: torch.Tensor, batch: Batch, sessions: list[SessionKV]) -> dict[str | None, Any]:
        """Tables (cos, sin) for every kind, each over all of the batch's rows."""
        return {kind: self._table(hidden, batch, sessions, kind) for kind in set(self._kinds)}

    @property
    def pinned(self) -> bool:
        """Its factors are chosen by how long a session may become."""
        return PINNED_ROPE in self._types

    def _table(self, hidden: torch.Tensor, batch: Batch, sessions: list[SessionKV], kind: str | None) -> Any:
        if not self.pinned:
            return self.plain(hidden, batch.positions[0], 0, kind)
        tables = [
            self.plain(hidden, segment.positions, kv.trunk_room, kind)
            for segment, kv in zip(batch.segments, sessions, strict=True)
        ]
        return tuple(torch.cat(parts, 1) for parts in zip(*tables, strict=True))

    def plain(self, hidden: torch.Tensor, positions: torch.Tensor, room: int, kind: str | None) -> Any:
        """The table of one session's rows at int64 [n] `positions`; the session may grow to `room` tokens."""
        extra = () if kind is None else (kind,)
        if not self.pinned:
            return self._rotary(hidden[None], positions[None], *extra)
        # longrope picks its factors by the call's largest position: ask with the last position that the session may
        # ever reach beside its own, so that the choice is made when it opens and never changes.
        last = torch.tensor([room - 1], device=positions.device)
        table = self._rotary(hidden[None], torch.cat([positions, last])[None], *extra)
        return tuple(part[:, :-1] for part in table)


class _Head:
    """Final norm and LM head in float32, with the family's own scaling and capping of logits around them."""

    def __init__(self, loaded: LoadedSpan) -> None:
        skeleton, base = loaded.skeleton, loaded.skeleton.base_model
        self._norm = copy.deepcopy(base.norm).float()
        self.module = copy.deepcopy(skeleton.get_output_embeddings()).float()
        self._final = _Final()
        name = _name_of(skeleton, skeleton.get_output_embeddings())
        self._model = _with_children(skeleton, **{skeleton.base_model_prefix: self._final, name: self.module})

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self._final.hidden = self._norm(hidden.float())[None]
        logits: torch.Tensor = self._model(inputs_embeds=self._final.hidden, use_cache=False).logits[0]
        return logits.float()


class _Final(torch.nn.Module):
    """Stands in for the decoder: its output is already known."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        # The mixture's output has every field that any causal-LM head looks at.
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def _with_children(module: torch.nn.Module, **children: torch.nn.Module) -> Any:
    """A shallow copy of `module` with some of its children replaced; everything else is shared."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **children}
    return changed


def _name_of(parent: torch.nn.Module, child: torch.nn.Module) -> str:
    return next(name for name, module in parent.named_children() if module is child)


def kv_shape(layers: Sequence[torch.nn.Module], loaded: LoadedSpan) -> KVShape:
    """The KV row shape that all layers share.  Raises UnsupportedModel where they differ."""
    shapes = set()
    for layer in layers:
        inner: Any = getattr(layer, "self_attn", None)
        dim = getattr(inner, "head_dim", None)
        config: Any = loaded.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if inner is None or dim is None:
            raise UnsupportedModel(
                f"layer {type(layer).__name__} has no standard self-attention (recurrent or hybrid models)"
            )
        shapes.add(KVShape(int(kv_heads), int(dim), int(dim)))
    if len(shapes) != 1:
        raise UnsupportedModel("its layers keep KV rows of different shapes")
    return shapes.pop()
