"""Put weights that a checkpoint stores in fewer bits into modules that hold them so, in place of expanding them."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from treeswarm.errors import ModelError
from treeswarm_node.model.checkpoint.dequantize import formulas
from treeswarm_node.model.checkpoint.dequantize.formulas import Codes
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight
from treeswarm_node.model.checkpoint.storage import find_block_weights
from treeswarm_node.model.checkpoint.tensors import HostedTensors
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.quantization.published_codes import Stacked, hold
from treeswarm_node.model.quantization.quantized_linear import (
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    compute_expert_by_expert,
)
from treeswarm_node.model.quantization.weight_kinds import HeldMatrix


@dataclass(frozen=True)
class _Place:
    """Says which of a parameter's matrices a weight of the checkpoint is."""

    target: str
    """Name of the parameter in the model."""
    expert: int | None
    """Index of the expert, or None if the weight is the whole parameter."""
    piece: int
    """Index among the weights that are stacked into one matrix, such as gate and up projection."""
    shape: torch.Size
    """Shape [out, in] of the matrix."""


@dataclass(frozen=True)
class _Piece:
    """Says how one of the matrices that are stacked is held."""

    matrix: HeldMatrix
    shape: torch.Size
    """Shape [out, in]."""
    roles: frozenset[str]
    """Roles of its parts."""


@dataclass
class _Filling:
    """Holds what was read of a parameter."""

    missing: int
    """Number of weights that are still to be read."""
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: dict[int, _Piece] = field(default_factory=dict)


class HeldWeights:
    """Takes weights of a checkpoint one by one, and replaces modules whose weights are complete."""

    def __init__(self, skeleton: PreTrainedModel, tensors: HostedTensors, *, by_kernel: bool) -> None:
        """Find the weights that can be held; `skeleton` has its parameters on meta.

        `by_kernel` says whether kernels multiply with codes where there are some, instead of expanding them.
        """
        self._skeleton, self._by_kernel = skeleton, by_kernel
        self._places = _find_places(skeleton, tensors)
        counts: dict[str, int] = {}
        for place in self._places.values():
            counts[place.target] = counts.get(place.target, 0) + 1
        self._filling = {target: _Filling(count) for target, count in counts.items()}

    @property
    def names(self) -> frozenset[str]:
        """Names in the checkpoint of the weights that are held."""
        return frozenset(self._places)

    def take(self, names: Iterable[str], weights: Mapping[str, Any]) -> set[str]:
        """Read those of the checkpoint's weights that are held, and return the model's names of their parameters.

        A weight that was taken before is not read again.
        """
        targets: set[str] = set()
        for name in names:
            if name not in self._places:
                continue
            place = self._places[name]
            targets.add(place.target)
            filling = self._filling.get(place.target)
            if filling is not None:
                self._put(place, filling, name, weights[name].read_codes())
                filling.missing -= 1
                if not filling.missing:
                    self._replace(place.target, filling)
                    del self._filling[place.target]
        return targets

    def _put(self, place: _Place, filling: _Filling, name: str, codes: Codes) -> None:
        parameter = self._parameter(place.target)
        if place.expert is None and parameter.ndim == 3 and codes.expand.func is formulas.mxfp4_experts:
            codes = Codes(codes.parts, partial(formulas.packed_fp4))  # gpt-oss's parameter is transposed
        matrix, parts = hold(codes, parameter.dtype, by_kernel=self._by_kernel)
        piece = _Piece(matrix, place.shape, frozenset(parts))
        if filling.pieces.setdefault(place.piece, piece) != piece:
            raise _uneven(name)
        for role, tensor in parts.items():
            part = f"{role}_{place.piece}"
            if place.expert is None:
                filling.parts[part] = tensor
                continue
            if part not in filling.parts:
                size = (len(parameter), *tensor.shape)
                filling.parts[part] = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
            if filling.parts[part].shape[1:] != tensor.shape:
                raise _uneven(name)
            filling.parts[part][place.expert] = tensor

    def _replace(self, target: str, filling: _Filling) -> None:
        """Replace a linear layer, or a parameter of fused experts, by one that holds codes."""
        owner, _, leaf = target.rpartition(".")
        module: Any = self._skeleton.get_submodule(owner)
        parameter = self._parameter(target)
        pieces, parts = [filling.pieces[piece] for piece in sorted(filling.pieces)], filling.parts
        if len(pieces) == 1:
            parts = {name.removesuffix("_0"): tensor for name, tensor in parts.items()}
        packing = pieces[0].matrix if len(pieces) == 1 else Stacked([(each.matrix, each.shape) for each in pieces])
        if parameter.ndim == 2:
            parent, _, name = owner.rpartition(".")
            held = QuantizedLinear(QuantizedWeight(packing, parameter.shape, parts), module.bias)
            setattr(self._skeleton.get_submodule(parent), name, held.eval())
            return
        transposed = bool(module.is_transposed)
        shape = parameter[0].t().shape if transposed else parameter[0].shape
        experts = QuantizedExperts(packing, shape, parts, parameter.dtype, transposed=transposed)
        delattr(module, leaf)
        setattr(module, leaf, experts.eval())
        compute_expert_by_expert(module)

    def _parameter(self, target: str) -> torch.Tensor:
        owner, _, leaf = target.rpartition(".")
        parameter: torch.Tensor = self._skeleton.get_submodule(owner).get_parameter(leaf)
        return parameter


