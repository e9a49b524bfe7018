"""Loads a span of a model: its tensors and no others, by transformers' own rules."""

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
from treeswarm_node.model.quantization import quantize


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
    """Load decoder blocks `span`, with the embedding at the head and norm and LM head at the tail.

    Only these tensors are read, from only the files that hold them.  Checkpoints whose names or layouts differ from
    the modules' (fused experts) go through transformers' own conversions.  With `quantization` or
    `offload`, block after block is loaded and put away, so that the device holds one of them whole at a time.

    Raises BadRequest for a span the model
    does not have, ModelError for files that are missing or corrupt, UnsupportedModel.
    """
    skeleton = _skeleton(folder, dtype)
    blocks = int(skeleton.config.num_hidden_layers)
    if span.end > blocks:
        raise BadRequest(f"blocks {span} run past the model, which has {blocks}: give --blocks within 0:{blocks}")
    conversions = get_model_conversion_mapping(skeleton)
    wanted = _wanted_tensors(folder, skeleton, span, conversions)
    for buffer in skeleton.buffers():
        buffer.data = buffer.data.to(device)
    skeleton.eval().requires_grad_(False)
    state = _open_tensors(folder, wanted, progress)
    by_block = quantization != "none" or offload is not None
    for block, part in _portions(state, span) if by_block else [(None, state)]:
        try:
            info, _ = convert_and_load_state_dict_in_model(
                skeleton, part, LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=conversions)
            )
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"the weights in '{folder}' cannot be read ({error}): download them again") from None
        if block is None:
            skeleton.tie_weights()
        layers = skeleton.base_model.layers
        _check_complete(
            folder,
            skeleton,
            hosted_parts(skeleton, span)
            if not by_block
            else [layers[block]]
            if block is not None
            else hosted_ends(skeleton, span),
            info,
        )
        if block is not None:
            layers[block].requires_grad_(False)
            if quantization != "none":
                quantize(layers[block], quantization)
            if offload is not None:
                offload.store_layer(layers[block])
    return LoadedSpan(skeleton.eval().requires_grad_(False), span, dtype, device, offload)


def _portions(state: dict[str, Any], span: Span) -> list[tuple[int | None, dict[str, Any]]]:
    """The tensors of each block, and last (None) those of no block."""
    parts: dict[int | None, dict[str, Any]] = {block: {} for block in [*range(span.start, span.end), None]}
    for name, tensor in state.items():
        found = BLOCK.search(name)
        parts[int(found[1]) if found else None][name] = tensor
    return list(parts.items())


def hosted_parts(skeleton: PreTrainedModel, span: Span) -> list[torch.nn.Module]:
    """The modules of which `span` needs real tensors."""
    return [*skeleton.base_model.layers[span.start : span.end], *hosted_ends(skeleton, span)]


def hosted_ends(skeleton: PreTrainedModel, span: Span) -> list[torch.nn.Module]:
    """Those that are no decoder block."""
    base = skeleton.base_model
    parts: list[torch.nn.Module] = []
    if span.start == 0:
        parts.append(skeleton.get_input_embeddings())
    if span.end == len(base.layers):
        parts += [base.norm, skeleton.get_output_embeddings()]
    return parts


def _skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model with every parameter on meta; buffers are computed from the config and real."""
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
        raise UnsupportedModel(f"models of type '{model_type}' keep their decoder blocks where they are not looked for")
    return skeleton


def _wanted_tensors(
    folder: Path, skeleton: PreTrainedModel, span: Span, conversions: list[Any]
) -> dict[str, list[str]]:
    """By file, the checkpoint tensors that end up in the span's modules."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    parts = {id(module) for part in hosted_parts(skeleton, span) for module in part.modules()}
    known = skeleton.state_dict(keep_vars=True)
    wanted_parameters = {
        id(p) for module in skeleton.modules() if id(module) in parts for p in module.parameters(recurse=False)
    }
    hosted = {name for name, tensor in known.items() if id(tensor) in wanted_parameters}
    wanted: dict[str, list[str]] = {}
    for file, tensors in weight_files(folder).items():
        for tensor in tensors:
            name, _ = rename_source_key(tensor, renamings, converters, skeleton.base_model_prefix, known)
            if name in hosted:
                wanted.setdefault(file, []).append(tensor)
    return wanted


class _Told:
    """A lazy slice of a checkpoint's tensor that tells when it is read, in whatever thread transformers does."""

    def __init__(self, inner: Any, read: Callable[[], None]) -> None:
        self._inner, self._read = inner, read

    def __getitem__(self, index: Any) -> Any:
        found = self._inner[index]
        self._read()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _open_tensors(folder: Path, wanted: dict[str, list[str]], progress: Progress | None) -> dict[str, Any]:
    """Lazy slices of the wanted tensors; transformers reads each when it places it."""
    total, done = sum(map(len, wanted.values())), itertools.count(1)
    state: dict[str, Any] = {}

    def read() -> None:
        if progress is not None:
            progress(next(done), total, LOADING)

    for file, tensors in sorted(wanted.items()):
        read_header(folder / file)
        try:
            opened: Any = safe_open(folder / file, framework="pt", device="cpu")
            state.update({tensor: _Told(opened.get_slice(tensor), read) for tensor in tensors})
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / file} cannot be read ({error}): download it again") from None
    return state


def _check_complete(folder: Path, skeleton: PreTrainedModel, parts: list[torch.nn.Module], info: Any) -> None:
    if info.mismatched_keys:
        name = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.mismatched_keys)[0]
        raise ModelError(f"tensor {name} in '{folder}' has not the shape that config.json says")
    if info.conversion_errors:
        raise ModelError(f"the weights in '{folder}' do not convert: {next(iter(info.conversion_errors.values()))}")
    names = {id(p): name for name, p in skeleton.named_parameters()}
    for part in parts:
        for parameter in part.parameters():
            if parameter.device.type == "meta":
                raise ModelError(
                    f"tensor {names.get(id(parameter), '?')} is missing in '{folder}': the directory is partial, "
                    "download it again"
                )
