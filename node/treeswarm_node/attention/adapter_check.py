"""Check an attention adapter against the reference: both attend to the same generated rows.

The check at load (`model/check/family_check.py`) compares layers in float32, where a kernel for 16 bits would not
even be called.  This check computes in the node's own dtype, on its device, with heads of the model's shape.
"""

import numpy as np
import torch

from treeswarm_node.attention.base import Attention, LayerInputs, TorchReference
from treeswarm_node.attention.metadata import Batch, SegmentMetadata
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape

# Largest accepted difference, relative to the output's norm.  Rounding was seen to cost 1e-6 in float32, 0.003 in
# bfloat16 and 0.0004 in float16 on a CPU; a part that is forgotten or weighted wrongly costs far more.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# Trunks as (first pool row, rows): a long one in two runs with a hole between them, and a short one.
LONG_TRUNK, SHORT_TRUNK = [(0, 320), (384, 277)], [(704, 70)]
CROWN_ROW, POOL_ROWS = 832, 1024
TREE_ROWS, CHUNK_ROWS = 9, 40
# The window begins inside the long trunk's first run, at another key for every depth of the tree.
WINDOW = 400
# Scales the queries so that some keys count much more than others, as in a trained model.
SHARPNESS = 3.0
SEED = 20261122


@torch.inference_mode()
def measure_disagreement(
    adapter: Attention, heads: int, shape: KVShape, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the largest difference between the adapter and the reference, relative to the reference output's norm.

    One batch holds a tree and a prefill chunk; it is computed with and without a sliding window.  Returns infinity if
    the difference is not finite.  Raises whatever the adapter's kernel raises.
    """
    generator = torch.Generator().manual_seed(SEED)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    store = KVStore({0: shape}, POOL_ROWS, dtype, device)
    pool = store.layers[0]
    pool.keys[:], pool.values[:] = noise(*pool.keys.shape), noise(*pool.values.shape)
    batch = _make_batch(store, device)
    rows = batch.positions.shape[1]
    query = SHARPNESS * noise(heads, rows, shape.key_dim)
    key, value = noise(shape.kv_heads, rows, shape.key_dim), noise(shape.kv_heads, rows, shape.value_dim)
    worst = 0.0
    for window in (None, WINDOW):
        layer = LayerInputs.with_kv_written(0, query, key, value, batch, scaling=shape.key_dim**-0.5, window=window)
        output, reference = (attention.attend(layer).float() for attention in (adapter, TorchReference()))
        difference = float((output - reference).norm() / reference.norm())
        worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    return worst


def _make_batch(store: KVStore, device: torch.device) -> Batch:
    """Return a tree below the long trunk, with its rows in the pool, and a prompt's chunk behind the short trunk."""
    depths, visible = _make_tree()
    long, short = (sum(count for _, count in runs) for runs in (LONG_TRUNK, SHORT_TRUNK))
    tree_rows = torch.arange(CROWN_ROW, CROWN_ROW + TREE_ROWS)
    tree_positions, chunk_positions = long + depths, torch.arange(short, short + CHUNK_ROWS)
    chunk_rows = torch.arange(SHORT_TRUNK[0][0] + short, SHORT_TRUNK[0][0] + short + CHUNK_ROWS)
    causal = torch.ones(CHUNK_ROWS, CHUNK_ROWS, dtype=torch.bool).tril()
    segments = [
        SegmentMetadata(
            rows=slice(0, TREE_ROWS),
            positions=tree_positions.to(device),
            trunk_runs=LONG_TRUNK,
            local_rows=tree_rows.to(device),
            local_positions=tree_positions.to(device),
            visible=visible.to(device),
        ),
        SegmentMetadata(
            rows=slice(TREE_ROWS, TREE_ROWS + CHUNK_ROWS),
            positions=chunk_positions.to(device),
            trunk_runs=SHORT_TRUNK,
            local_rows=None,
            local_positions=chunk_positions.to(device),
            visible=causal.to(device),
        ),
    ]
    kv_rows, positions = torch.cat([tree_rows, chunk_rows]), torch.cat([tree_positions, chunk_positions])
    return Batch(store, segments, kv_rows.to(device), positions.to(device)[None])


def _make_tree() -> tuple[torch.Tensor, torch.Tensor]:
    """Return depths int64 [TREE_ROWS] and ancestors bool [TREE_ROWS, TREE_ROWS] of a random tree."""
    random = np.random.default_rng(SEED)
    depths, visible = torch.zeros(TREE_ROWS, dtype=torch.int64), torch.eye(TREE_ROWS, dtype=torch.bool)
    for node in range(1, TREE_ROWS):
        parent = int(random.integers(-1, node))
        if parent >= 0:
            depths[node] = depths[parent] + 1
            visible[node] |= visible[parent]
    return depths, visible
