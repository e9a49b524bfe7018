"""Compute logits in float32 from an LM head that is held in 16 bits."""

from typing import Any

import torch

# Heads whose float32 copy would be larger than this are held in 16 bits.  Their products are those of the copy to the
# last bit in slices of at least 256 rows, and take 0.9 to 2.2 times as long on one thread (1 to 64 rows, heads of
# SmolLM2 and Llama 3.2, 2026-11-30), so small heads are copied.
MAX_COPY_BYTES = 256 << 20
# Bytes of float32 that a slice of the vocabulary takes: it should stay in a CPU's cache, and keep a GPU busy.
SLICE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
MIN_SLICE_ROWS = 256


class SlicedHead(torch.nn.Module):
    """Multiplies float32 rows with the weight of an LM head, slice by slice of the vocabulary, in float32."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = None if head.bias is None else head.bias.float()
        slice_bytes = SLICE_BYTES.get(head.weight.device.type, SLICE_BYTES["cuda"])
        self._rows = max(MIN_SLICE_ROWS, slice_bytes // (4 * head.in_features))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.float()
        logits = rows.new_empty(*rows.shape[:-1], len(self.weight))
        for start in range(0, len(self.weight), self._rows):
            part = self.weight[start : start + self._rows].float()
            logits[..., start : start + len(part)] = torch.nn.functional.linear(rows, part)
        return logits if self.bias is None else logits.add_(self.bias)


def keeps_16_bits(head: Any) -> bool:
    """Return whether an LM head is computed in slices, rather than held as a float32 copy."""
    return type(head) is torch.nn.Linear and not is_copied(head.weight.numel(), head.weight.dtype.itemsize)


def is_copied(numbers: int, width: int) -> bool:
    """Return whether an LM head with so many numbers of `width` bytes is held as a float32 copy, or is float32."""
    return width != 2 or numbers * torch.float32.itemsize <= MAX_COPY_BYTES
