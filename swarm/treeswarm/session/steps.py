"""Steps: what a session tells a device to compute, one append with nothing left to interpret."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Append
from treeswarm.session.paths import RowPaths


@dataclass(frozen=True, eq=False)
class Step:
    """One append, resolved against the session's tree.  The steps of a session run in order.

    A device first moves the crown rows in `commit_slots` to the end of its trunk, which then has `trunk_length` rows.
    Then it computes the rows: row i stands at `positions[i]` and has token `tokens[i]`.

    A tree step writes the K and V of row i to crown slot `slots[i]`.  Row i sees the whole trunk and each crown slot j
    with `visible[i, j]`: its ancestors and itself.

    A prefill step (`append.prefill`) writes row i to trunk position `positions[i]` = trunk_length + i.  Row i sees the
    trunk and rows 0..i.
    """

    append: Append
    commit_slots: NDArray[np.int64]
    """Crown slots of the committed path, in order."""
    trunk_length: int
    """Number of trunk rows after the commit."""
    positions: NDArray[np.int64]
    """Position in the text of each row to compute, in the append's order, int64 [rows]."""
    tokens: NDArray[np.int64]
    """Token of each row, int64 [rows]."""
    slots: NDArray[np.int64]
    """Crown slot of each row, int64 [rows]; empty in a prefill."""
    visible: NDArray[np.bool_]
    """Crown slots that each row sees, bool [rows, slots]; in a prefill the lower triangle, bool [rows, rows]."""
    computed: NDArray[np.bool_]
    """Which rows of the append these are, bool [append rows]: neither an upstream node nor this one skips them."""
    answered: NDArray[np.int64]
    """Rows (indices into `positions`) for which the tail computes the target's token, in order."""
    alternatives: int = 0
    """Number of the target's best tokens that the tail sends with each of them."""
    alternative_logprobs: bool = False
    """Whether the tail sends the log-probabilities of these too."""
    paths: RowPaths | None = None
    """Path to each row, or None unless the session keeps its text."""

    @property
    def rows(self) -> int:
        """Number of rows to compute."""
        return len(self.positions)

    @property
    def commits(self) -> bool:
        """True if the step moves rows.  Then it must start a forward: the copies read what earlier steps wrote."""
        return len(self.commit_slots) > 0
