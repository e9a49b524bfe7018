"""The tail walks as the client does, and hands every row of the text to the speculator once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from treeswarm.protocol.messages import Answers, Append, Resumption
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.session import NodeSession, SessionTerms, prune
from treeswarm.session.steps import Step
from treeswarm_node.speculator.followed_text import KEPT_ROWS, MOST_UNKNOWN, FollowedText, WalkEnd, first_to_read

WINDOW = 32


def append(
    seq: int,
    first_id: int,
    parents: Sequence[int],
    tokens: Sequence[int],
    *,
    commit: Sequence[int] = (),
    prefill: bool = False,
    fresh: bool = False,
    epoch: int = 0,
) -> Append:
    return Append(
        epoch=epoch,
        seq=seq,
        commit=np.array(commit, np.uint32),
        first_id=first_id,
        parents=np.array(parents, np.uint32),
        tokens=np.array(tokens, np.uint32),
        prefill=prefill,
        answers=Answers.LAST if prefill else Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(len(tokens), np.bool_),
        fresh=fresh,
    )


class Tail:
    """A session and its text.  A row's state is its position and its token."""

    def __init__(self, window: int = WINDOW) -> None:
        self.session = NodeSession(SessionTerms(0, 1000, 64, 1000, 100, 0))
        self.text = FollowedText(window)

    def take(self, message: Append, answers: Sequence[int]) -> WalkEnd | None:
        (step,) = self.session.receive(message)
        step = self.session.start(step)
        self.text.add(step, np.array(answers, np.int64), states_of(step))
        self.session.finish(step)
        return self.text.walk_end()

    def read(self) -> list[tuple[int, int, int]]:
        """Let the speculator read, and return position, token and next token of each row."""
        end = self.text.walk_end()
        assert end is not None
        self.text.mark_read(end)
        rows = list(zip(end.states.int().tolist(), end.next_tokens.tolist(), strict=True))
        assert [position for (position, _), _ in rows] == list(
            range(end.first_position, end.first_position + len(rows))
        )
        return [(position, token, following) for (position, token), following in rows]


def states_of(step: Step) -> torch.Tensor:
    return torch.from_numpy(np.stack([step.positions, step.tokens], 1)).float()


def prefilled(window: int = WINDOW) -> Tail:
    """Return a tail with the prompt 10, 11, 12 (ids 1 to 3), after which the target chose 13."""
    tail = Tail(window)
    end = tail.take(append(0, 1, [0, 1, 2], [10, 11, 12], prefill=True), [13])
    assert end is not None
    assert (end.tip, end.bonus) == (3, 13)
    return tail


def test_each_row_is_read_once() -> None:
    tail = prefilled()
    assert tail.read() == [(0, 10, 11), (1, 11, 12), (2, 12, 13)]
    # The target follows 13, 14 and leaves with 15; the sibling 99 is wrong.
    end = tail.take(append(1, 4, [3, 4, 4, 5], [13, 14, 99, 16], fresh=True), [14, 15, 0, 0])
    assert end is not None
    assert (end.tip, end.bonus) == (5, 15)
    assert tail.read() == [(3, 13, 14), (4, 14, 15)]
    end = tail.take(append(2, 8, [5], [15], commit=[4, 5], fresh=True), [17])
    assert end is not None
    assert (end.tip, end.bonus, end.first_position) == (8, 17, 5)
    assert tail.read() == [(5, 15, 17)]


def test_an_extension_lengthens_the_walk() -> None:
    """The rows read before stay read, because the walk goes on through the token that was its bonus."""
    tail = prefilled()
    tail.read()
    tail.take(append(1, 4, [3, 4], [13, 14], fresh=True), [14, 15])
    assert tail.read() == [(3, 13, 14), (4, 14, 15)]
    end = tail.take(append(2, 6, [5, 6], [15, 50]), [16, 0])
    assert end is not None
    assert (end.tip, end.bonus) == (6, 16)
    assert tail.read() == [(5, 15, 16)]


def test_another_walk_than_the_one_read_is_read_again() -> None:
    """The client may commit another path, as `hf` does: then rows are read again from where the paths part."""
    tail = prefilled()
    tail.read()
    tail.take(append(1, 4, [3, 4, 4], [13, 14, 20], fresh=True), [14, 15, 21])
    assert tail.read() == [(3, 13, 14), (4, 14, 15)]
    tail.take(append(2, 7, [6], [22], commit=[4, 6], fresh=True), [23])
    assert tail.read() == [(3, 13, 20), (4, 20, 22), (5, 22, 23)]


def test_a_row_that_was_skipped_ends_the_walk() -> None:
    """The client's own walk has gone elsewhere by then, and it ignores the proposal."""
    tail = prefilled()
    tail.read()
    (step,) = tail.session.receive(append(1, 4, [3, 4, 5], [13, 14, 15], fresh=True))
    pruned = prune(step, np.array([True, False, False]))
    tail.text.add(pruned, np.array([14]), states_of(pruned))
    end = tail.text.walk_end()
    assert end is not None
    assert (end.tip, end.bonus) == (4, 14)


