"""The KV rows of a draft model: which rows see which, which are kept, and which are dropped."""

import numpy as np
import pytest
import torch

from treeswarm_client.drafters.draft_model import FIRST_ROWS, TreeCache


def write(cache: TreeCache, values: list[int]) -> list[int]:
    """Write rows that hold these numbers (layers 0 and 1, one head).  Returns all rows read back."""
    rows = torch.tensor(values, dtype=torch.float32)[None, :, None]
    with torch.inference_mode():
        cache.write(0, rows, rows + 0.25)
        keys, vals = cache.write(1, rows, rows + 0.5)
    assert torch.equal(keys + 0.5, vals)
    return [int(row) for row in keys[0, :, 0]]


def test_an_accepted_path_joins_the_trunk_and_the_rest_goes() -> None:
    cache = TreeCache()
    cache.add_trunk(3)
    write(cache, [0, 1, 2])
    cache.add_crown(np.eye(4, dtype=np.bool_))
    write(cache, [10, 11, 12, 13])
    cache.keep(np.array([1, 3]), np.empty(0, np.int64))
    assert (cache.trunk, cache.used) == (5, 5)
    cache.add_trunk(1)
    assert write(cache, [20]) == [0, 1, 2, 11, 13, 20]


def test_rows_survive_a_move_onto_each_other() -> None:
    cache = TreeCache()
    cache.add_crown(np.eye(5, dtype=np.bool_))
    write(cache, [0, 1, 2, 3, 4])
    cache.keep(np.array([1, 0, 4, 2]), np.empty(0, np.int64))
    cache.add_trunk(1)
    assert write(cache, [9]) == [1, 0, 4, 2, 9]


def test_doubling_the_room_loses_no_row() -> None:
    cache = TreeCache()
    cache.add_trunk(FIRST_ROWS - 1)
    write(cache, list(range(FIRST_ROWS - 1)))
    cache.add_crown(np.eye(FIRST_ROWS + 3, dtype=np.bool_))
    read = write(cache, list(range(FIRST_ROWS - 1, 2 * FIRST_ROWS + 2)))
    assert read == list(range(2 * FIRST_ROWS + 2))


def test_rows_that_were_cut_are_overwritten() -> None:
    cache = TreeCache()
    cache.add_trunk(4)
    write(cache, [0, 1, 2, 3])
    cache.cut(2)
    cache.add_trunk(2)
    assert write(cache, [7, 8]) == [0, 1, 7, 8]
    cache.cut(99)
    assert cache.trunk == 4


def test_masks_show_the_trunk_and_earlier_rows() -> None:
    cache = TreeCache()
    cache.add_trunk(2)
    cache.add_trunk(3)
    assert cache.mask is not None
    assert cache.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    cache.add_crown(np.array([[True, False], [False, True]]))
    assert cache.mask.int().tolist() == [[1] * 5 + [1, 0], [1] * 5 + [0, 1]]


def test_a_text_cannot_continue_while_it_has_a_crown() -> None:
    cache = TreeCache()
    cache.add_crown(np.eye(2, dtype=np.bool_))
    with pytest.raises(AssertionError, match="neither kept nor dropped"):
        cache.add_trunk(1)
