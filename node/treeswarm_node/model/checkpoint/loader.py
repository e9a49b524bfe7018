"""Load a span of a model: its tensors and no others, converted as transformers converts them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from treeswarm.errors import BadRequest, ModelError, UnsupportedModel
from treeswarm.model_files import BLOCK, read_config, read_header, weight_files
from treeswarm.progress import LOADING, Progress
from treeswarm.protocol.spans import Span
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.offload import Offload
from treeswarm_node.model.quantization.quantized_linear import quantize


def load_span(
    folder: Path,
    span: Span,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *,
    quantization: str = "none",
    offload: Offload | None = None,
) -> LoadedSpan:
    """Load the decoder blocks `span`, with the embedding at the head and with norm and LM head at the tail.

    Only these tensors are read, and only the files that hold them.  If names or layouts in the checkpoint differ from
    those of the modules (fused experts), transformers' own conversions are applied.  With `quantization` or `offload`,
    blocks are loaded one by one, so that the device holds one unquantized block at a time.

    Raises BadRequest for a span that the model does not have, ModelError for files that are missing or corrupt, and
    UnsupportedModel.
    """
    skeleton = _build_skeleton(folder, dtype)
    blocks = int(skeleton.config.num_hidden_layers)
    if span.end > blocks:
        raise BadRequest(f"blocks {span} exceed the model, which has {blocks}: give --blocks within {Span(0, blocks)}")
    conversions = get_model_conversion_mapping(skeleton)
    tensors = _find_tensors(folder, skeleton, span, conversions)
    for buffer in skeleton.buffers():
        buffer.data = buffer.data.to(device)
    skeleton.eval().requires_grad_(False)
    state = _open_tensors(folder, tensors, progress)
    by_block = quantization != "none" or offload is not None
    for block, part in _split_by_block(state, span) if by_block else [(None, state)]:
        config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=conversions)
        info = _read_tensors(folder, skeleton, part, config)
        if block is None:
            skeleton.tie_weights()
            parts = hosted_ends(skeleton, span) if by_block else hosted_parts(skeleton, span)
            _check_complete(folder, skeleton, parts, info)
        else:
            layer = skeleton.base_model.layers[block]
            _check_complete(folder, skeleton, [layer], info)
            layer.requires_grad_(False)
            if quantization != "none":
                quantize(layer, quantization)
            if offload is not None:
                offload.store_layer(layer)
    return LoadedSpan(skeleton.eval().requires_grad_(False), span, dtype, device, offload)


def _read_tensors(folder: Path, skeleton: PreTrainedModel, tensors: dict[str, Any], config: LoadStateDictConfig) -> Any:
    """Read tensors into the skeleton's modules, and return transformers' report of what did not match."""
    try:
        info, _ = convert_and_load_state_dict_in_model(skeleton, tensors, config)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"the weights in '{folder}' cannot be read ({error}): download them again") from None
    return info


def _split_by_block(state: dict[str, Any], span: Span) -> list[tuple[int | None, dict[str, Any]]]:
    """Return the tensors of each block, and last, under None, those that belong to no block."""
    parts: dict[int | None, dict[str, Any]] = {block: {} for block in [*range(span.start, span.end), None]}
    for name, tensor in state.items():
        match = BLOCK.search(name)
        parts[int(match[1]) if match else None][name] = tensor
    return list(parts.items())


def hosted_parts(skeleton: PreTrainedModel, span: Span) -> list[torch.nn.Module]:
    """Return the modules whose tensors `span` needs."""
    return [*skeleton.base_model.layers[span.start : span.end], *hosted_ends(skeleton, span)]


def hosted_ends(skeleton: PreTrainedModel, span: Span) -> list[torch.nn.Module]:
    """Return the modules that `span` needs besides its decoder blocks: embedding, final norm, LM head."""
    base = skeleton.base_model
    parts: list[torch.nn.Module] = []
    if span.start == 0:
        parts.append(skeleton.get_input_embeddings())
    if span.end == len(base.layers):
        parts += [base.norm, skeleton.get_output_embeddings()]
    return parts


def _build_skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole model with every parameter on meta; buffers are real and computed from the config."""
    model_type = read_config(folder)["model_type"]
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        skeleton.tie_weights()
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot build a causal LM of type '{model_type}': {error}"
        ) from error
    if not (hasattr(skeleton.base_model, "layers") and hasattr(skeleton.base_model, "norm")):
        raise UnsupportedModel(
            f"unsupported architecture '{model_type}': expected base_model.layers and base_model.norm"
        )
    return skeleton


def _find_tensors(folder: Path, skeleton: PreTrainedModel, span: Span, conversions: list[Any]) -> dict[str, list[str]]:
    """Return, by file, the names of the checkpoint's tensors that are loaded into the span's modules."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    hosted_modules = {id(module) for part in hosted_parts(skeleton, span) for module in part.modules()}
    parameters = skeleton.state_dict(keep_vars=True)
    hosted_parameters = {
        id(parameter)
        for module in skeleton.modules()
        if id(module) in hosted_modules
        for parameter in module.parameters(recurse=False)
    }
    hosted_names = {name for name, parameter in parameters.items() if id(parameter) in hosted_parameters}
    by_file: dict[str, list[str]] = {}
    for file, tensors in weight_files(folder).items():
        for tensor in tensors:
            name, _ = rename_source_key(tensor, renamings, converters, skeleton.base_model_prefix, parameters)
            if name in hosted_names:
                by_file.setdefault(file, []).append(tensor)
    return by_file


class _ReportingSlice:
    """Wraps a lazy slice of a checkpoint's tensor, and calls `on_read` when transformers' thread reads it."""

    def __init__(self, tensor: Any, on_read: Callable[[], None]) -> None:
        self._tensor, self._on_read = tensor, on_read

    def __getitem__(self, index: Any) -> Any:
        value = self._tensor[index]
        self._on_read()
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def _open_tensors(folder: Path, by_file: dict[str, list[str]], progress: Progress | None) -> dict[str, Any]:
    """Return lazy slices of the tensors; transformers reads each slice when it loads it into a module."""
    total, done = sum(map(len, by_file.values())), itertools.count(1)
    state: dict[str, Any] = {}

    def report() -> None:
        if progress is not None:
            progress(next(done), total, LOADING)

    for file, tensors in sorted(by_file.items()):
        read_header(folder / file)
        try:
            opened: Any = safe_open(folder / file, framework="pt", device="cpu")
            state.update({tensor: _ReportingSlice(opened.get_slice(tensor), report) for tensor in tensors})
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / file} cannot be read ({error}): download it again") from None
    return state


def _check_complete(folder: Path, skeleton: PreTrainedModel, parts: list[torch.nn.Module], info: Any) -> None:
    if info.mismatched_keys:
        name = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.mismatched_keys)[0]
        raise ModelError(
            f"tensor {name} in '{folder}' does not have the shape that config.json implies: download it again"
        )
    if info.conversion_errors:
        error = next(iter(info.conversion_errors.values()))
        raise ModelError(f"the weights in '{folder}' cannot be converted: {error}")
    names = {id(p): name for name, p in skeleton.named_parameters()}
    for part in parts:
        for parameter in part.parameters():
            if parameter.device.type == "meta":
                raise ModelError(
                    f"tensor {names.get(id(parameter), '?')} is missing in '{folder}': the directory is partial, "
                    "download it again"
                )
