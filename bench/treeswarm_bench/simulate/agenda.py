"""Virtual time: a queue of events, run in the order of their times."""

import heapq
from collections.abc import Callable


class Agenda:
    """Runs events in the order of their times; of events at the same time, the one planned first runs first.

    `now` is the virtual time in seconds, `events` the number of events that have run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Plan `action` for `seconds` of virtual time from now."""
        self._planned += 1
        heapq.heappush(self._waiting, (self.now + seconds, self._planned, action))

    def run(self, until: float) -> None:
        """Run all events planned up to the time `until`, those included that they plan, and set `now` to it."""
        while self._waiting and self._waiting[0][0] <= until:
            self.now, _, action = heapq.heappop(self._waiting)
            self.events += 1
            action()
        self.now = until
