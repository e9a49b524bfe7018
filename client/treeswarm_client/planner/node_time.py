"""What a node's forward costs, by rows: its own profile, corrected by what is seen.  Pure.

The price of a row.  A forward carries the rows of all sessions that wait, so a row that we add delays every one of them
(arXiv 2310.18813: the best tree shrinks as the batch grows).  Where b sessions share a forward we therefore count a row
b times:

    price(rows) = time(1) + b · (time(rows) − time(1))

If all of them plan alike, that is also what happens: b trees of `rows` nodes cost the device b times the rows.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming, Profile
from treeswarm_client.planner.curves import Curve

# A node that told nothing: between a GPU that reads its weights from memory (256 rows cost little more than one) and a
# CPU (they cost a multiple).  Only the shape counts: the first timing sets the height, the next ones bend it.
UNKNOWN: Profile = ((1, 10_000), (2, 10_500), (4, 11_000), (16, 13_000), (64, 20_000), (256, 50_000))
# How far one timing moves an estimate once there are several.
STEP = 1 / 8
# Of a correction at some rows this much holds for all sizes: a machine that is slow today is slow throughout.
COMMON = 0.3
# A timing this far off, up or down, counts as no further: one stall is not a slow node.
FARTHEST = 3.0


@dataclass(frozen=True, eq=False)
class HopEstimate:
    """One node's share of one chain."""

    rows: NDArray[np.float64]
    """[points], rising."""
    table_s: NDArray[np.float64]
    """[points]: a forward of so many rows of ours, alone."""
    told: bool
    """The table began as the node's own."""
    queue_s: float = 0.0
    company_s: float = 0.0
    """What a forward takes longer because of other sessions' rows in it."""
    sessions: float = 1.0
    """In one forward."""
    samples: int = 0

    @classmethod
    def begin(cls, profile: Profile = ()) -> "HopEstimate":
        """As the node told it at open, or without."""
        rows, micros = np.array(profile or UNKNOWN, np.float64).T
        return cls(rows, micros / 1e6, bool(profile))

    def learned(self, timing: HopTiming) -> "HopEstimate":
        """After one append; one of which the node computed nothing says nothing."""
        if timing.rows < 1 or timing.compute_us < 1:
            return self
        step = max(STEP, 1 / (self.samples + 1))
        took = timing.compute_us / 1e6
        alone = float(self._alone.at(float(timing.rows)))
        in_company = timing.batch_sessions > 1 and (self.told or self.samples > 0)
        # With others in the forward, what it took longer is theirs; what it took less is a table too dear.
        company = min(max(0.0, took - alone), FARTHEST * (alone + self.company_s)) if in_company else 0.0
        table = self.table_s if company else self._corrected(timing.rows, took / alone)
        queue = min(timing.queue_us / 1e6, FARTHEST * (alone + self.queue_s))
        return replace(
            self,
            table_s=table,
            queue_s=self.queue_s + step * (queue - self.queue_s),
            company_s=self.company_s + step * (company - self.company_s),
            sessions=self.sessions + step * (max(1, timing.batch_sessions) - self.sessions),
            samples=self.samples + 1,
        )

    @cached_property
    def clock(self) -> Curve:
        """What a forward takes, by rows of ours, whoever else is in it."""
        return Curve(self._alone.rows, self._alone.seconds + self.company_s)

    @cached_property
    def price(self) -> Curve:
        """What such a forward costs everybody who is in it: what to plan by."""
        one = self.clock.at(1.0)
        return Curve(self.clock.rows, one + self.sessions * (self.clock.seconds - one))

    @cached_property
    def _alone(self) -> Curve:
        """The table made to rise, with a point far out that goes on as the last two do."""
        rising = np.maximum.accumulate(self.table_s)
        slope = (rising[-1] - rising[-2]) / (self.rows[-1] - self.rows[-2]) if len(rising) > 1 else 0.0
        far = 16 * self.rows[-1]
        further = rising[-1] + slope * (far - self.rows[-1])
        return Curve(np.append(self.rows, far), np.append(rising, further))

    def _corrected(self, rows: int, off: float) -> NDArray[np.float64]:
        """The table after a forward that took `off` times what it says: most of it near these rows."""
        if self.samples == 0 and not self.told:
            return self.table_s * off
        points = np.arange(len(self.rows))
        near = np.maximum(0.0, 1.0 - np.abs(points - np.interp(rows, self.rows, points)))
        weights = COMMON + (1 - COMMON) * near
        by = min(max(math.log(off), -math.log(FARTHEST)), math.log(FARTHEST))
        return np.asarray(self.table_s * np.exp(STEP * weights * by))
