"""Measures what the swarm can compute at every moment, and for how long blocks were missing."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.placement import best_possible


@dataclass(frozen=True)
class MeterSample:
    """The state of the swarm at one moment."""

    hours: float
    """Virtual hours since the start."""
    weakest: float
    """Rows per second through the block with the least throughput."""
    best: float
    """Rows per second if all nodes' throughput were spread evenly over the blocks."""
    online: int
    """Number of nodes online."""
    moves: int
    """Number of moves since the start."""
    failed: float
    """Share of first attempts that failed since the sample before."""


@dataclass(eq=False)
class SimulationMeter:
    """Integrates the throughput of online nodes, block by block, over time.

    The balance is the weakest block's throughput divided by the best possible one.
    """

    blocks: int
    """Number of blocks of the model."""
    now: float = 0.0
    """Virtual seconds up to which everything is integrated."""
    covered_s: float = 0.0
    """Seconds in which every block was served."""
    balance_s: float = 0.0
    """Integral of the balance over time, in seconds."""
    least_balance: float = 1.0
    """Smallest balance so far."""
    heal_s: list[float] = field(default_factory=list)
    """Seconds for which blocks were missing, one number for every block that is served again."""
    heal_beyond_load_s: list[float] = field(default_factory=list)
    """The same without the seconds that the node which serves the block again took to load it."""
    samples: list[MeterSample] = field(default_factory=list)
    """Samples for the plot, in the order of time."""
    online: int = 0
    """Number of nodes online."""
    rates: float = 0.0
    """Sum of the online nodes' block-rows per second."""

    def __post_init__(self) -> None:
        self.throughput: NDArray[np.float64] = np.zeros(self.blocks)
        self.replicas: NDArray[np.int64] = np.zeros(self.blocks, np.int64)
        self.missing_since: dict[int, float] = {}

    @property
    def weakest(self) -> float:
        """Rows per second through the weakest block, 0 if a block is missing."""
        return float(self.throughput.min()) if self.replicas.all() else 0.0

    @property
    def best(self) -> float:
        """Best possible rows per second of the nodes online."""
        return best_possible([self.rates], self.blocks)

    def advance(self, now: float) -> None:
        """Integrate up to `now`: nothing has changed since the last call."""
        balance = self.weakest / self.best if self.online else 0.0
        if now > self.now:
            self.least_balance = min(self.least_balance, balance)
            self.balance_s += balance * (now - self.now)
            self.covered_s += (now - self.now) * bool(self.replicas.all())
            self.now = now

    def change(self, now: float, start: int, end: int, rate: float, sign: int, load_s: float = 0.0) -> None:
        """Add a node of `rate` block-rows per second over blocks `start` up to `end` (`sign` 1), or remove it (-1).

        A node that is added took `load_s` seconds to load.
        """
        self.advance(now)
        self.throughput[start:end] += sign * rate / (end - start)
        self.replicas[start:end] += sign
        self.online += sign
        self.rates += sign * rate
        for block in np.flatnonzero(self.replicas == 0).tolist():
            self.missing_since.setdefault(block, now)
        for block in [block for block in self.missing_since if self.replicas[block]]:
            missing_s = now - self.missing_since.pop(block)
            # The swarm grows before the time 0; a block not yet served then was not lost.
            if now > 0:
                self.heal_s.append(missing_s)
                self.heal_beyond_load_s.append(max(0.0, missing_s - load_s))
