"""What the tail knows of one session's text: its rows with their states, and how far its own answers lead.  Pure.

The tail sees the commits, the trees and its answers, so it can walk as the client does, before the client has heard of
the answers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.protocol.messages import NO_TOKEN
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.steps import Step

# Number of rows that are kept although the speculator has read them: a repair cuts the text back to what the last
# answered append committed, which is a walk or two.
KEPT_ROWS = 64
# Number of rows of a text that may lack the sums of other nodes' taps.  The head goes on from its own results there,
# each of them one forward, and with every row it knows less of what the target computed.
MOST_UNKNOWN = 8


@dataclass(frozen=True, eq=False)
class TextRow:
    """One computed row of the trunk or the crown."""

    id: int
    """Id of the tree node."""
    token: int
    state: torch.Tensor
    """Results of the tapped blocks, [taps · hidden]."""
    answer: int | None = None
    """The target's token after this row, or None if it was not computed."""
    sum: torch.Tensor | None = None
    """Sum of other nodes' taps, [size], or None if none came."""


@dataclass(frozen=True, eq=False)
class WalkEnd:
    """The end of a walk, below which a tree is proposed."""

    tip: int
    """Id of the last node of the walk."""
    bonus: int
    """The target's token after it: the root of the tree."""
    first_position: int
    """Position in the text of the first of the new rows."""
    rows: tuple[TextRow, ...]
    """Rows that the speculator has not read, up to the walk's end; at least one.  If other nodes tap blocks too, the
    first one has a sum."""
    settings: SamplingSettings

    @property
    def next_tokens(self) -> NDArray[np.int64]:
        """Token after each of the rows, int64 [rows]."""
        return np.array([*(row.token for row in self.rows[1:]), self.bonus], np.int64)

    @property
    def states(self) -> torch.Tensor:
        """States of the rows, [rows, taps · hidden]."""
        return torch.stack([row.state for row in self.rows])

    @property
    def sums(self) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """Sums of the rows, [rows, size], with 0 where none came, and which of them came, bool [rows]."""
        empty = torch.zeros_like(next(row.sum for row in self.rows if row.sum is not None))
        known = np.array([row.sum is not None for row in self.rows])
        return torch.stack([empty if row.sum is None else row.sum for row in self.rows]), known


