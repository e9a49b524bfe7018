"""`TokenTree` agrees with a brute-force model that keeps a dictionary of parents."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treeswarm.errors import Refused
from treeswarm.session.tree import ROOT, TokenTree


@dataclass
class BruteTree:
    """Every node ever added, its parent, and which nodes are the trunk."""

    parents: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    trunk: list[int] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)

    @property
    def tip(self) -> int:
        return self.trunk[-1] if self.trunk else ROOT

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root's child down to `node`."""
        line = []
        while node != ROOT:
            line.append(node)
            node = self.parents[node]
        return line[::-1]

    def add(self, node: int, parent: int, token: int) -> None:
        self.parents[node], self.tokens[node] = parent, token
        self.alive.add(node)

    def commit(self, path: list[int]) -> None:
        self.trunk += path
        self.alive = {node for node in self.alive if self.tip in self.path(node)[:-1]}


class Trees(RuleBasedStateMachine):
    """Grow, prefill and commit both trees: they must agree on every position, ancestor and survivor."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.brute, self.next_id = TokenTree(), BruteTree(), ROOT + 1

    @rule(data=st.data(), count=st.integers(1, 6), gap=st.integers(0, 2))
    def grow(self, data: st.DataObject, count: int, gap: int) -> None:
        first, parents, tokens = self.next_id + gap, [], []
        for i in range(count):
            choices = [self.brute.tip, *sorted(self.brute.alive)]
            parents.append(data.draw(st.sampled_from(choices)))
            tokens.append(data.draw(st.integers(0, 9)))
            self.brute.add(first + i, parents[-1], tokens[-1])
        self.tree = self.tree.add(first, np.array(parents), np.array(tokens))
        self.next_id = first + count

    @rule(count=st.integers(1, 4))
    def prefill(self, count: int) -> None:
        chain = [self.brute.tip, *range(self.next_id, self.next_id + count - 1)]
        self.tree = self.tree.join(self.next_id, np.array(chain))
        for i, parent in enumerate(chain):
            self.brute.add(self.next_id + i, parent, 0)
        self.brute.commit(list(range(self.next_id, self.next_id + count)))
        self.next_id += count

    @precondition(lambda self: self.brute.alive)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        end = data.draw(st.sampled_from(sorted(self.brute.alive)))
        path = [node for node in self.brute.path(end) if node in self.brute.alive]
        before = self.tree
        self.tree, kept = self.tree.commit(path)
        self.brute.commit(path)
        assert before.ids[kept].tolist() == self.tree.ids.tolist()
        alone = before.commit_alone(path)
        assert (alone.trunk_length, alone.tip, alone.next_id) == (
            self.tree.trunk_length,
            self.tree.tip,
            self.tree.next_id,
        )
        assert not len(alone)

    @invariant()
    def same(self) -> None:
        brute, tree = self.brute, self.tree
        assert tree.ids.tolist() == sorted(brute.alive)
        assert (tree.trunk_length, tree.tip) == (len(brute.trunk), brute.tip)
        for i, node in enumerate(tree.ids.tolist()):
            path = brute.path(node)
            assert tree.positions[i] == len(path) - 1
            assert tree.tokens[i] == brute.tokens[node]
            assert tree.ids[tree.ancestors[i]].tolist() == [n for n in path if n in brute.alive]
            parent = brute.parents[node]
            assert tree.parents[i] == (-1 if parent == brute.tip else tree.ids.tolist().index(parent))


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.fixture
def small() -> TokenTree:
    """A tree with tip 1, nodes 2 and 3 below it, and node 4 below 2."""
    return TokenTree().join(1, np.array([ROOT])).add(2, np.array([1, 1, 2]), np.array([5, 6, 7]))


@pytest.mark.parametrize(
    ("first_id", "parents"),
    [(4, [1]), (5, [0]), (5, [9]), (5, [5]), (5, [6, 1]), (5, [2**32 - 1])],
    ids=["id used", "parent behind the tip", "parent unknown", "own parent", "parent later", "largest id"],
)
def test_bad_nodes_are_refused_and_change_nothing(small: TokenTree, first_id: int, parents: list[int]) -> None:
    before = small.ids.tolist()
    with pytest.raises(Refused) as refused:
        small.add(first_id, np.array(parents), np.zeros(len(parents), np.int64))
    assert refused.value.code == "bad-tree"
    assert small.ids.tolist() == before


@pytest.mark.parametrize("path", [[9], [4], [3, 4], [2, 3], [2, 2], [1]])
def test_a_commit_that_is_not_a_path_is_refused(small: TokenTree, path: list[int]) -> None:
    for commit in (small.commit, small.commit_alone):
        with pytest.raises(Refused, match="commit names"):
            commit(path)


def test_a_dead_branch_cannot_grow(small: TokenTree) -> None:
    tree, _ = small.commit([2])
    assert tree.ids.tolist() == [4]
    with pytest.raises(Refused, match="neither the tip nor a live"):
        tree.add(5, np.array([3]), np.array([1]))


@given(parents=st.lists(st.integers(-1, 30), max_size=30))
def test_a_new_tip_keeps_its_path_and_all_nodes_below(parents: list[int]) -> None:
    clipped = [min(p, i - 1) for i, p in enumerate(parents)]
    tree = TokenTree().add(1, np.array([p + 1 for p in clipped], np.int64), np.zeros(len(clipped), np.int64))
    for tip in tree.ids.tolist():
        alive = set(tree.ids[tree.alive_below(tip)].tolist())
        committed, _ = tree.commit(tree.ids[tree.ancestors[tree.ids.tolist().index(tip)]])
        path = set(tree.ids[tree.ancestors[tree.ids.tolist().index(tip)]].tolist())
        assert alive == path | set(committed.ids.tolist())
