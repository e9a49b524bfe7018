"""The report of what a planner did in each round, in words and figures, for `--explain`.  Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.planner.costs import Costs, traversal_s
from treeswarm_client.planner.plan import Plan

# A shorter time is no waiting, but what the program takes for itself.
WAITED_S = 0.0005
IN_DEBT = " (doubted: trees have cost more than they brought)"


@dataclass(frozen=True)
class RoundReport:
    """What was planned for one round and what came of it.

    Seconds of queue and compute are summed over the hops along the traversal's longest way.
    """

    round: int
    """Number of the round, from 1."""
    drafted: int
    """Number of nodes drafted."""
    shipped: int
    """Number of nodes in the first shipment."""
    extended: int
    """Number of nodes sent after the tree while it was in flight."""
    expected: float
    """Number of tokens expected, the bonus token included."""
    got: int
    """Number of tokens the round brought, the bonus token included."""
    expected_s: float
    """Seconds expected."""
    seconds: float
    """Seconds of the traversal and of the exposed drafting before it."""
    draft_s: float
    wire_s: float
    queue_s: float
    compute_s: float
    reason: str
    """Why the first shipment had this size."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def reason_of(plan: Plan, chances: NDArray[np.float64], costs: Costs, *, exploring: bool, in_debt: bool) -> str:
    """Say why the plan for drafted nodes has this size and no other; `chances` float64 [n] are those it was planned
    with."""
    if exploring:
        return f"{plan.size} nodes: exploring whether guesses hit again"
    if not len(chances):
        return "plain: the drafter had nothing to propose"
    name, doubt = f"{plan.size} nodes" if plan.size else "plain", IN_DEBT if in_debt else ""
    if plan.size == len(chances):
        return f"{name}: all that was drafted{doubt}"
    # Past a segment's end a node costs a forward of its own; the next one says nothing about those after it.
    gain = float(chances[plan.size])
    before, after = traversal_s(costs, np.array([plan.size, plan.size + 1]) + 1.0)
    cost = (after - before) * plan.rate
    one_more = "one more" if plan.size else "the best node"
    return f"{name}: {one_more} would bring {gain:.3f} tokens and cost {cost:.3f} tokens of time{doubt}"


LAST_TOKEN = "plain: only one more token is needed"
NO_ROOM = "plain: the nodes have no room for more rows"


def draft_is_late_text(waited_s: float) -> str:
    """Say that the round left without its draft, for which it had waited so long."""
    if waited_s < WAITED_S:
        return "plain: the draft of an earlier round is not ready yet"
    return f"plain: the draft was not ready within {1e3 * waited_s:.0f} ms"


def draft_follows_text(level_s: float, wait_s: float) -> str:
    """Say that the round does not wait for its draft, because a level takes longer than it would wait."""
    return (
        f"plain at once: a level of drafting takes {1e3 * level_s:.0f} ms, and a round waits {1e3 * wait_s:.0f} at most"
    )


FIRST_FOLLOWS = "plain at once: the first draft follows while the round travels"


def draft_seldom_right_text(entered: float, draft_s: float) -> str:
    """Say that the round does not wait for its draft, because the text would seldom enter it."""
    return f"plain at once: {1e3 * draft_s:.1f} ms of drafting follow it, and the text enters {entered:.0%} of drafts"


def would_not_pay_text(refused: Plan, draft_s: float, plain_s: float, *, in_debt: bool) -> str:
    """Say why nothing is drafted before the round leaves: what the tree that would lose least brings and costs.

    `draft_s` are the seconds of drafting among those of the `refused` plan; a plain round takes `plain_s`.
    """
    gain, cost = refused.tokens - 1.0, (refused.seconds - plain_s) / plain_s
    doubt = IN_DEBT if in_debt else ""
    return (
        f"plain: a tree of {refused.size} would bring {gain:.3f} tokens and cost {cost:.3f} tokens of time, "
        f"{draft_s / plain_s:.3f} of them for drafting{doubt}"
    )


def with_next_try(reason: str, rounds: int | None) -> str:
    """Add to the reason of a plain round in how many rounds a tree is tried all the same; None if that is not set."""
    return f"{reason}; the next try is in {max(1, rounds)} rounds" if rounds is not None else reason


def with_extension(reason: str, extended: int) -> str:
    """Add to a round's reason that nodes were sent after its first shipment."""
    return f"{reason}; {extended} nodes were sent after it" if extended else reason


def explain_line(report: RoundReport) -> str:
    """Return one round as one line."""
    extension = f"+{report.extended}" if report.extended else ""
    return (
        f"{report.round:4d}  shipped {report.shipped}{extension} of {report.drafted}  "
        f"tokens {report.got} ({report.expected:.2f} expected)  "
        f"{1e3 * report.seconds:.1f} ms ({1e3 * report.expected_s:.1f} expected)  {report.reason}"
    )


def explain_lines(reports: Sequence[RoundReport]) -> list[str]:
    """Return one line per round (a traversal after the prompt's), then the lines of a table of where time went."""
    return [*map(explain_line, reports), *_time_table(reports)]


def _time_table(reports: Sequence[RoundReport]) -> list[str]:
    total_s = sum(report.seconds for report in reports)
    if not total_s:
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
        f"{tokens} tokens ({expected:.1f} expected), {total_s:.3f} s ({expected_s:.3f} expected)",
        *(f"  {name:<8}{seconds:9.3f} s {seconds / total_s:6.1%}" for name, seconds in parts.items()),
    ]
