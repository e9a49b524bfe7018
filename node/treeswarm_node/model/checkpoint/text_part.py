"""Tell which tensors of a checkpoint nodes load, and to which block they belong, by their names alone.

Of a multimodal wrapper nodes load the tensors of its text decoder and LM head.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from treeswarm.model_files import read_config
from treeswarm_node.model.checkpoint.dequantize.stored_weights import role_of
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.tensors import is_below, name_mapping
from treeswarm_node.model.families.blocks import find_blocks, is_wrapper, text_modules


def tensors_to_load(folder: Path) -> Callable[[str], bool] | None:
    """Return what says of a tensor's name in the checkpoint whether nodes load it, or None if they load all.

    Only the config is read.  Raises UnsupportedModel.
    """
    if not isinstance(read_config(folder).get("text_config"), dict):
        return None
    return loaded_tensors(build_skeleton(folder, torch.float32))


def loaded_tensors(skeleton: PreTrainedModel) -> Callable[[str], bool]:
    """Return what says of a tensor's name in the checkpoint whether nodes load it: whether it is of the text part.

    Names tell that, so it is known before a file is here.
    """
    if not is_wrapper(skeleton.config):
        return lambda _: True
    modules = {id(module) for module in text_modules(skeleton)}
    prefixes = {f"{name}." for name, module in skeleton.named_modules() if id(module) in modules}
    target = name_mapping(skeleton, get_model_conversion_mapping(skeleton))

    def is_loaded(tensor: str) -> bool:
        return is_below(target(tensor), prefixes) or is_below(target(role_of(tensor)[0]), prefixes)

    return is_loaded


def find_block_of(skeleton: PreTrainedModel) -> Callable[[str], int | None]:
    """Return what says of a tensor's name in the checkpoint to which decoder block it belongs, or None."""
    decoder, prefix = find_blocks(skeleton), skeleton.base_model_prefix
    target = name_mapping(skeleton, get_model_conversion_mapping(skeleton))

    def block_of(tensor: str) -> int | None:
        # Old checkpoints lack the base model's prefix, also in names that belong to no parameter.
        names = (target(tensor), target(role_of(tensor)[0]), f"{prefix}.{tensor}")
        return next((block for block in map(decoder.block_of, names) if block is not None), None)

    return block_of
