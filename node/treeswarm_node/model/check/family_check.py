"""Check that this node computes a model correctly.

Every kind of layer of the span runs a random tree twice: as this node computes it, and with transformers' eager
attention.  The results must agree; there is no list of model types that are assumed to work.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import UnsupportedModel
from treeswarm.protocol.messages import Answers, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.session.steps import Step
from treeswarm_node.attention.metadata import Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.model.families.extra_inputs import RowInputs
from treeswarm_node.model.families.kv_shapes import attentions_of, kv_shapes
from treeswarm_node.model.quantization.quantized_linear import dequantized_copy
from treeswarm_node.model.span_model import SpanModel, run_layer

FAMILIES = "Llama, Qwen2, Qwen3, Mistral, Mixtral, Qwen3-MoE, Phi-3, OLMo2, Granite, Gemma 2, Gemma 3"
# Largest accepted difference, relative to the output.  float32 sums in another order differ by about 1e-6; with a
# wrong mask, scale or position the difference is far larger than this.
TOLERANCE = 1e-4
TRUNK_ROWS, TREE_ROWS = 19, 9
# A layer's sliding window is reduced to this for the check, so that the trunk is longer than the window.
CHECK_WINDOW = 8
SEED = 20261121


@dataclass(frozen=True)
class FamilyCheck:
    """Holds the result of checking a span."""

    worst_difference: float
    """Largest difference seen, relative to the output's largest value."""
    layer_kinds: int
    """Number of kinds of layers that were run."""


@torch.inference_mode()
def check_family(model: SpanModel) -> FamilyCheck:
    """Compare one layer of each kind of the span with transformers' eager attention, in float32.

    The layer runs a random trunk and tree, the eager attention every path of the tree.  Raises UnsupportedModel, which
    names the model type, the layer, the difference and the families known to work.
    """
    worst: dict[tuple[str, ...], float] = {}
    for index in range(model.loaded.span.start, model.loaded.span.end):
        kind = _layer_kind(model, index)
        if kind not in worst:
            worst[kind] = _check_layer(model, index, kind)
    return FamilyCheck(max(worst.values()), len(worst))


def _layer_kind(model: SpanModel, index: int) -> tuple[str, ...]:
    layer = model.base.layers[index]
    attentions = attentions_of(layer)
    return (
        type(layer).__name__,
        type(getattr(layer, "mlp", None)).__name__,
        str(model.rotary.kind_of(index)),
        f"reads block {model.kv_givers[index]}" if index in model.kv_givers else "keeps its own rows",
        *(str(_window_owner(inner).sliding_window) for inner in attentions),
        *(str(model.store.layers[int(inner.layer_idx)].shape) for inner in attentions),
    )


def _check_layer(model: SpanModel, index: int, kind: tuple[str, ...]) -> float:
    model_type = model.loaded.config.model_type
    try:
        worst = _compare_layer(model, index)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: {error}. Supported: {FAMILIES}"
        ) from error
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: layer {index} ({', '.join(kind)}) failed the "
            f"tree check with {type(error).__name__}: {error}. Supported: {FAMILIES}"
        ) from error
    if not worst <= TOLERANCE:
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: in the tree check layer {index} ({', '.join(kind)}) "
            f"differs from plain attention by {worst:.1e}, more than {TOLERANCE:.0e}. Supported: {FAMILIES}"
        )
    return worst


def _compare_layer(model: SpanModel, index: int) -> float:
    """Return the largest difference of a layer, which runs behind the layer whose keys and values it reads, if any."""
    indices = [model.kv_givers[index], index] if index in model.kv_givers else [index]
    layers = {i: _copy_for_check(model, i) for i in indices}
    generator = torch.Generator().manual_seed(SEED)
    rows = _Rows(
        torch.randn(TRUNK_ROWS + TREE_ROWS, model.hidden_size, generator=generator).to(model.device),
        np.random.default_rng(SEED).integers(model.loaded.config.vocab_size, size=TRUNK_ROWS + TREE_ROWS),
    )
    steps, parents = _make_steps()
    outputs = _run_tree(model, layers, steps, rows)
    worst = 0.0
    for node in range(-1, TREE_ROWS):
        path = [node]
        while path[-1] >= 0:
            path.append(parents[path[-1]])
        expected = _run_eagerly(
            model, layers, rows.at([*range(TRUNK_ROWS), *(TRUNK_ROWS + i for i in reversed(path[:-1]))])
        )
        worst = max(worst, float((expected - outputs[1 + node]).abs().max() / expected.abs().max().clamp_min(1.0)))
    return worst


def _copy_for_check(model: SpanModel, index: int) -> Any:
    """Return a float32 copy of a layer, with its sliding window reduced."""
    model.loaded.load_block(index)
    layer = dequantized_copy(model.base.layers[index])
    for inner in attentions_of(layer):
        owner = _window_owner(inner)
        if owner.sliding_window is not None:
            owner.sliding_window = min(int(owner.sliding_window), CHECK_WINDOW)
    return layer


