"""Match a checkpoint's tensors with the modules that a span hosts; nothing may be left over on either side."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from treeswarm.errors import ModelError
from treeswarm.model_files import read_config, read_header
from treeswarm.model_sources.gguf_files import is_gguf_folder
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight
from treeswarm_node.model.checkpoint.dequantize.stored_weights import find_stored_weights, role_of
from treeswarm_node.model.checkpoint.formats import quantization_settings
from treeswarm_node.model.checkpoint.storage import read_entries

# Tensors that old checkpoints store although they are computed from the config, as `from_pretrained` ignores them too.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
# Names of causal masks in old checkpoints, and of the value that hides a score.
MASKED_VALUE = "masked_bias"
MASKS = ("bias", "causal_mask", MASKED_VALUE)
# Scales of activations and of the KV cache.  Products here take activations as they are, as transformers does when it
# dequantizes, so these tensors are not needed.
OF_ACTIVATIONS = (
    r"\.(input|output)_(scale|global_scale|zero_point|scale_ub)$", r"\.(activation_scale|qscale_act)$",
    r"\.(q|k|v|kv)_(scale|zero_point)$",
)  # fmt: skip


@dataclass(frozen=True)
class HostedTensors:
    """Holds the tensors of a checkpoint that belong to hosted modules."""

    by_file: dict[str, list[str]]
    """Names in the checkpoint of the tensors to load, by file."""
    targets: dict[str, str]
    """Name in the model by name in the checkpoint; several tensors may be merged into one of the model.

    A weight that is stored in fewer bits has one name, under which it would be stored in 16 bits.
    """
    stored: Mapping[str, StoredWeight]
    """Weights that several tensors store in fewer bits, by the name that they would have in 16 bits."""
    expected: frozenset[str]
    """Names in the model of the hosted modules' parameters and persistent buffers."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each weight by its name in the checkpoint; a GGUF file's own reader knows those of its tensors."""


def name_mapping(skeleton: PreTrainedModel, conversions: list[Any]) -> Callable[[str], str]:
    """Return a function that maps a tensor's name in the checkpoint to its name in the model."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = skeleton.state_dict(keep_vars=True)

    @cache
    def target(tensor: str) -> str:
        name, _ = rename_source_key(tensor, renamings, converters, skeleton.base_model_prefix, state)
        return tensor if name not in state and tensor in state else name

    return target


def find_tensors(
    folder: Path,
    files: Mapping[str, Iterable[str]],
    skeleton: PreTrainedModel,
    hosted: Iterable[torch.nn.Module],
    conversions: list[Any],
) -> HostedTensors:
    """Find the checkpoint's tensors that are loaded into the hosted modules; `files` has their names by file.

    Tensors of a hosted module's children are not meant.

    Raises ModelError if the checkpoint has a tensor below a hosted module that the module does not have.
    """
    modules = {id(module) for module in hosted}
    state = skeleton.state_dict(keep_vars=True)
    target = name_mapping(skeleton, conversions)
    expected = frozenset(_names_of(skeleton, modules, state))
    prefixes = {f"{name}." for name, module in skeleton.named_modules() if id(module) in modules}
    ignored = re.compile("|".join((*(skeleton._keys_to_ignore_on_load_unexpected or ()), *COMPUTED, *OF_ACTIVATIONS)))

    by_file: dict[str, list[str]] = {}
    for file, tensors in files.items():
        for tensor in tensors:
            name = target(tensor)
            if name in expected or target(role_of(tensor)[0]) in expected:
                by_file.setdefault(file, []).append(tensor)
            elif name in state or not is_below(name, prefixes) or ignored.search(name):
                continue
            elif not (_is_zero_bias(folder / file, tensor) or _is_mask(folder / file, tensor)):
                raise _left_over(folder, tensor)
    stored, plain, shapes = _read_stored(folder, by_file)
    for tensor in plain:
        if target(tensor) not in expected:
            raise _left_over(folder, tensor)
    used = plain.union(part for weight in stored.values() for part in weight.parts.values())
    return HostedTensors(
        {file: [tensor for tensor in tensors if tensor in used] for file, tensors in by_file.items()},
        {name: target(name) for name in (*plain, *stored)},
        stored,
        expected,
        shapes,
    )


