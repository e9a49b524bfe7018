"""Padded batches become rows, and rows become padded batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm_client.hf.arguments import SpecialTokens
from treeswarm_client.hf.prompts import check_token_types, join_continuations, make_batch, unpack_inputs

PAD = 9
SPECIAL = SpecialTokens(eos_ids=(1,), pad_id=PAD, bos_id=3)
token_rows = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=5)


@given(token_rows, token_rows, st.integers(1, 3))
def test_rows_are_unpadded_and_padded_again(rows: list[list[int]], new: list[list[int]], samples: int) -> None:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    prompts = make_batch(ids, mask, SPECIAL)
    assert list(prompts.rows) == rows
    assert list(make_batch(ids, None, SPECIAL).rows) == rows, "padding is known by its token"
    texts = [new[i % len(new)] for i in range(len(rows) * samples)]
    out = join_continuations(prompts, texts, samples=samples, pad_id=PAD).tolist()
    assert len({len(row) for row in out}) == 1
    for i, row in enumerate(out):
        assert row[:longest] == ids[i // samples].tolist()
        end = longest + len(texts[i])
        assert row[longest:end] == texts[i]
        assert set(row[end:]) <= {PAD}


def test_pad_token_that_ends_texts_is_not_taken_for_padding() -> None:
    both = replace(SPECIAL, eos_ids=(PAD,))
    assert make_batch([[PAD, 2]], None, both).rows == ([PAD, 2],)


def test_missing_prompt_is_the_begin_token() -> None:
    assert make_batch(None, None, SPECIAL).rows == ([3],)
    with pytest.raises(BadRequest, match="give input_ids"):
        make_batch(None, None, replace(SPECIAL, bos_id=None))


@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        ([[1, 2, 9]], [[1, 1, 0]], "padding_side = 'left'"),
        ([[1, 2, 9]], [[1, 0, 1]], "padding_side = 'left'"),
        ([[1, 2, 9]], None, "give attention_mask"),
        ([[1, 2, 9]], [[0, 0, 0]], "empty"),
        ([[1, 2, 9]], [[1, 1]], "alike"),
        ("text", None, "tokenize it first"),
        ([[1, 2], [3]], None, "not a rectangle"),
        ([[0.5]], None, "whole numbers"),
        ([], None, "whole numbers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"\[rows, tokens\]"),
    ],
    ids=str,
)
def test_batches_not_padded_on_the_left_are_refused(inputs: Any, mask: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make_batch(inputs, mask, SPECIAL)


def test_tokenizer_output_is_accepted_whole() -> None:
    assert unpack_inputs({"input_ids": [[1]], "attention_mask": [[1]]}, None, None) == ([[1]], [[1]])
    assert unpack_inputs(None, [[1]], [[1]]) == ([[1]], [[1]])
    with pytest.raises(BadRequest, match="give one"):
        unpack_inputs([[1]], [[1]], None)
    with pytest.raises(BadRequest, match="no input_ids"):
        unpack_inputs({"ids": [[1]]}, None, None)
    check_token_types(torch.zeros(1, 4))
    with pytest.raises(BadRequest, match="token_type_ids"):
        check_token_types([[0, 1]])
