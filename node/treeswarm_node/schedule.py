"""The hours of the day at which an owner lets a node serve."""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time

from treeswarm.errors import BadRequest

log = logging.getLogger(__name__)

TIMES = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")
# The clock is read this often, rather than once before a long sleep: clocks are set, and machines sleep.
CHECK_EVERY_S = 15.0


@dataclass(frozen=True)
class Schedule:
    """The hours from `start` until `end`, local time; over midnight if `end` is the earlier one."""

    start: time
    end: time

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Parse hours such as `22:00-07:00`.  Raises BadRequest."""
        match = TIMES.fullmatch(text.strip())
        if match is None:
            raise BadRequest(f"'{text}' are not hours: give --hours 22:00-07:00, local time")
        start, end = time(int(match[1]), int(match[2])), time(int(match[3]), int(match[4]))
        if start == end:
            raise BadRequest(f"'{text}' ends when it begins: leave out --hours to serve all day")
        return cls(start, end)

    def includes(self, now: time) -> bool:
        """Return whether the node serves at this time of day."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


async def wait_until_within(hours: Schedule, clock: Callable[[], datetime] = datetime.now) -> None:
    """Wait until the hours begin."""
    logged = False
    while not hours.includes(clock().time()):
        if not logged:
            log.warning("waiting until the hours of this node begin: %s", hours)
            logged = True
        await asyncio.sleep(CHECK_EVERY_S)


async def follow_schedule(
    hours: Schedule, orders: "asyncio.Queue[str]", clock: Callable[[], datetime] = datetime.now
) -> None:
    """Order a serving node to pause when its hours end and to resume when they begin; runs until cancelled.

    An order that the owner gives meanwhile holds until then.
    """
    serving = True
    while True:
        due = hours.includes(clock().time())
        if due != serving:
            serving = due
            log.info("the hours are %s: %s", hours, "serving" if due else "pausing")
            await orders.put("resume" if due else "pause")
        await asyncio.sleep(CHECK_EVERY_S)
