"""Find out what a node would do with a model, by the functions that a start calls, without loading a weight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from treeswarm.errors import SwarmError, UnsupportedModel
from treeswarm.model_files import HubOptions, ModelShape, read_config, read_shape, resolve_model
from treeswarm.model_sources.gguf_files import is_gguf_folder
from treeswarm.model_sources.text_configs import TEXT_TYPES
from treeswarm.programs.devices import QUANTIZATIONS, Machine, checkpoint_dtype
from treeswarm.progress import Progress
from treeswarm.protocol.spans import Span
from treeswarm_node.config import NodeConfig
from treeswarm_node.dry_run.node_plan import NodePlan, NumberFormat, plan_nodes
from treeswarm_node.engine.loaded_stage import node_room
from treeswarm_node.model.automatic import with_device, with_numerics
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight
from treeswarm_node.model.checkpoint.formats import PLAIN, weight_format
from treeswarm_node.model.checkpoint.headers import HeadedModel, with_headers
from treeswarm_node.model.checkpoint.loader import MatchedCheckpoint, hosted_parts, match_tensors
from treeswarm_node.model.checkpoint.skeleton import ALIASES, build_skeleton
from treeswarm_node.model.checkpoint.storage import describe_storage, explain_no_kernel, held_blocks, stored_sizes
from treeswarm_node.model.checkpoint.tensors import check_complete
from treeswarm_node.model.checkpoint.text_part import loaded_tensors
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.families.kv_shapes import allowed_cuts, kv_givers, kv_shapes
from treeswarm_node.model.families.reasons import explain_blocks
from treeswarm_node.model.families.tested_types import TypeTest, find_type_test
from treeswarm_node.model.footprint import layers_by_size, read_footprint
from treeswarm_node.model.memory_fit import NodeRoom
from treeswarm_node.model.quantization.quantized_linear import check_quantizable
from treeswarm_node.model.quantization.weight_kinds import KINDS, explain_unsupported

# Dtypes that are compared if the owner names none, and the one in which models of few bits are computed then.
COMPARED, WITH_FEW_BITS = ("float32", "bfloat16"), "bfloat16"


@dataclass(frozen=True)
class PublishedSize:
    """Holds the sizes of a model in its files."""

    total: int
    """Number of bytes of all tensors that nodes load."""
    block: int
    """Number of bytes of the largest block."""


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of a model that can be hosted."""

    shape: ModelShape
    parameters: int
    """Number of the parameters that nodes load."""
    kv_rows: Sequence[str]
    """Shapes of KV rows that occur, in words."""
    published: PublishedSize | None
    """Sizes in the files, or None if their headers are not known."""
    room: NodeRoom
    device: str
    """Name of the device whose memory is planned with, or an empty string if the owner gave a size."""
    plans: Sequence[NodePlan]
    chosen: NumberFormat
    """Format in which a node with these settings would start a new swarm."""

    @property
    def chosen_plan(self) -> NodePlan:
        """The plan in the chosen format."""
        return next(plan for plan in self.plans if plan.format == self.chosen)


@dataclass(frozen=True)
class Appraisal:
    """Says what a node would do with a model."""

    model: str
    model_type: str
    text_type: str
    """Type of the model that writes the text: another one than `model_type` in a multimodal wrapper."""
    weights: str
    """Format in which the weights are published, and what loading makes of them."""
    source: str
    """What the sizes are from, in words."""
    test: TypeTest
    """What the tests of this release say of the type."""
    refusal: str | None
    """Why the model is not hosted, or None."""
    sizes: Sizes | None
    """Sizes of the model, or None if it is refused."""

    @property
    def can_start(self) -> bool:
        """Whether a node with these settings would come as far as loading the weights."""
        return self.sizes is not None and self.sizes.chosen_plan.fit > 0


def appraise(config: NodeConfig, machine: Machine, progress: Progress | None = None) -> Appraisal:
    """Return what a node with this config would do with its model.

    Raises ModelError if the model is not found, or its config cannot be read.
    """
    config = with_device(config, machine)
    hub = HubOptions(config.model.revision)
    folder = resolve_model(config.model.name, hub=hub, progress=progress)
    content = read_config(folder)
    model_type = str(content["model_type"])
    text = content.get("text_config")
    named = text.get("model_type") or TEXT_TYPES.get(model_type) if isinstance(text, dict) else None
    text_type = str(named or model_type)
    test = find_type_test(ALIASES.get(model_type, model_type))
    unread = Appraisal(config.model.name, model_type, text_type, weight_format(content).name, "", test, None, None)
    config = with_numerics(config, machine, checkpoint_dtype(content))
    try:
        with with_headers(config.model.name, folder, hub) as headed:
            return _measure(replace(unread, source=headed.source), config, headed, folder)
    except SwarmError as error:
        return replace(unread, refusal=str(error).replace(f"'{folder}'", f"'{config.model.name}'"))


def _measure(known: Appraisal, config: NodeConfig, headed: HeadedModel, folder: Path) -> Appraisal:
    """Return the appraisal with sizes; `folder` is the model's own directory.  Raises what a start would raise."""
    shape = read_shape(headed.folder)
    chosen = NumberFormat(config.model.dtype, config.model.quantization)
    dtype = getattr(torch, chosen.dtype)
    skeleton = build_skeleton(headed.folder, dtype)
    span = Span(0, shape.blocks)
    matched = _match_tensors(headed, skeleton, span)
    device, room = config.device, node_room(config, folder)
    formats = _formats(config, chosen, list(matched.tensors.stored.values()))
    plans = [_plan(numbers, skeleton, room, device.name, matched) for numbers in formats]
    chosen = _choose_expansion(config, chosen, plans)
    sizes = Sizes(
        shape=shape,
        parameters=_count_parameters(skeleton, span),
        kv_rows=_describe_kv(skeleton),
        published=_published_size(headed, matched, skeleton) if headed.is_published else None,
        room=room,
        device="" if device.memory else device.name,
        plans=plans,
        chosen=chosen,
    )
    storage = describe_storage(
        matched.block_weights,
        dtype,
        chosen.quantization,
        holds_codes=chosen.holds_codes or chosen.quantization == "published",
    )
    return replace(known, weights=storage or _describe_weights(known, headed, chosen), sizes=sizes)


