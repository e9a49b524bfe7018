"""Read the tensors of a GGUF file under the names and in the layout that transformers gives them, one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.model_sources.gguf_files import WEIGHTS

# Tensors whose content the config has: the divisors of Llama 3's rotary frequencies.
IN_CONFIG = {"rope_freqs.weight"}


@dataclass(frozen=True, eq=False)
class GGUFTensors:
    """The tensors of one GGUF file by transformers' names; the file is mapped, and nothing is read yet."""

    folder: Path
    processor: Any
    """Transformers' own changes of this architecture's tensors, such as the permutation of Llama's q and k."""
    names: Mapping[str, str]
    """Name in the model by name in the file, as transformers maps them."""
    stored: Mapping[str, list[Any]]
    """Tensors of the file by name in the model; gate and up projections of experts are merged into one."""

    @classmethod
    def open(cls, folder: Path, skeleton: PreTrainedModel) -> "GGUFTensors":
        """Open the GGUF file of a model directory.

        Raises ModelError, and UnsupportedModel if a tensor of the file belongs to no module.
        """
        try:
            reader = GGUFReader(folder / WEIGHTS)
        except (ValueError, IndexError, OSError) as error:
            raise ModelError(f"{(folder / WEIGHTS).resolve()} cannot be read ({error}): download it again") from None
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=skeleton.config.to_dict())
        names = get_gguf_hf_weights_map(skeleton, processor)
        stored: dict[str, list[Any]] = {}
        for tensor in reader.tensors:
            name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
            if name is not None:
                stored.setdefault(name, []).append(tensor)
            elif tensor.name not in IN_CONFIG:
                raise UnsupportedModel(
                    f"tensor {tensor.name} of the GGUF file belongs to no parameter of a model of type "
                    f"'{skeleton.config.model_type}' in transformers: use the model's safetensors form"
                )
        return cls(folder, processor, names, stored)

    def slice(self, name: str) -> "GGUFSlice":
        """Return one tensor of the model, which is read when it is indexed."""
        return GGUFSlice(self, name)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the model, dequantized to float32."""
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in self.stored[name]:
            result = self.processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self.names,
                parsed_parameters=parsed,
            )
            if result.name in self.names:  # otherwise the processor has put it into `parsed`
                parsed["tensors"][name] = torch.from_numpy(np.copy(result.weights))
        return parsed["tensors"][name]


@dataclass(frozen=True, eq=False)
class GGUFSlice:
    """One tensor, read when transformers' loading thread indexes it."""

    tensors: GGUFTensors
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensors.read(self.name)[index]
