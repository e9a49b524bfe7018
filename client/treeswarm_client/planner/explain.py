"""What a planner did, in words and figures, for whoever asks `--explain`.  Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.planner.plan import Costs, Plan, traversal_s

IN_DEBT = " (doubted: trees have cost more than they brought)"


@dataclass(frozen=True)
class RoundReport:
    """One round.  Seconds of queue and compute are summed over the hops along the longest way."""

    round: int
    drafted: int
    shipped: int
    extended: int
    """Nodes sent after the tree while it was in flight."""
    expected: float
    """Tokens, the bonus included."""
    got: int
    expected_s: float
    seconds: float
    """Drafting that nothing hid, and the traversal."""
    draft_s: float
    wire_s: float
    queue_s: float
    compute_s: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def reason_of(plan: Plan, chances: NDArray[np.float64], costs: Costs, *, exploring: bool, in_debt: bool) -> str:
    """Why this size and no other."""
    if exploring:
        return f"{plan.size} nodes: only to see whether guesses hit again"
    if not len(chances):
        return "plain: nothing was drafted"
    name, doubt = f"{plan.size} nodes" if plan.size else "plain", IN_DEBT if in_debt else ""
    if plan.size == len(chances):
        return f"{name}: all that was drafted{doubt}"
    # Past a segment's end a node costs a forward of its own; the next one tells nothing of those after it.
    gain = float(chances[plan.size])
    before, after = traversal_s(costs, np.array([plan.size, plan.size + 1]) + 1.0)
    cost = (after - before) * plan.rate
    return f"{name}: +{gain:.3f} tokens a further node would cost {cost:.3f} tokens of time{doubt}"


def explain_line(report: RoundReport) -> str:
    """One round in one line."""
    further = f"+{report.extended}" if report.extended else ""
    return (
        f"{report.round:4d}  shipped {report.shipped}{further} of {report.drafted}  "
        f"tokens {report.got} ({report.expected:.2f} expected)  "
        f"{1e3 * report.seconds:.1f} ms ({1e3 * report.expected_s:.1f} expected)  {report.reason}"
    )


def explain_lines(reports: Sequence[RoundReport]) -> list[str]:
    """A line a round, which is a traversal after the prompt's; then where the time went."""
    return [*map(explain_line, reports), *_table(reports)]


def _table(reports: Sequence[RoundReport]) -> list[str]:
    total = sum(report.seconds for report in reports)
    if not total:
        return []
    parts = {
        "draft": sum(report.draft_s for report in reports),
        "wire": sum(report.wire_s for report in reports),
        "queue": sum(report.queue_s for report in reports),
        "compute": sum(report.compute_s for report in reports),
    }
    tokens, expected = sum(report.got for report in reports), sum(report.expected for report in reports)
    expected_s = sum(report.expected_s for report in reports)
    return [
        f"{len(reports)} traversals (without the prompt's, and any that broke): "
        f"{tokens} tokens ({expected:.1f} expected), {total:.3f} s ({expected_s:.3f} expected)",
        *(f"  {name:<8}{seconds:9.3f} s {seconds / total:6.1%}" for name, seconds in parts.items()),
    ]
