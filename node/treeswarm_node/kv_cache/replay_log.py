"""Keep the activations that a node sent for the trunk, to send them again to a replacement node.

The replay log mirrors the KV cache.  Activations of crown rows wait in their slots until a commit moves them to the
trunk; slots of dead rows are overwritten.  Logs are in host memory, within a budget.  A session without a log can still
continue after a loss, replayed from further upstream.

Trunk rows that several sessions share are stored once, in immutable chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Append
from treeswarm.session.replay import JoinedBytes, replay
from treeswarm.session.steps import Step


@dataclass(eq=False)
class ReplayLogBudget:
    """Bounds the host memory of all sessions' replay logs, in bytes."""

    total_bytes: int
    """Number of bytes that all logs together may use."""
    used_bytes: int = 0
    """Number of bytes that open logs and chunks use."""

    @property
    def free_bytes(self) -> int:
        """Number of bytes left."""
        return self.total_bytes - self.used_bytes

    def open(
        self, row_bytes: int, trunk_room: int, crown_room: int, shared: Sequence["ReplayChunk"] = ()
    ) -> "ReplayLog | None":
        """Return a log for all rows of a session, or None if the budget has no room for it.

        The log's trunk begins with the chunks `shared`.
        """
        size = row_bytes * (trunk_room + crown_room) - sum(chunk.size for chunk in shared)
        if size > self.free_bytes:
            return None
        self.used_bytes += size
        return ReplayLog(self, size, row_bytes, crown_room, [chunk.share() for chunk in shared])


@dataclass(eq=False)
class ReplayChunk:
    """Holds immutable trunk rows and counts references to them.  Releasing the last reference frees the memory."""

    budget: ReplayLogBudget
    tokens: list[int]
    """Token of each row."""
    hidden: bytes = field(repr=False)
    """Activations of the rows, row-major."""
    references: int = 1
    """Number of logs and prefix units that hold the chunk."""

    @property
    def size(self) -> int:
        """Number of bytes of activations."""
        return len(self.hidden)

    def share(self) -> "ReplayChunk":
        """Add one reference."""
        assert self.references
        self.references += 1
        return self

    def release(self) -> None:
        """Remove one reference."""
        self.references -= 1
        if not self.references:
            self.budget.used_bytes -= self.size


@dataclass(eq=False)
class ReplayLog:
    """Holds one session's replay log.  A row is `row_bytes` of activations and the token that they belong to."""

    budget: ReplayLogBudget
    size: int
    """Number of bytes of the budget that are the log's own; its chunks are counted separately."""
    row_bytes: int
    """Number of bytes of activations per row."""
    crown_room: int
    """Number of crown slots."""
    _chunks: list[ReplayChunk] = field(default_factory=list)
    """The trunk's beginning; later rows are in `_hidden` and `_tokens`."""
    _hidden: bytearray = field(default_factory=bytearray)
    """Activations of the trunk rows after the chunks."""
    _tokens: list[int] = field(default_factory=list)
    """Tokens of the trunk rows after the chunks."""
    _crown_hidden: NDArray[np.uint8] = field(init=False)
    """Activations by crown slot, uint8 [crown_room, row_bytes]."""
    _crown_tokens: NDArray[np.int64] = field(init=False)
    """Token by crown slot, int64 [crown_room]."""

    def __post_init__(self) -> None:
        self._crown_hidden = np.zeros((self.crown_room, self.row_bytes), np.uint8)
        self._crown_tokens = np.zeros(self.crown_room, np.int64)

    def __len__(self) -> int:
        """Return the number of trunk rows in the log."""
        return self._frozen_rows + len(self._tokens)

    @property
    def _frozen_rows(self) -> int:
        return sum(len(chunk.tokens) for chunk in self._chunks)

    def record(self, step: Step, hidden: bytes) -> None:
        """Record a step's commits and the activations that it sent on, row-major as in an append.

        Steps must come in order.
        """
        self._hidden += self._crown_hidden[step.commit_slots].tobytes()
        self._tokens += self._crown_tokens[step.commit_slots].tolist()
        if step.append.prefill:
            self._hidden += hidden
            self._tokens += step.tokens.tolist()
        else:
            self._crown_hidden[step.slots] = np.frombuffer(hidden, np.uint8).reshape(step.rows, self.row_bytes)
            self._crown_tokens[step.slots] = step.tokens

    def freeze(self, rows: int) -> ReplayChunk:
        """Make a chunk of the first `rows` trunk rows that are in no chunk yet, so that others can share it."""
        end = rows * self.row_bytes
        chunk = ReplayChunk(self.budget, self._tokens[:rows], bytes(self._hidden[:end]))
        assert len(chunk.tokens) == rows
        assert chunk.size == end
        del self._hidden[:end], self._tokens[:rows]
        self.size -= end
        self._chunks.append(chunk)
        return chunk

    def truncate(self, length: int) -> bool:
        """Drop trunk rows from `length` on, and return True.

        Rows of a chunk that is cut are copied, because others may hold the chunk.  If the budget has no room for the
        copy, the log is closed and False is returned.
        """
        cut: list[ReplayChunk] = []
        while length < self._frozen_rows:
            cut.insert(0, self._chunks.pop())
        rows = length - self._frozen_rows
        if cut:
            self._hidden = bytearray(JoinedBytes([chunk.hidden for chunk in cut])[0 : rows * self.row_bytes])
            self._tokens = [token for chunk in cut for token in chunk.tokens]
        del self._hidden[rows * self.row_bytes :], self._tokens[rows:]
        for chunk in cut:
            chunk.release()
        copied_bytes = sum(chunk.size for chunk in cut)
        if copied_bytes > self.budget.free_bytes:
            self.close()
            return False
        self.budget.used_bytes += copied_bytes
        self.size += copied_bytes
        return True

    def replay(self, epoch: int) -> Iterator[Append]:
        """Return appends of all trunk rows, for a node that has none of them."""
        tokens = [token for chunk in self._chunks for token in chunk.tokens]
        hidden = JoinedBytes([*(chunk.hidden for chunk in self._chunks), self._hidden])
        return replay(epoch, [*tokens, *self._tokens], hidden, self.row_bytes)

    def close(self) -> None:
        """Release all memory.  Closing again does nothing."""
        for chunk in self._chunks:
            chunk.release()
        self.budget.used_bytes -= self.size
        self.size = 0
        self._chunks, self._hidden, self._tokens = [], bytearray(), []
