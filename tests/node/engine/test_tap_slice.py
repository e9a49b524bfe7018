"""Nodes with parts of a head's first matrix add up what one node with the whole of it computes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import SpanChain, append_of, tiny_model
from transformers import PreTrainedModel

from treeswarm.protocol.messages import Append
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.session.session import NodeSession, SessionTerms, prune
from treeswarm.session.steps import Step
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.activation_codec import Int8BlockCodec
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.engine.tap_slice import (
    ROWS_WITH_SUMS,
    TapSlice,
    add_taps,
    head_digest,
    read_sums,
    rows_with_sums,
)
from treeswarm_node.speculator.head import EPSILON, HeadShape, SpeculatorHead

HIDDEN, TAPS = 64, (0, 2, 3)


def make_head() -> SpeculatorHead:
    torch.manual_seed(3)
    return SpeculatorHead(HeadShape(HIDDEN, len(TAPS), 4, 2, 16, 96, window=32)).requires_grad_(False)


def part_of(head: SpeculatorHead, span: Span) -> TapSlice:
    columns = dict(zip(TAPS, head.keep_columns(range(len(TAPS))), strict=True))
    hosted = {tap: matrix for tap, matrix in columns.items() if span.start <= tap < span.end}
    return TapSlice("digest", TAPS, hosted, HIDDEN, 32, EPSILON)


def test_three_nodes_add_up_what_one_node_computes(cut_in_three: Callable[[PreTrainedModel], SpanChain]) -> None:
    """The difference is the rounding to 8 bits, once at each of the two nodes before the tail."""
    models, head = cut_in_three(tiny_model("llama")).models, make_head()
    tokens = torch.arange(7, 20)
    whole = head.fused(TappedTarget(tiny_model("llama"), TAPS).read(tokens[None])[0][0])
    append = append_of(0, 1, range(len(tokens)), tokens.tolist(), prefill=True)
    largest = 0.0
    for model in models:
        span = model.loaded.span
        part = part_of(head, span)
        runner = ModelRunner(model, Sampler(199), taps=TAPS, tap_slice=part)
        segment = segment_of(model, append, span)
        (computed,) = runner.run([segment])
        append = replace(append, hidden=computed.hidden, tap_sums=computed.tap_sums)
        if computed.tap_sums is not None:
            largest = max(largest, float(read_sums(part, replace(segment.step, append=append))[0].abs().max()))
    assert computed.states is not None
    values, known = read_sums(part, segment.step)
    assert known.all()
    difference = values + part.contribution(computed.states, (3,)) - whole
    assert float(difference.abs().max()) < 2 * 0.5 * largest / 127 * 1.01 + 1e-4
    assert float(difference.abs().max()) > 0


def segment_of(model: Any, append: Append, span: Span) -> Segment:
    session = NodeSession(SessionTerms(1, append.rows, 8, 100, 199, 4 * HIDDEN if span.start else 0))
    (step,) = session.receive(append)
    is_tail = span.end == model.blocks
    return Segment(model.store.open(append.rows, 8), step, span, is_tail, None if is_tail else 0)


def test_parts_without_rounding_are_the_whole_matrix() -> None:
    head, states = make_head(), torch.randn(5, len(TAPS) * HIDDEN)
    spans = [Span(0, 1), Span(1, 3), Span(3, 4)]
    own = [(part_of(head, span), part_of(head, span).blocks_in(span.start, span.end)) for span in spans]
    parts = [
        part.contribution(states[:, i * HIDDEN : (i + 1) * HIDDEN], blocks) for i, (part, blocks) in enumerate(own)
    ]
    assert torch.allclose(sum(parts, torch.zeros(5, HIDDEN)), head.fused(states), atol=1e-5)
    assert torch.allclose(part_of(head, Span(0, 4)).contribution(states, TAPS), head.fused(states), atol=1e-5)


def test_a_head_that_forgot_columns_keeps_those_of_its_taps() -> None:
    head, states = make_head(), torch.randn(5, HIDDEN)
    whole = part_of(make_head(), Span(3, 4)).contribution(states, (3,))
    (columns,) = head.keep_columns(range(2, 3))
    assert head.fuse.weight.numel() == HIDDEN * HIDDEN
    assert torch.equal(TapSlice("", TAPS, {3: columns}, HIDDEN, 32, EPSILON).contribution(states, (3,)), whole)
    assert make_head().keep_columns(range(0)) == []


# ---------------------------------------------------------------- which rows


def tree_step(rows: int = 40, sums: TapSums | None = None) -> Step:
    """Return a step with a chain of `rows` nodes."""
    session = NodeSession(SessionTerms(1, 500, 500, 1000, 199, 0, offered=0))
    (step,) = session.receive(replace(append_of(0, 1, range(rows), [5] * rows), tap_sums=sums))
    return step


def test_the_first_rows_of_a_tree_have_sums() -> None:
    assert np.flatnonzero(rows_with_sums(tree_step(), 0)).tolist() == list(range(ROWS_WITH_SUMS))
    assert rows_with_sums(tree_step(3), 0).all()
    # Rows that died while they waited take no place among the best.
    alive = np.arange(40) % 2 == 0
    assert rows_with_sums(prune(tree_step(), alive), 0).sum() == ROWS_WITH_SUMS


def test_the_last_rows_of_a_prompt_have_sums() -> None:
    session = NodeSession(SessionTerms(1, 500, 8, 1000, 199, 0))
    (step,) = session.receive(append_of(0, 1, range(30), [5] * 30, prefill=True))
    assert np.flatnonzero(rows_with_sums(step, 20)).tolist() == list(range(20, 30))
    assert not rows_with_sums(step, 30).any()


def begun(rows: int = 40) -> tuple[TapSlice, TapSums, torch.Tensor]:
    """Return the middle's part, what the node before it sent for a tree, and its sums."""
    head, states = make_head(), torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(4))
    first = part_of(head, Span(0, 1))
    sums = add_taps(first, tree_step(rows), states, (0,), 0)
    assert sums is not None
    return part_of(head, Span(1, 3)), sums, first.contribution(states[:ROWS_WITH_SUMS], (0,))


