"""`ExpandedTree` agrees with a dictionary of paths."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm_client.drafters.expanded_tree import NO_ROW, CandidateNodes, ExpandedTree
from treeswarm_client.drafters.seam import DraftTree

Path = tuple[int, ...]
TOKENS = 4


def candidates(paths: list[Path]) -> CandidateNodes:
    """Return candidates from which the path of their node can be told."""
    marks = np.array([[hash(path) % 997] * 3 for path in paths])
    return CandidateNodes(marks, marks.astype(np.float32), -marks.astype(np.float32))


def drafted(rng: np.random.Generator, levels: list[int]) -> tuple[ExpandedTree, list[Path]]:
    """Return a tree expanded at random, and the paths of its rows."""
    expanded, paths = ExpandedTree(candidates([()])), list[Path]()
    for count in levels:
        above = rng.integers(-1, len(paths), count) if paths else np.full(count, NO_ROW)
        tokens = rng.integers(0, TOKENS, count)
        drawn = [(*(paths[a] if a >= 0 else ()), int(t)) for a, t in zip(above, tokens, strict=True)]
        new = [i for i, path in enumerate(drawn) if path not in paths and path not in drawn[:i]]
        if not new:
            continue
        fresh = [drawn[i] for i in new]
        visible = expanded.add(above[new], tokens[new])
        paths += fresh
        for path, seen in zip(fresh, visible, strict=True):
            assert {paths[i] for i in np.flatnonzero(seen)} == {path[: n + 1] for n in range(len(path))}
        expanded.add_candidates(candidates(fresh))
    return expanded, paths


def check(expanded: ExpandedTree, paths: list[Path], root: Path) -> None:
    """Check that every row is found and has its own candidates."""
    assert len(expanded) == len(paths)
    table = expanded.candidates()
    assert table.tokens[:, 0].tolist() == candidates([root, *((*root, *path) for path in paths)]).tokens[:, 0].tolist()
    places = {path: i for i, path in enumerate(paths)}
    above = np.array([places.get(path[:-1], NO_ROW) for path in paths], np.int64)
    tokens = np.array([path[-1] for path in paths], np.int64)
    assert expanded.rows(above, tokens).tolist() == list(range(len(paths)))


@given(
    seed=st.integers(0, 2**32),
    levels=st.lists(st.integers(1, 9), max_size=6),
    walked=st.lists(st.integers(0, TOKENS - 1), max_size=4),
    bonus=st.integers(0, TOKENS - 1),
)
@settings(max_examples=200, deadline=None)
def test_rows_below_a_walked_path_are_kept(seed: int, levels: list[int], walked: list[int], bonus: int) -> None:
    rng = np.random.default_rng(seed)
    expanded, paths = drafted(rng, levels)
    check(expanded, paths, ())
    root = (*walked, bonus)
    moves = expanded.row_moves(walked, bonus)
    walked_rows = [root[: n + 1] for n in range(len(root)) if root[: n + 1] in paths]
    assert [paths[row] for row in moves.to_trunk] == walked_rows
    if root not in paths:
        assert not len(moves.kept)
        return
    kept = [path[len(root) :] for path in paths if len(path) > len(root) and path[: len(root)] == root]
    assert [paths[row][len(root) :] for row in moves.kept] == kept
    below = expanded.rerooted(moves)
    check(below, kept, root)
    visible = below.add(np.array([NO_ROW]), np.array([TOKENS]))
    assert visible[0].tolist() == [False] * len(kept) + [True]


@given(seed=st.integers(0, 2**32), levels=st.lists(st.integers(1, 9), max_size=6))
@settings(max_examples=50, deadline=None)
def test_rows_of_a_shipped_tree_are_found_by_its_paths(seed: int, levels: list[int]) -> None:
    rng = np.random.default_rng(seed)
    expanded, paths = drafted(rng, levels)
    shipped = [path for path in paths if rng.random() < 0.8]
    shipped = [path for path in shipped if all(path[:n] in shipped for n in range(1, len(path)))]
    shipped += [(*path, TOKENS + 1) for path in shipped[:2]]
    parents = np.array([shipped.index(path[:-1]) if len(path) > 1 else -1 for path in shipped], np.int64)
    tree = DraftTree(parents, np.array([path[-1] for path in shipped], np.int64), np.zeros(len(shipped), np.float32))
    expected = [paths.index(path) if path in paths else NO_ROW for path in shipped]
    assert expanded.rows_of(tree).tolist() == expected
