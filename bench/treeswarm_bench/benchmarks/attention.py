"""One layer's attention, reference beside flash.

Run `python -m treeswarm_bench.benchmarks.attention [--device cuda]`; it prints one JSON object.

A tree's rows over a trunk in one run, with heads as an 8B model has them (32 query heads, 8 of K and V, 128 each).
Milliseconds of a call, the median of calls in turns; `kv_mib` is what any kernel must read of the trunk.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from treeswarm_node.attention.base import Attention, LayerInputs, TorchReference
from treeswarm_node.attention.flash import FlashAttention
from treeswarm_node.attention.metadata import Batch, SegmentMetadata
from treeswarm_node.kv_cache.kv_store import KVShape, KVStore

HEADS, SHAPE = 32, KVShape(8, 128, 128)
ROWS, TRUNKS = (1, 16, 64, 256), (512, 8192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def made_up(rows: int, trunk: int, store: KVStore, device: torch.device) -> Batch:
    """One session: a binary tree below a trunk at the pool's beginning, its crown behind it."""
    depths, sees = torch.zeros(rows, dtype=torch.int64), torch.eye(rows, dtype=torch.bool)
    for node in range(1, rows):
        parent = (node - 1) // 2
        depths[node] = depths[parent] + 1
        sees[node] |= sees[parent]
    crown, positions = torch.arange(trunk, trunk + rows).to(device), (trunk + depths).to(device)
    meta = SegmentMetadata(slice(0, rows), positions, [(0, trunk)], None, positions, sees.to(device))
    return Batch(store, 0, [meta], crown, positions[None])


@torch.inference_mode()
def measure(rows: int, trunk: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Both adapters on the same rows, in turns, until the time is over."""
    store = KVStore(1, SHAPE, trunk + max(ROWS), dtype, device)
    store.keys.normal_()
    store.values.normal_()
    batch = made_up(rows, trunk, store, device)
    query = torch.randn(HEADS, rows, SHAPE.key_dim, device=device).to(dtype)
    key, value = (torch.randn(SHAPE.kv_heads, rows, SHAPE.key_dim, device=device).to(dtype) for _ in range(2))

    def attending(adapter: Attention) -> Callable[[], torch.Tensor]:
        return lambda: adapter.attend(
            LayerInputs.with_kv_written(0, query, key, value, batch, scaling=SHAPE.key_dim**-0.5)
        )

    todo = {"reference_ms": attending(TorchReference()), "flash_ms": attending(FlashAttention(device))}
    took: dict[str, list[float]] = {name: [] for name in todo}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(took["flash_ms"]) < 4:
        for name, work in todo.items():
            took[name].append(_timed(work, device))
    figures = {name: round(statistics.median(times[1:]), 4) for name, times in took.items()}
    faster = round(figures["reference_ms"] / figures["flash_ms"], 2)
    return {
        "rows": rows, "trunk": trunk, "dtype": str(dtype).removeprefix("torch."), **figures, "faster": faster,
        "kv_mib": 2 * SHAPE.kv_heads * trunk * SHAPE.key_dim * dtype.itemsize / 2**20,
    }  # fmt: skip


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Milliseconds, until the device has finished."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the 16 cases (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {args.threads} threads"
    cases = [
        measure(rows, trunk, dtype, device, args.seconds)
        for dtype in DTYPES.values() for trunk in TRUNKS for rows in ROWS
    ]  # fmt: skip
    print(
        json.dumps({"device": name, "torch": torch.__version__, "load": os.getloadavg()[0], "cases": cases}, indent=1)
    )


if __name__ == "__main__":
    main()
