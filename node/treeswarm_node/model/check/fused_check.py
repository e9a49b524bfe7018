"""Compute blocks in few operations where that gives what their own forward gives."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from treeswarm_node.model.check.family_check import float32_copy, layer_kind, run_random_tree
from treeswarm_node.model.families.routes import InterfaceRoute
from treeswarm_node.model.fused_block import FusedBlock, is_plain_block
from treeswarm_node.model.span_model import SpanModel, run_block

log = logging.getLogger(__name__)
# Largest accepted difference, relative to the output's norm: of a float32 copy, and of the block as it serves, by its
# dtype.  Seen in SmolLM2: 1e-7, and 0.004 in bfloat16; a step that is left out or done otherwise costs far more.
TOLERANCE = 1e-5
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


@torch.inference_mode()
def fuse_blocks(model: SpanModel) -> int:
    """Compute the plain blocks of a span in few operations, on a CPU, and return how many they are.

    One block of each kind is compared with its own forward on a random tree, in float32 and as it serves; a kind that
    differs keeps its own forward.  Offloaded blocks do, too.
    """
    if model.device.type != "cpu" or model.loaded.offload is not None or not isinstance(model.route, InterfaceRoute):
        return 0
    agrees: dict[tuple[str, ...], bool] = {}
    for index, block in enumerate(model.layers, model.loaded.span.start):
        if not is_plain_block(block) or index in model.kv_givers:
            continue
        kind = layer_kind(model, index)
        if kind not in agrees:
            agrees[kind] = _agrees(model, index)
        if agrees[kind]:
            model.fused[index] = FusedBlock(block)
    return len(model.fused)


def _agrees(model: SpanModel, index: int) -> bool:
    block = model.frame.blocks.layers[index]
    try:
        exact = _difference(model, index, float32_copy(block), torch.float32)
        served = _difference(model, index, block, model.dtype)
    except Exception as error:  # Whatever a model's own code raises, its forward runs as it is.
        log.info("block %d is not computed in few operations (%s: %s)", index, type(error).__name__, error)
        return False
    if exact <= TOLERANCE and served <= TOLERANCES[model.dtype]:
        return True
    log.info("block %d is not computed in few operations: they differ by %.1e and %.1e", index, exact, served)
    return False


def _difference(model: SpanModel, index: int, block: torch.nn.Module, dtype: torch.dtype) -> float:
    """Return the norm of the difference, relative to the output's; infinity if the block returns something else."""
    runs: list[Callable[[Any, dict[str, Any]], Any]] = [run_block, lambda fused, arguments: fused.run(arguments)]
    expected = run_random_tree(model, {index: block}, runs[0], dtype).float()
    actual = run_random_tree(model, {index: FusedBlock(block)}, runs[1], dtype).float()
    return float((actual - expected).norm() / expected.norm())
