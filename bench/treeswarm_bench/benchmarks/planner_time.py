"""What the planner itself takes of a round: `python -m treeswarm_bench.benchmarks.planner_time`, one JSON object.

Milliseconds of processor time, in one process and out of one cache: between other work they are two to three times as
many.  Links, nodes, drafter and target are the tests' own, on exact virtual time.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tests.support.replayed_rounds import AGREEMENT, CELLS, automatic

from treeswarm_client.planner.planner import Planner

TOKENS = 2000


@dataclass(eq=False)
class Watched:
    """A planner, and the seconds that all it was asked took."""

    planner: Planner
    spent_s: float = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        asked = getattr(self.planner, name)

        def timed(*told: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return asked(*told, **named)
            finally:
                self.spent_s += time.thread_time() - start

        return timed


def measure(cell: str, text: str) -> dict[str, Any]:
    """One text, from the first token on."""
    watched = Watched(Planner())
    _, sizes = automatic(CELLS[cell], AGREEMENT[text], TOKENS, planner=cast("Planner", watched))
    shipped = [size for size in sizes if size]
    return {
        "links": cell,
        "agreement": text,
        "rounds": len(sizes),
        "with_trees": len(shipped),
        "nodes_a_tree": sum(shipped) / len(shipped) if shipped else 0.0,
        "ms_a_round": 1e3 * watched.spent_s / len(sizes),
    }


if __name__ == "__main__":
    places = [(cell, text) for cell in CELLS for text in ("good", "zero")]
    print(json.dumps([measure(*place) for place in places], indent=1))