def test_sums_of_rows_that_died_are_not_sent_on() -> None:
    part, sums, values = begun()
    alive = np.arange(40) % 3 > 0
    step = prune(tree_step(sums=sums), alive)
    states = torch.zeros(step.rows, HIDDEN)
    added = add_taps(part, step, states, (2,), 0)
    assert added is not None
    assert np.flatnonzero(added.rows).tolist() == [row for row in range(ROWS_WITH_SUMS) if row % 3 > 0]
    assert added.blocks == (0, 2)
    decoded = Int8BlockCodec(HIDDEN).decode(added.data, torch.float32)
    assert torch.allclose(decoded, values[alive[:ROWS_WITH_SUMS]], atol=float(values.abs().max()) / 127)


def test_a_node_without_a_tapped_block_passes_sums_on() -> None:
    _, sums, _ = begun()
    relay = part_of(make_head(), Span(1, 2))
    passed = add_taps(relay, tree_step(sums=sums), torch.empty(40, 0), (), 0)
    assert passed is not None
    assert (passed.blocks, passed.data) == (sums.blocks, sums.data)
    assert np.array_equal(passed.rows, sums.rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: None,
        lambda sums: replace(sums, blocks=(0, 2)),
        lambda sums: replace(sums, blocks=(1,)),
        lambda sums: replace(sums, data=sums.data + bytes(sums.count)),
        lambda sums: replace(sums, data=b"\xff" * len(sums.data)),
    ],
    ids=["none", "its own block", "another block", "another size", "not finite"],
)
def test_nothing_is_added_to_sums_that_are_not_those_before(change: Callable[[TapSums], TapSums | None]) -> None:
    part, sums, _ = begun()
    assert add_taps(part, tree_step(sums=change(sums)), torch.randn(40, HIDDEN), (2,), 0) is None


def test_a_row_that_is_not_finite_is_missing() -> None:
    part, sums, values = begun()
    size = len(sums.data) // sums.count
    data = bytearray(sums.data)
    data[3 * size - 2 : 3 * size] = np.array(np.nan, np.float16).tobytes()
    read, known = read_sums(part, tree_step(sums=replace(sums, data=bytes(data))))
    assert np.flatnonzero(known).tolist() == [row for row in range(ROWS_WITH_SUMS) if row != 2]
    assert not read[~torch.from_numpy(known)].any()
    assert torch.allclose(read[3], values[3], atol=float(values[3].abs().max()) / 127)


def test_heads_that_read_other_things_have_other_digests() -> None:
    matrix = torch.randn(4, 8)
    digest = head_digest(matrix, (1, 2), EPSILON)
    assert head_digest(matrix.clone(), (1, 2), EPSILON) == digest
    others = [(matrix + 1, (1, 2), EPSILON), (matrix, (1, 3), EPSILON), (matrix, (1, 2), None)]
    assert len({digest, head_digest(matrix.half(), (1, 2), EPSILON), *(head_digest(*other) for other in others)}) == 5
