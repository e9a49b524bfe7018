"""The injected faults of speed: one script per fault and link.  Pure data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from treeswarm_bench.benchmarks.disturbed.world import (
    CLIENT,
    EVERYWHERE,
    MESSAGE_S,
    NODES,
    SMALL,
    SMOLLM2,
    LinkChange,
    Replacement,
    Script,
    Slowdown,
    Speeds,
)

LINKS = {"1ms": 0.001, "25ms": 0.025, "100ms": 0.1}
"""Delay of every link one way, in seconds."""
JUMP_S = 0.15
"""Delay of a link that has jumped."""
# Eight busy loops beside a program on two cores leave it about a fifth of one; a program needs more than a loop.
LOADED = 6.0
REPLACED = 5.0
COLD_NODES = 5.0
# A disturbance begins when a plain text would have this many rounds, and not before this time.
BEGINS_ROUNDS, BEGINS_S = 12, 1.0
# After the last change a text goes on for the time of this many plain rounds.
SETTLING_ROUNDS = 30
BURSTS_S = (1.0, 5.0, 30.0)
PLACES = {"client": (CLIENT,), "one node": (NODES[1],), "all": EVERYWHERE}


@dataclass(frozen=True)
class DisturbedCase:
    """One fault over one link."""

    fault: str
    link: str
    script: Script

    @property
    def until_s(self) -> float:
        """Time of the script after which the planner has settled, in seconds."""
        return self.script.changes_s[-1] + SETTLING_ROUNDS * plain_round_s(self.script.delay_s, self.script.speeds)


def plain_round_s(delay_s: float, speeds: Speeds = SMALL) -> float:
    """Return how long a plain round takes where nothing is disturbed."""
    links = len(NODES) + 1
    return links * (delay_s + MESSAGE_S) + len(NODES) * speeds.forward_s[0]


def _begin_s(delay_s: float) -> float:
    return max(BEGINS_S, BEGINS_ROUNDS * plain_round_s(delay_s))


def _burst(machines: tuple[str, ...], seconds: float) -> Callable[[float], Script]:
    def script(delay_s: float) -> Script:
        start_s = _begin_s(delay_s)
        return Script(delay_s, slowdowns=(Slowdown(machines, LOADED, start_s, start_s + seconds),))

    return script


def _loaded_from_the_start(machines: tuple[str, ...], seconds: float) -> Callable[[float], Script]:
    return lambda delay_s: Script(delay_s, slowdowns=(Slowdown(machines, LOADED, -np.inf, seconds),))


def _jump(delay_s: float) -> Script:
    """Return a script in which the links jump for the time of 40 plain rounds."""
    start_s = _begin_s(delay_s)
    end_s = start_s + 40 * plain_round_s(JUMP_S)
    return Script(delay_s, links=(LinkChange(start_s, JUMP_S), LinkChange(end_s, delay_s)))


FAULTS: dict[str, Callable[[float], Script]] = {
    "none": Script,
    "first draft 10x": lambda delay_s: Script(delay_s, first_draft=10.0),
    "first draft 50x": lambda delay_s: Script(delay_s, first_draft=50.0),
    "first draft 400x": lambda delay_s: Script(delay_s, first_draft=400.0),
    **{f"burst {s:g} s, {place}": _burst(machines, s) for s in BURSTS_S for place, machines in PLACES.items()},
    **{f"loaded first 5 s, {place}": _loaded_from_the_start(machines, 5.0) for place, machines in PLACES.items()},
    "shared cores": lambda delay_s: Script(delay_s, shares_cores=True),
    "link jumps to 150 ms": _jump,
    "node replaced, 5x": lambda delay_s: Script(
        delay_s, replacement=Replacement(NODES[1], REPLACED, _begin_s(delay_s))
    ),
    "noise": lambda delay_s: Script(delay_s, noisy=True),
    "crowded start": lambda delay_s: Script(
        delay_s,
        slowdowns=(Slowdown(EVERYWHERE, LOADED, -np.inf, 5.0),),
        first_draft=50.0,
        cold_nodes=COLD_NODES,
    ),
    "cold nodes 5x": lambda delay_s: Script(delay_s, cold_nodes=COLD_NODES),
    # The first chat model of most users, with an n-gram draft and all nodes on the client's own machine: `swarm demo`.
    "SmolLM2": lambda delay_s: Script(delay_s, speeds=SMOLLM2, shares_cores=True),
    "SmolLM2, loaded": lambda delay_s: Script(
        delay_s,
        speeds=replace(SMOLLM2, profiled=1),
        shares_cores=True,
        slowdowns=(Slowdown(EVERYWHERE, LOADED, -np.inf, np.inf),),
    ),
    "SmolLM2, noise": lambda delay_s: Script(delay_s, speeds=SMOLLM2, shares_cores=True, noisy=True),
}


def disturbed_case(fault: str, link: str) -> DisturbedCase:
    return DisturbedCase(fault, link, FAULTS[fault](LINKS[link]))


def is_sensible(fault: str, link: str) -> bool:
    """Whether a fault fits a link: at 1 ms a text is over long before a burst of 30 s."""
    return not (link == "1ms" and "30 s" in fault)
