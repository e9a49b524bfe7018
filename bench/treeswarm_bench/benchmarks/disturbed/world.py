"""A world of scripted speeds: links, machines and what disturbs them, as frozen data, and the clock work that obeys it.

Nothing here depends on the machine that runs the bench: a run with the same seed takes the same virtual times.
"""

import asyncio
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from treeswarm_bench.virtual_clock import VirtualClockLoop

CLIENT = "client"
NODES = ("node0", "node1", "node2")
EVERYWHERE = (CLIENT, *NODES)

# What a machine spends on a message besides the model and the wire: `swarm bench overhead`, docs/benchmarks.md.
MESSAGE_S = 0.0019
# One row between nodes: the activations of SmolLM2-135M in float32.  A row on the client's links is a few numbers.
ROW_BYTES, CLIENT_ROW_BYTES = 2304, 24
BYTES_PER_S = 12.5e6
# Seconds that a repair takes until the chain is whole again: docs/benchmarks.md has 282 to 537 ms.
REPAIR_S = 0.4
# Heavy-tailed noise: every time is multiplied by a lognormal factor, and one in 25 by a Pareto factor besides.
NOISE_SIGMA, TAIL_CHANCE, TAIL_SHAPE, TAIL_MOST = 0.25, 0.04, 1.2, 10.0


@dataclass(frozen=True)
class Speeds:
    """What forwards take on machines that nothing disturbs."""

    rows: tuple[float, ...]
    forward_s: tuple[float, ...]
    """Seconds of a node's forward of so many rows."""
    level_s: float
    """Seconds of a level of drafting."""
    level_row_s: float
    """Seconds that each of its rows adds."""
    profiled: int | None = None
    """Number of sizes that a node had time to measure of itself, from one row on; None for all."""


# Three nodes of a small target on CPUs, as in `planner_replay`; the bundled draft takes 2 ms and 0.04 to 0.06 per row.
SMALL = Speeds((1.0, 16.0, 64.0, 256.0), (0.004, 0.005, 0.009, 0.026), 0.002, 0.00005)
# Nodes in the shape of a GPU, assumed: bound by reading weights up to 64 rows, then by products.
FLAT = Speeds((1.0, 64.0, 256.0), (0.010, 0.011, 0.019), 0.002, 0.00005)
# A third of SmolLM2-135M in float32 on one thread (docs/results/2026-11-30/cpu-kinds-smollm2.json; 256 rows by the last
# slope), and a draft from tables, which takes almost nothing.
SMOLLM2 = Speeds((1.0, 2.0, 4.0, 16.0, 64.0, 256.0), (0.0229, 0.0256, 0.0353, 0.0552, 0.0946, 0.252), 0.0003, 0.00001)


@dataclass(frozen=True)
class Slowdown:
    """Machines on which everything takes `factor` times as long for a while."""

    machines: tuple[str, ...]
    factor: float
    start_s: float
    end_s: float


@dataclass(frozen=True)
class LinkChange:
    """A new delay of all links, from some time on."""

    start_s: float
    delay_s: float


@dataclass(frozen=True)
class Replacement:
    """A node that is lost at some time and replaced by one whose forwards take `factor` times as long."""

    node: str
    factor: float
    start_s: float


