"""Appends in flight through a chain: the answers that are due, and the rows they hold of the chain's credit."""

import asyncio
from dataclasses import dataclass, field

from treeswarm.errors import SwarmError
from treeswarm.protocol.messages import Answer, Append


class Interrupted(SwarmError):
    """The chain lost a node, or a node asked to leave: repair the chain and ship again.  Never reaches a user."""


@dataclass(eq=False)
class RowsInFlight:
    """The appends of one epoch that wait for their answers.  Answers come in the order of the appends."""

    answered: int = 0
    """Number of appends answered.  Every node has what these brought."""
    moved_at: float = 0.0
    """Time of the loop's clock, in seconds, at which the last append was sent or answered."""
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nothing more can be sent or answered in this epoch."""
    interrupted_at: float = 0.0
    """Time of the loop's clock, in seconds, of the first interruption, or 0 before it."""
    _rows: dict[int, int] = field(default_factory=dict)
    """Number of rows of each unanswered append, by sequence number."""
    _answers: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    """Future answer of each unanswered append, by sequence number."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __bool__(self) -> bool:
        """Return whether any append is unanswered."""
        return bool(self._rows)

    @property
    def rows(self) -> int:
        """Number of rows in flight."""
        return sum(self._rows.values())

    @property
    def oldest(self) -> int:
        """Sequence number of the append that has waited longest for its answer."""
        return min(self._rows)

    def add(self, append: Append) -> asyncio.Future[Answer]:
        """Register an append that is about to be sent, and return the future of its answer."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._answers[append.seq], self._rows[append.seq] = answer, append.rows
        self.moved_at = loop.time()
        return answer

    def is_due(self, seq: int) -> bool:
        """Return whether the next answer belongs to the append with this sequence number."""
        return seq == self.answered and seq in self._answers

    def resolve(self, answer: Answer) -> None:
        """Take the answer that was due, and free its rows."""
        waiting = self._answers.pop(answer.seq)
        self.answered += 1
        self.moved_at = asyncio.get_running_loop().time()
        self._rows.pop(answer.seq, None)
        self._changed.set()
        if not waiting.done():  # it is done if its waiter was cancelled
            waiting.set_result(answer)

    async def wait_for_change(self) -> None:
        """Wait until an answer has freed rows, or the epoch is interrupted."""
        self._changed.clear()
        await self._changed.wait()

    def interrupt(self) -> None:
        """End the epoch: every future answer raises Interrupted.  Only the first call has an effect."""
        if self.interrupted.is_set():
            return
        self.interrupted_at = asyncio.get_running_loop().time()
        self.interrupted.set()
        self._changed.set()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(Interrupted("the chain lost a node"))
                # If no task waits for it, the next append raises Interrupted instead: mark the exception as retrieved.
                waiting.exception()
