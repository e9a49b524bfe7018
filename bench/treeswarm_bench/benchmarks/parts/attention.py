"""`swarm bench attention`: one layer's attention, the torch reference beside the flash kernels.

A tree's rows attend to a trunk that is stored in one run.  The heads are those of an 8B model: 32 query heads, and 8
heads of K and V with 128 dimensions each.  The figures are milliseconds per call, as the median of calls that the two
adapters make in turn.  `kv_mib` is what any kernel must read of the trunk.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.attention.base import Attention, LayerInputs, TorchReference
from treeswarm_node.attention.flash import FlashAttention
from treeswarm_node.attention.metadata import Batch, SegmentMetadata
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape

HEADS, SHAPE = 32, KVShape(8, 128, 128)
ROWS, TRUNKS = (1, 16, 64, 256), (512, 8192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The first call of each adapter is not counted; the median needs a few more, however slow a call is.
LEAST_CALLS = 4


async def bench_attention(*, device: str, threads: int, seconds: float) -> dict[str, Any]:
    """Measure 16 cases on a device, `seconds` each; `threads` counts on a CPU only.  Raises BadRequest for no device.

    The cases are both dtypes, both lengths of the trunk and four numbers of rows.
    """
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"--device {device} cannot be used here: {error}") from error
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where.type}, {threads} threads"
    cases = [
        measure(rows, trunk, dtype, where, seconds) for dtype in DTYPES.values() for trunk in TRUNKS for rows in ROWS
    ]
    return {
        "bench": "attention",
        "device": name,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "cases": cases,
        "provenance": machine_provenance(),
    }


def tree_batch(rows: int, trunk: int, store: KVStore, device: torch.device) -> Batch:
    """Return a batch of one session: a binary tree below a trunk at the pool's beginning, its crown behind it."""
    depths, visible = torch.zeros(rows, dtype=torch.int64), torch.eye(rows, dtype=torch.bool)
    for node in range(1, rows):
        parent = (node - 1) // 2
        depths[node] = depths[parent] + 1
        visible[node] |= visible[parent]
    crown, positions = torch.arange(trunk, trunk + rows).to(device), (trunk + depths).to(device)
    metadata = SegmentMetadata(slice(0, rows), positions, [(0, trunk)], None, positions, visible.to(device))
    return Batch(store, [metadata], crown, positions[None])


@torch.inference_mode()
def measure(rows: int, trunk: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Run both adapters on the same rows, in turn, for at least `seconds`; return the figures of this case."""
    store = KVStore({0: SHAPE}, trunk + max(ROWS), dtype, device)
    store.layers[0].keys.normal_()
    store.layers[0].values.normal_()
    batch = tree_batch(rows, trunk, store, device)
    query = torch.randn(HEADS, rows, SHAPE.key_dim, device=device).to(dtype)
    key, value = (torch.randn(SHAPE.kv_heads, rows, SHAPE.key_dim, device=device).to(dtype) for _ in range(2))

    def attend_with(adapter: Attention) -> Callable[[], torch.Tensor]:
        return lambda: adapter.attend(
            LayerInputs.with_kv_written(0, query, key, value, batch, scaling=SHAPE.key_dim**-0.5)
        )

    calls = {"reference_ms": attend_with(TorchReference()), "flash_ms": attend_with(FlashAttention(device))}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(taken["flash_ms"]) < LEAST_CALLS:
        for name, call in calls.items():
            taken[name].append(_call_ms(call, device))
    figures = {name: round(statistics.median(times[1:]), 4) for name, times in taken.items()}
    return {
        "rows": rows,
        "trunk": trunk,
        "dtype": str(dtype).removeprefix("torch."),
        **figures,
        "faster": round(figures["reference_ms"] / figures["flash_ms"], 2),
        "kv_mib": 2 * SHAPE.kv_heads * trunk * SHAPE.key_dim * dtype.itemsize / 2**20,
    }


def _call_ms(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the milliseconds of a call, until the device has finished."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
