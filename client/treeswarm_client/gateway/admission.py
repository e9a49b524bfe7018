"""How many generations run at once; the others wait in a line that has an end."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from treeswarm_client.gateway.config import GatewayLimits
from treeswarm_client.gateway.errors import Busy


@dataclass(eq=False)
class Admission:
    """Places for generations, given in the order they were asked for."""

    limits: GatewayLimits
    running: int = 0
    _line: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @contextlib.asynccontextmanager
    async def places(self, wanted: int) -> AsyncIterator["Slots"]:
        """Hold `wanted` places.  Raises Busy where the line is too long, or does not move."""
        wanted = min(wanted, self.limits.generations)
        await self._take(wanted)
        held = Slots(self, wanted)
        try:
            yield held
        finally:
            held.give_back()

    def close(self) -> None:
        """Nobody who waits gets a turn any more."""
        for _, turn in self._line:
            if not turn.done():
                turn.set_exception(Busy("the gateway is being stopped: ask again in a while"))

    def returned(self, places: int) -> None:
        self.running -= places
        self._admit()

    async def _take(self, wanted: int) -> None:
        if not self._line and self.running + wanted <= self.limits.generations:
            self.running += wanted
            return
        if len(self._line) >= self.limits.waiting:
            raise Busy(f"{len(self._line)} requests wait already: try again in a while")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((wanted, turn))
        try:
            await asyncio.wait_for(turn, self.limits.wait_s)
        except BaseException as error:
            # Its turn came in the very moment it gave up.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.running -= wanted
            self._line = deque(entry for entry in self._line if entry[1] is not turn)
            self._admit()
            if isinstance(error, TimeoutError):
                raise Busy(f"no turn within {self.limits.wait_s:.0f} s: try again in a while") from None
            raise

    def _admit(self) -> None:
        """First come, first served: a large request is not passed by small ones for ever."""
        while self._line and self.running + self._line[0][0] <= self.limits.generations:
            wanted, turn = self._line.popleft()
            if not turn.done():
                self.running += wanted
                turn.set_result(None)


@dataclass(eq=False)
class Slots:
    """Held by one request."""

    admission: Admission
    held: int

    def give_back(self) -> None:
        """Once counts; whoever has ended early need not hold them until his caller has read all."""
        held, self.held = self.held, 0
        self.admission.returned(held)
