"""Check that this node computes a model correctly.

Every kind of layer of the span runs a random tree twice: as this node computes it, and with transformers' eager
attention.  The results must agree; there is no list of model types that are assumed to work.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from treeswarm.errors import UnsupportedModel
from treeswarm.protocol.messages import Answers, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.session.steps import Step
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.model.check.plain_copy import is_large, plain_copy
from treeswarm_node.model.families.frame import RunLayer
from treeswarm_node.model.families.mask_tables import short_tables
from treeswarm_node.model.families.reasons import explain_blocks
from treeswarm_node.model.families.routes import CacheRoute
from treeswarm_node.model.quantization.quantized_linear import QuantizedWeight
from treeswarm_node.model.span_model import SpanModel, run_block

# Largest accepted difference, relative to the output.  float32 sums in another order differ by about 1e-6; with a
# wrong mask, scale or position the difference is far larger than this.
TOLERANCE = 1e-4
TRUNK_ROWS, TREE_ROWS = 19, 9
# Windows are reduced to this for the check, so that the trunk is longer than the window.
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
    """Compare one block of each kind of the span with transformers' eager attention, in float32.

    The block runs a random trunk and tree, the eager attention every path of the tree.  If it differs by transformers'
    attention interface, the model is changed to give blocks their keys by a cache.  Raises UnsupportedModel, which
    names the model type, the block and the difference.
    """
    _check_ends(model)
    try:
        return _check_blocks(model)
    except UnsupportedModel as error:
        if isinstance(model.route, CacheRoute):
            raise
        try:
            model.use_cache_route()
            return _check_blocks(model)
        except UnsupportedModel:
            raise error from None


def _check_ends(model: SpanModel) -> None:
    """Raise UnsupportedModel if embeddings differ from those of a text in order, or if embeddings or logits are NaN.

    Parameters of a multimodal model's other parts are NaN.
    """
    results, reason = [], None
    rows = torch.arange(TREE_ROWS, device=model.device)
    try:
        if model.loaded.span.start == 0:
            tokens = rows + min(TREE_ROWS, int(model.loaded.config.vocab_size) - TREE_ROWS)
            own = model.frame.embed(tokens, None).to(model.dtype)
            results.append(model.embed(tokens.flip(0), rows.flip(0)).flip(0))
            if not torch.allclose(own, results[0], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True):
                reason = "embeddings do not follow from token and position alone"
        if model.loaded.is_tail:
            results.append(model.logits(torch.ones(1, model.hidden_size, dtype=model.dtype, device=model.device)))
    except Exception as error:  # Whatever a model's own code raises, it cannot be run around its blocks.
        reason = f"embedding and LM head do not run without blocks ({type(error).__name__}: {error})"
    if any(result.isnan().any() for result in results):
        reason = "their text passes through parts that are for images or sound, and are not hosted"
    if reason is not None:
        model_type = model.loaded.model_type
        raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}; see docs/models.md")


def _check_blocks(model: SpanModel) -> FamilyCheck:
    worst: dict[tuple[str, ...], float] = {}
    for index in range(model.loaded.span.start, model.loaded.span.end):
        kind = layer_kind(model, index)
        if kind not in worst:
            worst[kind] = _check_layer(model, index)
    return FamilyCheck(max(worst.values()), len(worst))


def layer_kind(model: SpanModel, index: int) -> tuple[str, ...]:
    """Return what tells a block's kind from others: its modules, their settings, and its layer type in the config."""
    layer = model.frame.blocks.layers[index]
    settings = [
        f"{name or 'block'}: {type(module).__name__}({', '.join(_settings_of(module))})"
        for name, module in layer.named_modules()
        if not re.search(r"\.experts\.[1-9]", name)
    ]
    settings.append(f"reads block {model.kv_givers[index]}" if index in model.kv_givers else "keeps its own rows")
    types = [getattr(model.loaded.config, name, None) for name in ("layer_types", "mlp_layer_types")]
    return (*(str(kinds[index]) for kinds in types if isinstance(kinds, list) and len(kinds) > index), *settings)