def _read_stored(
    folder: Path, by_file: dict[str, list[str]]
) -> tuple[Mapping[str, StoredWeight], frozenset[str], Mapping[str, tuple[int, ...]]]:
    """Return the weights that the tensors store in fewer bits, the tensors that are weights as they are, and shapes.

    A GGUF file's own reader expands its weights.
    """
    if is_gguf_folder(folder):
        return {}, frozenset(itertools.chain.from_iterable(by_file.values())), {}
    entries = read_entries(folder, by_file)
    found = find_stored_weights(entries, quantization_settings(read_config(folder)) or {})
    shapes = {name: entries[name].shape for name in found.plain}
    return found.weights, found.plain, shapes | {name: weight.shape for name, weight in found.weights.items()}


def _is_zero_bias(path: Path, tensor: str) -> bool:
    """Return whether a tensor is a bias of zeros beside a weight of GPTQ: its old tools write one for every layer."""
    stem, _, end = tensor.rpartition(".")
    header = read_header(path) if end == "bias" and path.exists() else {}
    if f"{stem}.qweight" not in header:
        return False
    with safe_open(path, framework="pt") as opened:
        return not opened.get_tensor(tensor).any()


def _is_mask(path: Path, tensor: str) -> bool:
    """Return whether a tensor is a causal mask [1, 1, n, n], or its value; old checkpoints of GPT-J have both."""
    end = tensor.rpartition(".")[2]
    header = read_header(path) if end in MASKS and path.exists() else {}
    shape = header[tensor]["shape"] if tensor in header else [0]
    return shape == [] if end == MASKED_VALUE else len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]


def _left_over(folder: Path, tensor: str) -> ModelError:
    return ModelError(
        f"tensor {tensor} in '{folder}' belongs to no parameter of the model that config.json describes: config and "
        "weights are of different models, or the weights are in an unknown format"
    )


def _names_of(skeleton: PreTrainedModel, modules: set[int], state: dict[str, Any]) -> Iterable[str]:
    """Return the names of the modules' parameters and persistent buffers; a tied one has several."""
    tensors = {
        id(tensor)
        for module in skeleton.modules()
        if id(module) in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return [name for name, tensor in state.items() if id(tensor) in tensors]


def is_below(name: str, prefixes: set[str]) -> bool:
    """Return whether a tensor's name is that of a module in `prefixes`, or below one of them."""
    parts = name.split(".")
    return any(".".join(parts[:length]) + "." in prefixes for length in range(1, len(parts)))


def check_report(folder: Path, info: Any) -> None:
    """Raise ModelError if transformers could not load a tensor: `info` is its report."""
    if info.mismatched_keys:
        name = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.mismatched_keys)[0]
        raise ModelError(
            f"tensor {name} in '{folder}' does not have the shape that config.json implies: download it again"
        )
    if info.conversion_errors:
        name, error = next(iter(info.conversion_errors.items()))
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(f"tensor {name} in '{folder}' cannot be converted: {reason[:200]}")


def check_complete(folder: Path, skeleton: PreTrainedModel, expected: Iterable[str], missing: set[str]) -> None:
    """Raise ModelError if one of the `expected` names is in `missing`, the names that were not loaded.

    What transformers computes from the config is not missing.
    """
    computed = re.compile("|".join((*(skeleton._keys_to_ignore_on_load_missing or ()), *COMPUTED)))
    for name in sorted(missing.intersection(expected)):
        if not computed.search(name):
            raise ModelError(
                f"tensor {name} is missing in '{folder}': the directory is partial (download it again), or its "
                "weights are in an unknown format"
            )
