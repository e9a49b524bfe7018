"""Another attention adapter is proven, not believed: it and the reference attend to the same made-up rows.

The proof at load (`proof.py`) compares layers in float32, where a kernel for 16 bits would not even be asked.  Here it
computes in the node's own dtype, on its device, with heads of the model's shape.
"""

import numpy as np
import torch

from treeswarm_node.attention.base import Attention, LayerInputs, TorchReference
from treeswarm_node.attention.metadata import Batch, SegmentMetadata
from treeswarm_node.kv_cache.kv_store import KVShape, KVStore

# Relative to the output's norm.  Rounding was seen to cost 1e-6 in float32, 0.003 in bfloat16, 0.0004 in float16 on a
# CPU; a part forgotten or weighed wrongly costs far more.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# A long trunk in two runs with a hole between them, and a short one; (first pool row, rows).
RUNS, SHORT = [(0, 320), (384, 277)], [(704, 70)]
CROWN_ROW, POOL_ROWS = 832, 1024
TREE, CHUNK = 9, 40
# It begins inside the long trunk's first run, at another key for every depth of the tree.
WINDOW = 400
# Makes some keys count much more than others, as in a trained model.
SHARPNESS = 3.0
SEED = 20261122


@torch.inference_mode()
def measure_disagreement(
    adapter: Attention, heads: int, shape: KVShape, dtype: torch.dtype, device: torch.device
) -> float:
    """How far the adapter is from the reference at most, relative to the output's norm; a tree and a prefill chunk in
    one batch, with and without a sliding window.  Raises what the adapter's kernel does."""
    random = torch.Generator().manual_seed(SEED)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(device, dtype)

    store = KVStore(1, shape, POOL_ROWS, dtype, device)
    store.keys[:], store.values[:] = noise(*store.keys.shape), noise(*store.values.shape)
    batch = _batch(store, device)
    rows = batch.positions.shape[1]
    query = SHARPNESS * noise(heads, rows, shape.key_dim)
    key, value = noise(shape.kv_heads, rows, shape.key_dim), noise(shape.kv_heads, rows, shape.value_dim)
    worst = 0.0
    for window in (None, WINDOW):
        layer = LayerInputs.with_kv_written(0, query, key, value, batch, scaling=shape.key_dim**-0.5, window=window)
        ours, plain = (one.attend(layer).float() for one in (adapter, TorchReference()))
        off = float((ours - plain).norm() / plain.norm())
        worst = max(worst, off if np.isfinite(off) else float("inf"))
    return worst


def _batch(store: KVStore, device: torch.device) -> Batch:
    """A tree below the long trunk, its rows in the pool; a chunk of a prompt behind the short one."""
    depths, sees = _tree()
    long, short = (sum(count for _, count in runs) for runs in (RUNS, SHORT))
    tree_rows = torch.arange(CROWN_ROW, CROWN_ROW + TREE)
    tree_at, chunk_at = long + depths, torch.arange(short, short + CHUNK)
    chunk_rows = torch.arange(SHORT[0][0] + short, SHORT[0][0] + short + CHUNK)
    whole = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    segments = [
        SegmentMetadata(
            slice(0, TREE), tree_at.to(device), RUNS, tree_rows.to(device), tree_at.to(device), sees.to(device)
        ),
        SegmentMetadata(
            slice(TREE, TREE + CHUNK), chunk_at.to(device), SHORT, None, chunk_at.to(device), whole.to(device)
        ),
    ]  # fmt: skip
    written, positions = torch.cat([tree_rows, chunk_rows]), torch.cat([tree_at, chunk_at])
    return Batch(store, 0, segments, written.to(device), positions.to(device)[None])


def _tree() -> tuple[torch.Tensor, torch.Tensor]:
    """Depths int64 [TREE] and ancestors bool [TREE, TREE] of a random tree."""
    random = np.random.default_rng(SEED)
    depths, sees = torch.zeros(TREE, dtype=torch.int64), torch.eye(TREE, dtype=torch.bool)
    for node in range(1, TREE):
        parent = int(random.integers(-1, node))
        if parent >= 0:
            depths[node] = depths[parent] + 1
            sees[node] |= sees[parent]
    return depths, sees
