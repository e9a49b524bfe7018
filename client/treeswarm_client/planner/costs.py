"""What a node's forward costs, by rows: its own profile, corrected by what is seen.  Pure.

The price of a row.  A forward carries the rows of all sessions that wait, so a row that we add delays every one of them
(arXiv 2310.18813: the best tree shrinks as the batch grows).  Where b sessions share a forward we therefore count a row
b times:

    price(rows) = time(1) + b · (time(rows) − time(1))

If all of them plan alike, that is also what happens: b trees of `rows` nodes cost the device b times the rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from statistics import median

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming, Profile
from treeswarm_client.drafters.seam import DraftTree


@dataclass(frozen=True)
class ChainHop:
    """One node of a chain, for what its time is known by."""

    node: str
    """Its id, with the span it computes here."""
    profile: Profile = ()
    """As the node told it when it opened the session."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Level before its first point and after its last."""

    rows: NDArray[np.float64]
    """[points], rising."""
    seconds: NDArray[np.float64]
    """[points]"""

    def at(self, rows: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Of the same shape."""
        return np.asarray(np.interp(rows, self.rows, self.seconds))


def total(curves: Sequence[Curve]) -> Curve:
    """Their sum, exactly: asked once for all of them, however many there are."""
    if not curves:
        return Curve(np.zeros(1), np.zeros(1))
    rows = np.array(sorted({point for curve in curves for point in curve.rows.tolist()}))
    return Curve(rows, np.sum([curve.at(rows) for curve in curves], axis=0))


# Measurements remembered, and how many of about the same size: a session's rounds are often all alike, and the few
# of another size are what the slope is known by.
KEPT = 64
KEPT_ALIKE = 16
# Of the largest, two sizes must be so far apart to say anything of the slope.
APART = 1 / 8
# A slope begins with the trust of so many pairs of measurements.
PRIOR_PAIRS = 4
# Late measurements are a minority among so many of the newest: of these the height is the median.
NEWEST = 16


@dataclass(frozen=True)
class LineFit:
    """`height + x · slope`, both ≥ 0: the slope is the median of those between any two measurements (Theil and Sen),
    each as heavy as the two are apart; the height is the median of what the slope leaves."""

    prior_slope: float
    height: float = 0.0
    slope: float = 0.0
    seen: tuple[tuple[float, float], ...] = ()
    """(x, y), oldest first."""

    def learned(self, x: float, y: float) -> "LineFit":
        """With one more measurement; the first is believed to be no more than half slope."""
        if not self.seen:
            slope = min(self.prior_slope, 0.5 * y / x) if x > 0 else self.prior_slope
            return replace(self, height=max(0.0, y - slope * x), slope=slope, seen=((x, y),))
        seen = _kept([*self.seen, (x, y)])
        xs, ys = np.array(seen).T
        slope = self._slope(xs, ys)
        newest = slice(-NEWEST, None)
        height = median((ys[newest] - slope * xs[newest]).tolist())
        return replace(self, height=max(0.0, height), slope=slope, seen=tuple(seen))

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The line's values, of the same shape."""
        return self.height + self.slope * x

    def _slope(self, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> float:
        least = max(APART * float(xs.max()), 1e-9)
        if np.ptp(xs) < least:  # as in a session that ships nothing but single rows
            return self.slope
        earlier, later = _pairs(len(xs))
        run, rise = xs[later] - xs[earlier], ys[later] - ys[earlier]
        apart = np.abs(run) >= least
        weights = np.abs(run[apart])
        slopes = np.append(rise[apart] / run[apart], self.prior_slope)
        weights = np.append(weights, PRIOR_PAIRS * weights.mean())
        order = np.argsort(slopes)
        half = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
        return max(0.0, float(slopes[order][half]))


@cache
def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The earlier and the later of any two of so many (at most `KEPT`)."""
    earlier, later = np.triu_indices(count, 1)
    return earlier, later


def _kept(seen: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The newest, and of those of one size (within a factor of two) only so many."""
    alike: dict[int, int] = {}
    kept = []
    for x, y in reversed(seen[-KEPT:]):
        size = int(math.log2(x + 1))
        alike[size] = alike.get(size, 0) + 1
        if alike[size] <= KEPT_ALIKE:
            kept.append((x, y))
    return kept[::-1]


# 100 Mbit/s, what a volunteer's line at home carries upstream on a good day: dear enough that the first trees stay
# small where nothing is known, cheap enough that a fast line is found out by trying.
PRIOR_SECONDS_PER_BYTE = 8e-8
# One way across a continent and back: of no consequence after the prefill.
PRIOR_LATENCY_S = 0.05


@dataclass(frozen=True)
class LinkEstimate:
    """All links of one chain together, as the client sees them: `latency_s + bytes · seconds_per_byte`."""

    line: LineFit = LineFit(PRIOR_SECONDS_PER_BYTE, PRIOR_LATENCY_S, PRIOR_SECONDS_PER_BYTE)

    @property
    def latency_s(self) -> float:
        return self.line.height

    @property
    def seconds_per_byte(self) -> float:
        return self.line.slope

    def learned(self, count: float, seconds: float) -> "LinkEstimate":
        """One traversal took `seconds` outside queues and forwards, with `count` bytes on its longest way."""
        return LinkEstimate(self.line.learned(count, seconds))

    def seconds(self, count: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Of a traversal with so many bytes."""
        return self.line.at(np.asarray(count, np.float64))


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


LEVEL_STEP = 1 / 8
# Deeper than any tree of a usual drafter; what lies below counts to the last.
DEPTHS = 64


@dataclass(frozen=True, eq=False)
class DraftLevels:
    """Of the trees drafted lately."""

    level_s: float = 0.0
    deep: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Levels of the best 1, 2, … nodes of a tree."""
    samples: int = 0

    def learned(self, tree: DraftTree, seconds: float) -> "DraftLevels":
        """With one more tree and the seconds it took."""
        if not len(tree):
            return self
        depths = np.minimum(tree.depths(), DEPTHS - 1)
        step = max(LEVEL_STEP, 1 / (self.samples + 1))
        level_s = seconds / (int(depths.max()) + 1)
        return DraftLevels(
            self.level_s + step * (level_s - self.level_s),
            mixed(self.deep, np.maximum.accumulate(depths) + 1.0),
            self.samples + 1,
        )

    def draft_s(self, largest: int) -> NDArray[np.float64]:
        """What drafting 0 to `largest` nodes takes, float64 [largest + 1].

        A level is one forward of the draft, however many nodes it has; a tree larger than any seen is deeper by the
        root of how much larger.
        """
        known = np.maximum.accumulate(self.deep[:largest])
        if not len(known):
            return np.zeros(largest + 1)
        further = known[-1] * np.sqrt(np.arange(len(known) + 1, largest + 1) / len(known))
        return self.level_s * np.concatenate([[0.0], known, further])


def mixed(usual: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """By rank, the usual moved towards the new, as far as both go; where one goes further, that one."""
    if not len(usual):
        return new
    common = min(len(usual), len(new))
    longer = usual if len(usual) > common else new
    return np.concatenate([usual[:common] + LEVEL_STEP * (new[:common] - usual[:common]), longer[common:]])