@dataclass(frozen=True, eq=False)
class _Rows:
    """Holds the rows that a check runs."""

    hidden: torch.Tensor
    """Activations [rows, hidden]."""
    tokens: NDArray[np.int64]
    """Tokens, int64 [rows]."""

    def at(self, rows: list[int] | slice) -> "_Rows":
        return _Rows(self.hidden[rows], self.tokens[rows])


def _window_owner(inner: Any) -> Any:
    """Return the holder of a layer's sliding window: the module in families that mix windows, else its config."""
    owner = inner if hasattr(inner, "sliding_window") else inner.config
    if not hasattr(owner, "sliding_window"):
        owner.sliding_window = None
    return owner


def _make_steps() -> tuple[list[Step], list[int]]:
    """Return steps of a prefill and of a random tree below it, and the tree's parents (-1: the tip)."""
    random = np.random.default_rng(SEED)
    parents = [int(random.integers(-1, i)) if i else -1 for i in range(TREE_ROWS)]
    session = NodeSession(
        SessionTerms(
            epoch=0, trunk_room=TRUNK_ROWS + TREE_ROWS, crown_room=TREE_ROWS, credit_rows=99, vocab_size=1, row_bytes=0
        )
    )
    chain = np.arange(TRUNK_ROWS)
    tree = np.array(parents) + TRUNK_ROWS + 1
    return [
        session.receive(_make_append(seq, first, above, prefill))[0]
        for seq, first, above, prefill in ((0, 1, chain, True), (1, TRUNK_ROWS + 1, tree, False))
    ], parents


def _make_append(seq: int, first_id: int, parents: NDArray[np.int64], prefill: bool) -> Append:
    rows = len(parents)
    return Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=first_id,
        parents=parents.astype(np.uint32),
        tokens=np.zeros(rows, np.uint32),
        prefill=prefill,
        answers=Answers.NONE,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
    )


def _run_tree(model: SpanModel, layers: dict[int, Any], steps: list[Step], rows: _Rows) -> torch.Tensor:
    """Return the trunk's last row and the tree's rows [1 + TREE_ROWS, hidden] as this node computes them."""
    givers = {taker: giver for taker, giver in model.kv_givers.items() if taker in layers}
    tokens = 4 * (TRUNK_ROWS + TREE_ROWS) + 256
    store = KVStore(kv_shapes(list(layers.values())), tokens, torch.float32, model.device, givers)
    kv = store.open(TRUNK_ROWS + TREE_ROWS, TREE_ROWS)
    states = []
    for step, part in zip(steps, (rows.at(slice(TRUNK_ROWS)), rows.at(slice(TRUNK_ROWS, None))), strict=True):
        kv.commit(step)
        index = next(iter(layers))
        batch = make_batch([Segment(kv, step, Span(index, index + 1))], store, model.device)
        inputs, state = _extra_inputs(model, part), model.extra_inputs.to_state(part.hidden)
        for index, layer in layers.items():
            rotation = model.rotary(part.hidden, batch, [kv])[model.rotary.kind_of(index)]
            state = run_layer(layer, state, rotation, batch, model.attention, inputs.of_block(index))
        states.append(model.extra_inputs.to_rows(state))
    return torch.cat([states[0][-1:], states[1]])


def _run_eagerly(model: SpanModel, layers: dict[int, Any], rows: _Rows) -> torch.Tensor:
    """Return the last row [hidden] of a causal pass with transformers' own eager attention."""
    inputs, state = _extra_inputs(model, rows), model.extra_inputs.to_state(rows.hidden)
    for index, layer in layers.items():
        state = _run_layer_eagerly(model, layer, index, state, inputs.of_block(index))
    return model.extra_inputs.to_rows(state)[-1]


def _run_layer_eagerly(
    model: SpanModel, layer: Any, index: int, state: torch.Tensor, extra: dict[str, Any]
) -> torch.Tensor:
    count, attentions = state.shape[-2], attentions_of(layer)
    positions = torch.arange(count, device=model.device)
    visible = positions[:, None] >= positions
    window = _window_owner(attentions[0]).sliding_window
    if window is not None:
        visible &= positions[:, None] - positions < window
    mask = torch.zeros(count, count, device=model.device).masked_fill(~visible, torch.finfo(torch.float32).min)
    rotation = model.rotary.plain(
        state.flatten(0, -3)[0], positions, TRUNK_ROWS + TREE_ROWS, model.rotary.kind_of(index)
    )
    config = attentions[0].config
    eager = copy.copy(config)
    eager._attn_implementation = "eager"
    try:
        for inner in attentions:
            inner.config = eager
        output = layer(
            state, position_embeddings=rotation, attention_mask=mask[None, None], position_ids=positions[None], **extra
        )
    finally:
        for inner in attentions:
            inner.config = config
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _extra_inputs(model: SpanModel, rows: _Rows) -> RowInputs:
    """Return the extra inputs of the rows, in float32 as the layers' copies."""
    inputs = model.extra_inputs.of_rows(rows.tokens)
    return inputs if inputs.per_layer is None else replace(inputs, per_layer=inputs.per_layer.float())
