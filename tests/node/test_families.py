"""Every supported family: two sessions in one batch, trees against the plain model along every path."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel
from treeswarm_node import batch
from treeswarm_node.proof import prove

from .conftest import FAMILIES, SpanChain, append_of, tiny_model

TOLERANCE = 1e-4
Cut = Callable[[PreTrainedModel], SpanChain]


class Text:
    """One session's text and tree, kept by hand: ids are positions in `tokens` plus one."""

    def __init__(self, prompt: list[int], random: np.random.Generator, vocab: int) -> None:
        self.trunk = list(range(1, len(prompt) + 1))
        self.tokens = dict(zip(self.trunk, prompt, strict=True))
        self.parents: dict[int, int] = {i: i - 1 for i in self.trunk}
        self.random, self.vocab, self.next_id, self.seq = random, vocab, len(prompt) + 1, 0

    def prefill(self, chunk: int) -> list[Any]:
        """The prompt's appends in chunks."""
        appends = []
        for start in range(0, len(self.trunk), chunk):
            ids = self.trunk[start : start + chunk]
            tokens = [self.tokens[i] for i in ids]
            appends.append(append_of(self._count(), ids[0], [i - 1 for i in ids], tokens, prefill=True))
        return appends

    def tree(self, size: int, commit: list[int]) -> tuple[Any, list[int]]:
        """A random tree below the new tip."""
        self.trunk += commit
        ids = list(range(self.next_id, self.next_id + size))
        for i in ids:
            self.parents[i] = int(self.random.choice([self.trunk[-1], *range(self.next_id, i)]))
            self.tokens[i] = int(self.random.integers(self.vocab))
        self.next_id += size
        made = append_of(
            self._count(), ids[0], [self.parents[i] for i in ids], [self.tokens[i] for i in ids], commit=commit
        )
        return made, ids

    def path(self, node: int) -> list[int]:
        line = []
        while node:
            line.append(node)
            node = self.parents[node]
        return line[::-1]

    def _count(self) -> int:
        self.seq += 1
        return self.seq - 1


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


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_a_cut_model_equal_the_plain_model(family: str, cut_in_three: Cut) -> None:
    model = tiny_model(family)
    chain = cut_in_three(model)
    for span in chain.models:
        assert prove(span).worst < TOLERANCE
    # The long session runs past every window, and past Phi-3's original context of 32; the short one's room stays
    # within it, because the room a session opens with decides which factors longrope gives it.
    assert worst_difference(model, chain, {"short": 9, "long": 61}, size=6, room=23) < TOLERANCE
    for span in chain.models:
        span.store.check()


class TestPlantedMistakes:
    """What the comparison above must catch."""

    def test_a_crown_node_that_sees_its_sibling(self, cut_in_three: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
        def seeing_all(*arguments: Any) -> batch.SegmentMeta:
            meta = honest(*arguments)
            meta.visible = torch.tril(torch.ones_like(meta.visible))
            return meta

        honest = batch._segment_meta
        monkeypatch.setattr(batch, "_segment_meta", seeing_all)
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
        honest = batch.SegmentMeta.reach
        monkeypatch.setattr(batch.SegmentMeta, "reach", lambda meta, window: honest(meta, window and window + 1))
        model = tiny_model("mistral")
        assert worst_difference(model, cut_in_three(model), {"one": 61}) > TOLERANCE

    def test_the_proof_at_load_catches_one_too(self, cut_in_three: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
        chain = cut_in_three(tiny_model("gemma2"))
        honest = batch.SegmentMeta.reach
        monkeypatch.setattr(batch.SegmentMeta, "reach", lambda meta, window: honest(meta, None))
        with pytest.raises(UnsupportedModel, match=r"'gemma2'.*differs from plain attention.*Supported: Llama"):
            prove(chain.models[0])
