"""What rows cost on one chain, estimated from profiles and from the timings of traversals.

Links cost latency and bytes by a rate; a node's forward costs what its own profile says, corrected by its timings.  All
estimates are frozen: an update returns a new one.  `CostTracker` alone remembers, for every node and every chain.

A forward carries the rows of all sessions that wait, so a row that we add delays every one of them (arXiv 2310.18813:
the best tree shrinks as the batch grows).  Where b sessions share a forward we therefore count a row b times:

    price(rows) = time(1) + b · (time(rows) − time(1))

If all of them plan alike, that is also what happens: b trees of `rows` nodes cost the device b times the rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import MAX_ROWS, HopTiming, Profile
from treeswarm_client.recent_samples import RecentSamples

# --- LineFit
# Number of measurements kept, and number kept of about the same size: the rounds of a session are often all alike, and
# the few of another size determine the slope.
KEPT = 64
KEPT_ALIKE = 16
# Two sizes must differ by this share of the largest to say anything about the slope.
APART = 1 / 8
# A slope begins with the weight of this many pairs of measurements.
PRIOR_PAIRS = 4
# Late measurements are a minority among this many of the newest; the intercept is the lower median of what these leave.
NEWEST = 8
# The first measurement, often the slowest, raises the intercept to this many times what was assumed, at most.
FIRST_TIMES = 4.0
# So many measurements in a row that leave more than the intercept by this factor, or less, are no outliers: the line
# has changed, and what was measured before is forgotten.
CHANGED_IN_A_ROW, CHANGED = 4, 1.4

# --- LinkEstimate
# 100 Mbit/s, what a volunteer's line at home carries upstream on a good day: dear enough that the first trees stay
# small where nothing is known, cheap enough that a fast line is discovered by trying.
PRIOR_SECONDS_PER_BYTE = 8e-8
# One way across a continent and back: of no consequence after the prefill.
PRIOR_LATENCY_S = 0.05

# --- HopEstimate
# Profile of a node that sent none: between a GPU that reads its weights from memory (256 rows cost little more than
# one) and a CPU (they cost a multiple).  Only the shape counts: the first timing sets the height, later ones bend it.
UNKNOWN: Profile = ((1, 10_000), (2, 10_500), (4, 11_000), (16, 13_000), (64, 20_000), (256, 50_000))
# Weight of one timing in an estimate that has several.
STEP = 1 / 8
# A node is busy with other sessions if our rows wait for them this share of a single row's forward, or if so many
# sessions share a forward.  Four clients of three nodes wait 0.4 to 0.8 of it; at 0.2, late rows of a client's own made
# an idle node look busy now and then (19.4 tokens per second instead of 21.1; `swarm bench concurrent`, 2026-11-30).
BUSY_WAIT, BUSY_SESSIONS = 0.3, 1.1
# A waiting time that is off by a larger factor than this counts as this factor: one stall is no slow node.
FARTHEST = 3.0
# The same for a forward, when it bends the table near its number of rows.  Machines that are slow today are slow for
# all numbers of rows, which the node's pace follows within five timings; only the rest is the table's.
BENDS = 1.5

# --- Costs
# On the client's own links a row is its parent and token on the way out, and id, token and log-probability back.
CLIENT_ROW_BYTES = 24

# --- CostTracker
# Number of chains and of nodes remembered after they were left.
REMEMBERED = 64
# Number of rows that a chain counts as having carried before anything has passed through it.
FIRST_ROWS = 16

Rows = NDArray[np.float64] | float


@dataclass(frozen=True)
class ChainHop:
    """One node of a chain, as cost estimates identify it."""

    node: str
    """Id of the node, with the span that it computes in this chain."""
    profile: Profile = ()
    """Profile that the node sent when it opened the session; empty if it sent none."""
    is_local: bool = False
    """Whether the node computes on the client's own machine, so that drafting takes its cores."""


# ---------------------------------------------------------------- curves and lines


@dataclass(frozen=True, eq=False)
class Curve:
    """Seconds by rows, given at some points, straight between them, and level before the first and after the last."""

    rows: NDArray[np.float64]
    """Numbers of rows, float64 [points], rising."""
    seconds: NDArray[np.float64]
    """Seconds at these numbers of rows, float64 [points]."""

    def at(self, rows: Rows) -> NDArray[np.float64]:
        """Return the seconds for `rows` rows, in the shape of `rows`."""
        return np.asarray(np.interp(rows, self.rows, self.seconds))


