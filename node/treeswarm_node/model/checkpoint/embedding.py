"""Read a model's embedding for a node whose span does not need it: heads beside the tail embed tokens."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from treeswarm.errors import ModelError
from treeswarm.model_files import weight_files
from treeswarm.model_sources.gguf_files import WEIGHTS, is_gguf_folder
from treeswarm_node.model.checkpoint.gguf_tensors import GGUFTensors
from treeswarm_node.model.checkpoint.lazy_weights import open_weights
from treeswarm_node.model.checkpoint.tensors import find_tensors

CPU = torch.device("cpu")


def read_embedding(folder: Path, skeleton: PreTrainedModel, dtype: torch.dtype) -> torch.Tensor:
    """Return the embedding [vocabulary, hidden] of a checkpoint.  `skeleton` is its model, with or without weights.

    Raises ModelError.
    """
    module: Any = skeleton.get_input_embeddings()
    gguf = GGUFTensors.open(folder, skeleton) if is_gguf_folder(folder) else None
    files = weight_files(folder) if gguf is None else {WEIGHTS: list(gguf.stored)}
    tensors = find_tensors(folder, files, skeleton, [module], get_model_conversion_mapping(skeleton))
    dtypes = dict.fromkeys(tensors.targets.values(), dtype)
    for weight in open_weights(folder, tensors, dtypes, CPU, None, gguf).values():
        values: torch.Tensor = weight[...]
        if values.shape == module.weight.shape:
            return values.to(dtype)
    raise ModelError(f"'{folder}' has no embedding that a speculator could read: give --speculator none")
