"""Hold what one attention layer keeps of the sessions' texts.

`LayerState` is the protocol of a layer kind, and `KVRows` its only implementation today:

    trunk row, crown row   a row of the pool each, of `row_bytes`; the store decides which rows are whose
    session                `session_bytes` besides the rows: none for attention
    commit                 `copy_rows` copies crown rows to the trunk's end
    prefix sharing         a full page of trunk rows is never written again, so other sessions may read it
    replay                 a node's replay log keeps activations, not states: a replacement computes its states anew

A recurrent layer would keep its inputs per row, a matrix per session, and copies of the matrix where a prefix ends.
"""

import contextlib
import math
import mmap
import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class KVShape:
    """Describes the shape of one KV row of one attention layer."""

    kv_heads: int
    """Number of KV heads."""
    key_dim: int
    """Size of a head's key."""
    value_dim: int
    """Size of a head's value."""
    is_latent: bool = False
    """Whether a row is a compressed latent of all heads, whose value is the beginning of its key (MLA)."""

    def __str__(self) -> str:
        heads = "latents" if self.is_latent else f"{self.kv_heads} heads"
        return f"{heads} of {self.key_dim} + {self.value_dim}"

    @property
    def numbers(self) -> int:
        """Number of numbers that are stored per row."""
        return self.kv_heads * (self.key_dim + (0 if self.is_latent else self.value_dim))


class LayerState(Protocol):
    """What one layer keeps in a pool of rows that all sessions share."""

    row_bytes: int
    """Number of bytes per row, of a trunk or of a crown."""
    session_bytes: int
    """Number of bytes per session besides its rows."""

    def copy_rows(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy rows of the pool, which is how crown rows are committed; both arguments are int64 [n]."""
        ...


class KVRows:
    """Holds the keys and values of one attention layer, or the latents of which a layer computes both."""

    session_bytes = 0

    def __init__(self, shape: KVShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.row_bytes = shape.numbers * dtype.itemsize
        # Heads first: a head's run of rows is then one strided view that a batched product reads in place.
        self.keys = zeros_on_demand((shape.kv_heads, rows, shape.key_dim), dtype, device)
        self.values = (
            self.keys[..., : shape.value_dim]
            if shape.is_latent
            else zeros_on_demand((shape.kv_heads, rows, shape.value_dim), dtype, device)
        )

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [kv_heads, n, dim] to the rows int64 [n]; a latent's value is a part of its key."""
        self.keys[:, rows] = keys
        if not self.shape.is_latent:
            self.values[:, rows] = values

    def copy_rows(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy rows of the pool; both arguments are int64 [n]."""
        source, target = (torch.from_numpy(rows).to(self.keys.device) for rows in (sources, targets))
        for pool in (self.keys,) if self.shape.is_latent else (self.keys, self.values):
            pool[:, target] = pool[:, source]


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros that take a CPU's memory only where they are written; `torch.zeros` writes all of them at once."""
    if device.type != "cpu" or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Rows of one text lie apart, head by head: huge pages took 145 MB for 64 rows in 15 blocks of SmolLM2.
    with contextlib.suppress(OSError):  # a kernel may know no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
