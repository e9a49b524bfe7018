"""Load the multi-token prediction layer that lies in a model's own checkpoint, behind its last block."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_layers import MtpModel
from transformers.modeling_utils import LoadStateDictConfig

from treeswarm.errors import ModelError
from treeswarm.model_files import read_config, read_header, usual_block_of, weight_files
from treeswarm.model_sources.gguf_files import is_gguf_folder
from treeswarm_node.model.checkpoint.formats import PLAIN, weight_format
from treeswarm_node.model.checkpoint.skeleton import read_model_config
from treeswarm_node.model.checkpoint.tensors import check_report
from treeswarm_node.model.families.frame import set_implementation
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.files import SpeculatorConfig
from treeswarm_node.speculator.mtp import MTP, WINDOW, MtpSpeculator

OF_MTP = re.compile(r"^(model\.)?mtp\.")
"""Matches names of tensors of an MTP layer that is not counted among the blocks."""
# Copies of the target's embedding and LM head that checkpoints store with the layer, and that transformers shares.
SHARED = re.compile(r"(embed_tokens|shared_head\.head)\.weight$")


def mtp_tensors(folder: Path, blocks: int) -> dict[str, list[str]]:
    """Return the names of the tensors of the first MTP layer, by file.  Raises ModelError where files are missing."""
    found: dict[str, list[str]] = {}
    if is_gguf_folder(folder):
        return found
    for file, tensors in weight_files(folder).items():
        names = [name for name in tensors if usual_block_of(name) == blocks or OF_MTP.match(name)]
        if names := [name for name in names if not SHARED.search(name)]:
            found[file] = names
    return found


def mtp_bytes(folder: Path, blocks: int, width: int) -> int:
    """Return the bytes of the first MTP layer with values of `width` bytes, or 0 if its files are not all here."""
    count = 0
    for file, names in mtp_tensors(folder, blocks).items():
        if not (folder / file).is_file():
            return 0
        header = read_header(folder / file)
        count += sum(math.prod(header[name]["shape"]) for name in names)
    return count * width


def can_read_mtp(folder: Path) -> bool:
    """Return whether transformers knows the MTP layers of such models, and the checkpoint's are plain numbers."""
    config = read_model_config(folder).get_text_config(decoder=True)
    return bool(getattr(config, "num_mtp_layers", None)) and weight_format(read_config(folder)) == PLAIN


def load_mtp(
    folder: Path, model: SpanModel, served: ServedSpan, read_embedding: Callable[[], torch.Tensor]
) -> MtpSpeculator:
    """Load the first MTP layer of a checkpoint for its tail.  Raises ModelError."""
    skeleton: Any = model.loaded.skeleton
    names = mtp_tensors(folder, served.blocks)
    _check(folder, skeleton, names)
    with torch.device("meta"):
        mtp: Any = MtpModel(skeleton, 1)
    # The layer attends with masks of trees, over a cache of its own.
    set_implementation([mtp.config], "sdpa")
    state: dict[str, Any] = {}
    for file, tensors in names.items():
        opened: Any = safe_open(folder / file, framework="pt", device="cpu")
        state |= {name: opened.get_slice(name) for name in tensors}
    config = LoadStateDictConfig(
        device_map={"": model.device}, dtype=model.dtype, weight_mapping=mtp.get_weight_conversions(skeleton)
    )
    try:
        info, _ = convert_and_load_state_dict_in_model(mtp, state, config)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"the MTP layer in '{folder}' cannot be read ({error}): download it again") from None
    check_report(folder, info)
    missing = sorted(name for name in info.missing_keys if name.startswith("layers."))
    if missing or info.unexpected_keys:
        raise ModelError(
            f"the MTP layer in '{folder}' lacks or adds {', '.join([*missing, *sorted(info.unexpected_keys)][:3])}: it "
            "is not what transformers builds for this model"
        )
    lm_head, _ = model.lm_head()
    return MtpSpeculator(
        _config(served), mtp.eval().requires_grad_(False), skeleton.get_decoder().norm, read_embedding(), lm_head
    )


def _check(folder: Path, skeleton: Any, names: dict[str, list[str]]) -> None:
    """Raise ModelError if a checkpoint has no MTP layer that can be read."""
    config = skeleton.config.get_text_config(decoder=True)
    if not getattr(config, "num_mtp_layers", None):
        raise ModelError(
            f"transformers knows no MTP layer of models of type '{config.model_type}': give a head instead"
        )
    if not names:
        raise ModelError(f"'{folder}' has no MTP layer: give a head, or --speculator none")
    if weight_format(read_config(folder)) != PLAIN:
        raise ModelError(f"the MTP layer in '{folder}' is stored in fewer bits, which is not read yet")
    if not hasattr(skeleton, "lm_head") or not hasattr(skeleton.get_decoder(), "norm"):
        raise ModelError(
            f"models of type '{config.model_type}' have no final norm and LM head where an MTP layer looks"
        )


def _config(served: ServedSpan) -> SpeculatorConfig:
    """Return what scoring needs: the layer's scores count as the chances that it was trained to give."""
    return SpeculatorConfig(
        kind=MTP, config_digest=served.config, weights_digest=served.numerics.weights, hidden_size=served.hidden_size,
        vocab_size=served.vocab_size, taps=(served.blocks - 1,), heads=1, kv_heads=1, head_dim=1, intermediate_size=1,
        window=WINDOW, greedy_tau=1.0, sampled_tau=1.0,
    )  # fmt: skip
