"""Seconds by rows, known at some points and straight between them.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
