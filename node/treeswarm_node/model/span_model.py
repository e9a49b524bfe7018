"""Compute a span's forward pass: embedding, decoder blocks, logits.

There is no code per model family: transformers' own modules run (`families/frame.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.base import Attention, TorchReference
from treeswarm_node.attention.interface import IMPLEMENTATION, register
from treeswarm_node.attention.latent import unexpanded
from treeswarm_node.attention.metadata import Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.families.extra_inputs import embeds
from treeswarm_node.model.families.frame import Frame, RunLayer, set_implementation
from treeswarm_node.model.families.kv_shapes import check_cuts, kv_givers, latent_attentions
from treeswarm_node.model.families.mask_tables import without_tables
from treeswarm_node.model.families.observation import observe_shapes
from treeswarm_node.model.families.routes import AttentionRoute, CacheRoute, InterfaceRoute
from treeswarm_node.model.fused_block import FusedBlock
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.taps import Taps


class SpanModel:
    """Computes a loaded span, with a KV cache of `kv_tokens` rows.

    Without another `attention`, the reference computes it.  A SpanModel must be used from one thread at a time.
    """

    def __init__(self, loaded: LoadedSpan, kv_tokens: int, attention: Attention | None = None) -> None:
        register()
        self.loaded = loaded
        self.attention = attention or TorchReference()
        self.blocks = loaded.blocks
        """Number of decoder blocks of the whole model."""
        self.frame = Frame(loaded.skeleton, loaded.device, self._unused_weights())
        set_implementation(self.frame.configs, IMPLEMENTATION)
        self.layers = list(self.frame.blocks.layers[loaded.span.start : loaded.span.end])
        givers = kv_givers(self.frame.blocks.layers)
        check_cuts(loaded.span, givers, self.blocks)
        hosted = range(loaded.span.start, loaded.span.end)
        self.kv_givers = {taker: giver for taker, giver in givers.items() if taker in hosted}
        """Layer whose keys and values each layer of the span reads that keeps none of its own."""
        self.fused: dict[int, FusedBlock] = {}
        """Blocks that are computed in few operations, by index."""
        self._kv_tokens = kv_tokens
        self.route, shapes = self._choose_route()
        self.store = self._make_store(shapes)
        self._head = self._make_head() if loaded.is_tail else None

    @property
    def hidden_size(self) -> int:
        """Number of values in one row of activations."""
        return int(self.loaded.config.hidden_size) * self.frame.extra_inputs.streams

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
        return not self.frame.depends_on_room

    @property
    def attention_name(self) -> str:
        """Name of the attention adapter."""
        return self.attention.name

    def linears(self) -> list[torch.nn.Linear]:
        """Return the linear layers of the blocks and the head whose layout may change.

        Quantized ones are not included, nor is a head whose weights are the hosted embedding.
        """
        parts = [*self.layers, *([self._head.output_embeddings] if self._head else [])]
        linears = [module for part in parts for module in part.modules() if type(module) is torch.nn.Linear]
        embedding: Any = self.loaded.skeleton.get_input_embeddings()
        return [linear for linear in linears if linear.weight is not embedding.weight]

    def use_cache_route(self) -> None:
        """Let blocks compute attention themselves, over keys that they are given.  Raises UnsupportedModel."""
        route = CacheRoute(self.frame)
        shapes = observe_shapes(self.frame, self.loaded, route, self.run_layer)
        self.route, self.store = route, self._make_store(shapes)

    def run_layer(self, index: int, arguments: dict[str, Any]) -> Any:
        """Run a block with its own weights."""
        self.loaded.load_block(index)
        if index in self.fused:
            return self.fused[index].run(arguments)
        return run_block(self.frame.blocks.layers[index], arguments)

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the activations [n, hidden] of tokens at positions, both int64 [n], as the family embeds them."""
        if not len(tokens):
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
        return self.frame.embed(tokens, positions).to(self.dtype)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], hidden: torch.Tensor, taps: Taps | None = None) -> torch.Tensor:
        """Run the segments' blocks on their concatenated rows, and return the activations; both are [ΣT, hidden].

        All segments must have the same span.  Every segment's commit happens first.  In each layer, all K and V of the
        batch are written before any row attends.  A step may therefore see rows of an earlier step of its session in
        the same forward.  `taps` record what blocks return, unless there are no rows.
        """
        for segment in segments:
            segment.kv.commit(segment.step)
        if not len(hidden):
            return hidden
        run_layer = self.run_layer if taps is None else taps.recording(self.run_layer, self.frame.extra_inputs)
        return self.run_segments(segments, hidden, self.store, run_layer)

    def run_segments(
        self, segments: Sequence[Segment], hidden: torch.Tensor, store: KVStore, run_layer: RunLayer
    ) -> torch.Tensor:
        """Run the segments' blocks, with `run_layer` for each, on a store in which their commits have happened."""
        batch = make_batch(segments, store, self.device)
        sessions = [(segment.rows, segment.room) for segment in batch.segments]
        run = self.route.over(batch, self.attention, run_layer)
        length = self.route.length(batch)
        tokens = None
        if self.frame.extra_inputs.per_layer:
            tokens = torch.from_numpy(np.concatenate([segment.step.tokens for segment in segments])).to(self.device)
        return self.frame.run(hidden, batch.positions[0], segments[0].span, run, sessions, length, tokens=tokens)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits float32 [n, vocab] of final activations [n, hidden]; norm and head run in float32."""
        assert self._head is not None
        return self._head.finish(hidden.float(), self.frame.parts_of_result).float()

    def lm_head(self) -> tuple[torch.Tensor, bool]:
        """Return the LM head [vocab, hidden] as logits are computed with it, and whether the embedding is the same."""
        assert self._head is not None
        skeleton: Any = self.loaded.skeleton
        weight: torch.Tensor = self._head.output_embeddings.weight
        return weight, bool(skeleton.config.get_text_config(decoder=True).tie_word_embeddings)

    def _unused_weights(self) -> set[int]:
        """Return ids of the weights of embedding and LM head that blocks and embedding do not read."""
        skeleton: Any = self.loaded.skeleton
        embedding = skeleton.get_input_embeddings()
        used = {id(embedding.weight)} if self._embeds() else set()
        return {id(embedding.weight), id(skeleton.get_output_embeddings().weight)} - used

    def _embeds(self) -> bool:
        """Return whether the span needs the embedding."""
        return embeds(self.loaded.skeleton, self.loaded.span)

    def _make_store(self, shapes: dict[int, KVShape]) -> KVStore:
        kept = {index: shape for index, shape in shapes.items() if index not in self.kv_givers}
        return KVStore(kept, self._kv_tokens, self.dtype, self.device, self.kv_givers)

    def _make_head(self) -> Frame:
        """Return the frame that computes logits.

        The head exists once: if it is a float32 copy, the skeleton's own in 16 bits is freed, unless it is an embedding
        that the span needs.
        """
        head = Frame.for_head(self.loaded.skeleton, self.device)
        skeleton: Any = self.loaded.skeleton
        embedding, output = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
        is_tied = output.weight is embedding.weight
        if not (is_tied and self._embeds()):
            output.weight = head.output_embeddings.weight
        if not self._embeds() and embedding.weight.device.type != "meta":
            embedding.weight = torch.nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
        return head

    def _choose_route(self) -> tuple[AttentionRoute, dict[int, KVShape]]:
        """Return the first route by which the span's blocks run, and the shapes of what they keep."""
        interface, cache = InterfaceRoute(), CacheRoute(self.frame)
        try:
            return interface, observe_shapes(self.frame, self.loaded, interface, self.run_layer)
        except UnsupportedModel as error:
            try:
                return cache, observe_shapes(self.frame, self.loaded, cache, self.run_layer)
            except UnsupportedModel:
                raise error from None


def run_block(block: torch.nn.Module, arguments: dict[str, Any]) -> Any:
    """Run a decoder block so that latent attention hands on its latents, and only the given mask hides keys."""
    with unexpanded(latent_attentions(block)), without_tables(block):
        return block(**arguments)
