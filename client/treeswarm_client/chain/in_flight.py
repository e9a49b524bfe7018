"""Appends on their way through a chain: whose answers are waited for, and how many rows they hold of the credit."""

import asyncio
from dataclasses import dataclass, field

from treeswarm.protocol.messages import Answer, Append
from treeswarm_client.chain.repair import Interrupted


@dataclass(eq=False)
class RowsInFlight:
    """Of one epoch; answers come in the order of the appends."""

    answered: int = 0
    """Appends whose answers are here: every node has what they brought."""
    moved_at: float = 0.0
    """When the last one left or came back."""
    _rows: dict[int, int] = field(default_factory=dict)
    """By sequence number."""
    _answers: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def rows(self) -> int:
        return sum(self._rows.values())

    @property
    def oldest(self) -> int:
        """Sequence number of the append that is waited for longest."""
        return min(self._rows)

    def leaves(self, append: Append) -> asyncio.Future[Answer]:
        """It is about to be sent; the future will hold its answer."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._answers[append.seq], self._rows[append.seq] = answer, append.rows
        self.moved_at = loop.time()
        return answer

    def is_due(self, seq: int) -> bool:
        """Whether the next answer may be this append's."""
        return seq == self.answered and seq in self._answers

    def arrives(self, answer: Answer) -> None:
        """The answer that was due."""
        waiting = self._answers.pop(answer.seq)
        self.answered += 1
        self.moved_at = asyncio.get_running_loop().time()
        self._rows.pop(answer.seq, None)
        self._changed.set()
        if not waiting.done():  # else nobody waits any more
            waiting.set_result(answer)

    async def change(self) -> None:
        """Until an answer has made room, or there will be none."""
        self._changed.clear()
        await self._changed.wait()

    def interrupt(self) -> None:
        """Whoever waits for an answer hears that the chain broke."""
        self._changed.set()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(Interrupted("the chain lost a node"))
                waiting.exception()  # nobody may be waiting; then it is raised by the next append instead
