"""Find a model's decoder blocks and what it has besides them, whatever their names are."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class DecoderBlocks:
    """Holds the list of a model's decoder blocks, and where it is."""

    path: str
    """Name of the list within the causal LM, such as `model.layers` or `transformer.h`."""
    layers: torch.nn.ModuleList


def find_blocks(skeleton: PreTrainedModel) -> DecoderBlocks:
    """Return the decoder blocks: of all lists of modules, the one with the most parameters.

    Raises UnsupportedModel if there is none, or several of the same size.
    """
    lists = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, torch.nn.ModuleList)]
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists}
    largest = [(name, module) for name, module in lists if sizes[name] == max(sizes.values())]
    if len(largest) != 1:
        found = "several lists" if largest else "no list"
        raise UnsupportedModel(f"models of type '{skeleton.config.model_type}' have {found} of decoder blocks")
    return DecoderBlocks(*largest[0])


def text_modules(skeleton: PreTrainedModel, blocks: DecoderBlocks) -> Iterator[torch.nn.Module]:
    """Yield all modules, or of a multimodal wrapper those of its text decoder and its LM head."""
    if skeleton.config.get_text_config(decoder=True) is skeleton.config:
        yield from skeleton.modules()
        return
    yield from skeleton.get_submodule(blocks.path.rpartition(".")[0]).modules()
    yield from skeleton.get_output_embeddings().modules()


def modules_besides(skeleton: PreTrainedModel, blocks: DecoderBlocks) -> Iterator[torch.nn.Module]:
    """Yield the modules with tensors of their own that are not in decoder blocks: embeddings, norms, LM head.

    Of a multimodal wrapper, only those of its text decoder are meant.
    """
    inside = {id(module) for module in blocks.layers.modules()}
    text = {id(module) for module in text_modules(skeleton, blocks)}
    for module in skeleton.modules():
        if id(module) in text and id(module) not in inside and (module._parameters or module._buffers):
            yield module