def test_a_resumption_cuts_the_text_back() -> None:
    tail = prefilled()
    tail.read()
    tail.take(append(1, 4, [3, 4], [13, 14], fresh=True), [14, 15])
    tail.read()
    tail.session.resume(1, Resumption(3, 9))
    tail.text.truncate(3)
    end = tail.take(append(0, 10, [9, 10], [13, 18], fresh=True, epoch=1), [18, 19])
    assert end is not None
    assert (end.tip, end.bonus) == (11, 19)
    # Row 2 was read with 13 after it, which is still true.
    assert tail.read() == [(3, 13, 18), (4, 18, 19)]


def test_only_the_window_is_kept_and_read() -> None:
    tail = Tail(window=16)
    tokens = [i % 90 for i in range(300)]
    tail.take(append(0, 1, list(range(300)), tokens, prefill=True), [5])
    rows = tail.read()
    assert [position for position, _, _ in rows] == list(range(284, 300))
    assert len(tail.text._trunk) <= 16


def test_states_that_were_read_are_forgotten() -> None:
    tail = Tail(window=512)
    tokens = [i % 90 for i in range(300)]
    tail.take(append(0, 1, list(range(300)), tokens, prefill=True), [5])
    assert len(tail.read()) == 300
    assert len(tail.text._trunk) == KEPT_ROWS


def test_a_text_that_begins_in_the_prefix_cache_is_read_from_there() -> None:
    """The rows of the prefix have no states here: the speculator begins with the first row that was computed."""
    tail = Tail()
    step = Tail().session.receive(append(0, 1, [0, 1, 2], [10, 11, 12], prefill=True))[0]
    moved = Step(
        append=step.append,
        commit_slots=step.commit_slots,
        trunk_length=64,
        positions=step.positions + 64,
        tokens=step.tokens,
        slots=step.slots,
        visible=step.visible,
        computed=step.computed,
        answered=step.answered,
    )
    tail.text.add(moved, np.array([13]), states_of(moved))
    assert tail.read() == [(64, 10, 11), (65, 11, 12), (66, 12, 13)]


# ---------------------------------------------------------------- sums of other nodes' taps


@pytest.mark.parametrize(
    ("known", "first", "start"),
    [
        ("11111", 0, 0),
        ("11111", 3, 3),
        ("11100", 3, 2),
        ("10000", 3, 0),
        ("00110", 0, 2),
        ("00110", 4, 3),
        ("00000", 0, None),
        ("1" + "0" * MOST_UNKNOWN, 3, 0),
        ("1" + "0" * (MOST_UNKNOWN + 1), 3, None),
        ("1" + "0" * MOST_UNKNOWN + "10", 0, MOST_UNKNOWN + 1),
        ("", 0, None),
    ],
)
def test_reading_begins_at_a_row_with_a_sum(known: str, first: int, start: int | None) -> None:
    assert first_to_read([row == "1" for row in known], first) == start


def take_with_sums(tail: Tail, message: Append, answers: Sequence[int], summed: Sequence[bool]) -> WalkEnd | None:
    """Take an append of which some rows have sums: each sum is the row's token."""
    (step,) = tail.session.receive(message)
    sums = [torch.tensor([float(token)]) if has else None for token, has in zip(step.tokens, summed, strict=True)]
    tail.text.add(step, np.array(answers, np.int64), states_of(step), sums)
    tail.session.finish(step)
    return tail.text.walk_end()


def test_rows_without_a_sum_are_read_after_the_last_one_that_has_one() -> None:
    tail = Tail()
    tail.text.needs_sums = True
    take_with_sums(tail, append(0, 1, [0, 1, 2], [10, 11, 12], prefill=True), [13], [False, True, True])
    assert tail.read() == [(1, 11, 12), (2, 12, 13)]
    end = take_with_sums(tail, append(1, 4, [3, 4, 5], [13, 14, 15], fresh=True), [14, 15, 16], [True, False, False])
    assert end is not None
    assert end.sums[0].flatten().tolist() == [13.0, 0.0, 0.0]
    assert end.sums[1].tolist() == [True, False, False]
    assert tail.read() == [(3, 13, 14), (4, 14, 15), (5, 15, 16)]
    # The next walk begins with a row without a sum: row 3 is read once more, as the last one that has one.
    take_with_sums(tail, append(2, 7, [6], [16], commit=[4, 5, 6], fresh=True), [17], [False])
    assert tail.read() == [(3, 13, 14), (4, 14, 15), (5, 15, 16), (6, 16, 17)]


def test_nothing_is_proposed_where_no_sums_come() -> None:
    tail = Tail()
    tail.text.needs_sums = True
    assert take_with_sums(tail, append(0, 1, [0, 1], [10, 11], prefill=True), [13], [False, False]) is None
    assert take_with_sums(tail, append(1, 3, [2], [13], fresh=True), [14], [False]) is None
    end = take_with_sums(tail, append(2, 4, [3], [14], commit=[3], fresh=True), [15], [True])
    assert end is not None
    assert (end.first_position, len(end.rows)) == (3, 1)
