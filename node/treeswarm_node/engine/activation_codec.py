"""Rows of activations as bytes and back: the model's own dtype, or 8 bits a value where the class says so."""

from typing import Protocol

import torch

from treeswarm.protocol.messages import ACTIVATION_BLOCK

LEVELS = 127
"""Of an int8 to either side of zero."""


class RowCodec(Protocol):
    """Both directions; every row is as long as any other."""

    def encode(self, rows: torch.Tensor) -> bytes:
        """[n, hidden] on any device to n rows of bytes, one after the other."""
        ...

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        """Back to [n, hidden] on the CPU, in `dtype`.  `data` is whole rows: the session has counted its bytes."""
        ...


class NativeCodec:
    """The bytes of the tensor."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size

    def encode(self, rows: torch.Tensor) -> bytes:
        return rows.contiguous().cpu().view(torch.uint8).numpy().tobytes() if len(rows) else b""

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        if not data:
            return torch.empty(0, self._hidden_size, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, self._hidden_size)


class Int8BlockCodec:
    """Per row: its values as int8, then a float16 scale for every `ACTIVATION_BLOCK` of them.

    A value is off by at most half its block's scale, which is the block's largest value / 127.  What is not finite
    stays so, as a scale that is none, and the next node refuses it; values too large for a float16 scale are clipped.
    """

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._blocks = -(-hidden_size // ACTIVATION_BLOCK)

    def encode(self, rows: torch.Tensor) -> bytes:
        if not len(rows):
            return b""
        padded = torch.nn.functional.pad(rows.float(), (0, self._blocks * ACTIVATION_BLOCK - self._hidden_size))
        blocks = padded.view(-1, self._blocks, ACTIVATION_BLOCK)
        largest = blocks.abs().amax(-1, keepdim=True)
        most = torch.finfo(torch.float16).max
        scales = torch.where(largest.isfinite(), (largest / LEVELS).clamp(max=most), torch.nan).half()
        levels = (blocks / scales.float()).nan_to_num(0, 0, 0).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        values = levels.view(-1, self._blocks * ACTIVATION_BLOCK)[:, : self._hidden_size]
        packed = torch.cat([values.contiguous().view(torch.uint8), scales.flatten(1).view(torch.uint8)], 1)
        return packed.cpu().numpy().tobytes()

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        if not data:
            return torch.empty(0, self._hidden_size, dtype=dtype)
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, self._hidden_size + 2 * self._blocks)
        values, scales = packed[:, : self._hidden_size], packed[:, self._hidden_size :]
        by_value = scales.contiguous().view(torch.float16).float().repeat_interleave(ACTIVATION_BLOCK, 1)
        levels = values.contiguous().view(torch.int8).float()
        rows: torch.Tensor = (levels * by_value[:, : self._hidden_size]).to(dtype)
        return rows


def make_row_codec(activations: str, hidden_size: int) -> RowCodec:
    """For `NumericsClass.activations`."""
    return Int8BlockCodec(hidden_size) if activations == "int8" else NativeCodec(hidden_size)
