"""What a traversal costs outside the nodes: latency, and bytes by a rate.  Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.planner.lines import LineFit

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
