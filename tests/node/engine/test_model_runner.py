"""One forward for many sessions: what is read once for all of them, and that each gets what it gets alone."""

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


def prompt_of(tail: SpanModel, rows: int, seed: int) -> Segment:
    """A session's first step, with activations of its own."""
    session = NodeSession(SessionTerms(1, rows, 8, rows + 8, 199, 4 * tail.hidden_size))
    hidden = np.random.default_rng(seed).standard_normal((rows, tail.hidden_size), np.float32)
    append = append_of(0, 1, range(rows), [5] * rows, prefill=True)
    (step,) = session.receive(replace(append, hidden=hidden.tobytes()))
    return Segment(tail.store.open(rows, 8), step, tail.loaded.span)


def test_the_head_is_read_once_for_all_sessions_of_a_forward(
    cut_in_three: Callable[[PreTrainedModel], SpanChain], monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = cut_in_three(tiny_model("llama")).models[2]
    device, head, read = ModelRunner(tail, Sampler(199)), tail.logits, []

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        read.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(tail, "logits", counted)
    rows = (1, 4, 2, HEAD_ROWS + 1, 3)
    together = device.run([prompt_of(tail, count, seed) for seed, count in enumerate(rows)])
    assert read == [7, HEAD_ROWS + 1, 3]
    for seed, (count, computed) in enumerate(zip(rows, together, strict=True)):
        segment = prompt_of(tail, count, seed)
        (alone,) = device.run([segment])
        segment.kv.close()
        assert computed.tokens is not None
        assert alone.tokens is not None
        assert computed.tokens.tolist() == alone.tokens.tolist()
        assert len(computed.tokens) == count
        np.testing.assert_allclose(computed.logprobs, alone.logprobs, atol=1e-5)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 12), max_size=12))
def test_runs_hold_everybody_once_and_no_more_than_they_may(rows: list[int]) -> None:
    runs = _group_rows(rows, 10)
    assert [index for run in runs for index in range(run.start, run.stop)] == list(range(len(rows)))
    assert all(sum(rows[run]) <= 10 or run.stop - run.start == 1 for run in runs)
    assert all(sum(rows[a]) + rows[b.start] > 10 for a, b in itertools.pairwise(runs)), "the next would have fitted"
