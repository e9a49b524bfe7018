"""Load a small slice of a model with transformers' own `from_pretrained`, to compare it with what this node loaded.

The slice is the whole causal LM with all decoder blocks replaced but one, or with none, and with few rows of embedding
and LM head.  A block keeps its index and its name.  Of a large block, the slice has a part of the weights, as they were
loaded: some modules, or some experts; the other large parameters have no rows.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from treeswarm_node.model.checkpoint.part_loader import pick
from treeswarm_node.model.checkpoint.parts import LoadedPart
from treeswarm_node.model.families.blocks import find_blocks, text_modules
from treeswarm_node.model.loaded_span import LoadedSpan

# Rows of embedding and head that are compared: those of token ids that are spread evenly over the vocabulary.
VOCABULARY_ROWS = 64
# Parameters of at most this many bytes are left whole where they are not in the part that is compared.
SMALL_BYTES = 1 << 20


def load_slice(
    loaded: LoadedSpan, weights: Mapping[str, Any], block: int | None, loaded_part: LoadedPart | None = None
) -> PreTrainedModel:
    """Return the model as transformers loads it, with weights in decoder block `block` alone, or outside the blocks.

    `weights` are the checkpoint's lazy tensors.  With a part, only its weights are loaded.
    """
    whole, path = type(loaded.skeleton), find_blocks(loaded.skeleton).path
    kept = _rows_of_ends(loaded)

    def init(model: Any, config: PretrainedConfig, *arguments: Any, **options: Any) -> None:
        whole.__init__(model, config, *arguments, **options)
        _drop_other_parts(model)
        _prune(model, model.get_submodule(path), block, [len(rows) for rows in kept.values()])
        if loaded_part is not None:
            _cut_others(model.get_submodule(path)[block], f"{path}.{block}", loaded_part)

    pruned: Any = type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})
    if loaded_part is not None:
        state = pick(weights, loaded_part.part)
    else:
        state = _few_rows(loaded, weights, kept) if block is None else dict(weights)
    with _silence():
        model: PreTrainedModel = pruned.from_pretrained(
            None,
            config=_plain_config(loaded.skeleton.config),
            state_dict=state,
            dtype=loaded.dtype,
            attn_implementation="eager",
        )
    return model.eval().requires_grad_(False)


def _plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config that says nothing of published formats, as its weights are given as plain numbers."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def spread(vocabulary: int) -> list[int]:
    """Return ascending token ids that are spread over a vocabulary, its first and last among them."""
    count = min(VOCABULARY_ROWS, vocabulary)
    return sorted({round(index * (vocabulary - 1) / max(1, count - 1)) for index in range(count)})


def _prune(model: PreTrainedModel, layers: Any, block: int | None, counts: list[int]) -> None:
    """Replace all decoder blocks but `block`, and keep as many first rows of embedding and head as counts say."""
    for index in range(len(layers)):
        if index != block:
            layers[index] = torch.nn.Identity()
    for module, rows in zip(_ends(model), counts, strict=True):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter[:rows].detach(), requires_grad=False))
        module.padding_idx = None  # It may be the number of a row that was cut off.


def _drop_other_parts(model: PreTrainedModel) -> None:
    """Remove the weights of what a multimodal wrapper has beside its text decoder."""
    kept = {id(module) for module in text_modules(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not any(id(module) in kept for module in child.modules()):
                setattr(parent, name, torch.nn.Identity())


def _ends(model: PreTrainedModel) -> list[Any]:
    """Return the modules that have a row per token: embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in ends if module is not None]


def _cut_others(layer: torch.nn.Module, path: str, loaded: LoadedPart) -> None:
    """Cut a block's large parameters that are not in a part to no rows, and fused ones to the part's experts."""
    experts = loaded.part.experts
    for module_path, module in layer.named_modules(prefix=path):
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{module_path}.{name}"
            if experts is not None and experts.parameter == full_name:
                rows = experts.end - experts.start
            elif full_name in loaded.names or parameter.nbytes <= SMALL_BYTES or not parameter.ndim:
                continue
            else:
                rows = 0
            setattr(module, name, torch.nn.Parameter(parameter[:rows].detach(), requires_grad=False))


def _rows_of_ends(loaded: LoadedSpan) -> dict[str, list[int]]:
    """Return the token ids whose rows of embedding and head are compared, by the module's name.

    They are all of them if several of the checkpoint's tensors are merged into a module's weight.
    """
    targets = loaded.weights.targets.values() if loaded.weights is not None else ()
    sources = Counter(target.rpartition(".")[0] for target in targets)
    rows: dict[str, list[int]] = {}
    for module in _ends(loaded.skeleton):
        name = next(name for name, each in loaded.skeleton.named_modules() if each is module)
        count = int(module.weight.shape[0])
        has_bias = getattr(module, "bias", None) is not None
        rows[name] = list(range(count)) if sources[name] > 1 + has_bias else spread(count)
    return rows


def _few_rows(loaded: LoadedSpan, weights: Mapping[str, Any], kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the tensors outside the blocks, of embedding and head only few rows."""
    assert loaded.weights is not None
    path = find_blocks(loaded.skeleton).path
    few = {name: kept.get(target.rpartition(".")[0], []) for name, target in loaded.weights.targets.items()}
    return {
        name: _read_rows(weights[name], few[name]) if 0 < len(few[name]) <= VOCABULARY_ROWS else weights[name]
        for name, target in loaded.weights.targets.items()
        if not target.startswith(f"{path}.")
    }


def _read_rows(tensor: Any, rows: list[int]) -> torch.Tensor:
    """Return rows of a lazy tensor; one that cannot be read in part (quantized or GGUF) is read whole, once."""
    if hasattr(tensor, "get_shape"):
        return torch.cat([tensor[row : row + 1] for row in rows])
    whole: torch.Tensor = tensor[...]
    return whole[rows]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from reporting the weights that the slice leaves out."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