@dataclass(frozen=True)
class Script:
    """What happens to a swarm's speed, by virtual time.  Times count from the first round, after the prompt."""

    delay_s: float
    """Seconds that a link delays a message at first, one way."""
    links: tuple[LinkChange, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    replacement: Replacement | None = None
    shares_cores: bool = False
    """Whether client and nodes share cores: each of two machines at work takes twice as long."""
    noisy: bool = False
    """Whether all times have heavy-tailed noise."""
    first_draft: float = 1.0
    """Factor on the draft's forwards until the first tree is drafted."""
    cold_nodes: float = 1.0
    """Factor on each node's first forward, the prompt's, and on its first round's."""
    speeds: Speeds = SMALL

    @cached_property
    def changes_s(self) -> list[float]:
        """Times at which a new phase begins, rising; the first is 0."""
        times = {0.0, *(change.start_s for change in self.links)}
        times |= {time for slow in self.slowdowns for time in (slow.start_s, slow.end_s)}
        times |= {self.replacement.start_s} if self.replacement else set()
        return sorted(time for time in times if 0 <= time < np.inf)

    def delay_at(self, now: float) -> float:
        return [self.delay_s, *(change.delay_s for change in self.links if change.start_s <= now)][-1]

    def factor_at(self, machine: str, now: float) -> float:
        """Return how many times as long everything takes on `machine`."""
        factor = 1.0
        for slow in self.slowdowns:
            if machine in slow.machines and slow.start_s <= now < slow.end_s:
                factor *= slow.factor
        return factor

    def condition_at(self, now: float) -> "Script":
        """Return the script in which the speeds of this time hold for ever."""
        slowdowns = tuple(
            replace(slow, start_s=-np.inf, end_s=np.inf) for slow in self.slowdowns if slow.start_s <= now < slow.end_s
        )
        lost = self.replacement
        return Script(
            self.delay_at(now),
            slowdowns=slowdowns,
            replacement=replace(lost, start_s=-np.inf) if lost and lost.start_s <= now else None,
            shares_cores=self.shares_cores,
            noisy=self.noisy,
            speeds=self.speeds,
        )


@dataclass(eq=False)
class World:
    """The speeds of one run: how long each piece of work takes that begins now."""

    script: Script
    loop: VirtualClockLoop
    seed: int
    origin_s: float = np.inf
    """Time of the loop's clock at which the script begins; before it nothing is disturbed."""
    drafting_first: bool = True
    """Whether the first tree is not drafted yet."""
    at_work: set[str] = field(default_factory=set)
    """Machines that compute now."""

    def __post_init__(self) -> None:
        self._noise = np.random.default_rng(self.seed)

    @property
    def now(self) -> float:
        """Seconds since the script began; negative before it."""
        return self.loop.now - self.origin_s

    def work_s(self, machine: str, seconds: float) -> float:
        """Return how long work of `seconds` takes on `machine` if it begins now."""
        others = len(self.at_work - {machine}) if self.script.shares_cores else 0
        return seconds * self.script.factor_at(machine, self.now) * (1 + others) * self._noise_factor()

    def message_s(self, machine: str) -> float:
        """Return how long a message that `machine` sends now takes to its receiver, without its bytes."""
        return self.script.delay_at(self.now) * self._noise_factor() + self.work_s(machine, MESSAGE_S)

    def draft_level(self, rows: int) -> None:
        """Let the time of a forward of the draft pass, in the drafter's thread."""
        factor = self.script.first_draft if self.drafting_first else 1.0
        self._pass(CLIENT, factor * (self.script.speeds.level_s + self.script.speeds.level_row_s * rows))

    def forward_base_s(self, rows: int) -> float:
        """Return how long a forward takes on an undisturbed node; beyond the table, its last slope continues."""
        sizes, seconds = self.script.speeds.rows, self.script.speeds.forward_s
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return float(np.interp(rows, sizes, seconds)) + slope * max(0.0, rows - sizes[-1])

    def _pass(self, machine: str, seconds: float) -> None:
        spent_s = self.work_s(machine, seconds)
        self.at_work.add(machine)
        self.loop.sleep_in_work(spent_s)
        self.at_work.discard(machine)

    def _noise_factor(self) -> float:
        if not self.script.noisy:
            return 1.0
        factor = float(self._noise.lognormal(0.0, NOISE_SIGMA))
        if self._noise.random() < TAIL_CHANCE:
            factor *= min(TAIL_MOST, 1.0 + float(self._noise.pareto(TAIL_SHAPE)))
        return factor


async def sleep_until(time: float) -> None:
    """Sleep until a time of the loop's clock."""
    await asyncio.sleep(max(0.0, time - asyncio.get_running_loop().time()))
