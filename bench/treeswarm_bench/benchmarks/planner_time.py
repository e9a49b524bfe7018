"""Measure what the planner itself takes of a round.

Run `python -m treeswarm_bench.benchmarks.planner_time`; it prints one JSON object.  The figures are milliseconds of
processor time, in one process and out of one cache: between other work they are two to three times as many.  Links,
nodes, drafter and target are the tests' own, on exact virtual time.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from treeswarm_bench.benchmarks.planner_replay import AGREEMENT, CELLS, rate_of_planned_sizes
from treeswarm_client.planner.policy import AutoPolicy, TreePolicy

TOKENS = 2000


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


if __name__ == "__main__":
    places = [(cell, text) for cell in CELLS for text in ("good", "zero")]
    print(json.dumps([measure(*place) for place in places], indent=1))