def _match_tensors(headed: HeadedModel, skeleton: PreTrainedModel, span: Span) -> MatchedCheckpoint:
    """Match the weights with the modules as loading does.  Raises ModelError, and UnsupportedModel."""
    matched = match_tensors(headed.folder, skeleton, span)
    tensors = matched.tensors
    tied = skeleton.all_tied_weights_keys
    missing = set(tensors.expected) - set(tensors.targets.values())
    check_complete(headed.folder, skeleton, tensors.expected, missing.difference(tied, tied.values()))
    return matched


def _describe_kv(skeleton: PreTrainedModel) -> list[str]:
    """Return the shapes of KV rows.  Raises UnsupportedModel if blocks are known to keep something else."""
    try:
        shapes = kv_shapes(list(find_blocks(skeleton).layers))
    except UnsupportedModel as error:
        if reason := explain_blocks(skeleton.config.get_text_config(decoder=True)):
            model_type = skeleton.config.model_type
            raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}") from error
        return ["rows whose shape is seen when blocks are loaded; planned as keys and values of the hidden size,"]
    return [str(shape) for shape in dict.fromkeys(shapes.values())]


def _count_parameters(skeleton: PreTrainedModel, span: Span) -> int:
    found = {id(p): p.numel() for module in hosted_parts(skeleton, span) for p in module.parameters(recurse=False)}
    return sum(found.values())


def _published_size(headed: HeadedModel, matched: MatchedCheckpoint, skeleton: PreTrainedModel) -> PublishedSize:
    sizes = stored_sizes(headed.folder, loaded_tensors(skeleton))
    by_block: Counter[int | None] = Counter()
    for name, target in matched.file_targets.items():
        by_block[matched.decoder.block_of(target)] += sizes[name]
    total = by_block.total()
    del by_block[None]
    return PublishedSize(total, max(by_block.values(), default=0))


def _describe_weights(known: Appraisal, headed: HeadedModel, chosen: NumberFormat) -> str:
    if is_gguf_folder(headed.folder):
        return f"GGUF, expanded to {chosen.dtype} while they are loaded"
    if known.weights == PLAIN.name:
        return known.weights
    return f"{known.weights}, expanded to {chosen.dtype} while they are loaded"


def _choose_expansion(config: NodeConfig, chosen: NumberFormat, plans: Sequence[NodePlan]) -> NumberFormat:
    """Return the chosen format, with codes that are held if a start would hold them."""
    held = replace(chosen, holds_codes=True)
    if config.device.expand == "load" or not any(plan.format == held for plan in plans):
        return chosen
    expanded, wanted = next(plan for plan in plans if plan.format == chosen), config.model
    fits = expanded.fit >= (wanted.num_blocks or 1)
    if wanted.span is not None:
        fits = expanded.limits.allow(wanted.span, expanded.spans[-1].end if expanded.spans else wanted.span.end + 1)
    return held if config.device.expand == "use" or not fits else chosen


def _formats(config: NodeConfig, chosen: NumberFormat, stored: Sequence[StoredWeight]) -> list[NumberFormat]:
    """Return the formats to compare: all of them, in the owner's dtype if they named one."""
    has_kernel = any(weight.has_kernel for weight in stored)
    named = not config.automatic.numerics
    dtypes = [chosen.dtype] if named else [*COMPARED, *({chosen.dtype} - set(COMPARED))]
    few_bits = chosen.dtype if named else WITH_FEW_BITS
    kinds = [kind for kind in QUANTIZATIONS if kind != "none" and (kind != "published" or has_kernel)]
    formats = [NumberFormat(dtype) for dtype in dtypes]
    if stored and torch.device(config.device.name).type != "mps":  # codes are not held there
        formats += [NumberFormat(dtype, holds_codes=True) for dtype in {few_bits: 0, chosen.dtype: 0}]
    formats += [NumberFormat(few_bits, kind) for kind in kinds]
    return formats if chosen in formats else [*formats, chosen]


def _plan(
    numbers: NumberFormat,
    skeleton: PreTrainedModel,
    room: NodeRoom,
    device: str,
    matched: MatchedCheckpoint,
) -> NodePlan:
    place = torch.device(device)
    is_published = numbers.quantization == "published"
    held = held_blocks(matched.block_weights, by_kernel=is_published) if numbers.holds_codes or is_published else {}
    footprint = read_footprint(skeleton, getattr(torch, numbers.dtype), numbers.quantization, place.type, held)
    layers = find_blocks(skeleton).layers
    refusal = explain_no_kernel(matched.tensors.stored.values()) if is_published else None
    if refusal is None and numbers.quantization != "none":
        refusal = explain_unsupported(numbers.quantization, place)
        try:
            for layer in layers_by_size(layers) if numbers.quantization in KINDS else ():
                check_quantizable(layer, numbers.quantization)
        except UnsupportedModel as error:
            refusal = str(error)
    return plan_nodes(numbers, footprint, room, allowed_cuts(kv_givers(layers), len(layers)), refusal)
