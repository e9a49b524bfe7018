"""Every supported family: two sessions in one batch, trees against the plain model along every path."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import ADAPTERS, FAMILIES, SpanChain, tiny_model
from tests.support.texts import Text
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention import metadata as batch
from treeswarm_node.attention.base import Attention
from treeswarm_node.model.family_check import check_family

TOLERANCE = 1e-4
Cut = Callable[[PreTrainedModel], SpanChain]


def worst_difference(
    model: PreTrainedModel, chain: SpanChain, lengths: dict[str, int], *, size: int = 11, room: int = 40
) -> float:
    """Drive every session through chunked prefill and three trees in common batches.

    A session opens with room for its prompt and `room` tokens more.
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
        logits = chain.run({name: made for name, (made, _) in trees.items()})
        for name, (_, ids) in trees.items():
            text = texts[name]
            for row, node in enumerate(ids):
                whole = torch.tensor([[text.tokens[i] for i in text.path(node)]])
                plain = model(whole, use_cache=False).logits[0, -1]
                worst = max(worst, float((plain - logits[name][row]).abs().max()))
            end = int(random.choice(ids))
            commits[name] = [i for i in text.path(end) if i in ids]
    return worst


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Attention:
    """Everything here holds of every adapter."""
    return ADAPTERS[request.param]()


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_a_cut_model_equal_the_plain_model(family: str, cut_in_three: Cut) -> None:
    model = tiny_model(family)
    chain = cut_in_three(model)
    for span in chain.models:
        assert check_family(span).worst_difference < TOLERANCE
    # The long session runs past every window, and past Phi-3's original context of 32; the short one's room stays
    # within it, because the room a session opens with decides which factors longrope gives it.
    assert worst_difference(model, chain, {"short": 9, "long": 61}, size=6, room=23) < TOLERANCE
    for span in chain.models:
        span.store.check()


class TestPlantedMistakes:
    """What the comparison above must catch."""

    def test_a_crown_node_that_sees_its_sibling(self, cut_in_three: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
        def seeing_all(*arguments: Any) -> batch.SegmentMetadata:
            meta = honest(*arguments)
            meta.visible = torch.tril(torch.ones_like(meta.visible))
            return meta

        honest = batch._segment_metadata
        monkeypatch.setattr(batch, "_segment_metadata", seeing_all)
        model = tiny_model("llama")
        assert worst_difference(model, cut_in_three(model), {"one": 9}) > TOLERANCE

    def test_a_live_page_used_twice(self, cut_in_three: Cut) -> None:
        model = tiny_model("llama")
        chain = cut_in_three(model)
        pool = chain.models[1].store.pool
        allocate = pool.allocate
        pool.allocate = lambda count, after=None: allocate(count, after) and list(range(count))  # type: ignore[method-assign]
        assert worst_difference(model, chain, {"one": 9, "two": 12}) > TOLERANCE
        with pytest.raises(AssertionError, match="lost or owned twice"):
            chain.models[1].store.check()

    def test_a_window_one_too_wide(self, cut_in_three: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = batch.SegmentMetadata.visible_keys
        monkeypatch.setattr(
            batch.SegmentMetadata, "visible_keys", lambda meta, window: honest(meta, window and window + 1)
        )
        model = tiny_model("mistral")
        assert worst_difference(model, cut_in_three(model), {"one": 61}) > TOLERANCE

    def test_the_proof_at_load_catches_one_too(self, cut_in_three: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
        chain = cut_in_three(tiny_model("gemma2"))
        honest = batch.SegmentMetadata.visible_keys
        monkeypatch.setattr(batch.SegmentMetadata, "visible_keys", lambda meta, window: honest(meta, None))
        with pytest.raises(UnsupportedModel, match=r"'gemma2'.*differs from plain attention.*Supported: Llama"):
            check_family(chain.models[0])
