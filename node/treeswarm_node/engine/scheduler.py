"""Choose which waiting steps make the next forward.

The choice is a pure function, without clock or device.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

from treeswarm.protocol.spans import Span
from treeswarm_node.config import BatchBudget


class Waiting(Protocol):
    """Describes a waiting step to the scheduler."""

    @property
    def session(self) -> Hashable: ...
    @property
    def span(self) -> Span: ...
    @property
    def rows(self) -> int: ...
    @property
    def prefill(self) -> bool: ...
    @property
    def commits(self) -> bool: ...


def next_batch(waiting: Sequence[Waiting], budget: BatchBudget) -> list[int]:
    """Return indices into `waiting` (in order of arrival) of the steps that run together next.

    A session's steps keep their order, and only its first step in a forward may commit.  Tree steps go before prefill,
    so that a long prompt delays other sessions' rounds by at most one chunk.  Among steps of the same kind, the first
    to arrive goes first.  All steps of a forward run the same blocks.
    """
    before = _predecessors(waiting)
    chosen: list[int] = []
    rows = prefill_rows = 0
    for index in sorted(range(len(waiting)), key=lambda i: (waiting[i].prefill, i)):
        step = waiting[index]
        is_next = before[index] is None or before[index] in chosen
        is_first = not any(waiting[i].session == step.session for i in chosen)
        fits = not chosen or (
            step.span == waiting[chosen[0]].span
            and rows + step.rows <= budget.rows
            and (not step.prefill or prefill_rows + step.rows <= budget.prefill_rows)
        )
        if is_next and fits and (is_first or not step.commits):
            chosen.append(index)
            rows += step.rows
            prefill_rows += step.rows if step.prefill else 0
    return sorted(chosen)


def _predecessors(waiting: Sequence[Waiting]) -> list[int | None]:
    """Return, for each step, the index of the previous step of the same session, or None for the session's first."""
    last: dict[Hashable, int] = {}
    before: list[int | None] = []
    for index, step in enumerate(waiting):
        before.append(last.get(step.session))
        last[step.session] = index
    return before
