"""A model that reads more weights and writes the same text, for benches of what is bound by reading weights.

Each block's feed-forward gets several times its neurons.  The new neurons' input weights are random, and their part of
the down projection is zero, so that they add nothing.  The results change by rounding alone, and a draft that agreed
with the model still does.  Files are rewritten tensor by tensor, in the model's own dtype, without torch.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import BadRequest, ModelError, UnsupportedModel
from treeswarm.model_files import (
    BLOCK,
    CLIENT_FILES,
    INDEX,
    SINGLE,
    read_config,
    read_header,
    read_shape,
    resolve_model,
    weight_files,
)

FEED_FORWARD = re.compile(r"layers\.\d+\.mlp\.(.+)")
# Axis of each tensor that counts neurons: checkpoints keep [out, in].
NEURONS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
DTYPES = ("F32", "F16", "BF16")
# The standard deviation that models are initialised with.  It is far from overflow in any dtype, and from subnormal
# numbers, with which processors are slow.
SPREAD = 0.02
SEED = 0
# Largest number of values that are written at once.
CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor in a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of its first byte in the file."""
    size: int
    """Number of bytes."""

    @property
    def neurons(self) -> int | None:
        """Axis to widen, or None if the tensor stays as it is."""
        match = FEED_FORWARD.search(self.name)
        return NEURONS.get(match[1]) if match else None

    def widened(self, times: int) -> tuple[int, ...]:
        """Return its shape with `times` as many neurons."""
        return tuple(size * (times if axis == self.neurons else 1) for axis, size in enumerate(self.shape))


@dataclass(frozen=True)
class WidenedModel:
    """The directory of a wider model, and its sizes."""

    of: str
    """The original model as the user named it."""
    times: int
    folder: Path
    file_bytes: int
    block_weights: int
    """Number of weights in all decoder blocks."""


@contextlib.contextmanager
def widened_model(model: str, times: int) -> Iterator[WidenedModel]:
    """Write `model` with `times` as many neurons into a folder that is removed on leaving.

    `model` is a directory, a bundled name or a hub id.  Raises BadRequest for `times` below 1, ModelError if the model
    cannot be read or written, and UnsupportedModel for feed-forwards of another kind.
    """
    source = resolve_model(model, weights=True)
    with tempfile.TemporaryDirectory(prefix="treeswarm-widened-") as name:
        folder = Path(name)
        try:
            block_weights = widen(source, folder, times)
        except OSError as error:
            raise ModelError(
                f"'{model}' cannot be widened into {folder} ({error.strerror}): free some disk space"
            ) from None
        yield WidenedModel(model, times, folder, (folder / SINGLE).stat().st_size, block_weights)


def widen(source: Path, folder: Path, times: int) -> int:
    """Write a wider copy of the model in `source` into `folder`; return the number of weights in its decoder blocks.

    Raises BadRequest for `times` below 1, ModelError if the model cannot be read, and UnsupportedModel for
    feed-forwards of another kind.  Raises OSError if the copy cannot be written.
    """
    if times < 1:
        raise BadRequest(f"--widen {times} leaves no neurons: give 1 or more")
    config, tensors = read_config(source), _tensors(source)
    _check_feed_forwards(source, config, tensors, read_shape(source).blocks)
    for path in {path for pattern in CLIENT_FILES for path in source.glob(pattern)}:
        if path.name not in {"config.json", INDEX} and path.is_file():
            shutil.copyfile(path, folder / path.name)
    wider = config | {"intermediate_size": config["intermediate_size"] * times}
    (folder / "config.json").write_text(json.dumps(wider, indent=2), "utf-8")
    _write(folder / SINGLE, tensors, times)
    return sum(int(np.prod(tensor.widened(times))) for tensor in tensors if BLOCK.search(tensor.name))


def _check_feed_forwards(source: Path, config: Mapping[str, Any], tensors: list[Tensor], blocks: int) -> None:
    """Raises UnsupportedModel unless all feed-forwards are of the one kind that can be widened."""
    neurons = config.get("intermediate_size")
    parts = [(tensor, match[1]) for tensor in tensors if (match := FEED_FORWARD.search(tensor.name))]
    other = next(
        (
            tensor
            for tensor, part in parts
            if part not in NEURONS or len(tensor.shape) != 2 or tensor.shape[NEURONS[part]] != neurons
        ),
        None,
    )
    if other is not None or len(parts) != blocks * len(NEURONS):
        reason = f"it has {other.name} {list(other.shape)}" if other else "some of its blocks lack them"
        raise UnsupportedModel(
            f"'{source}' cannot be widened: each block's feed-forward must be gate_proj, up_proj and down_proj of "
            f"intermediate_size neurons, without biases, but {reason}: choose a model like Llama's"
        )
    unsupported = next((tensor for tensor, _ in parts if tensor.dtype not in DTYPES), None)
    if unsupported is not None:
        raise UnsupportedModel(
            f"'{source}' cannot be widened: {unsupported.name} is {unsupported.dtype}, not one of {', '.join(DTYPES)}"
        )


def _tensors(source: Path) -> list[Tensor]:
    """Return all tensors of a checkpoint.  Raises ModelError."""
    tensors = []
    for file in sorted(weight_files(source)):
        header = read_header(source / file)
        with (source / file).open("rb") as opened:
            data = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                tensors.append(Tensor(name, entry["dtype"], shape, source / file, data + begin, end - begin))
    return tensors


# ---------------------------------------------------------------- writing


def _write(path: Path, tensors: list[Tensor], times: int) -> None:
    """Write one safetensors file: the header's length, the header, and the tensors in its order without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size * (times if tensor.neurons is not None else 1)
        shape = list(tensor.widened(times))
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(SEED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(file, tensor, times, random)


def _write_tensor(file: BinaryIO, tensor: Tensor, times: int, random: np.random.Generator) -> None:
    content = np.fromfile(tensor.file, np.uint8, tensor.size, offset=tensor.begin)
    if tensor.neurons == 1:
        rows = content.reshape(tensor.shape[0], -1)
        zeros = np.zeros((1, rows.shape[1] * (times - 1)), np.uint8)
        for row in rows:
            file.write(row.tobytes())
            file.write(zeros.tobytes())
        return
    file.write(content.tobytes())
    if tensor.neurons == 0:
        left = int(np.prod(tensor.shape)) * (times - 1)
        while left:
            count = min(left, CHUNK_VALUES)
            file.write(_as_stored(SPREAD * random.standard_normal(count, np.float32), tensor.dtype).tobytes())
            left -= count


def _as_stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Convert to a checkpoint's dtype; bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "F16" else np.float32)
