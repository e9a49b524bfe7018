"""Choose the memory layout of weights: row-major, as in checkpoints, or column-major, whichever is faster here.

A product of few rows mostly reads its weight.  A CPU's library reads one of the layouts faster.  Which one depends on
the weight's shape and on the machine, so it is measured.
"""

import statistics
import time
from collections.abc import Iterable

import torch

# Numbers of rows to measure with: that of a plain step, and those of the trees that fit slow links.
ROWS = (1, 2, 4, 8, 16)
# Column-major is chosen if its time is below this share of the row-major time.  A smaller gain is not worth a copy, and
# cannot be distinguished from noise.
MAX_RATIO = 0.95
# Number of calls of a product, and seconds after which no more calls are made (large weights).  The fastest call
# counts, because other load can only slow a call down.
CALLS, MAX_S = 12, 0.1
# Bytes of the largest weight that is converted.  During the conversion the weight exists twice, which `memory_fit.py`
# does not account for, so a large head keeps its layout.
MAX_BYTES = 512 << 20


@torch.no_grad()
def choose_layouts(linears: Iterable[torch.nn.Linear]) -> int:
    """Change each weight to the layout that is faster for its shape, and return how many were changed.

    Products may change in the last bit.  Only float32 weights on a CPU are changed: kernels for 16 bits are made for
    row-major weights, and were seen to take ten times as long otherwise.
    """
    column_major: dict[torch.Size, bool] = {}
    changed = 0
    for linear in linears:
        weight = linear.weight
        if not _may_change(weight):
            continue
        if weight.shape not in column_major:
            column_major[weight.shape] = _time_ratio(weight, to_column_major(weight)) < MAX_RATIO
        if column_major[weight.shape]:
            weight.data = to_column_major(weight)
            changed += 1
    return changed


def _may_change(weight: torch.Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.nbytes <= MAX_BYTES


def to_column_major(weight: torch.Tensor) -> torch.Tensor:
    """Return the same weight [out, in] with its columns contiguous in memory."""
    return weight.t().contiguous().t()


def _time_ratio(weight: torch.Tensor, other: torch.Tensor) -> float:
    """Return the time of products with `other` as a share of those with `weight`: the geometric mean over `ROWS`."""
    return statistics.geometric_mean(_ratio_for(weight, other, torch.ones(rows, weight.shape[1])) for rows in ROWS)


def _ratio_for(weight: torch.Tensor, other: torch.Tensor, hidden: torch.Tensor) -> float:
    """Return the ratio of the fastest calls.  Calls alternate, so that other load affects both alike."""
    best = [float("inf"), float("inf")]
    deadline = time.perf_counter() + MAX_S
    for call in range(CALLS):
        for i, layout in enumerate((weight, other)):
            start = time.perf_counter()
            torch.nn.functional.linear(hidden, layout)
            best[i] = min(best[i], time.perf_counter() - start)
        if call and time.perf_counter() > deadline:
            break
    return best[1] / best[0]