def sum_curves(curves: Sequence[Curve]) -> Curve:
    """Return the exact sum of the curves as one curve, so that many of them are evaluated at once."""
    if not curves:
        return Curve(np.zeros(1), np.zeros(1))
    rows = np.array(sorted({point for curve in curves for point in curve.rows.tolist()}))
    return Curve(rows, np.sum([curve.at(rows) for curve in curves], axis=0))


@dataclass(frozen=True)
class LineFit:
    """A line `intercept + x · slope`, both ≥ 0, through noisy measurements of which some are far off.

    The slope is the median of the slopes between any two measurements, weighted by their distance (Theil and Sen).  The
    intercept is the lower median of what the slope leaves.
    """

    prior_slope: float
    intercept: float = 0.0
    slope: float = 0.0
    measurements: tuple[tuple[float, float], ...] = ()
    """Measurements (x, y), oldest first."""

    def updated(self, x: float, y: float) -> "LineFit":
        """Return the line with one more measurement; of the first one, at most half is put down to the slope.

        The first one alone moves the intercept FIRST_TIMES as far up as was assumed at most.
        """
        if not self.measurements:
            slope = min(self.prior_slope, 0.5 * y / x) if x > 0 else self.prior_slope
            left = min(max(0.0, y - slope * x), FIRST_TIMES * self.intercept)
            return replace(self, intercept=left, slope=slope, measurements=((x, y),))
        kept = _newest_of_each_size([*self.measurements, (x, y)])
        if self._has_changed(kept):
            kept = kept[-CHANGED_IN_A_ROW:]
        xs, ys = np.array(kept).T
        slope = self._slope(xs, ys)
        newest = slice(-NEWEST, None)
        intercept = median_low((ys[newest] - slope * xs[newest]).tolist())
        return replace(self, intercept=max(0.0, intercept), slope=slope, measurements=tuple(kept))

    def _has_changed(self, measurements: Sequence[tuple[float, float]]) -> bool:
        """Whether the newest measurements are all far off the line, and on the same side of it."""
        newest = measurements[-CHANGED_IN_A_ROW:]
        if len(measurements) <= CHANGED_IN_A_ROW:
            return False
        ratios = [(y - self.slope * x) / max(self.intercept, 1e-9) for x, y in newest]
        return min(ratios) > CHANGED or max(ratios) < 1 / CHANGED

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the line's values, in the shape of `x`."""
        return self.intercept + self.slope * x

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
    """Return the indices of the earlier and of the later of every two of `count` measurements (at most `KEPT`)."""
    earlier, later = np.triu_indices(count, 1)
    return earlier, later


