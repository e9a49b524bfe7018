"""Build the modules of a model from its config, without weights."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import is_timm_available

from treeswarm.errors import UnsupportedModel
from treeswarm.model_files import read_config
from treeswarm_node.model.checkpoint.formats import check_format
from treeswarm_node.model.families.blocks import find_blocks, is_wrapper
from treeswarm_node.model.families.reasons import explain_blocks

# Model types that other programs write, and the type of transformers that has the same modules and tensor names.
ALIASES = {"kimi_k2": "deepseek_v3"}

# Functions with which constructors make the tensors of their parameters.
FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))
# A tensor with more numbers is a parameter (experts, embeddings), never a buffer that is computed from the config: the
# largest of those, a table of masks over 2,048 x 2,048 positions, has 4 million.
LARGEST_BUFFER = 2**26


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Makes large tensors on meta at once.

    `init_empty_weights` moves a parameter to meta after it was made in memory.  Llama 4 fills the experts of a block
    with zeros: 2.5 GiB per block, and a minute of a dry run.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in FACTORIES and given.get("device") is None and "out" not in given:
            sized = func(*args, **{**given, "device": "meta"})
            if sized.numel() > LARGEST_BUFFER:
                return sized
        return func(*args, **given)


def _register_towers_of_timm() -> None:
    """Let an empty module stand for vision towers that only the package timm could build: no text needs them."""
    if is_timm_available():
        return
    empty = type("UnbuiltTower", (PreTrainedModel,), {"__module__": __name__})
    for built_type, class_name in MODEL_MAPPING_NAMES.items():
        if class_name == "TimmWrapperModel":
            AutoModel._model_mapping.register(CONFIG_MAPPING[built_type], empty, exist_ok=True)


_register_towers_of_timm()


def read_model_config(folder: Path) -> PretrainedConfig:
    """Return the config of the model in `folder`, as transformers reads it.

    Nothing of the directory is executed: code that its `auto_map` names is ignored.  Raises ModelError, and
    UnsupportedModel if transformers does not know the type or the weights are in an unknown format.
    """
    content = read_config(folder)
    check_format(folder, content)
    model_type = content["model_type"]
    if model_type in ALIASES:
        known: Any = CONFIG_MAPPING[ALIASES[model_type]]
        return _call(model_type, lambda: known.from_dict({**content, "model_type": ALIASES[model_type]}))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(_describe_unknown_type(model_type, content))
    return _call(model_type, lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def build_skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole model with every parameter on meta; buffers are real and computed from the config."""
    config = read_model_config(folder)
    model_type = config.model_type
    transformers.utils.logging.disable_progress_bar()

    def build() -> Any:
        with init_empty_weights(include_buffers=False), _LargeTensorsOnMeta():
            skeleton = _auto_class(config).from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
        skeleton.tie_weights()
        return skeleton

    skeleton: PreTrainedModel = _call(model_type, build)
    _check_text_alone(skeleton)
    find_blocks(skeleton)
    return skeleton


def _check_text_alone(skeleton: PreTrainedModel) -> None:
    """Raise UnsupportedModel if the model cannot compute logits from text alone."""
    model_type = skeleton.config.model_type
    if type(skeleton).forward is torch.nn.Module.forward:
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: they are several models, without a forward of their own"
        )
    required = [
        name
        for name, parameter in inspect.signature(type(skeleton).forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    missing = [name for name in required if name not in ("self", "input_ids")]
    if missing:
        raise UnsupportedModel(
            f"models of type '{model_type}' are not supported: they compute no text without {', '.join(missing)}"
        )
    if skeleton.get_output_embeddings() is None:
        reason = explain_blocks(skeleton.config.get_text_config(decoder=True)) or "they have no LM head of their own"
        raise UnsupportedModel(f"models of type '{model_type}' are not supported: {reason}")


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that builds models of this config with an LM head.

    Of a multimodal wrapper it is the wrapper's own: for some, AutoModelForCausalLM would build the text decoder alone.
    """
    wrappers = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    others = (AutoModelForCausalLM, AutoModelForSeq2SeqLM)
    for auto_class in (*wrappers, *others) if is_wrapper(config) else (AutoModelForCausalLM, *wrappers):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise ValueError("no class of it writes text")


def _call(model_type: str, call: Callable[[], Any]) -> Any:
    """Call transformers, and raise UnsupportedModel with one line if it refuses or fails."""
    try:
        return call()
    except Exception as error:  # transformers' constructors raise errors of every kind.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot build a causal LM of type '{model_type}': {reason[:200]}"
        ) from error


def _describe_unknown_type(model_type: str, content: dict[str, Any]) -> str:
    reason = f"transformers {transformers.__version__} does not know models of type '{model_type}'"
    if content.get("auto_map"):
        return f"{reason}, and code from the model's own repository (auto_map) is never run here"
    return f"{reason}: a newer release may"
