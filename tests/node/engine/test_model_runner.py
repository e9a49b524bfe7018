"""One forward serves many sessions: the LM head is read once, and results are those of separate forwards."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.node.conftest import SpanChain, append_of, tiny_model
from transformers import PreTrainedModel

from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.model_runner import HEAD_ROWS, ModelRunner, _group_rows
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.model.span_model import SpanModel


def make_segment(tail: SpanModel, rows: int, seed: int) -> Segment:
    """Return the first step of a new session, with random activations."""
    session = NodeSession(SessionTerms(1, rows, 8, rows + 8, 199, 4 * tail.hidden_size))
    hidden = np.random.default_rng(seed).standard_normal((rows, tail.hidden_size), np.float32)
    append = append_of(0, 1, range(rows), [5] * rows, prefill=True)
    (step,) = session.receive(replace(append, hidden=hidden.tobytes()))
    return Segment(tail.store.open(rows, 8), step, tail.loaded.span)


def test_head_is_read_once_for_all_sessions_of_a_forward(
    cut_in_three: Callable[[PreTrainedModel], SpanChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = cut_in_three(tiny_model("llama")).models[2]
    runner, head, head_calls = ModelRunner(tail, Sampler(199)), tail.logits, []

    def count_rows(hidden: torch.Tensor) -> torch.Tensor:
        head_calls.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(tail, "logits", count_rows)
    rows = (1, 4, 2, HEAD_ROWS + 1, 3)
    together = runner.run([make_segment(tail, count, seed) for seed, count in enumerate(rows)])
    assert head_calls == [7, HEAD_ROWS + 1, 3]
    for seed, (count, computed) in enumerate(zip(rows, together, strict=True)):
        segment = make_segment(tail, count, seed)
        (separate,) = runner.run([segment])
        segment.kv.close()
        assert computed.tokens is not None
        assert separate.tokens is not None
        assert computed.tokens.tolist() == separate.tokens.tolist()
        assert len(computed.tokens) == count
        np.testing.assert_allclose(computed.logprobs, separate.logprobs, atol=1e-5)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 12), max_size=12))
def test_row_groups_cover_all_and_respect_the_limit(rows: list[int]) -> None:
    groups = _group_rows(rows, 10)
    assert [index for group in groups for index in range(group.start, group.stop)] == list(range(len(rows)))
    assert all(sum(rows[group]) <= 10 or group.stop - group.start == 1 for group in groups)
    assert all(sum(rows[a]) + rows[b.start] > 10 for a, b in itertools.pairwise(groups)), (
        "the next item would have fitted"
    )
