"""Decide whether a node holds published weights in their bits, so that its blocks fit into its memory."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from treeswarm.errors import BadRequest
from treeswarm.model_files import HubOptions, read_config
from treeswarm.protocol.spans import Span
from treeswarm_node.config import NodeConfig
from treeswarm_node.model.checkpoint.formats import PLAIN, weight_format
from treeswarm_node.model.checkpoint.headers import with_headers
from treeswarm_node.model.checkpoint.loader import MatchedCheckpoint, match_tensors
from treeswarm_node.model.checkpoint.storage import held_blocks
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.memory_fit import Footprint, NodeRoom, count_blocks_that_fit


@dataclass(frozen=True)
class Holding:
    """Says how a node holds its weights, and what they need."""

    footprint: Footprint
    holds_codes: bool = False
    """Whether weights are held in the bits in which they were published, and expanded where they are used."""
    matched: MatchedCheckpoint | None = field(default=None, compare=False)
    """Tensors of the span, if they had to be matched to find that out."""


def choose_holding(
    config: NodeConfig, room: NodeRoom, folder: Path, skeleton: PreTrainedModel, span: Span | None = None
) -> Holding:
    """Return how a node holds weights that is to host `span`, whose files are here, or as many blocks as fit.

    Weights in fewer bits are expanded while they are loaded if what is to be hosted fits so, because that computes
    faster.
    """
    settings, device = config.model, torch.device(config.device.name).type
    dtype = getattr(torch, settings.dtype)
    plain = Holding(read_footprint(skeleton, dtype, settings.quantization, device))
    expand = when_to_expand(config, folder)
    if expand == "load" or (expand == "auto" and _fits(room, plain.footprint, skeleton, span)):
        return plain
    if span is not None:  # a hub that does not answer must not change how its weights are held
        matched = match_tensors(folder, skeleton, span)
    else:  # headers of all files are read, here or at the hub
        with with_headers(config.model.name, folder, HubOptions(config.model.revision)) as headed:
            matched = match_tensors(headed.folder, skeleton, Span(0, len(find_blocks(skeleton).layers)))
    held = held_blocks(matched.block_weights, by_kernel=settings.quantization == "published")
    of_span = None if span is None else matched
    if not held:
        return replace(plain, matched=of_span)
    footprint = read_footprint(skeleton, dtype, settings.quantization, device, held, span)
    return Holding(footprint, holds_codes=True, matched=of_span)


def when_to_expand(config: NodeConfig, folder: Path) -> str:
    """Return when weights are expanded: `load`, `use`, or `auto` if memory decides.

    Weights that are plain numbers, or are quantized again, are never held in published bits, nor are any on mps: codes
    are read where they are expanded, which is the CPU there.  Raises BadRequest if the owner asks for it.
    """
    expand, device = config.device.expand, torch.device(config.device.name).type
    if device == "mps":
        if expand == "use":
            raise BadRequest(
                "--expand use does not work on mps, where published codes stay on the CPU: give --expand load"
            )
        return "load"
    if config.model.quantization not in {"none", "published"} or weight_format(read_config(folder)) == PLAIN:
        return "load"
    return "use" if config.model.quantization == "published" else expand


def _fits(room: NodeRoom, footprint: Footprint, skeleton: PreTrainedModel, span: Span | None) -> bool:
    blocks = len(find_blocks(skeleton).layers)
    try:
        limits = count_blocks_that_fit(room, footprint, blocks)
    except BadRequest:
        return False
    return span is None or limits.allow(span, blocks)
