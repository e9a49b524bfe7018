"""What a node has sent for the trunk, kept to be sent again when its next hop is lost.

Mirrors the KV cache: activations of crown rows wait in their slots until a commit moves them to the trunk; what the
tree loses is overwritten.  In host memory, within a budget; a session that gets no share of it can still go on after a
loss, from further upstream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.messages import Append
from treeswarm.replay import replay
from treeswarm.steps import Step


@dataclass(eq=False)
class JournalBudget:
    """Bytes of host memory for all sessions' journals."""

    total: int
    taken: int = 0

    def open(self, row_bytes: int, trunk_room: int, crown_room: int) -> "Journal | None":
        """A journal with room for the whole session, or None if that does not fit."""
        size = row_bytes * (trunk_room + crown_room)
        if self.taken + size > self.total:
            return None
        self.taken += size
        return Journal(self, size, row_bytes, crown_room)


@dataclass(eq=False)
class Journal:
    """One session's.  Rows are `row_bytes` of activations and the token they belong to."""

    budget: JournalBudget
    size: int
    row_bytes: int
    crown_room: int
    _hidden: bytearray = field(default_factory=bytearray)
    _tokens: list[int] = field(default_factory=list)
    _crown_hidden: NDArray[np.uint8] = field(init=False)
    _crown_tokens: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._crown_hidden = np.zeros((self.crown_room, self.row_bytes), np.uint8)
        self._crown_tokens = np.zeros(self.crown_room, np.int64)

    def __len__(self) -> int:
        """Trunk rows kept."""
        return len(self._tokens)

    def note(self, step: Step, hidden: bytes) -> None:
        """Take a step's commits and the activations it sent on, row-major as in an append; steps come in order."""
        self._hidden += self._crown_hidden[step.commit_slots].tobytes()
        self._tokens += self._crown_tokens[step.commit_slots].tolist()
        if step.append.prefill:
            self._hidden += hidden
            self._tokens += step.tokens.tolist()
        else:
            self._crown_hidden[step.slots] = np.frombuffer(hidden, np.uint8).reshape(step.rows, self.row_bytes)
            self._crown_tokens[step.slots] = step.tokens

    def truncate(self, length: int) -> None:
        """Forget rows from `length` on."""
        del self._hidden[length * self.row_bytes :]
        del self._tokens[length:]

    def replay(self, epoch: int) -> Iterator[Append]:
        """All rows kept, for a node that has none of them."""
        return replay(epoch, self._tokens, self._hidden, self.row_bytes)

    def close(self) -> None:
        """Give the memory back."""
        self.budget.taken -= self.size
        self.size = 0
        self._hidden, self._tokens = bytearray(), []