def _newest_of_each_size(measurements: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the newest `KEPT` measurements, and at most `KEPT_ALIKE` of one size (within a factor of two)."""
    alike: dict[int, int] = {}
    kept = []
    for x, y in reversed(measurements[-KEPT:]):
        size = int(math.log2(x + 1))
        alike[size] = alike.get(size, 0) + 1
        if alike[size] <= KEPT_ALIKE:
            kept.append((x, y))
    return kept[::-1]


# ---------------------------------------------------------------- links and nodes


@dataclass(frozen=True)
class LinkEstimate:
    """All links of one chain together, as the client sees them: `latency_s + bytes · seconds_per_byte`."""

    line: LineFit = LineFit(PRIOR_SECONDS_PER_BYTE, PRIOR_LATENCY_S, PRIOR_SECONDS_PER_BYTE)

    @property
    def latency_s(self) -> float:
        return self.line.intercept

    @property
    def seconds_per_byte(self) -> float:
        return self.line.slope

    def updated(self, byte_count: float, seconds: float) -> "LinkEstimate":
        """Return the estimate after a traversal that spent `seconds` outside queues and forwards.

        `byte_count` is the number of bytes along its longest way.
        """
        return LinkEstimate(self.line.updated(byte_count, seconds))

    def assumed_elsewhere(self) -> "LinkEstimate":
        """Return what is assumed of another chain of the same client before anything has passed through it."""
        return LinkEstimate(replace(self.line, measurements=()))

    def seconds(self, byte_count: Rows) -> NDArray[np.float64]:
        """Return the seconds on links of a traversal with `byte_count` bytes, in the shape of `byte_count`."""
        return self.line.at(np.asarray(byte_count, np.float64))


@dataclass(frozen=True, eq=False)
class HopEstimate:
    """What one node's part of a chain costs, by rows."""

    rows: NDArray[np.float64]
    """Numbers of rows in the table, float64 [points], rising."""
    table_s: NDArray[np.float64]
    """Seconds of a forward with that many rows of ours and no others, float64 [points]."""
    from_profile: bool
    """Whether the table began as the node's own profile."""
    paces: RecentSamples = RecentSamples()
    """Times of the last forwards, as multiples of the table's."""
    queue_s: float = 0.0
    """Seconds that our rows wait for the node's device."""
    shared_s: float = 0.0
    """Seconds by which other sessions' rows lengthen a forward."""
    sessions: float = 1.0
    """Number of sessions in one forward."""
    samples: int = 0
    """Number of timings learned from."""

    @classmethod
    def begin(cls, profile: Profile = ()) -> "HopEstimate":
        """Begin with the profile that a node sent when it opened the session, or without one."""
        rows, micros = np.array(_completed(profile) if profile else UNKNOWN, np.float64).T
        return cls(rows, micros / 1e6, bool(profile))

    def updated(self, timing: HopTiming) -> "HopEstimate":
        """Return the estimate after one append; a timing of which the node computed nothing changes nothing."""
        if timing.rows < 1 or timing.compute_us < 1:
            return self
        # The prior counts as one timing.
        step = max(STEP, 1 / (self.samples + 2))
        compute_s = timing.compute_us / 1e6
        alone_s = float(self._alone.at(float(timing.rows)))
        is_shared = timing.batch_sessions > 1 and (self.from_profile or self.samples > 0)
        # In a shared forward, extra time is due to the other sessions; missing time means that the table is too dear.
        extra_s = min(max(0.0, compute_s - alone_s), FARTHEST * (alone_s + self.shared_s)) if is_shared else 0.0
        corrected = self if extra_s else self._corrected(timing.rows, compute_s)
        queue_s = min(timing.queue_us / 1e6, FARTHEST * (alone_s + self.queue_s))
        return replace(
            corrected,
            queue_s=self.queue_s + step * (queue_s - self.queue_s),
            shared_s=self.shared_s + step * (extra_s - self.shared_s),
            sessions=self.sessions + step * (max(1, timing.batch_sessions) - self.sessions),
            samples=self.samples + 1,
        )

    @cached_property
    def duration(self) -> Curve:
        """Seconds that a forward takes by a clock, by rows of ours, with the usual other sessions in it."""
        return Curve(self._alone.rows, self._alone.seconds + self.shared_s)

    @cached_property
    def price(self) -> Curve:
        """Seconds that such a forward costs all sessions in it, by rows of ours: what plans use."""
        single = self.duration.at(1.0)
        return Curve(self.duration.rows, single + self.sessions * (self.duration.seconds - single))

    @property
    def is_busy(self) -> bool:
        """Whether other sessions use the node so much that each further forward keeps one of them waiting."""
        return self.sessions > BUSY_SESSIONS or self.queue_s > BUSY_WAIT * float(self.duration.at(1.0))

    @property
    def pace(self) -> float:
        """Factor by which forwards take longer than the table says."""
        if self.from_profile or not self.paces.values:
            return self.paces.location(1.0)
        return self.paces.location(min(self.paces.values))  # an unknown node's table has a shape, but no height

    @cached_property
    def _alone(self) -> Curve:
        """The table at the node's pace, made to rise, with a point far out that continues the last slope."""
        rising = self.pace * np.maximum.accumulate(self.table_s)
        slope = (rising[-1] - rising[-2]) / (self.rows[-1] - self.rows[-2]) if len(rising) > 1 else 0.0
        far = 16 * self.rows[-1]
        far_s = rising[-1] + slope * (far - self.rows[-1])
        return Curve(np.append(self.rows, far), np.append(rising, far_s))

    def _corrected(self, rows: int, compute_s: float) -> "HopEstimate":
        """Return the estimate after a forward of our rows alone: its pace, and a table bent near these rows."""
        by_table_s = float(np.interp(rows, self.rows, np.maximum.accumulate(self.table_s)))
        by_table_s *= max(1.0, rows / self.rows[-1])
        paced = replace(self, paces=self.paces.updated(compute_s / by_table_s))
        points = np.arange(len(self.rows))
        near = np.maximum(0.0, 1.0 - np.abs(points - np.interp(rows, self.rows, points)))
        residual = compute_s / (paced.pace * by_table_s)
        log_factor = min(max(math.log(residual), -math.log(BENDS)), math.log(BENDS))
        return replace(paced, table_s=self.table_s * np.exp(STEP * near * log_factor))


def _completed(profile: Profile) -> Profile:
    """Return a profile that reaches as far as UNKNOWN, in the shape of that beyond its last point.

    A loaded node has time to measure one or two rows of itself.  Straight on, all trees would seem to be free.
    """
    last_rows, last_us = profile[-1]
    known_rows, known_us = np.array(UNKNOWN, np.float64).T
    factor = last_us / float(np.interp(last_rows, known_rows, known_us))
    return (*profile, *((rows, round(factor * micros)) for rows, micros in UNKNOWN if rows > last_rows))


# ---------------------------------------------------------------- a traversal


@dataclass(frozen=True)
class Costs:
    """What rows cost on one chain."""

    link: LinkEstimate
    hops: tuple[HopEstimate, ...]
    row_bytes: int
    """Number of bytes of one row on a link between nodes."""
    inner_links: int
    """Number of links between nodes: one less than there are hops."""
    segment_rows: int = MAX_ROWS
    """Most rows of one append: larger trees travel as several, and a node computes one while the next travels."""

    @cached_property
    def duration(self) -> Curve:
        """Seconds that the forwards of all nodes take together by a clock, by rows."""
        return sum_curves([hop.duration for hop in self.hops])

    @cached_property
    def price(self) -> Curve:
        """Seconds that the forwards of all nodes cost all sessions together, by rows (see the module's docstring)."""
        return sum_curves([hop.price for hop in self.hops])

    @cached_property
    def is_busy(self) -> bool:
        """Whether any node is busy with other sessions."""
        return any(hop.is_busy for hop in self.hops)

    @cached_property
    def queue_s(self) -> float:
        """Seconds of waiting for devices, all nodes together."""
        return sum(hop.queue_s for hop in self.hops)

    @cached_property
    def plain_s(self) -> float:
        """Seconds that a plain round takes by a clock."""
        return max(1e-9, float(traversal_s(self, 1.0, priced=False)))

    @property
    def bytes_per_row(self) -> int:
        """Number of bytes of one row on all links together."""
        return self.row_bytes * self.inner_links + CLIENT_ROW_BYTES

    @property
    def most_bytes_per_row(self) -> int:
        """Number of bytes of one row on the link that carries most."""
        return self.row_bytes if self.inner_links else CLIENT_ROW_BYTES


def traversal_s(costs: Costs, rows: Rows, *, priced: bool = True) -> NDArray[np.float64]:
    """Return the seconds from the client through the chain and back, in the shape of `rows`.

    With `priced`, rows cost their price; otherwise the result is what a clock would show.  Segments pass the chain as
    through a pipeline: the first one pays every stage, each later one the slowest alone.
    """
    count = np.asarray(rows, np.float64)
    first = np.minimum(count, costs.segment_rows)
    forwards = costs.price if priced else costs.duration
    seconds = costs.link.seconds(first * costs.bytes_per_row) + costs.queue_s + forwards.at(first)
    after = count - first
    if not after.any():
        return np.asarray(seconds)
    whole, rest = np.divmod(after, costs.segment_rows)
    later = whole * slowest_stage_s(costs, float(costs.segment_rows), priced=priced)
    last = np.where(rest > 0, slowest_stage_s(costs, rest, priced=priced), 0.0)
    return np.asarray(seconds + later + last)


def slowest_stage_s(costs: Costs, rows: Rows, *, priced: bool = True) -> NDArray[np.float64]:
    """Return what a further append of `rows` rows adds to a traversal under way: its time at the slowest node or link.

    The result has the shape of `rows`, in seconds.
    """
    count = np.asarray(rows, np.float64)
    stages = [costs.link.seconds_per_byte * count * costs.most_bytes_per_row]
    forwards = (hop.price if priced else hop.duration for hop in costs.hops)
    return np.asarray(np.max([*stages, *(forward.at(count) for forward in forwards)], axis=0))


def round_duration_s(costs: Costs, size: int) -> float:
    """Return the seconds of a round that ships `size` nodes, as a clock would show them, without drafting."""
    return float(traversal_s(costs, 1.0 + size, priced=False)) if size else costs.plain_s


@dataclass(frozen=True)
class TraversalParts:
    """Where the seconds of one traversal went, along its longest way."""

    seconds: float
    """Seconds of the whole traversal."""
    wire_s: float
    queue_s: float
    compute_s: float
    byte_count: float
    """Number of bytes carried in `wire_s`."""


def take_apart(
    costs: Costs, rows: Sequence[int], seconds: float, timings: Sequence[Sequence[HopTiming]]
) -> TraversalParts:
    """Attribute a traversal's seconds to links, queues and forwards.

    `rows` has the number of rows of each append, `timings` the timings per append and hop.  Of appends after the first
    only the slowest stage counts, as in `traversal_s`.  Where that is believed to be a link, its time stays in what is
    left for the wire.
    """
    if not rows or not timings:
        return TraversalParts(seconds, seconds, 0.0, 0.0, sum(rows[:1]) * costs.bytes_per_row)
    queue_s = sum(hop.queue_us for hop in timings[0]) / 1e6
    compute_s = sum(hop.compute_us for hop in timings[0]) / 1e6
    byte_count = float(rows[0] * costs.bytes_per_row)
    for count, before, hops in zip(rows[1:], timings, timings[1:], strict=False):
        # Two appends that waited together share a forward, and report the same microseconds for it.
        own = [hop.compute_us for old, hop in zip(before, hops, strict=False) if old.compute_us != hop.compute_us]
        node_s = max(own, default=0) / 1e6
        link_bytes = count * costs.most_bytes_per_row
        if link_bytes * costs.link.seconds_per_byte > node_s:
            byte_count += link_bytes
        else:
            compute_s += node_s
    return TraversalParts(seconds, max(0.0, seconds - queue_s - compute_s), queue_s, compute_s, byte_count)


# ---------------------------------------------------------------- what is remembered


@dataclass(eq=False)
class CostTracker:
    """Keeps the costs of the present chain, and remembers nodes and chains that were left."""

    costs: Costs = Costs(LinkEstimate(), (), 0, 0)
    """Costs of the present chain."""
    most_rows: int = FIRST_ROWS
    """Most rows that one traversal of this chain has carried."""
    _chain: tuple[str, ...] = ()
    _nodes: dict[str, HopEstimate] = field(default_factory=dict)
    _links: dict[tuple[str, ...], LinkEstimate] = field(default_factory=dict)

    def begin(self, hops: Sequence[ChainHop], *, row_bytes: int, segment_rows: int) -> bool:
        """Begin a generation, or go on over a repaired chain.  Returns whether the chain differs from the last one."""
        chain = tuple(hop.node for hop in hops)
        for hop in hops:
            if hop.node not in self._nodes:
                self._nodes[hop.node] = HopEstimate.begin(hop.profile)
        changed = chain != self._chain
        if changed:
            self._chain, self.most_rows = chain, FIRST_ROWS
        for estimates in (self._nodes, self._links):
            _forget_oldest(estimates, REMEMBERED + len(chain))  # type: ignore[arg-type]
        link = self._links.get(chain) or self.costs.link.assumed_elsewhere()
        self.costs = Costs(link, self._hops(), row_bytes, max(0, len(chain) - 1), segment_rows)
        return changed

    def learn(self, rows: int, parts: TraversalParts, timings: Sequence[Sequence[HopTiming]]) -> None:
        """Learn from a traversal of `rows` rows that nothing broke; `timings` are per append and hop."""
        link = self._links.pop(self._chain, self.costs.link).updated(parts.byte_count, parts.wire_s)
        self._links[self._chain] = link
        for place, node in enumerate(self._chain):
            for timing in _forwards([hops[place] for hops in timings if place < len(hops)]):
                self._nodes[node] = self._nodes[node].updated(timing)
        self.most_rows = max(self.most_rows, rows)
        self.costs = replace(self.costs, link=link, hops=self._hops())

    def _hops(self) -> tuple[HopEstimate, ...]:
        return tuple(self._nodes[node] for node in self._chain)


def _forwards(timings: Sequence[HopTiming]) -> list[HopTiming]:
    """Merge the timings of one hop in one traversal by forward.

    Appends that waited together were computed together, and report the same microseconds.
    """
    merged: list[HopTiming] = []
    for timing in timings:
        if merged and merged[-1].compute_us == timing.compute_us:
            merged[-1] = replace(merged[-1], rows=merged[-1].rows + timing.rows)
        else:
            merged.append(timing)
    return merged


def _forget_oldest(estimates: dict[object, object], keep: int) -> None:
    for key in list(estimates)[: max(0, len(estimates) - keep)]:
        del estimates[key]
