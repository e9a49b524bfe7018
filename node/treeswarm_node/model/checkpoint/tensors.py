"""Match a checkpoint's tensors with the modules that a span hosts; nothing may be left over on either side."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from treeswarm.errors import ModelError

# Tensors that old checkpoints store although they are computed from the config, as `from_pretrained` ignores them too.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class HostedTensors:
    """Holds the tensors of a checkpoint that belong to hosted modules."""

    by_file: dict[str, list[str]]
    """Names in the checkpoint of the tensors to load, by file."""
    targets: dict[str, str]
    """Name in the model by name in the checkpoint; several tensors may be merged into one of the model."""
    expected: frozenset[str]
    """Names in the model of the hosted modules' parameters and persistent buffers."""


def find_tensors(
    folder: Path,
    files: Mapping[str, Iterable[str]],
    skeleton: PreTrainedModel,
    hosted: Iterable[torch.nn.Module],
    conversions: list[Any],
) -> HostedTensors:
    """Find the checkpoint's tensors that are loaded into the hosted modules; `files` has their names by file.

    Raises ModelError if the checkpoint has a tensor below a hosted module that the module does not have.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    modules = {id(module) for part in hosted for module in part.modules()}
    state = skeleton.state_dict(keep_vars=True)
    expected = frozenset(_names_of(skeleton, modules, state))
    prefixes = {f"{name}." for name, module in skeleton.named_modules() if id(module) in modules}
    ignored = re.compile("|".join((*(skeleton._keys_to_ignore_on_load_unexpected or ()), *COMPUTED)))
    by_file: dict[str, list[str]] = {}
    targets: dict[str, str] = {}
    for file, tensors in files.items():
        for tensor in tensors:
            name, _ = rename_source_key(tensor, renamings, converters, skeleton.base_model_prefix, state)
            if name not in state and tensor in state:
                name = tensor
            if name in expected:
                by_file.setdefault(file, []).append(tensor)
                targets[tensor] = name
            elif name not in state and _is_below(name, prefixes) and not ignored.search(name):
                raise ModelError(
                    f"tensor {tensor} in '{folder}' belongs to no parameter of the model that config.json describes: "
                    "config and weights are of different models, or the weights are in an unknown format"
                )
    return HostedTensors(by_file, targets, expected)


def _names_of(skeleton: PreTrainedModel, modules: set[int], state: dict[str, Any]) -> Iterable[str]:
    """Return the names of the modules' parameters and persistent buffers; a tied one has several."""
    tensors = {
        id(tensor)
        for module in skeleton.modules()
        if id(module) in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return [name for name, tensor in state.items() if id(tensor) in tensors]


def _is_below(name: str, prefixes: set[str]) -> bool:
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
