"""Virtual time: what happens when."""

import heapq
from collections.abc import Callable


class Agenda:
    """Events in the order of their time; of equal ones, the first that was planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._waiting, (self.now + seconds, self._planned, action))

    def run(self, until: float) -> None:
        while self._waiting and self._waiting[0][0] <= until:
            self.now, _, action = heapq.heappop(self._waiting)
            self.happened += 1
            action()
        self.now = until
