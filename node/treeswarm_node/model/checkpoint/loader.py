"""Load a span of a model: its tensors and no others, converted as transformers converts them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.model_files import weight_files
from treeswarm.model_sources.gguf_files import WEIGHTS, is_gguf_folder
from treeswarm.progress import Progress
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.gguf_tensors import GGUFTensors
from treeswarm_node.model.checkpoint.held_weights import HeldWeights
from treeswarm_node.model.checkpoint.lazy_weights import open_weights
from treeswarm_node.model.checkpoint.part_loader import PartLoader
from treeswarm_node.model.checkpoint.parts import LoadedPart, divide
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.storage import (
    BlockWeight,
    describe_storage,
    explain_no_kernel,
    find_block_weights,
)
from treeswarm_node.model.checkpoint.tensors import HostedTensors, check_complete, find_tensors
from treeswarm_node.model.families.blocks import DecoderBlocks, find_blocks, is_wrapper, modules_besides
from treeswarm_node.model.families.extra_inputs import ExtraInputs
from treeswarm_node.model.families.kv_shapes import check_cuts, kv_givers
from treeswarm_node.model.loaded_span import CheckpointWeights, LoadedSpan
from treeswarm_node.model.offload import Offload
from treeswarm_node.model.quantization.quantized_linear import check_quantizable
from treeswarm_node.model.quantization.weight_kinds import KINDS

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MatchedCheckpoint:
    """Holds the tensors of a checkpoint that a span needs, and how they become those of its modules."""

    tensors: HostedTensors
    conversions: list[Any]
    """Transformers' renamings and conversions of the model's type."""
    gguf: GGUFTensors | None
    """Reader of the weights, or None if they are safetensors."""
    decoder: DecoderBlocks

    @property
    def block_weights(self) -> list[BlockWeight]:
        """Weights of decoder blocks that are stored in fewer bits."""
        return find_block_weights(self.tensors.stored, self.tensors.targets, self.decoder)

    @property
    def file_targets(self) -> dict[str, str]:
        """Name in the model of what a tensor becomes, or a part of, by the tensor's name in the files."""
        if self.gguf is not None:
            return {name: target for target, names in self.gguf.stored.items() for name in names}
        targets, stored = self.tensors.targets, self.tensors.stored
        parts = {part: targets[name] for name, weight in stored.items() for part in weight.parts.values()}
        return parts | {name: target for name, target in targets.items() if name not in stored}


def match_tensors(folder: Path, skeleton: PreTrainedModel, span: Span) -> MatchedCheckpoint:
    """Match a checkpoint's tensors with the modules of a span; only headers are read.

    Raises ModelError, and UnsupportedModel.
    """
    conversions = get_model_conversion_mapping(skeleton)
    gguf = GGUFTensors.open(folder, skeleton) if is_gguf_folder(folder) else None
    files = weight_files(folder) if gguf is None else {WEIGHTS: list(gguf.stored)}
    tensors = find_tensors(folder, files, skeleton, hosted_parts(skeleton, span), conversions)
    if gguf is not None:
        tensors = replace(tensors, shapes={name: gguf.shape(name) for name in tensors.targets})
    return MatchedCheckpoint(tensors, conversions, gguf, find_blocks(skeleton))


