"""Load a span's tensors part by part: each is converted as transformers converts it, and quantized at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from treeswarm.errors import ModelError
from treeswarm_node.model.checkpoint.held_weights import HeldWeights
from treeswarm_node.model.checkpoint.lazy_weights import SomeExperts
from treeswarm_node.model.checkpoint.parts import ExpertRange, LoadedPart, LoadPart
from treeswarm_node.model.checkpoint.tensors import check_report
from treeswarm_node.model.quantization.quantized_linear import (
    ExpertPacker,
    expert_weights,
    quantize_loaded,
)
from treeswarm_node.model.quantization.weight_kinds import KINDS


def pick(weights: Mapping[str, Any], part: LoadPart) -> dict[str, Any]:
    """Return the lazy weights of a part."""
    experts = part.experts
    if experts is None or not experts.in_one_tensor:
        return {name: weights[name] for name in part.tensors}
    return {name: SomeExperts(weights[name], experts.start, experts.end) for name in part.tensors}


@dataclass(eq=False)
class PartLoader:
    """Loads parts into the modules of a skeleton."""

    folder: Path
    skeleton: PreTrainedModel
    config: LoadStateDictConfig
    quantization: str
    held: HeldWeights | None = None
    """Takes the weights that are held in the bits in which they were published, or None if all are expanded."""
    _fused: dict[str, "torch.Tensor | ExpertPacker"] = field(default_factory=dict)
    """Fused experts of which some are loaded, by the parameter's name."""

    def load(self, part: LoadPart, weights: Mapping[str, Any]) -> LoadedPart:
        """Load a part of the checkpoint's lazy `weights`, and return what it has become.

        Raises ModelError if the files cannot be read, or do not fit the modules.
        """
        names = self.held.take(part.tensors, weights) if self.held is not None else set()
        rest = replace(part, tensors=tuple(name for name in part.tensors if name not in self._held_names))
        if part.experts is not None:
            if rest.tensors:
                names |= self._load_experts(part, part.experts, weights)
            return LoadedPart(part, frozenset(names))
        if rest.tensors:
            names |= self._convert(pick(weights, rest))
        if self.quantization in KINDS and part.block is not None:
            for path in {name.rpartition(".")[0] for name in names}:
                self._quantize(path)
        return LoadedPart(part, frozenset(names))

    @property
    def _held_names(self) -> frozenset[str]:
        return self.held.names if self.held is not None else frozenset()

    def _quantize(self, path: str) -> None:
        owner, _, name = path.rpartition(".")
        parent = self.skeleton.get_submodule(owner)
        quantize_loaded(parent, name, self.quantization)

    def _load_experts(self, part: LoadPart, experts: ExpertRange, weights: Mapping[str, Any]) -> set[str]:
        """Load some experts of a fused parameter: the parameter is cut to them while they are converted."""
        path, _, name = experts.parameter.rpartition(".")
        module = self.skeleton.get_submodule(path)
        whole = module.get_parameter(name)
        module._parameters[name] = torch.nn.Parameter(whole[experts.start : experts.end], requires_grad=False)
        try:
            names = self._convert(pick(weights, part))
            loaded: torch.Tensor = module._parameters[name].data
        finally:
            module._parameters[name] = whole
        if loaded.is_meta:
            listed = ", ".join(part.tensors[:3])
            raise ModelError(f"tensors {listed}, … in '{self.folder}' are no experts' weights: use another checkpoint")
        if experts.parameter not in self._fused:
            self._fused[experts.parameter] = self._make_room(module, whole, loaded)
        fused = self._fused[experts.parameter]
        if isinstance(fused, ExpertPacker):
            fused.put(experts.start, loaded)
        else:
            fused[experts.start : experts.end] = loaded
        if experts.end < len(whole):
            return names
        del self._fused[experts.parameter]
        if isinstance(fused, ExpertPacker):
            fused.replace(module, name)
        else:
            module._parameters[name] = torch.nn.Parameter(fused, requires_grad=False)
        return names

    def _make_room(
        self, module: torch.nn.Module, whole: torch.Tensor, loaded: torch.Tensor
    ) -> "torch.Tensor | ExpertPacker":
        kind = self.quantization
        if kind in KINDS and any(whole is weight for _, weight in expert_weights(module, kind)):
            return ExpertPacker(whole, kind, transposed=bool(module.is_transposed))
        return torch.empty(whole.shape, dtype=loaded.dtype, device=loaded.device)

    def _convert(self, weights: dict[str, Any]) -> set[str]:
        """Read and convert weights into modules, and return the model's names of those that were loaded."""
        try:
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, weights, self.config)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"the weights in '{self.folder}' cannot be read ({error}): download them again") from None
        check_report(self.folder, info)
        return set(self.skeleton.state_dict()) - set(info.missing_keys)
