"""Write tiny random checkpoints."""

from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from tests.families.configs import tiny_config
from tests.families.wrapper_configs import tiny_wrapper_config, wrapper_types

SEED = 20261130
# Standard deviation of weights: large enough that a mistake anywhere changes the logits.
WEIGHT_STD = 0.15
# Standard deviation of what is added to vectors (norms, biases) and to persistent buffers, which begin as constants.
NUDGE_STD = 0.1


def write_checkpoint(case: str, folder: Path) -> None:
    """Write the tiny checkpoint of a type, or of a form `type@form` of it, as a directory of Hugging Face."""
    torch.manual_seed(SEED)
    if case.partition("@")[0] in wrapper_types():
        config = tiny_wrapper_config(case)
        classes = (AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)
        auto_class = next(each for each in classes if type(config) in each._model_mapping)
    else:
        config, auto_class = tiny_config(case), AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32)
    randomise(model)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Give every parameter and every persistent buffer random values."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, WEIGHT_STD)
        elif parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=NUDGE_STD)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # training never changes it, and transformers loads some as zero
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer), alpha=NUDGE_STD)