def _settings_of(module: torch.nn.Module) -> list[str]:
    """Return the numbers and words that a module's computation may depend on, except its index.

    Of a quantized weight that is also how it is packed: a checkpoint may mix formats by layer.
    """
    packed = [f"packing={module.packing!r} of {sorted(module.parts())}"] if isinstance(module, QuantizedWeight) else []
    return packed + [
        f"{name}={value}"
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in ("layer_idx", "layer_id", "training")
        if not name.startswith("_")
    ]


def _check_layer(model: SpanModel, index: int) -> float:
    block = f"block {index} ({type(model.frame.blocks.layers[index]).__name__})"
    model_type = model.loaded.model_type
    try:
        worst = _compare_layer(model, index)
        seen = f"{block} differs from plain attention by {worst:.1e} in the tree check, more than {TOLERANCE:.0e}"
    except UnsupportedModel as error:
        worst, seen = float("inf"), str(error)
    except Exception as error:  # Whatever a model's own code raises, the block is not what this node can host.
        worst, seen = float("inf"), f"{block} fails the tree check with {type(error).__name__}: {error}"
    if not worst <= TOLERANCE:
        reason = explain_blocks(model.loaded.config) or seen
        raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}; see docs/models.md")
    return worst


def _compare_layer(model: SpanModel, index: int) -> float:
    """Return the largest difference of a layer, which runs behind the layer whose keys and values it reads, if any."""
    indices = [model.kv_givers[index], index] if index in model.kv_givers else [index]
    originals = {i: model.frame.blocks.layers[i] for i in indices}
    for i in indices:
        model.loaded.load_block(i)
    rows = _make_rows(model, torch.float32)
    steps, parents = _make_steps(rows.tokens)
    configs = model.frame.configs
    one_by_one = _expert_by_expert(configs if any(map(is_large, originals.values())) else ())
    with _short_windows(configs), short_tables(originals.values(), CHECK_WINDOW), one_by_one:
        layers = {i: float32_copy(layer) for i, layer in originals.items()}
        outputs = _run_tree(model, layers, steps, rows, run_block)
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


@dataclass(frozen=True, eq=False)
class _Rows:
    """Holds the rows that a check runs."""

    hidden: torch.Tensor
    """Activations [rows, hidden]."""
    tokens: NDArray[np.int64]
    """Tokens, int64 [rows]."""

    def at(self, rows: list[int]) -> "_Rows":
        return _Rows(self.hidden[rows], self.tokens[rows])


def _make_rows(model: SpanModel, dtype: torch.dtype) -> _Rows:
    generator = torch.Generator().manual_seed(SEED)
    return _Rows(
        torch.randn(TRUNK_ROWS + TREE_ROWS, model.hidden_size, generator=generator).to(model.device, dtype),
        np.random.default_rng(SEED).integers(model.loaded.config.vocab_size, size=TRUNK_ROWS + TREE_ROWS),
    )


def run_random_tree(
    model: SpanModel, layers: dict[int, Any], run: Callable[[Any, dict[str, Any]], Any], dtype: torch.dtype
) -> torch.Tensor:
    """Return the activations [1 + TREE_ROWS, hidden] of a random tree behind layers, each run by `run`, in `dtype`."""
    rows = _make_rows(model, dtype)
    return _run_tree(model, layers, _make_steps(rows.tokens)[0], rows, run)


