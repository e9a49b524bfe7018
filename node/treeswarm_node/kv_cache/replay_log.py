"""What a node has sent for the trunk, kept to be sent again when its next hop is lost.

Mirrors the KV cache: activations of crown rows wait in their slots until a commit moves them to the trunk; what the
tree loses is overwritten.  In host memory, within a budget; a session that gets no share of it can still go on after a
loss, from further upstream.

Rows of a trunk that several sessions share are kept once, in chunks that do not change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Append
from treeswarm.session.replay import Joined, replay
from treeswarm.session.steps import Step


@dataclass(eq=False)
class ReplayLogBudget:
    """Bytes of host memory for all sessions' journals."""

    total_bytes: int
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def open(
        self, row_bytes: int, trunk_room: int, crown_room: int, shared: Sequence["ReplayChunk"] = ()
    ) -> "ReplayLog | None":
        """A journal with room for the whole session, whose trunk begins with the `shared` chunks; or None if that does
        not fit."""
        size = row_bytes * (trunk_room + crown_room) - sum(chunk.size for chunk in shared)
        if size > self.free_bytes:
            return None
        self.used_bytes += size
        return ReplayLog(self, size, row_bytes, crown_room, [chunk.share() for chunk in shared])


@dataclass(eq=False)
class ReplayChunk:
    """Rows that do not change any more, for everyone who holds it; the last one to let go gives the memory back."""

    budget: ReplayLogBudget
    tokens: list[int]
    hidden: bytes = field(repr=False)
    holders: int = 1

    @property
    def size(self) -> int:
        return len(self.hidden)

    def share(self) -> "ReplayChunk":
        """One more holder."""
        assert self.holders
        self.holders += 1
        return self

    def release(self) -> None:
        """One holder less."""
        self.holders -= 1
        if not self.holders:
            self.budget.used_bytes -= self.size


@dataclass(eq=False)
class ReplayLog:
    """One session's.  Rows are `row_bytes` of activations and the token they belong to."""

    budget: ReplayLogBudget
    size: int
    """Bytes of the budget that are its own; chunks are extra."""
    row_bytes: int
    crown_room: int
    _chunks: list[ReplayChunk] = field(default_factory=list)
    """The trunk's beginning; what follows is in `_hidden` and `_tokens`."""
    _hidden: bytearray = field(default_factory=bytearray)
    _tokens: list[int] = field(default_factory=list)
    _crown_hidden: NDArray[np.uint8] = field(init=False)
    _crown_tokens: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._crown_hidden = np.zeros((self.crown_room, self.row_bytes), np.uint8)
        self._crown_tokens = np.zeros(self.crown_room, np.int64)

    def __len__(self) -> int:
        """Trunk rows kept."""
        return self._frozen_rows + len(self._tokens)

    @property
    def _frozen_rows(self) -> int:
        return sum(len(chunk.tokens) for chunk in self._chunks)

    def record(self, step: Step, hidden: bytes) -> None:
        """Take a step's commits and the activations it sent on, row-major as in an append; steps come in order."""
        self._hidden += self._crown_hidden[step.commit_slots].tobytes()
        self._tokens += self._crown_tokens[step.commit_slots].tolist()
        if step.append.prefill:
            self._hidden += hidden
            self._tokens += step.tokens.tolist()
        else:
            self._crown_hidden[step.slots] = np.frombuffer(hidden, np.uint8).reshape(step.rows, self.row_bytes)
            self._crown_tokens[step.slots] = step.tokens

    def freeze(self, rows: int) -> ReplayChunk:
        """Make the first `rows` that are in no chunk one: others may hold it too."""
        cut = rows * self.row_bytes
        chunk = ReplayChunk(self.budget, self._tokens[:rows], bytes(self._hidden[:cut]))
        assert len(chunk.tokens) == rows
        assert chunk.size == cut
        del self._hidden[:cut], self._tokens[:rows]
        self.size -= cut
        self._chunks.append(chunk)
        return chunk

    def truncate(self, length: int) -> bool:
        """Forget rows from `length` on.  False, and closed, if the budget has no room for a copy of what was in chunks
        that others hold."""
        opened: list[ReplayChunk] = []
        while length < self._frozen_rows:
            opened.insert(0, self._chunks.pop())
        end = length - self._frozen_rows
        if opened:
            self._hidden = bytearray(Joined([chunk.hidden for chunk in opened])[0 : end * self.row_bytes])
            self._tokens = [token for chunk in opened for token in chunk.tokens]
        del self._hidden[end * self.row_bytes :], self._tokens[end:]
        for chunk in opened:
            chunk.release()
        more = sum(chunk.size for chunk in opened)
        if more > self.budget.free_bytes:
            self.close()
            return False
        self.budget.used_bytes += more
        self.size += more
        return True

    def replay(self, epoch: int) -> Iterator[Append]:
        """All rows kept, for a node that has none of them."""
        tokens = [token for chunk in self._chunks for token in chunk.tokens]
        hidden = Joined([*(chunk.hidden for chunk in self._chunks), self._hidden])
        return replay(epoch, [*tokens, *self._tokens], hidden, self.row_bytes)

    def close(self) -> None:
        """Give the memory back."""
        for chunk in self._chunks:
            chunk.release()
        self.budget.used_bytes -= self.size
        self.size = 0
        self._chunks, self._hidden, self._tokens = [], bytearray(), []
