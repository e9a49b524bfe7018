"""Encode rows of activations as bytes and decode them: in the model's own dtype, or in 8 bits per value.

The numerics class says which of the two a chain uses.
"""

from typing import Protocol

import torch

from treeswarm.protocol.messages import ACTIVATION_BLOCK

LEVELS = 127
"""Number of int8 levels on either side of zero."""


class RowCodec(Protocol):
    """Encodes and decodes rows.  Every encoded row has the same length."""

    def encode(self, rows: torch.Tensor) -> bytes:
        """Return rows [n, hidden], on any device, as n rows of bytes, one after the other."""
        ...

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows [n, hidden] on the CPU, in `dtype`.

        `data` must be whole rows; the session has checked the number of bytes.
        """
        ...


class NativeCodec:
    """Encodes rows as the tensor's own bytes."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size

    def encode(self, rows: torch.Tensor) -> bytes:
        return rows.contiguous().cpu().view(torch.uint8).numpy().tobytes() if len(rows) else b""

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        if not data:
            return torch.empty(0, self._hidden_size, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, self._hidden_size)


class Int8BlockCodec:
    """Encodes each row as int8 values, followed by a float16 scale for every `ACTIVATION_BLOCK` values.

    A decoded value differs by at most half its block's scale, which is the block's largest value / 127.  A block with
    a value that is not finite gets a scale of NaN, so the next node refuses it.  Values too large for a float16 scale
    are clipped.
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
        max_scale = torch.finfo(torch.float16).max
        scales = torch.where(largest.isfinite(), (largest / LEVELS).clamp(max=max_scale), torch.nan).half()
        levels = (blocks / scales.float()).nan_to_num(0, 0, 0).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        values = levels.view(-1, self._blocks * ACTIVATION_BLOCK)[:, : self._hidden_size]
        encoded = torch.cat([values.contiguous().view(torch.uint8), scales.flatten(1).view(torch.uint8)], 1)
        return encoded.cpu().numpy().tobytes()

    def decode(self, data: bytes, dtype: torch.dtype) -> torch.Tensor:
        if not data:
            return torch.empty(0, self._hidden_size, dtype=dtype)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, self._hidden_size + 2 * self._blocks)
        values, scales = encoded[:, : self._hidden_size], encoded[:, self._hidden_size :]
        scale_of_value = scales.contiguous().view(torch.float16).float().repeat_interleave(ACTIVATION_BLOCK, 1)
        levels = values.contiguous().view(torch.int8).float()
        rows: torch.Tensor = (levels * scale_of_value[:, : self._hidden_size]).to(dtype)
        return rows


def make_row_codec(activations: str, hidden_size: int) -> RowCodec:
    """Return the codec for `NumericsClass.activations`."""
    return Int8BlockCodec(hidden_size) if activations == "int8" else NativeCodec(hidden_size)
