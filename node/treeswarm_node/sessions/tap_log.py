"""Keep the sums of taps that a node sent for the end of the trunk, to send them again with the replay log."""

from dataclasses import dataclass, field, replace

import numpy as np

from treeswarm.protocol.messages import Append
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.session.steps import Step

# Most sums kept of a crown: sixteen of each append, and a round has a few appends.
MOST_CROWN_SUMS = 1024


@dataclass(eq=False)
class TapLog:
    """Holds the sums of one session that may be needed again, as they were sent."""

    window: int
    """Number of rows at the end of the trunk whose sums are kept."""
    _blocks: tuple[int, ...] = ()
    """Blocks whose taps are in the sums."""
    _trunk: dict[int, bytes] = field(default_factory=dict)
    """Sum by position in the text."""
    _crown: dict[int, bytes] = field(default_factory=dict)
    """Sum by crown slot."""

    def record(self, step: Step, sums: TapSums | None) -> None:
        """Take note of a step's commits, and of the sums that were sent with its rows.  Steps come in order."""
        start = step.trunk_length - len(step.commit_slots)
        for position, slot in enumerate(step.commit_slots.tolist(), start):
            if (kept := self._crown.pop(slot, None)) is not None:
                self._trunk[position] = kept
        if step.append.fresh or step.append.prefill:
            self._crown.clear()
        if sums is not None:
            self._keep(step, sums)
        length = step.trunk_length + (step.rows if step.append.prefill else 0)
        for position in [position for position in self._trunk if position < length - self.window]:
            del self._trunk[position]
        while len(self._crown) > MOST_CROWN_SUMS:
            del self._crown[next(iter(self._crown))]

    def _keep(self, step: Step, sums: TapSums) -> None:
        if sums.blocks != self._blocks:  # The chain has changed: older sums are of other blocks.
            self._blocks = sums.blocks
            self.truncate(0)
        size = len(sums.data) // sums.count
        rows = np.flatnonzero(sums.rows[step.computed])
        places = step.positions if step.append.prefill else step.slots
        kept = self._trunk if step.append.prefill else self._crown
        for i, row in enumerate(rows.tolist()):
            kept.pop(int(places[row]), None)  # A slot that is used again counts as new.
            kept[int(places[row])] = sums.data[i * size : (i + 1) * size]

    def truncate(self, length: int) -> None:
        """Forget the crown, and the trunk from `length` on."""
        self._crown.clear()
        for position in [position for position in self._trunk if position >= length]:
            del self._trunk[position]

    def attach(self, append: Append) -> Append:
        """Return a replayed append, whose ids are positions + 1, with the sums that its rows had."""
        first = append.first_id - 1
        sums = [self._trunk.get(position) for position in range(first, first + append.rows)]
        rows = np.array([row is not None for row in sums], np.bool_)
        if not rows.any():
            return append
        data = b"".join(row for row in sums if row is not None)
        return replace(append, tap_sums=TapSums(rows, self._blocks, data))