def float32_copy(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a float32 copy without quantization, which shares its configs with the model."""
    copied = plain_copy(layer)
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            copied.get_submodule(name).config = module.config
    return copied


@contextlib.contextmanager
def _short_windows(configs: Iterable[Any]) -> Iterator[None]:
    """Reduce the windows from which transformers makes masks to CHECK_WINDOW in this context."""
    values = [
        (config, name, getattr(config, name))
        for config in configs
        for name in ("sliding_window", "attention_chunk_size")
        if getattr(config, name, None)
    ]
    for config, name, value in values:
        setattr(config, name, min(int(value), CHECK_WINDOW))
    try:
        yield
    finally:
        for config, name, value in values:
            setattr(config, name, value)


@contextlib.contextmanager
def _expert_by_expert(configs: Iterable[Any]) -> Iterator[None]:
    """Let fused experts be computed one by one in this context, as large copies need it."""
    values = [(config, config._experts_implementation) for config in configs]
    for config, _ in values:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, value in values:
            config._experts_implementation = value


def _make_steps(tokens: NDArray[np.int64]) -> tuple[list[Step], list[int]]:
    """Return steps of a prefill and of a random tree below it, and the tree's parents (-1: the tip)."""
    random = np.random.default_rng(SEED)
    parents = [int(random.integers(-1, i)) if i else -1 for i in range(TREE_ROWS)]
    session = NodeSession(
        SessionTerms(
            epoch=0,
            trunk_room=TRUNK_ROWS + TREE_ROWS,
            crown_room=TREE_ROWS,
            credit_rows=99,
            vocab_size=2**31,
            row_bytes=0,
        )
    )
    chain = np.arange(TRUNK_ROWS)
    tree = np.array(parents) + TRUNK_ROWS + 1
    return [
        session.receive(_make_append(seq, first, above, tokens[first - 1 :], prefill))[0]
        for seq, first, above, prefill in ((0, 1, chain, True), (1, TRUNK_ROWS + 1, tree, False))
    ], parents


def _make_append(
    seq: int, first_id: int, parents: NDArray[np.int64], tokens: NDArray[np.int64], prefill: bool
) -> Append:
    rows = len(parents)
    return Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=first_id,
        parents=parents.astype(np.uint32),
        tokens=tokens[:rows].astype(np.uint32),
        prefill=prefill,
        answers=Answers.NONE,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
    )


def _run_tree(
    model: SpanModel,
    layers: dict[int, Any],
    steps: list[Step],
    rows: _Rows,
    run: Callable[[Any, dict[str, Any]], Any],
) -> torch.Tensor:
    """Return the trunk's last row and the tree's rows [1 + TREE_ROWS, hidden] as this node computes them."""
    shapes = {i: state.shape for i, state in model.store.layers.items() if i not in model.kv_givers}
    store = KVStore(shapes, 4 * (TRUNK_ROWS + TREE_ROWS) + 256, rows.hidden.dtype, model.device, model.kv_givers)
    kv = store.open(TRUNK_ROWS + TREE_ROWS, TREE_ROWS)
    span = Span(min(layers), max(layers) + 1)
    states = []
    for step, hidden in zip(steps, (rows.hidden[:TRUNK_ROWS], rows.hidden[TRUNK_ROWS:]), strict=True):
        kv.commit(step)
        states.append(model.run_segments([Segment(kv, step, span)], hidden, store, _run_only(model, layers, run)))
    return torch.cat([states[0][-1:], states[1]])


def _run_eagerly(model: SpanModel, layers: dict[int, Any], rows: _Rows) -> torch.Tensor:
    """Return the last row [hidden] of a causal pass with transformers' own positions, masks and eager attention."""
    sessions = [(slice(0, len(rows.hidden)), TRUNK_ROWS + TREE_ROWS)]
    span = Span(min(layers), max(layers) + 1)
    run = _run_only(model, layers, lambda layer, arguments: layer(**arguments))
    with model.frame.attending_by("eager"):
        tokens = torch.from_numpy(rows.tokens).to(model.device)
        return model.frame.run(rows.hidden, None, span, run, sessions, tokens=tokens)[-1]


def _run_only(model: SpanModel, layers: dict[int, Any], run: Callable[[Any, dict[str, Any]], Any]) -> RunLayer:
    """Return a function that runs these layers, and returns the activations as they are for all others."""

    def run_layer(index: int, arguments: dict[str, Any]) -> Any:
        if index not in layers:
            return next(iter(arguments.values()))
        model.loaded.load_block(index)  # A copy of a large block reads the block's own weights.
        return run(layers[index], arguments)

    return run_layer
