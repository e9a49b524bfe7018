"""Two sessions in one batch agree with the plain model along every path of their trees, for every family."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import ADAPTERS, FAMILIES, SpanChain, tiny_model
from tests.support.texts import Text
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention import metadata
from treeswarm_node.attention.base import Attention
from treeswarm_node.model.check.family_check import check_family

TOLERANCE = 1e-4
CutModel = Callable[[PreTrainedModel], SpanChain]


def worst_difference(
    model: PreTrainedModel, chain: SpanChain, lengths: dict[str, int], *, size: int = 11, room: int = 40
) -> float:
    """Run chunked prefill and three trees of `size` rows per session, and return the largest difference.

    All sessions are in each batch.  A session opens with room for its prompt and `room` more tokens.
    """
    random, vocab = np.random.default_rng(1), int(model.config.vocab_size)
    texts = {name: Text(random.integers(1, vocab, n).tolist(), random, vocab) for name, n in lengths.items()}
    for name, length in lengths.items():
        chain.open(name, trunk_room=length + room)
    prefills = {name: text.prefill(chunk=29) for name, text in texts.items()}
    for i in range(max(map(len, prefills.values()))):
        chain.run({name: appends[i] for name, appends in prefills.items() if i < len(appends)})
    worst = 0.0
    commits: dict[str, list[int]] = {name: [] for name in texts}
    for _ in range(3):
        trees = {name: text.tree(size, commits[name]) for name, text in texts.items()}
        logits = chain.run({name: append for name, (append, _) in trees.items()})
        for name, (_, ids) in trees.items():
            text = texts[name]
            for row, node in enumerate(ids):
                tokens = torch.tensor([[text.tokens[i] for i in text.path(node)]])
                expected = model(tokens, use_cache=False).logits[0, -1]
                worst = max(worst, float((expected - logits[name][row]).abs().max()))
            end = int(random.choice(ids))
            commits[name] = [i for i in text.path(end) if i in ids]
    return worst


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Attention:
    """Run every test of this file with every adapter."""
    return ADAPTERS[request.param]()


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_on_a_cut_model_equal_the_plain_model(family: str, cut_in_three: CutModel) -> None:
    model = tiny_model(family)
    chain = cut_in_three(model)
    for span in chain.models:
        assert check_family(span).worst_difference < TOLERANCE
    # The long session exceeds every window and Phi-3's original context of 32.  The short one's room is within that
    # context, because longrope's factors depend on the room that a session opens with.
    assert worst_difference(model, chain, {"short": 9, "long": 61}, size=6, room=23) < TOLERANCE
    for span in chain.models:
        span.store.check()


class TestPlantedMistakes:
    """The comparison above must detect these mistakes."""

    def test_crown_node_that_sees_its_sibling(self, cut_in_three: CutModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def see_all(*arguments: Any) -> metadata.SegmentMetadata:
            segment = original(*arguments)
            segment.visible = torch.tril(torch.ones_like(segment.visible))
            return segment

        original = metadata._segment_metadata
        monkeypatch.setattr(metadata, "_segment_metadata", see_all)
        model = tiny_model("llama")
        assert worst_difference(model, cut_in_three(model), {"one": 9}) > TOLERANCE

    def test_live_page_used_twice(self, cut_in_three: CutModel) -> None:
        model = tiny_model("llama")
        chain = cut_in_three(model)
        pool = chain.models[1].store.pool
        allocate = pool.allocate
        pool.allocate = lambda count, after=None: allocate(count, after) and list(range(count))  # type: ignore[method-assign]
        assert worst_difference(model, chain, {"one": 9, "two": 12}) > TOLERANCE
        with pytest.raises(AssertionError, match="lost or owned twice"):
            chain.models[1].store.check()

    def test_window_that_is_one_too_wide(self, cut_in_three: CutModel, monkeypatch: pytest.MonkeyPatch) -> None:
        original = metadata.SegmentMetadata.visible_keys
        monkeypatch.setattr(
            metadata.SegmentMetadata, "visible_keys", lambda segment, window: original(segment, window and window + 1)
        )
        model = tiny_model("mistral")
        assert worst_difference(model, cut_in_three(model), {"one": 61}) > TOLERANCE

    def test_family_check_detects_a_missing_window(
        self, cut_in_three: CutModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chain = cut_in_three(tiny_model("gemma2"))
        # Both routes of attention ask for the oldest position that a row sees.
        monkeypatch.setattr(
            metadata.SegmentMetadata, "oldest_seen", lambda segment, _: torch.zeros_like(segment.positions)
        )
        with pytest.raises(UnsupportedModel, match=r"'gemma2'.*differs from plain attention.*docs/models.md"):
            check_family(chain.models[0])
