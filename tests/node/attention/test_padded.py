"""Which segments are computed together."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_node.attention.padded import MAX_ROWS, group_by_size

SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5_000)), max_size=30)


@given(SIZES, st.integers(1, 4_000))
def test_only_short_segments_of_like_size_go_together(sizes: list[tuple[int, int]], most_keys: int) -> None:
    groups = group_by_size(sizes, most_keys)
    chosen = [i for group in groups for i in group]
    assert len(set(chosen)) == len(chosen)
    for group in groups:
        assert len(group) > 1
        rows, keys = zip(*(sizes[i] for i in group), strict=True)
        assert 0 < max(rows) <= min(MAX_ROWS, 2 * min(rows))
        assert max(keys) <= min(most_keys, 2 * min(keys))


@given(st.integers(2, 20), st.integers(1, MAX_ROWS), st.integers(1, 1_000))
def test_all_that_are_equal_go_together(count: int, rows: int, keys: int) -> None:
    assert group_by_size([(rows, keys)] * count, 1_000) == [list(range(count))]
