"""What a session asks of a device: one append with nothing left to interpret."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Append


@dataclass(frozen=True, eq=False)
class Step:
    """One append, resolved against the session's tree.  Steps of a session run in order.

    A device first moves `commit_slots` (crown rows, in path order) to the end of its trunk, which then has
    `trunk_length` rows; then it computes the rows, row i at `positions[i]`, of tokens `tokens[i]`.

    A tree step writes row i's K and V to crown slot `slots[i]`; row i sees the whole trunk and the crown slots j
    with `visible[i, j]` (its ancestors and itself).  A prefill step (`append.prefill`) writes row i to trunk
    position `positions[i]` = trunk_length + i; row i sees the trunk and rows 0..i: `slots` is empty and
    `visible` is the lower triangle [rows, rows].

    Only rows the append did not skip, and this node does not skip, are in `positions`, `tokens`, `slots`,
    `visible`, in the append's order; `computed` [append rows] says which those are.
    """

    append: Append
    commit_slots: NDArray[np.int64]
    trunk_length: int
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    slots: NDArray[np.int64]
    visible: NDArray[np.bool_]
    computed: NDArray[np.bool_]
    answered: NDArray[np.int64]
    """Which of the computed rows (indices into `positions`) want the target's token, in order."""
    alternatives: int = 0
    """How many of the target's best tokens are wanted beside each of these."""

    @property
    def rows(self) -> int:
        """Rows to compute."""
        return len(self.positions)

    @property
    def commits(self) -> bool:
        """A step that commits must start a forward: its copies read what earlier steps wrote."""
        return len(self.commit_slots) > 0
