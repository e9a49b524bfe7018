"""Limits how many generations run at once; further requests wait in a queue of limited length."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.errors import Busy


@dataclass(eq=False)
class Admission:
    """Slots for generations, given out in the order of the requests."""

    limits: GatewayLimits
    running: int = 0
    """Number of slots in use."""
    _queue: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)
    """Number of slots that each waiting request needs, and the future that tells it to go on."""

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def hold_slots(self, count: int) -> AsyncIterator["Slots"]:
        """Hold `count` slots.  Raises Busy if the queue is full, or if the wait takes too long."""
        count = min(count, self.limits.generations)
        await self._take(count)
        slots = Slots(self, count)
        try:
            yield slots
        finally:
            slots.release()

    def close(self) -> None:
        """Refuse every request that waits."""
        for _, turn in self._queue:
            if not turn.done():
                turn.set_exception(Busy("the gateway is being stopped: try again later"))

    def release(self, count: int) -> None:
        """Take back `count` slots and admit the requests that now fit."""
        self.running -= count
        self._admit()

    async def _take(self, count: int) -> None:
        if not self._queue and self.running + count <= self.limits.generations:
            self.running += count
            return
        if len(self._queue) >= self.limits.waiting:
            raise Busy(f"{len(self._queue)} requests wait already: try again later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        try:
            await asyncio.wait_for(turn, self.limits.wait_s)
        except BaseException as error:
            # The slots may have been given out in the same moment in which the request gave up.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.running -= count
            self._queue = deque(entry for entry in self._queue if entry[1] is not turn)
            self._admit()
            if isinstance(error, TimeoutError):
                raise Busy(f"no free slot within {self.limits.wait_s:.0f} s: try again later") from None
            raise

    def _admit(self) -> None:
        """Admit requests from the front of the queue only, so that small requests never overtake a large one."""
        while self._queue and self.running + self._queue[0][0] <= self.limits.generations:
            count, turn = self._queue.popleft()
            if not turn.done():
                self.running += count
                turn.set_result(None)


@dataclass(eq=False)
class Slots:
    """The slots that one request holds."""

    admission: Admission
    held: int

    def release(self) -> None:
        """Give the slots back; further calls do nothing.

        Generations that have ended give them back before the caller has read the whole answer.
        """
        held, self.held = self.held, 0
        self.admission.release(held)
