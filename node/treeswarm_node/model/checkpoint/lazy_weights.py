"""Give transformers the weights of a checkpoint one by one: each is read, and expanded, when it is loaded."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from treeswarm.errors import ModelError
from treeswarm.model_files import read_header
from treeswarm.progress import LOADING, Progress
from treeswarm_node.model.checkpoint.dequantize.formulas import Codes
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight
from treeswarm_node.model.checkpoint.gguf_tensors import GGUFTensors
from treeswarm_node.model.checkpoint.tensors import HostedTensors


def open_weights(
    folder: Path,
    tensors: HostedTensors,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    progress: Progress | None,
    gguf: GGUFTensors | None = None,
) -> dict[str, Any]:
    """Return lazy weights by name; transformers reads each one when it loads it into a module.

    A weight that is stored in fewer bits has the name that it would have in 16 bits, and becomes a tensor of the
    dtype that `dtypes` has for the model's tensor.
    """
    slices = _open_slices(folder, tensors.by_file, gguf)
    total, done = len(tensors.targets), itertools.count(1)

    def report() -> None:
        if progress is not None:  # A tensor of many experts is read several times.
            progress(min(next(done), total), total, LOADING)

    # A GPU expands weights faster than the CPU beside it does, and needs fewer bytes from it.
    place = device if device.type == "cuda" else torch.device("cpu")
    weights: dict[str, Any] = {}
    for name, target in tensors.targets.items():
        if name in tensors.stored:
            weights[name] = _StoredSlice(tensors.stored[name], slices, dtypes[target], place, report)
        else:
            weights[name] = _ReportingSlice(slices[name], report)
    return weights


class _ReportingSlice:
    """Wraps a lazy slice of a checkpoint's tensor, and calls `on_read` when transformers' thread reads it."""

    def __init__(self, tensor: Any, on_read: Callable[[], None]) -> None:
        self._tensor, self._on_read = tensor, on_read

    def __getitem__(self, index: Any) -> Any:
        value = self._tensor[index]
        self._on_read()
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


class SomeExperts:
    """Stands for some experts of a lazy weight [experts, …]: only these are read, where the format allows it."""

    def __init__(self, weight: Any, start: int, end: int) -> None:
        self._weight, self._start, self._end = weight, start, end

    def __getitem__(self, index: Any) -> Any:
        return self._weight[self._start : self._end][index]


class _StoredSlice:
    """Reads and expands a weight that is stored in fewer bits, when transformers' thread reads it."""

    def __init__(
        self,
        weight: StoredWeight,
        slices: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        on_read: Callable[[], None],
    ) -> None:
        self._weight, self._dtype, self._device, self._on_read = weight, dtype, device, on_read
        self._slices = {role: slices[name] for role, name in weight.parts.items()}

    def __getitem__(self, index: Any) -> torch.Tensor:
        some = index if isinstance(index, slice) and self._divides else ...
        codes = self.read_codes(some)
        value = codes.expand(codes.parts, self._dtype)
        return value if some is index else value[index]

    def read_codes(self, some: Any = ...) -> Codes:
        """Read the weight, or some of its experts, in the bits in which it is stored."""
        codes = self._weight.read({role: part[some].to(self._device) for role, part in self._slices.items()})
        self._on_read()
        return codes

    @property
    def _divides(self) -> bool:
        """Return whether every tensor of the weight has the experts as its first dimension."""
        count = self._weight.shape[0]
        return len(self._weight.shape) > 2 and all(part.get_shape()[:1] == [count] for part in self._slices.values())


def _open_slices(folder: Path, by_file: Mapping[str, list[str]], gguf: GGUFTensors | None) -> dict[str, Any]:
    """Return a lazy slice of each tensor, by name."""
    slices: dict[str, Any] = {}
    for file, tensors in sorted(by_file.items()):
        if gguf is not None:
            slices.update({tensor: gguf.lazy(tensor) for tensor in tensors})
            continue
        read_header(folder / file)
        try:
            opened: Any = safe_open(folder / file, framework="pt", device="cpu")
            slices.update({tensor: opened.get_slice(tensor) for tensor in tensors})
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / file} cannot be read ({error}): download it again") from None
    return slices
