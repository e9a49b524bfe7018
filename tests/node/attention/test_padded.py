"""Segments of similar size are computed together."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_node.attention.padded import MAX_ROWS, group_by_size

SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5_000)), max_size=30)


@given(SIZES, st.integers(1, 4_000))
def test_only_short_segments_of_similar_size_are_grouped(sizes: list[tuple[int, int]], max_keys: int) -> None:
    groups = group_by_size(sizes, max_keys)
    grouped = [i for group in groups for i in group]
    assert len(set(grouped)) == len(grouped)
    for group in groups:
        assert len(group) > 1
        rows, keys = zip(*(sizes[i] for i in group), strict=True)
        assert 0 < max(rows) <= min(MAX_ROWS, 2 * min(rows))
        assert max(keys) <= min(max_keys, 2 * min(keys))


@given(st.integers(2, 20), st.integers(1, MAX_ROWS), st.integers(1, 1_000))
def test_segments_of_equal_size_are_grouped(count: int, rows: int, keys: int) -> None:
    assert group_by_size([(rows, keys)] * count, 1_000) == [list(range(count))]