@dataclass(eq=False)
class FollowedText:
    """The trunk's last rows and the crown of one session, as the steps of the tail build them."""

    window: int
    """Number of rows before the end of the text that a speculator reads at most."""
    needs_sums: bool = False
    """Whether other nodes tap blocks too, so that rows need their sums."""
    _trunk: deque[TextRow] = field(default_factory=deque)
    """Last rows of the trunk, without gaps."""
    _length: int = 0
    """Number of rows of the whole trunk."""
    _crown: dict[int, TextRow] = field(default_factory=dict)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    """Id of each crown node, by its parent's id and its token."""
    _root: int = 0
    """Id of the node with which the present round's tree begins, or 0 before there is one."""
    _settings: SamplingSettings = SamplingSettings()
    _read: list[tuple[int, int]] = field(default_factory=list)
    """Id and next token of the last rows that the speculator has read, in order."""
    _read_end: int = 0
    """Position in the text after the last row that the speculator has read."""

    def add(
        self,
        step: Step,
        answers: NDArray[np.int64],
        states: torch.Tensor,
        sums: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Take note of a computed step: `answers` are the tail's, int64 [answered].

        `states` are those of all its rows, and `sums` what other nodes' taps add up to at each of them.
        """
        append = step.append
        self._commit(append.commit.tolist(), step.trunk_length)
        if append.fresh or append.prefill:
            self._crown, self._children, self._root = {}, {}, 0
        answer_of = dict(zip(step.answered.tolist(), answers.tolist(), strict=True))
        ids = (append.first_id + np.flatnonzero(step.computed)).tolist()
        rows = [
            TextRow(node, token, states[i], answer_of.get(i), None if sums is None else sums[i])
            for i, (node, token) in enumerate(zip(ids, step.tokens.tolist(), strict=True))
        ]
        self._settings = append.settings
        if append.prefill:
            self._extend(rows, step.trunk_length)
            return
        if append.fresh and rows and rows[0].id == append.first_id:
            self._root = append.first_id
        parents = append.parents[step.computed].tolist()
        for row, parent in zip(rows, parents, strict=True):
            self._crown[row.id] = row
            self._children[parent, row.token] = row.id

    def truncate(self, length: int) -> None:
        """Cut the trunk back to `length` rows, and drop the crown."""
        first = self._length - len(self._trunk)
        while self._trunk and first + len(self._trunk) > length:
            self._trunk.pop()
        self._length = length
        self._crown, self._children, self._root = {}, {}, 0

    def walk_end(self) -> WalkEnd | None:
        """Follow the answers to the end of the walk.

        Return None if an answer on the way is missing, or before there is an answer, or if too many sums are missing.
        """
        path: list[TextRow] = []
        if self._root:
            node: int | None = self._root
            while node is not None:
                row = self._crown.get(node)
                if row is None or row.answer is None:
                    return None
                path.append(row)
                node = self._children.get((node, row.answer))
        last = path[-1] if path else self._trunk[-1] if self._trunk else None
        if last is None or last.answer is None or last.answer == NO_TOKEN:
            return None
        rows = [*self._trunk, *path]
        first = self._length - len(self._trunk)
        skipped = self._rows_read(rows, first, last.answer)
        surplus = max(skipped, len(rows) - self.window)
        if self.needs_sums:
            start = first_to_read([row.sum is not None for row in rows], surplus)
            if start is None:
                return None
            surplus = start
        return WalkEnd(last.id, last.answer, first + surplus, tuple(rows[surplus:]), self._settings)

    def mark_read(self, end: WalkEnd) -> None:
        """Remember that the speculator reads the rows of this end, and forget states that are needed no more."""
        read = list(zip((row.id for row in end.rows), end.next_tokens.tolist(), strict=True))
        self._read = [*self._read_before(end.first_position), *read][-KEPT_ROWS:]
        self._read_end = end.first_position + len(end.rows)
        self._forget()

    def _read_before(self, position: int) -> Sequence[tuple[int, int]]:
        """Return what is remembered of the rows read before a position, if they end there."""
        surplus = self._read_end - position
        return self._read[: len(self._read) - surplus] if 0 <= surplus <= len(self._read) else []

    def _rows_read(self, rows: Sequence[TextRow], first: int, bonus: int) -> int:
        """Return how many of the rows, the first of which is at position `first`, the speculator has read so."""
        wanted = list(zip((row.id for row in rows), [*(row.token for row in rows[1:]), bonus], strict=True))
        start = self._read_end - len(self._read)
        # At least the last row is read again: its result is what the tree grows from.
        for count in range(min(self._read_end - first, len(rows) - 1), 0, -1):
            overlap = min(count, first + count - start)
            if (
                overlap > 0
                and self._read[first + count - overlap - start :][:overlap] == wanted[count - overlap : count]
            ):
                return count
        return 0

    def _commit(self, path: Sequence[int], length: int) -> None:
        """Move the committed nodes to the trunk, which then has `length` rows."""
        self._extend([self._crown[node] for node in path if node in self._crown], length - len(path))
        for node in path:
            self._crown.pop(node, None)

    def _extend(self, rows: Sequence[TextRow], length: int) -> None:
        """Add rows to the trunk, which has `length` rows before; if rows are missing there, begin with these."""
        if self._length != length:
            self._trunk.clear()
        self._trunk.extend(rows)
        self._length = length + len(rows)
        self._forget()

    def _forget(self) -> None:
        """Drop the states of rows that no proposal needs any more."""
        needed = max(self._length - self._read_end, 0)
        kept = min(self.window, needed + KEPT_ROWS)
        while len(self._trunk) > kept:
            self._trunk.popleft()


def first_to_read(known: Sequence[bool], first: int) -> int | None:
    """Return the row with which a speculator begins to read if it needs no row before `first`, or None for none.

    It begins at a row with a sum, if possible not after `first`, and leaves so much out that at most MOST_UNKNOWN of
    the rows have none.
    """
    rows = np.array(known, np.bool_)
    missing_after = np.cumsum(~rows[::-1])[::-1]
    usable = np.flatnonzero(rows & (missing_after <= MOST_UNKNOWN))
    early = usable[usable <= first]
    return int(early[-1]) if len(early) else int(usable[0]) if len(usable) else None
