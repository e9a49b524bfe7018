"""What the swarm truly can compute at every moment, and for how long a block was missing."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.placement import best_possible


@dataclass(frozen=True)
class MeterSample:
    """One moment.  `weakest`, `best`: rows a second; `moves`: so far; `failed`: share of first tries since the last."""

    hours: float
    weakest: float
    best: float
    online: int
    moves: int
    failed: float


@dataclass(eq=False)
class SimulationMeter:
    """Online nodes' throughput by block, integrated over time."""

    blocks: int
    now: float = 0.0
    covered_s: float = 0.0
    balance_s: float = 0.0
    least_balance: float = 1.0
    heal_s: list[float] = field(default_factory=list)
    samples: list[MeterSample] = field(default_factory=list)
    online: int = 0
    rates: float = 0.0

    def __post_init__(self) -> None:
        self.throughput: NDArray[np.float64] = np.zeros(self.blocks)
        self.replicas: NDArray[np.int64] = np.zeros(self.blocks, np.int64)
        self.missing_since: dict[int, float] = {}

    @property
    def weakest(self) -> float:
        return float(self.throughput.min()) if self.replicas.all() else 0.0

    @property
    def best(self) -> float:
        return best_possible([self.rates], self.blocks)

    def advance(self, now: float) -> None:
        """Time passed as it was."""
        balance = self.weakest / self.best if self.online else 0.0
        if now > self.now:
            self.least_balance = min(self.least_balance, balance)
            self.balance_s += balance * (now - self.now)
            self.covered_s += (now - self.now) * bool(self.replicas.all())
            self.now = now

    def change(self, now: float, start: int, end: int, rate: float, sign: int) -> None:
        """A node of `rate` block-rows a second came online over these blocks (`sign` 1), or went (-1)."""
        self.advance(now)
        self.throughput[start:end] += sign * rate / (end - start)
        self.replicas[start:end] += sign
        self.online += sign
        self.rates += sign * rate
        for block in np.flatnonzero(self.replicas == 0).tolist():
            self.missing_since.setdefault(block, now)
        for block in [block for block in self.missing_since if self.replicas[block]]:
            missing_s = now - self.missing_since.pop(block)
            # Before time begins the swarm grows; nothing was lost then.
            if now > 0:
                self.heal_s.append(missing_s)
