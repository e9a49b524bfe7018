"""Sums of taps are kept for the end of the trunk, and go with the rows that are replayed."""

from dataclasses import replace

import numpy as np
from tests.node.conftest import append_of

from treeswarm.protocol.messages import Append, Resumption
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession, SessionTerms, prune
from treeswarm_node.sessions.tap_log import MOST_CROWN_SUMS, TapLog

WINDOW = 6


class Node:
    """A session and its log.  The sum of a row is its token, twice."""

    def __init__(self, blocks: tuple[int, ...] = (1, 2)) -> None:
        self.session = NodeSession(SessionTerms(1, 9000, 2000, 10_000, 256, 0))
        self.log = TapLog(WINDOW)
        self.blocks = blocks

    def take(self, append: Append, summed: list[int], alive: list[bool] | None = None) -> None:
        """Record an append's step, of which the rows `summed` of the append had sums."""
        (step,) = self.session.receive(append)
        step = step if alive is None else prune(step, np.array(alive))
        rows = np.isin(np.arange(append.rows), summed)
        data = b"".join(bytes([token, token]) for token in append.tokens[rows].tolist())
        self.log.record(step, TapSums(rows, self.blocks, data) if summed else None)
        self.session.finish(step)

    def replayed(self) -> dict[int, bytes]:
        """Return the sum of each replayed row that has one, by position."""
        found: dict[int, bytes] = {}
        for append in replay(2, [0] * self.session.tree.trunk_length):
            sums = self.log.attach(append).tap_sums
            if sums is not None:
                assert sums.blocks == self.blocks
                size = len(sums.data) // sums.count
                places = np.flatnonzero(sums.rows) + append.first_id - 1
                found |= {int(p): sums.data[i * size : (i + 1) * size] for i, p in enumerate(places)}
        return found


def test_committed_rows_keep_their_sums() -> None:
    node = Node()
    node.take(append_of(0, 1, [0, 1, 2], [10, 11, 12], prefill=True), [1, 2])
    node.take(replace(append_of(1, 4, [3, 4, 4, 5], [13, 14, 15, 16]), fresh=True), [0, 1, 2])
    assert node.replayed() == {1: b"\x0b\x0b", 2: b"\x0c\x0c"}
    # The walk went along 13, 14 and 16, of which the last had no sum.
    node.take(replace(append_of(2, 8, [7], [17], commit=[4, 5, 7]), fresh=True), [0])
    assert node.replayed() == {1: b"\x0b\x0b", 2: b"\x0c\x0c", 3: b"\x0d\x0d", 4: b"\x0e\x0e"}


def test_only_the_window_is_kept() -> None:
    node = Node()
    node.take(append_of(0, 1, range(20), list(range(20)), prefill=True), list(range(20)))
    assert sorted(node.replayed()) == list(range(20 - WINDOW, 20))


def test_rows_that_died_leave_no_sum() -> None:
    node = Node()
    node.take(append_of(0, 1, [0], [10], prefill=True), [0])
    node.take(append_of(1, 2, [1, 1, 3], [11, 12, 13]), [1, 2], alive=[False, True, True])
    node.take(append_of(2, 5, [4], [14], commit=[3, 4]), [])
    assert node.replayed() == {0: b"\x0a\x0a", 1: b"\x0c\x0c", 2: b"\x0d\x0d"}


def test_a_resumption_cuts_the_log_back() -> None:
    node = Node()
    node.take(append_of(0, 1, [0, 1, 2], [10, 11, 12], prefill=True), [0, 1, 2])
    node.take(append_of(1, 4, [3], [13]), [0])
    node.session.resume(2, Resumption(2, 9))
    node.log.truncate(2)
    assert sorted(node.replayed()) == [0, 1]
    node.take(replace(append_of(0, 10, [9], [20]), epoch=2), [0])
    node.take(replace(append_of(1, 11, [10], [21], commit=[10]), epoch=2), [])
    assert node.replayed()[2] == b"\x14\x14"


def test_sums_of_other_blocks_replace_the_ones_before() -> None:
    node = Node()
    node.take(append_of(0, 1, [0, 1], [10, 11], prefill=True), [0, 1])
    node.blocks = (2,)
    node.take(append_of(1, 3, [2], [12], prefill=True), [0])
    assert sorted(node.replayed()) == [2]


def test_a_crown_keeps_no_more_than_its_newest_sums() -> None:
    node = Node()
    node.take(append_of(0, 1, [0], [1], prefill=True), [])
    for seq in range(2):
        first = 2 + 700 * seq
        node.take(append_of(1 + seq, first, [1] * 700, [(first + i) % 256 for i in range(700)]), list(range(700)))
    assert len(node.log._crown) == MOST_CROWN_SUMS
    assert 699 in node.log._crown
