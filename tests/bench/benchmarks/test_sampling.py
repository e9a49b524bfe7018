"""Shared noise beside rejection, on tiny random models: the texts are the target's own, whatever the draft."""

import copy

import numpy as np
import pytest
import torch
from tests.client.drafters.conftest import VOCAB, drafter_of, noised, plain_logprobs, tiny_model

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.sampling.rejection import ROOT
from treeswarm_bench.benchmarks.sampling.sampled_trees import BestFirstShape, Shape, StaticShape
from treeswarm_bench.benchmarks.sampling.sampling import (
    SEED,
    ArgmaxRule,
    GeneratedText,
    RejectionRule,
    bench_sampling,
    generate,
    ratio_of,
)
from treeswarm_bench.benchmarks.sampling.tree_model import CachedModel
from treeswarm_client.drafters.model import DraftOptions

PROMPT = [5, 3, 40, 7, 7, 19, 22]
TEMPERATURE, SAMPLE = 0.8, 3


@pytest.mark.parametrize("shared", [True, False])
def test_our_text_is_the_targets_argmax_with_noise(shared: bool) -> None:
    model = tiny_model()
    rule = ArgmaxRule(drafter_of(tiny_model(num_hidden_layers=1), DraftOptions(shared_noise=shared)), VOCAB)
    rule.begin(PROMPT, TEMPERATURE, SAMPLE)
    text = generate(CachedModel.of(copy.deepcopy(model)), rule, PROMPT, 12, 20)
    settings = SamplingSettings(temperature=TEMPERATURE, seed=SEED, sample=SAMPLE)
    so_far = list(PROMPT)
    for token in text.tokens:
        assert token == noised(plain_logprobs(model, so_far, settings), len(so_far), settings).argmax()
        so_far.append(token)


@pytest.mark.parametrize("shape", [StaticShape(), BestFirstShape()], ids=["static", "best-first"])
def test_draft_that_is_the_target_is_never_rejected(shape: Shape) -> None:
    """If a row, a position or a mask of either cache were wrong, the two would differ."""
    model = tiny_model()
    rule = RejectionRule(CachedModel.of(copy.deepcopy(model)), shape)
    rule.begin(PROMPT, TEMPERATURE, SAMPLE)
    target = CachedModel.of(copy.deepcopy(model))
    text = generate(target, rule, PROMPT, 6, 30)
    updated = rule.shape.accepted[0] / rule.shape.tried[0]  # type: ignore[attr-defined]
    assert np.max(updated) > np.max(shape.accepted[0] / shape.tried[0])  # type: ignore[attr-defined]
    rejected = (rule.shape.tried - shape.tried) - (rule.shape.accepted - shape.accepted)  # type: ignore[attr-defined]
    assert rejected.sum() == pytest.approx(0.0)
    assert text.per_round > 2.0


def test_tree_has_the_logits_of_its_separate_paths() -> None:
    model = tiny_model()
    cached = CachedModel.of(copy.deepcopy(model))
    settings = SamplingSettings(temperature=1.0)
    cached.begin(PROMPT[:-1])
    cached.below([ROOT], PROMPT[-1:])
    logprobs = torch.log_softmax(cached.below([0, 0, 1, 2], [9, 8, 7, 7]), -1)
    for row, path in zip(logprobs, ([9], [8], [9, 7], [8, 7]), strict=True):
        np.testing.assert_allclose(row, plain_logprobs(model, [*PROMPT, *path], settings), atol=2e-5)
    cached.advance([0, 2, 4], [11])
    after = torch.log_softmax(cached.below([ROOT], [12]), -1)[0]
    np.testing.assert_allclose(after, plain_logprobs(model, [*PROMPT, 8, 7, 11, 12], settings), atol=2e-5)


def test_ratio_pairs_prompts() -> None:
    theirs = [GeneratedText([0] * 10, 10), GeneratedText([0] * 30, 10)]
    ours = [GeneratedText([0] * 20, 10), GeneratedText([0] * 60, 10)]
    assert ratio_of(ours, theirs).as_dict() == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert ratio_of(ours[:1], theirs[:1]).as_dict() == {"value": 2.0, "low": None, "high": None}


async def test_temperature_zero_is_refused() -> None:
    with pytest.raises(BadRequest, match="above 0"):
        await bench_sampling(BenchSetup(), temperatures=(0.0, 1.0))
