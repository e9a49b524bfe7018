"""Which steps run together."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.spans import Span
from treeswarm_node.config import BatchBudget
from treeswarm_node.engine.scheduler import next_batch


@dataclass(frozen=True)
class Wait:
    session: int
    rows: int = 1
    prefill: bool = False
    commits: bool = False
    span: Span = Span(0, 4)


BUDGET = BatchBudget(rows=64, prefill_rows=32)


def test_trees_of_all_sessions_share_a_forward() -> None:
    assert next_batch([Wait(1, 9), Wait(2, 9), Wait(3, 9)], BUDGET) == [0, 1, 2]


def test_trees_go_before_prefill_and_prefill_fills_what_is_left() -> None:
    waiting = [Wait(1, 30, prefill=True), Wait(2, 30, prefill=True), Wait(3, 40)]
    assert next_batch(waiting, BUDGET) == [2]
    assert next_batch([*waiting[:2], Wait(3, 20)], BUDGET) == [0, 2]


def test_a_step_that_commits_waits_for_what_came_before_it() -> None:
    assert next_batch([Wait(1, 5), Wait(1, 5), Wait(1, 5, commits=True), Wait(1, 5)], BUDGET) == [0, 1]


def test_a_session_is_never_reordered() -> None:
    assert next_batch([Wait(1, 60, prefill=True), Wait(1, 5), Wait(2, 60)], BUDGET) == [2]


def test_a_step_larger_than_the_budget_runs_alone() -> None:
    assert next_batch([Wait(1, 500), Wait(2, 1)], BUDGET) == [0]


def test_only_steps_of_the_same_blocks_run_together() -> None:
    assert next_batch([Wait(1), Wait(2, span=Span(1, 4)), Wait(3)], BUDGET) == [0, 2]


waits = st.builds(Wait, st.integers(0, 3), st.integers(0, 50), st.booleans(), st.booleans())


@given(st.lists(waits, max_size=12))
def test_everything_runs_once_in_its_sessions_order(waiting: list[Wait]) -> None:
    left, ran = list(enumerate(waiting)), []
    while left:
        chosen = next_batch([wait for _, wait in left], BUDGET)
        assert chosen
        batch = [left[i] for i in chosen]
        assert len(batch) == 1 or sum(wait.rows for _, wait in batch) <= BUDGET.rows
        for session in {wait.session for _, wait in batch}:
            assert not any(wait.commits for _, wait in [b for b in batch if b[1].session == session][1:])
        ran += batch
        left = [entry for i, entry in enumerate(left) if i not in chosen]
    for session in range(4):
        order = [index for index, wait in ran if wait.session == session]
        assert order == sorted(order)
