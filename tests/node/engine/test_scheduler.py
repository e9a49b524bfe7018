"""The scheduler chooses which waiting steps run in one forward."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.spans import Span
from treeswarm_node.config import BatchBudget
from treeswarm_node.engine.scheduler import next_batch


@dataclass(frozen=True)
class FakeStep:
    session: int
    rows: int = 1
    prefill: bool = False
    commits: bool = False
    span: Span = Span(0, 4)


BUDGET = BatchBudget(rows=64, prefill_rows=32)


def test_trees_of_all_sessions_share_a_forward() -> None:
    assert next_batch([FakeStep(1, 9), FakeStep(2, 9), FakeStep(3, 9)], BUDGET) == [0, 1, 2]


def test_trees_go_before_prefill_which_fills_the_rest() -> None:
    waiting = [FakeStep(1, 30, prefill=True), FakeStep(2, 30, prefill=True), FakeStep(3, 40)]
    assert next_batch(waiting, BUDGET) == [2]
    assert next_batch([*waiting[:2], FakeStep(3, 20)], BUDGET) == [0, 2]


def test_committing_step_waits_for_earlier_steps() -> None:
    assert next_batch([FakeStep(1, 5), FakeStep(1, 5), FakeStep(1, 5, commits=True), FakeStep(1, 5)], BUDGET) == [0, 1]


def test_steps_of_a_session_are_never_reordered() -> None:
    assert next_batch([FakeStep(1, 60, prefill=True), FakeStep(1, 5), FakeStep(2, 60)], BUDGET) == [2]


def test_step_larger_than_the_budget_runs_alone() -> None:
    assert next_batch([FakeStep(1, 500), FakeStep(2, 1)], BUDGET) == [0]


def test_only_steps_of_the_same_blocks_run_together() -> None:
    assert next_batch([FakeStep(1), FakeStep(2, span=Span(1, 4)), FakeStep(3)], BUDGET) == [0, 2]


steps = st.builds(FakeStep, st.integers(0, 3), st.integers(0, 50), st.booleans(), st.booleans())


@given(st.lists(steps, max_size=12))
def test_every_step_runs_once_in_its_sessions_order(waiting: list[FakeStep]) -> None:
    remaining, ran = list(enumerate(waiting)), []
    while remaining:
        chosen = next_batch([step for _, step in remaining], BUDGET)
        assert chosen
        batch = [remaining[i] for i in chosen]
        assert len(batch) == 1 or sum(step.rows for _, step in batch) <= BUDGET.rows
        for session in {step.session for _, step in batch}:
            assert not any(step.commits for _, step in [b for b in batch if b[1].session == session][1:])
        ran += batch
        remaining = [entry for i, entry in enumerate(remaining) if i not in chosen]
    for session in range(4):
        order = [index for index, step in ran if step.session == session]
        assert order == sorted(order)