def load_span(
    folder: Path,
    span: Span,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *,
    quantization: str = "none",
    offload: Offload | None = None,
    skeleton: PreTrainedModel | None = None,
    holds_codes: bool = False,
    matched: MatchedCheckpoint | None = None,
) -> LoadedSpan:
    """Load the decoder blocks `span`, with the embedding at the head and with norm and LM head at the tail.

    Only these tensors are read, and only the files that hold them.  If names or layouts in the checkpoint differ from
    those of the modules (fused experts), transformers' own conversions are applied.  Tensors are read in small parts,
    each of which is quantized before the next one is read; with `offload`, the device holds one block at a time.
    `skeleton` is the model without weights in `dtype`, if it has been built; it becomes the loaded one.  `matched` are
    the span's tensors, if they have been matched with it.  With
    `holds_codes` weights that are published in fewer bits are held so where that is possible, and expanded one by one
    where they are used; with the quantization `published`, kernels multiply with the codes.

    Raises BadRequest for a span that the model does not have, ModelError for files that are missing or corrupt, and
    UnsupportedModel.
    """
    skeleton = build_skeleton(folder, dtype) if skeleton is None else skeleton
    decoder = find_blocks(skeleton)
    layers, blocks = decoder.layers, len(decoder.layers)
    if span.end > blocks:
        raise BadRequest(f"blocks {span} exceed the model, which has {blocks}: give --blocks within {Span(0, blocks)}")
    check_cuts(span, kv_givers(layers), blocks)
    matched = match_tensors(folder, skeleton, span) if matched is None else matched
    tensors = matched.tensors
    if is_wrapper(skeleton.config):
        log.info("'%s' is a multimodal model: its text part alone is hosted", skeleton.config.model_type)
    if storage := describe_storage(matched.block_weights, dtype, quantization, holds_codes=holds_codes):
        log.info("%s", storage)
    for buffer in skeleton.buffers():
        buffer.data = buffer.data.to(device)
    skeleton.eval().requires_grad_(False)
    dtypes = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    open_again = partial(open_weights, folder, tensors, dtypes, device, None, matched.gguf)
    state = open_weights(folder, tensors, dtypes, device, progress, matched.gguf)
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=skeleton._get_dtype_plan(dtype),
        weight_mapping=matched.conversions,
    )
    if quantization in KINDS:
        for layer in layers[span.start : span.end]:
            check_quantizable(layer, quantization)
    held = _hold_weights(skeleton, tensors, quantization) if holds_codes or quantization == "published" else None
    loader = PartLoader(folder, skeleton, config, quantization, held)
    parts: list[LoadedPart] = []
    for block, of_block in divide(tensors, skeleton, range(span.start, span.end)).items():
        parts += [loader.load(part, state) for part in of_block]
        expected = {name for name in tensors.expected if decoder.block_of(name) == block}
        if block is None:
            missing = set(skeleton.state_dict()).difference(*(loaded.names for loaded in parts))
            missing = _tie_weights(skeleton, missing, expected)
        else:
            missing = expected.difference(*(loaded.names for loaded in parts))
        check_complete(folder, skeleton, expected, missing)
        if block is not None:
            layers[block].requires_grad_(False)
            if offload is not None:
                offload.store_layer(layers[block])
    weights = CheckpointWeights(open_again, tensors.targets, parts)
    has_codes = held is not None and bool(held.names)
    return LoadedSpan(skeleton.eval().requires_grad_(False), span, dtype, device, offload, weights, has_codes)


def _hold_weights(skeleton: PreTrainedModel, tensors: HostedTensors, quantization: str) -> HeldWeights:
    """Return what holds weights in their published bits.  Raises UnsupportedModel if no kernel multiplies with them."""
    if quantization == "published" and (reason := explain_no_kernel(tensors.stored.values())):
        raise UnsupportedModel(reason)
    return HeldWeights(skeleton, tensors, by_kernel=quantization == "published")


def _tie_weights(skeleton: PreTrainedModel, missing: set[str], expected: Iterable[str]) -> set[str]:
    """Tie weights as `from_pretrained` does, and return the names that are missing afterwards."""
    tied = skeleton.all_tied_weights_keys
    if any(name in tied or name in tied.values() for name in expected):
        skeleton.tie_weights(missing_keys=missing, recompute_mapping=False)
    return missing


def hosted_parts(skeleton: PreTrainedModel, span: Span) -> list[torch.nn.Module]:
    """Return the modules whose own tensors `span` needs: its blocks', and at the model's ends those besides blocks.

    Tensors of a module's children are not meant: a model that has a buffer of its own would bring all its blocks.  The
    embedding is needed at the head and the LM head at the tail; the rest is small, and loaded at both ends.
    """
    blocks = find_blocks(skeleton)
    at_head, at_tail = span.start == 0, span.end == len(blocks.layers)
    embedding, lm_head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    inputs = ExtraInputs(skeleton, blocks).modules
    needed = [module for part in (*blocks.layers[span.start : span.end], *inputs) for module in part.modules()]
    for module in modules_besides(skeleton, blocks):
        if at_head if module is embedding else at_tail if module is lm_head else at_head or at_tail:
            needed.append(module)
    return needed
