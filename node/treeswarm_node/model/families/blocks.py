"""Find a model's decoder blocks and what it has besides them, whatever their names are."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from treeswarm.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class DecoderBlocks:
    """Holds the list of a model's decoder blocks, and where it is."""

    path: str
    """Name of the list within the causal LM, such as `model.layers` or `transformer.h`."""
    layers: torch.nn.ModuleList

    def block_of(self, tensor: str) -> int | None:
        """Return the number of the block that a tensor of the causal LM belongs to, by its name, or None.

        Parts that read images have lists of layers too, with names like those of decoder blocks elsewhere.
        """
        inside = tensor.removeprefix(f"{self.path}.")
        number = inside.partition(".")[0]
        return int(number) if inside != tensor and number.isdigit() else None


def is_wrapper(config: PretrainedConfig) -> bool:
    """Return whether a config is that of a multimodal wrapper: one with a text decoder that has a config of its own."""
    return config.get_text_config(decoder=True) is not config


def text_decoder(skeleton: PreTrainedModel) -> tuple[str, torch.nn.Module]:
    """Return the part that writes text, with its name: of a wrapper the module with the text decoder's config."""
    if not is_wrapper(skeleton.config):
        return "", skeleton
    config = skeleton.config.get_text_config(decoder=True)
    found = ((name, module) for name, module in skeleton.named_modules() if getattr(module, "config", None) is config)
    for name, module in found:
        return name, module
    raise UnsupportedModel(f"models of type '{skeleton.config.model_type}' have no text decoder that is known here")


def find_blocks(skeleton: PreTrainedModel) -> DecoderBlocks:
    """Return the decoder blocks: of all lists of modules of the text decoder, the one with the most parameters.

    A part whose config is of another class reads images or sound, such as GIT's, which may have more layers than the
    decoder.  Raises UnsupportedModel if there is no list, or several of the same size.
    """
    path, decoder = text_decoder(skeleton)
    config, modules = skeleton.config.get_text_config(decoder=True), dict(decoder.named_modules())
    others = tuple(
        f"{name}." for name, module in modules.items() if type(getattr(module, "config", config)) is not type(config)
    )
    lists = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, torch.nn.ModuleList) and not name.startswith(others)
    ]
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists}
    largest = [(name, module) for name, module in lists if sizes[name] == max(sizes.values())]
    if len(largest) != 1:
        found = "several lists" if largest else "no list"
        raise UnsupportedModel(f"models of type '{skeleton.config.model_type}' have {found} of decoder blocks")
    name, layers = largest[0]
    return DecoderBlocks(f"{path}.{name}" if path else name, layers)


def text_modules(skeleton: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield all modules, or of a multimodal wrapper those of its text decoder and its LM head."""
    yield from text_decoder(skeleton)[1].modules()
    if is_wrapper(skeleton.config):
        yield from skeleton.get_output_embeddings().modules()


def modules_besides(skeleton: PreTrainedModel, blocks: DecoderBlocks) -> Iterator[torch.nn.Module]:
    """Yield the modules with tensors of their own that are not in decoder blocks: embeddings, norms, LM head.

    Of a multimodal wrapper, only those of its text decoder are meant.
    """
    inside = {id(module) for module in blocks.layers.modules()}
    text = {id(module) for module in text_modules(skeleton)}
    for module in skeleton.modules():
        if id(module) in text and id(module) not in inside and (module._parameters or module._buffers):
            yield module
