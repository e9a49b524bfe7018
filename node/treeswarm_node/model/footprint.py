"""Find how much memory the parts of a model need, from its modules without weights."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.plain_copy import copy_bytes
from treeswarm_node.model.check.weights import COMPARED_BYTES
from treeswarm_node.model.checkpoint.loader import hosted_parts
from treeswarm_node.model.checkpoint.parts import PART_BYTES, fused_experts
from treeswarm_node.model.checkpoint.storage import HeldBlock
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.families.extra_inputs import ExtraInputs, embeds
from treeswarm_node.model.families.kv_shapes import kv_shapes
from treeswarm_node.model.families.lm_head import is_copied
from treeswarm_node.model.memory_fit import EndWeights, Footprint
from treeswarm_node.model.quantization.quantized_linear import quantizable_matrices
from treeswarm_node.model.quantization.weight_kinds import KINDS

# Number of values per row that a forward holds in a decoder layer, as a multiple of the hidden size.  They are query,
# key, value, gate, up and residual; the widest families seen need less than this.
ACTIVATION_COPIES = 24
# Number of copies of experts that exist while they are merged: as they were read, stacked, and joined.
COPIES_OF_PART = 3
# Number of copies of a matrix that exist while it is packed, the packed one and what reading it needs among them.
COPIES_OF_MATRIX = 2


def read_footprint(
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    quantization: str,
    device: str,
    held: Mapping[int, HeldBlock] = MappingProxyType({}),
    span: Span | None = None,
) -> Footprint:
    """Return the footprint of a model, from its modules without weights.

    `skeleton` may have been built in any dtype; `device` is the type of the device that computes.  `held` has the sizes
    of weights that are held in the bits in which they were published, by block of `span` (None: all blocks).
    """
    blocks, config = find_blocks(skeleton), skeleton.config.get_text_config(decoder=True)
    width = dtype.itemsize
    if held:
        hosted = span or Span(0, len(blocks.layers))
        layers = enumerate(blocks.layers[hosted.start : hosted.end], hosted.start)
        sizes = [_held_bytes(layer, width, held.get(index, HeldBlock())) for index, layer in layers]
    else:
        sizes = [_block_bytes(layer, width, quantization) for layer in layers_by_size(blocks.layers)]
    loading = max(_loading_bytes(layer, width, quantization) for layer in layers_by_size(blocks.layers))
    return Footprint(
        block=max(sizes),
        ends=_end_weights(skeleton, width),
        kv_row=max(_kv_numbers(layer, config) for layer in blocks.layers) * width,
        forward_row=ACTIVATION_COPIES * int(config.hidden_size) * ExtraInputs(skeleton, blocks).streams * 4,
        loading=loading,
        checking=max(
            *(_comparing_bytes(layer, width) for layer in layers_by_size(blocks.layers)),
            *(copy_bytes(layer) for layer in layers_by_size(blocks.layers)),
            *(_packing_bytes(layer, width, quantization, device) for layer in layers_by_size(blocks.layers)),
        ),
        expanding=max((of_block.largest for of_block in held.values()), default=0) * width,
    )


def layers_by_size(layers: Iterable[torch.nn.Module]) -> Iterable[torch.nn.Module]:
    """Return one layer of each number of parameters: layers of one number are alike."""
    return {sum(p.numel() for p in layer.parameters()): layer for layer in layers}.values()


def _held_bytes(layer: torch.nn.Module, width: int, held: HeldBlock) -> int:
    """Return the bytes of a decoder block some of whose weights are held in the bits in which they were published."""
    return (sum(parameter.numel() for parameter in layer.parameters()) - held.numbers) * width + held.size


def _block_bytes(layer: torch.nn.Module, width: int, quantization: str) -> int:
    """Return the bytes of a decoder block as it is held."""
    total = sum(parameter.numel() for parameter in layer.parameters()) * width
    if quantization not in KINDS:
        return total
    kind = KINDS[quantization]
    for count, (outputs, inputs) in quantizable_matrices(layer, quantization):
        total += count * (kind.count_bytes(outputs, inputs) - outputs * inputs * width)
    return total


def _loading_bytes(layer: torch.nn.Module, width: int, quantization: str) -> int:
    """Return the bytes that a decoder block needs for a moment while it is loaded: a few copies of its largest part."""
    fused = fused_experts(layer)
    sizes = {name: parameter.numel() * width for name, parameter in layer.named_parameters()}
    largest = max(size // fused.get(name, 1) for name, size in sizes.items())
    part = min(PART_BYTES, sum(sizes.values())) if fused else 0
    return max(COPIES_OF_PART * part, largest * (COPIES_OF_MATRIX if quantization != "none" else 1))


def _comparing_bytes(layer: torch.nn.Module, width: int) -> int:
    """Return the bytes that comparing a block's weights with transformers' own takes."""
    fused = fused_experts(layer)
    sizes = {name: parameter.numel() * width for name, parameter in layer.named_parameters()}
    largest = max(size // fused.get(name, 1) for name, size in sizes.items())
    return COPIES_OF_PART * max(largest, min(COMPARED_BYTES, sum(sizes.values())))


def _packing_bytes(layer: torch.nn.Module, width: int, quantization: str, device: str) -> int:
    """Return the bytes that packing a block's largest matrices for a CPU's kernels needs for a moment."""
    if device != "cpu" or not (quantization == "int8" or (quantization == "none" and width == 2)):
        return 0
    sizes = [module.weight.numel() for module in layer.modules() if type(module) is torch.nn.Linear]
    # Two matrices that take the same rows are joined, and then packed.
    return 4 * max(sizes, default=0) * (width if quantization == "none" else 1)


def _end_weights(skeleton: PreTrainedModel, width: int) -> EndWeights:
    blocks = len(find_blocks(skeleton).layers)
    spans = (Span(0, 1), Span(blocks - 1, blocks), Span(0, blocks), *([Span(1, 2)] if blocks > 2 else []))
    head, tail, whole, *middle = (_bytes_besides_blocks(skeleton, span, width) for span in spans)
    return EndWeights(middle[0] if middle else min(head, tail), head, tail, whole)


def _bytes_besides_blocks(skeleton: PreTrainedModel, span: Span, width: int) -> int:
    """Return the bytes of the weights that a span holds besides its blocks."""
    inside = {id(parameter) for parameter in find_blocks(skeleton).layers.parameters()}
    hosted = (p for module in hosted_parts(skeleton, span) for p in module.parameters(recurse=False))
    parameters = {id(p): p for p in hosted if id(p) not in inside}
    total = sum(parameter.numel() for parameter in parameters.values()) * width
    head: Any = skeleton.get_output_embeddings()
    if id(head.weight) not in parameters or span.end < len(find_blocks(skeleton).layers):
        return total
    if width == 2 and is_copied(head.weight.numel(), width):
        # The head is copied to float32, and its own matrix is freed unless the embedding is the same one.
        embedding: Any = skeleton.get_input_embeddings()
        is_kept = head.weight is embedding.weight and embeds(skeleton, span)
        total += head.weight.numel() * (torch.float32.itemsize - (0 if is_kept else width))
    return total


def _kv_numbers(layer: torch.nn.Module, config: Any) -> int:
    """Return how many numbers a block keeps per token: by its attentions, or keys and values of the hidden size."""
    try:
        return sum(shape.numbers for shape in kv_shapes([layer]).values())
    except UnsupportedModel:  # Other names: what blocks keep is seen when they are loaded.
        return 2 * int(config.hidden_size)
