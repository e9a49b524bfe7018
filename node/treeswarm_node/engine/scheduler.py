"""Which waiting steps make the next forward.  A pure function: one screen, no clock, no device."""

from collections.abc import Hashable, Sequence
from typing import Protocol

from treeswarm.protocol.spans import Span
from treeswarm_node.config import BatchBudget


class Waiting(Protocol):
    """What the choice needs to know of a waiting step."""

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
    """Indices into `waiting` (in order of arrival) that run together next.

    A session's steps keep their order, and only its first of a forward may commit.  Tree steps go before
    prefill, so that a long prompt delays nobody's round by more than one chunk; within each kind, first come
    first served.  All steps of a forward run the same blocks.
    """
    before = _predecessors(waiting)
    chosen: list[int] = []
    rows = prefill_rows = 0
    for index in sorted(range(len(waiting)), key=lambda i: (waiting[i].prefill, i)):
        step = waiting[index]
        in_turn = before[index] is None or before[index] in chosen
        opens = not any(waiting[i].session == step.session for i in chosen)
        fits = not chosen or (
            step.span == waiting[chosen[0]].span
            and rows + step.rows <= budget.rows
            and (not step.prefill or prefill_rows + step.rows <= budget.prefill_rows)
        )
        if in_turn and fits and (opens or not step.commits):
            chosen.append(index)
            rows += step.rows
            prefill_rows += step.rows if step.prefill else 0
    return sorted(chosen)


def _predecessors(waiting: Sequence[Waiting]) -> list[int | None]:
    """For each step, the one of the same session that came just before it."""
    last: dict[Hashable, int] = {}
    before: list[int | None] = []
    for index, step in enumerate(waiting):
        before.append(last.get(step.session))
        last[step.session] = index
    return before
