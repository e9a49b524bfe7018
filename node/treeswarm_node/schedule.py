"""The time of day at which an owner lets a node serve."""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time

from treeswarm.errors import BadRequest

log = logging.getLogger(__name__)

TIMES = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")
# Looked at rather than slept through: clocks are set, and machines sleep.
LOOK_S = 15.0


@dataclass(frozen=True)
class Schedule:
    """From `start` until `end`, local time; over midnight where `end` is the earlier one."""

    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """`22:00-07:00`.  Raises BadRequest."""
        match = TIMES.fullmatch(text.strip())
        if match is None:
            raise BadRequest(f"'{text}' are no hours: give --hours 22:00-07:00, local time")
        start, end = time(int(match[1]), int(match[2])), time(int(match[3]), int(match[4]))
        if start == end:
            raise BadRequest(f"'{text}' begins when it ends: leave --hours away to serve all day")
        return cls(start, end)

    def include(self, now: time) -> bool:
        """Whether the node serves at this time of day."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


async def until_within(hours: Schedule, clock: Callable[[], datetime] = datetime.now) -> None:
    """Wait for them; nothing is loaded meanwhile."""
    told = False
    while not hours.include(clock().time()):
        if not told:
            log.warning("the hours are %s: waiting for them", hours)
            told = True
        await asyncio.sleep(LOOK_S)


async def keep_hours(
    hours: Schedule, orders: "asyncio.Queue[str]", clock: Callable[[], datetime] = datetime.now
) -> None:
    """Order a serving node to pause and to resume when its hours end and begin; until cancelled.

    What the owner orders meanwhile holds until then.
    """
    serving = True
    while True:
        due = hours.include(clock().time())
        if due != serving:
            serving = due
            log.info("the hours are %s: %s", hours, "serving" if due else "pausing")
            await orders.put("resume" if due else "pause")
        await asyncio.sleep(LOOK_S)
