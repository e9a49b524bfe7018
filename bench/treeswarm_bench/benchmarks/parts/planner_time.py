"""`swarm bench planner`: how much of a round the planner itself takes.

The figures are milliseconds of processor time, in one process and with warm caches: between other work they are two to
three times as high.  Links, nodes, drafter and target are simulated on exact virtual time (`planner_replay.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from treeswarm_bench.benchmarks.parts.planner_replay import AGREEMENT, CELLS, rate_of_planned_sizes
from treeswarm_client.planner.policy import AutoPolicy, TreePolicy
from treeswarm_client.provenance import machine_provenance

TOKENS = 2000
TEXTS = ("good", "zero")


@dataclass(eq=False)
class TimedPolicy:
    """A policy, and the seconds that all its methods took."""

    policy: AutoPolicy
    spent_s: float = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.policy, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self.spent_s += time.thread_time() - start

        return timed


async def bench_planner() -> dict[str, Any]:
    """Return `rows`, one for each kind of links and each of a good and a useless draft."""
    rows = [measure(cell, text) for cell in CELLS for text in TEXTS]
    return {"bench": "planner", "tokens": TOKENS, "rows": rows, "provenance": machine_provenance()}


def measure(cell: str, text: str) -> dict[str, Any]:
    """Generate one text from its first token on, and return the figures of its rounds."""
    timed: list[TimedPolicy] = []

    def around(policy: AutoPolicy) -> TreePolicy:
        timed.append(TimedPolicy(policy))
        return cast("TreePolicy", timed[0])

    _, sizes = rate_of_planned_sizes(CELLS[cell], AGREEMENT[text], TOKENS, around=around)
    shipped = [size for size in sizes if size]
    return {
        "links": cell,
        "agreement": text,
        "rounds": len(sizes),
        "with_trees": len(shipped),
        "nodes_a_tree": sum(shipped) / len(shipped) if shipped else 0.0,
        "ms_a_round": 1e3 * timed[0].spent_s / len(sizes),
    }