def _uneven(name: str) -> ModelError:
    return ModelError(f"{name} is not stored as the other experts of its layer: give --expand load")


def _find_places(skeleton: PreTrainedModel, tensors: HostedTensors) -> dict[str, _Place]:
    """Return the place of each weight that can be held, by its name in the checkpoint."""
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = skeleton.state_dict()
    by_target: dict[str, list[str]] = {}
    for name, target in tensors.targets.items():
        by_target.setdefault(target, []).append(name)
    in_blocks = find_block_weights(tensors.stored, tensors.targets, find_blocks(skeleton))
    held_targets = {weight.target for weight in in_blocks if weight.can_be_held}
    places: dict[str, _Place] = {}
    for target, names in by_target.items():
        stored = [tensors.stored[name] for name in names if name in tensors.stored]
        if len(stored) < len(names) or target not in held_targets:
            continue
        patterns = {
            name: rename_source_key(name, renamings, converters, skeleton.base_model_prefix, state)[1] for name in names
        }
        owner, _, leaf = target.rpartition(".")
        module: Any = skeleton.get_submodule(owner)
        if len(names) == 1 and patterns[names[0]] is None:
            if _is_whole(stored[0], module, leaf):
                parameter = module.get_parameter(leaf)
                shape = parameter.shape if parameter.ndim == 2 else parameter[0].shape
                places[names[0]] = _Place(target, None, 0, shape)
            continue
        converter = by_pattern.get(next(iter(patterns.values())) or "")
        if converter is not None and _merges_experts(converter):
            places |= _place_experts(target, module, leaf, patterns, converter.source_patterns, tensors.stored)
    return places


def _is_whole(weight: StoredWeight, module: torch.nn.Module, leaf: str) -> bool:
    """Return whether a weight is the matrix of a linear layer, or all matrices of fused experts."""
    parameter = module.get_parameter(leaf)
    if type(module) is torch.nn.Linear and leaf == "weight":
        # The headers of a 4-bit weight of bitsandbytes say only how many numbers it has.
        return weight.shape == tuple(parameter.shape) or (
            weight.read is formulas.bitsandbytes_4bit and math.prod(weight.shape) == parameter.numel()
        )
    if not hasattr(module, "is_transposed") or parameter.ndim != 3 or weight.shape != tuple(parameter.shape):
        return False
    return weight.is_stacked and bool(module.is_transposed) == (weight.read is formulas.mxfp4)


def _merges_experts(converter: WeightConverter) -> bool:
    """Return whether a conversion stacks experts, and their gate and up projections."""
    if len(converter.target_patterns) != 1:
        return False
    merge, *rest = converter.operations
    if type(merge) is not MergeModulelist or merge.dim != 0:
        return False
    if not rest:
        return len(converter.source_patterns) == 1
    return len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1 and not rest[0].num_shards_attribute


def _place_experts(
    target: str,
    module: torch.nn.Module,
    leaf: str,
    patterns: Mapping[str, str | None],
    order: Sequence[str],
    stored: Mapping[str, StoredWeight],
) -> dict[str, _Place]:
    """Return the places of experts' matrices, or none if they do not fill the parameter."""
    parameter = module.get_parameter(leaf)
    if getattr(module, "is_transposed", True) or parameter.ndim != 3:
        return {}
    by_piece = [sorted((n for n in patterns if patterns[n] == pattern), key=dot_natural_key) for pattern in order]
    if any(len(names) != len(parameter) for names in by_piece):
        return {}
    numbers = sum(math.prod(stored[name].shape) for name in itertools.chain.from_iterable(by_piece))
    if numbers != parameter.numel():
        return {}
    return {
        name: _Place(target, expert, piece, torch.Size(stored[name].shape))
        for piece, names in enumerate(by_piece)
        for expert, name in enumerate(names)
    }
