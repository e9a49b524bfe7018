"""Network coordinates: predict the round trip between two hosts that have never exchanged a message.

Vivaldi (Dabek, Cox, Kaashoek, Morris: "Vivaldi: a decentralized network coordinate system", SIGCOMM 2004) with a height
vector: distances in the plane are the long haul, and the height is what a host's own access line adds to every path.
All lengths are seconds of round trip.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The paper's c_c and c_e: how far a coordinate and its error estimate follow one measurement.
STEP = 0.25
ERROR_STEP = 0.25
# No path is free, and a height of zero could never grow again, because it changes in proportion to itself.
LEAST_HEIGHT_S = 1e-5
# Relative errors.  A new host knows nothing, and an estimate of zero would freeze a coordinate for ever.
WORST_ERROR, LEAST_ERROR = 1.0, 0.01
LEAST_RTT_S = 1e-6
# A correct measurement moves a coordinate by at most a quarter of its length, and the far side of the earth is 0.2 s
# away.
LONGEST_STEP_S = 0.1


@dataclass(frozen=True)
class Coordinate:
    """Where a host is; all lengths are seconds of round trip."""

    x: float = 0.0
    y: float = 0.0
    height_s: float = LEAST_HEIGHT_S
    """Seconds that the host's access line adds to every path."""
    error: float = WORST_ERROR
    """The host's own estimate of its relative error, 0.01 to 1."""


def distance(a: Coordinate, b: Coordinate) -> float:
    """Return the predicted round trip in seconds."""
    return math.hypot(a.x - b.x, a.y - b.y) + a.height_s + b.height_s


def update(own: Coordinate, remote: Coordinate, rtt_s: float) -> Coordinate:
    """Return a host's coordinate `own` after a measured round trip of `rtt_s` seconds to a host at `remote`.

    A spring of length `rtt_s` between the two hosts pulls or pushes the first.  The larger its error is in relation to
    the other's, the farther it moves.
    """
    rtt_s = max(rtt_s, LEAST_RTT_S)
    predicted = max(distance(own, remote), LEAST_RTT_S)
    weight = own.error / (own.error + max(remote.error, LEAST_ERROR))
    miss = abs(predicted - rtt_s) / rtt_s
    error = miss * ERROR_STEP * weight + own.error * (1 - ERROR_STEP * weight)
    push = STEP * weight * (rtt_s - predicted) / predicted
    x, y = own.x - remote.x, own.y - remote.y
    if x == y == 0.0:
        # Two new hosts at the origin must part in some direction: the last digits of the measurement choose it.
        angle = math.tau * math.modf(rtt_s * 1e6)[0]
        x, y = predicted * math.cos(angle), predicted * math.sin(angle)
    # The change per measurement is limited: a host with a false coordinate must not pull others there.
    return Coordinate(
        own.x + _step(push * x),
        own.y + _step(push * y),
        max(own.height_s + _step(push * (own.height_s + remote.height_s)), LEAST_HEIGHT_S),
        min(max(error, LEAST_ERROR), WORST_ERROR),
    )


def _step(length: float) -> float:
    return min(max(length, -LONGEST_STEP_S), LONGEST_STEP_S)


def as_points(coordinates: Iterable[Coordinate]) -> NDArray[np.float64]:
    """Return the coordinates for `distances`: float64 [hosts, 3], columns x, y and height."""
    rows = [(coordinate.x, coordinate.y, coordinate.height_s) for coordinate in coordinates]
    return np.array(rows, np.float64).reshape(len(rows), 3)


def distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `distance` for all pairs, in seconds: float64 [n, 3] and [m, 3] give [n, m]."""
    x = np.subtract.outer(a[:, 0], b[:, 0])
    y = np.subtract.outer(a[:, 1], b[:, 1])
    x *= x
    y *= y
    x += y
    np.sqrt(x, out=x)
    x += np.add.outer(a[:, 2], b[:, 2])
    return x
