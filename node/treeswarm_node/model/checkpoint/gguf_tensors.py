"""Read the tensors of a GGUF file under the names and in the layout that transformers gives them, one by one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.quants import quant_shape_to_byte_shape
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.model_sources.gguf_files import WEIGHTS, GGUFEntry, read_architecture, read_table

# Tensors whose content the config has: the divisors of Llama 3's rotary frequencies.
IN_CONFIG = {"rope_freqs.weight"}


@dataclass(frozen=True)
class _FlatModel:
    """A model without submodules, for transformers' map of names.

    That function asks gguf for the whole table of names again for every submodule, which took 9 s of processor time for
    30 layers (2026-11-30).  All names are found with those of the model and of its decoder.
    """

    config: Any
    names: Iterable[str]

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self.names)

    def named_children(self) -> tuple[()]:
        return ()


def _map_names(skeleton: PreTrainedModel, processor: Any) -> dict[str, str]:
    """Return transformers' map: name in the model by name in the file."""
    prefix = f"{skeleton.base_model_prefix}."
    names = list(skeleton.state_dict())
    bare = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    decoder = get_gguf_hf_weights_map(_FlatModel(skeleton.config, bare), processor, qual_name=prefix)
    whole = get_gguf_hf_weights_map(_FlatModel(skeleton.config, names), processor)
    return {**decoder, **whole}


@dataclass(frozen=True, eq=False)
class GGUFTensors:
    """The tensors of one GGUF file by transformers' names; the file is mapped, and nothing is read yet."""

    content: np.ndarray
    """Bytes of the file."""
    table: Mapping[str, GGUFEntry]
    """Shape and place of each tensor by its name in the file."""
    processor: Any
    """Transformers' own changes of this architecture's tensors, such as the permutation of Llama's q and k."""
    names: Mapping[str, str]
    """Name in the model by name in the file, as transformers maps them."""
    stored: Mapping[str, list[str]]
    """Names in the file by name in the model; gate and up projections of experts are merged into one."""

    @classmethod
    def open(cls, folder: Path, skeleton: PreTrainedModel) -> "GGUFTensors":
        """Open the GGUF file of a model directory.

        Raises ModelError, and UnsupportedModel if a tensor of the file belongs to no module.
        """
        try:
            content = np.memmap(folder / WEIGHTS, mode="r", dtype=np.uint8)
        except (ValueError, OSError) as error:
            raise ModelError(f"{(folder / WEIGHTS).resolve()} cannot be read ({error}): download it again") from None
        processor = TENSOR_PROCESSORS.get(read_architecture(folder), TensorProcessor)(config=skeleton.config.to_dict())
        names, table = _map_names(skeleton, processor), read_table(folder)
        stored: dict[str, list[str]] = {}
        for tensor in table:
            name = names.get(tensor) or names.get(tensor.removesuffix(".weight"))
            if name is not None:
                stored.setdefault(name, []).append(tensor)
            elif tensor not in IN_CONFIG:
                raise UnsupportedModel(
                    f"tensor {tensor} of the GGUF file belongs to no parameter of a model of type "
                    f"'{skeleton.config.model_type}' in transformers: use the model's safetensors form"
                )
        return cls(content, table, processor, names, stored)

    def lazy(self, name: str) -> "GGUFSlice":
        """Return one tensor of the model, which is read when it is indexed."""
        return GGUFSlice(self, name)

    def read(self, name: str, some: slice | None = None) -> torch.Tensor:
        """Return one tensor of the model, dequantized to float32; of several experts, those that `some` names."""
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in self.stored[name]:
            result = self.processor.process(
                weights=self._values(self.table[tensor], some),
                name=tensor,
                tensor_key_mapping=self.names,
                parsed_parameters=parsed,
            )
            if result.name in self.names:  # otherwise the processor has put it into `parsed`
                parsed["tensors"][name] = torch.from_numpy(np.copy(result.weights))
        return parsed["tensors"][name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the model in the file; of merged ones, that of the first."""
        return self.table[self.stored[name][0]].shape

    def _values(self, entry: GGUFEntry, some: slice | None) -> np.ndarray:
        """Return a tensor's values as float32, or those of `some` experts."""
        kind = GGMLQuantizationType[entry.kind]
        content = self.content[entry.offset : entry.offset + entry.size]
        content = content.reshape(quant_shape_to_byte_shape(entry.shape, kind))
        if some is not None:
            content = content[some]
        values: np.ndarray = dequantize(content, kind)
        return values.reshape(entry.shape if some is None else (len(content), *entry.shape[1:]))


@dataclass(frozen=True, eq=False)
class GGUFSlice:
    """One tensor, read when transformers' loading thread indexes it."""

    tensors: GGUFTensors
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, slice) and len(self.tensors.shape(self.name)) > 2:
            return self.tensors.read(self.name, index)
        return self.tensors.read(self.name)[index]
