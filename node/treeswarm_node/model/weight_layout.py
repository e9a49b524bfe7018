"""How weights lie in memory: by rows, as checkpoints have them, or by columns, whichever multiplies faster here.

A product of few rows is mostly reading its weight.  A CPU's library reads one of the layouts faster; which one depends
on the weight's shape and on the machine, so it is measured.
"""

import statistics
import time
from collections.abc import Iterable

import torch

# A plain step's, and trees' as slow links make them.
ROWS = (1, 2, 4, 8, 16)
# Of the other layout's time: less is not worth a copy, nor told from noise.
WORTH = 0.95
# A product is called so often, or for so long where the weight is large; its best call is the undisturbed one.
CALLS, LONGEST_S = 12, 0.1
# For a moment there are two of a weight, which the plan of what fits knows nothing of: a large head stays as it is.
LARGEST_BYTES = 512 << 20


@torch.no_grad()
def choose_layouts(linears: Iterable[torch.nn.Linear]) -> int:
    """Give each the layout that is faster for its shape; returns how many were changed.

    Their products may change in the last bit.  Only float32 on a CPU: kernels for 16 bits are made for rows alone, and
    were seen to take ten times as long otherwise.
    """
    columns: dict[torch.Size, bool] = {}
    changed = 0
    for linear in linears:
        weight = linear.weight
        if not _may_change(weight):
            continue
        if weight.shape not in columns:
            columns[weight.shape] = _share(weight, to_column_major(weight)) < WORTH
        if columns[weight.shape]:
            weight.data = to_column_major(weight)
            changed += 1
    return changed


def _may_change(weight: torch.Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.nbytes <= LARGEST_BYTES


def to_column_major(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers [out, in], a column after the other in memory."""
    return weight.t().contiguous().t()


def _share(weight: torch.Tensor, other: torch.Tensor) -> float:
    """Of the time that products with `weight` take, what those with `other` do: the mean over `ROWS`."""
    return statistics.geometric_mean(_ratio(weight, other, torch.ones(rows, weight.shape[1])) for rows in ROWS)


def _ratio(weight: torch.Tensor, other: torch.Tensor, hidden: torch.Tensor) -> float:
    """In turn, so that both have the same neighbours."""
    best = [float("inf"), float("inf")]
    until = time.perf_counter() + LONGEST_S
    for call in range(CALLS):
        for i, each in enumerate((weight, other)):
            start = time.perf_counter()
            torch.nn.functional.linear(hidden, each)
            best[i] = min(best[i], time.perf_counter() - start)
        if call and time.perf_counter() > until:
            break
    return best[1] / best[0]
