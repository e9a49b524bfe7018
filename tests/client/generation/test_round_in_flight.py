"""A round in flight, and the nodes that may be shipped after its tree."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import Answer, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import walk
from treeswarm_client.drafters.seam import UNANSWERED, DraftTree
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.round_in_flight import RoundInFlight

SESSION = bytes(16)


def tree_of(parents: Sequence[int], tokens: Sequence[int]) -> DraftTree:
    scores = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return DraftTree(np.array(parents, np.int64), np.array(tokens, np.int64), scores)


def random_tree(rng: np.random.Generator, size: int, vocab: int = 5) -> DraftTree:
    nodes: dict[tuple[int, int], None] = {}
    for _ in range(size):
        nodes.setdefault((int(rng.integers(-1, max(len(nodes), 1) if nodes else 0)), int(rng.integers(vocab))))
    return tree_of([parent for parent, _ in nodes], [token for _, token in nodes])


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def answer_to(append: Append, tokens: Sequence[int]) -> Answer:
    ids = np.arange(append.first_id, append.first_id + append.rows, dtype=np.uint32)
    answered_tokens = np.array(tokens, np.uint32)
    return Answer(SESSION, append.epoch, append.seq, ids, answered_tokens, np.zeros(len(ids), np.float32), ())


def round_of(draft: DraftTree, segment_rows: int = 3) -> tuple[AppendBuilder, RoundInFlight]:
    builder = AppendBuilder(SamplingSettings(), segment_rows, 0)
    builder.prefill([9, 9])
    return builder, RoundInFlight(builder.round(3, draft))


@given(seed=st.integers(0, 2**32), size=st.integers(0, 20), more=st.integers(0, 20), rows=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_a_walk_over_partial_answers_is_the_walk_over_all(seed: int, size: int, more: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    builder, flight = round_of(random_tree(rng, size), rows)
    pending = list(flight.shipment.appends)
    wider = flight.draft.union(random_tree(rng, more), 30)
    extension = builder.extend(flight.shipment, wider)
    flight.extend(extension)
    pending += extension.appends
    truth = rng.integers(0, 5, len(wider) + 1)
    expected = walk(wider.parents, wider.tokens, truth)
    assert flight.finished_walk() is None
    for append in pending:
        flight.add_answer(answer_to(append, truth[flight.answered : flight.answered + append.rows].tolist()))
        if (path := flight.finished_walk()) is not None:
            assert path == expected
            break
    assert flight.finished_walk() == expected
    assert flight.answers[: flight.answered].tolist() == truth[: flight.answered].tolist()
    assert set(flight.answers[flight.answered :].tolist()) <= {UNANSWERED}
    assert flight.tokens_along(expected)[0] == [int(truth[0]), *(int(truth[i + 1]) for i in expected.accepted)]
    builder.accept(flight.shipment, expected.accepted)
    after = builder.round(4, tree_of([], []))
    assert (
        after.appends[0].commit.tolist()
        == flight.shipment.answer_ids[[0, *(i + 1 for i in expected.accepted)]].tolist()
    )
    assert after.appends[0].fresh


def test_an_answer_to_other_nodes_is_malformed() -> None:
    _, flight = round_of(tree_of([-1, 0], [1, 2]))
    (append,) = flight.shipment.appends
    answer = answer_to(append, [1, 2, 3])
    short = Answer(SESSION, 0, 0, answer.ids[:2], answer.tokens[:2], answer.logprobs[:2], ())
    with pytest.raises(Malformed, match="other nodes"):
        flight.add_answer(short)


def test_a_hint_names_the_new_tip_and_trunk_length() -> None:
    builder, flight = round_of(tree_of([-1, 0], [1, 2]))
    assert builder.hint_after(flight.shipment, ()) == (3, int(flight.shipment.answer_ids[0]))
    assert builder.hint_after(flight.shipment, (0, 1)) == (5, int(flight.shipment.answer_ids[2]))


@given(seed=st.integers(0, 2**32), a=st.integers(0, 20), b=st.integers(0, 40), most=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_a_union_keeps_the_first_tree_and_adds_the_second(seed: int, a: int, b: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    shipped, wider = random_tree(rng, a), random_tree(rng, b)
    both = shipped.union(wider, most)
    assert paths_of(both.best(len(shipped))) == paths_of(shipped)
    assert (both.parents < np.arange(len(both))).all()
    assert len(set(paths_of(both))) == len(both)
    assert len(both) <= max(most, len(shipped))
    assert set(paths_of(both)) <= {*paths_of(shipped), *paths_of(wider)}
    of_both = dict(zip(paths_of(both), both.scores.tolist(), strict=True))
    for tree in (shipped, wider):
        assert all(of_both.get(path, 0.0) >= score for path, score in zip(paths_of(tree), tree.scores, strict=True))
    if most >= a + b:
        assert set(paths_of(both)) == {*paths_of(shipped), *paths_of(wider)}
