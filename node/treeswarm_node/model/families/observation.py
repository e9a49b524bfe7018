"""Run a span's blocks once before they serve: what do they keep, and do they depend on activations alone?"""

from typing import Any

import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.families.frame import Frame, RunLayer
from treeswarm_node.model.families.reasons import explain_blocks
from treeswarm_node.model.families.routes import AttentionRoute
from treeswarm_node.model.loaded_span import LoadedSpan

ROWS = 3
SEED = 20261130
# Largest accepted difference, relative to the largest value, of the same rows in another surrounding.
TOLERANCE = 1e-3


@torch.inference_mode()
def observe_shapes(frame: Frame, loaded: LoadedSpan, route: AttentionRoute, run_layer: RunLayer) -> dict[int, KVShape]:
    """Return the shape of the KV rows of each attention of the span, by its index in the model.

    Raises UnsupportedModel if the blocks cannot be run, keep nothing, or use more than the activations that they are
    given: a node that hosts only some of the blocks has nothing else.
    """
    generator = torch.Generator().manual_seed(SEED)
    embedding: Any = loaded.skeleton.get_input_embeddings()

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(loaded.device, loaded.dtype)

    width = int(loaded.config.hidden_size) * frame.extra_inputs.streams
    hidden = noise(ROWS, width)
    surroundings = noise(2, ROWS, width if frame.extra_inputs.per_layer else int(embedding.weight.shape[-1]))
    positions = torch.arange(ROWS, device=loaded.device)
    shapes: dict[int, KVShape] = {}
    run = route.observing(shapes, run_layer)
    model_type = loaded.model_type
    try:
        outputs = [frame.run(hidden, positions, loaded.span, run, before=before).float() for before in surroundings]
    except Exception as error:  # Whatever a model's own code raises, it says that its blocks need something else.
        seen = str(error) if isinstance(error, UnsupportedModel) else f"their blocks do not run ({_describe(error)})"
        reason = explain_blocks(loaded.config) or seen
        raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}") from error
    if not shapes:
        reason = explain_blocks(loaded.config) or "their blocks keep something else than keys and values"
        raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}")
    if loaded.span.start and not _agree(*outputs):
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: their blocks use more than the activations of the block "
            "before them, and nodes pass nothing else on"
        )
    return shapes


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
