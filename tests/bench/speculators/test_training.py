"""Training of a speculator on a tiny target: the loss falls, and an interrupted run ends with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.node.conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.texts import QUESTIONS
from treeswarm_bench.speculators.learning import HeadLearner
from treeswarm_bench.speculators.prompts import chat_questions
from treeswarm_bench.speculators.reads import KeptReadings, TextReading
from treeswarm_bench.speculators.samples import InputTexts, PromptSource, padded, read_input_texts
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_bench.speculators.training import SpeculatorTraining, TargetIdentity, TrainingPlan
from treeswarm_client.prompt_encoder import PromptEncoder
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.files import WEIGHTS, read_speculator_config
from treeswarm_node.speculator.seam import SpeculationRequest

WINDOW = 40
PLAN = TrainingPlan(seed=1, minutes=1.0, window=WINDOW, taps=(2, 3), chats=False, own_texts=64, steps=24)


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encoder() -> PromptEncoder:
    """Return a tokenizer of characters."""
    vocabulary = {chr(i): i for i in range(199)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PromptEncoder("tiny", tokenizer, None)


def decided_model() -> PreTrainedModel:
    """Return a tiny Llama with a distribution that is not nearly flat, as a random model's is."""
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data *= 10
    return model


def make(out: Path, *, plan: TrainingPlan = PLAN, stop_at: int | None = None) -> SpeculatorTraining:
    """Return a training of a tiny Llama, which is stopped once that step is saved."""
    random = np.random.default_rng(0)
    texts = InputTexts(random.integers(0, 199, 600), random.integers(0, 199, 200))
    training = SpeculatorTraining(
        TappedTarget(decided_model(), (2, 3)),
        TargetIdentity("c" * 64, "w" * 64),
        texts,
        PromptSource(encoder(), texts, chats=False),
        replace(plan, own_texts=0, steps=0),
        out,
        report=lambda _: None,
        clock=lambda: 0.0,
    )
    # What the clock would decide is given, so that no time matters.
    training.plan = replace(training.plan, own_texts=plan.own_texts, steps=plan.steps)
    if stop_at is not None:
        _stop_at(training, stop_at)
    return training


def _stop_at(training: SpeculatorTraining, last: int) -> None:
    """Let a training end as if it were killed after it has saved a step."""
    make_reading = training._reading

    def stop(step: int, learner: HeadLearner, own: KeptReadings) -> TextReading:
        if step == last:
            training._save(learner, step)
            raise Stopped
        return make_reading(step, learner, own)

    training._reading = stop  # type: ignore[method-assign]


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = make(tmp_path / "whole").run()
    with pytest.raises(Stopped):
        make(tmp_path / "parts", stop_at=5).run()
    with pytest.raises(Stopped):
        make(tmp_path / "parts", stop_at=17).run()
    assert make(tmp_path / "parts").run() == config
    whole, parts = (load_file(tmp_path / folder / WEIGHTS) for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(BadRequest, match="holds a training with other settings"):
        make(tmp_path / "parts", plan=replace(PLAN, seed=2))


def test_loss_falls_and_the_head_comes_to_agree(tmp_path: Path) -> None:
    """A few texts are learned by heart: a random target has no rules that hold for others."""
    training = make(tmp_path)
    _, own = training._own_texts()
    learner, texts = training._learner(own), np.arange(6)
    few = KeptReadings(training.target, learner.vocabulary, own).of(texts)
    before, agreement = float(learner.loss(few).detach()), learner.agreement([few])
    for step in range(60):
        learner.learn(few, step / 60)
    after = float(learner.loss(few).detach())
    assert after < 0.6 * before
    assert all(late > early + 0.3 for early, late in zip(agreement, learner.agreement([few]), strict=True))


def test_a_trained_head_scores_in_the_node_as_in_training(tmp_path: Path) -> None:
    training = make(tmp_path)
    training.run()
    target = training.target
    speculator = AutoregressiveSpeculator.load(tmp_path, target.lm_head, is_tied=False, dtype=torch.float32)
    assert read_speculator_config(tmp_path).taps == (2, 3)
    text = np.random.default_rng(3).integers(0, 199, 20)
    states, _ = target.read(torch.from_numpy(text)[None])
    memory = speculator.new_memory()
    asked = SpeculationRequest(memory, 0, states[0, :-1], text[1:], SamplingSettings(), 16)
    *_, tree = speculator.propose(asked)
    weights = speculator.weights
    (whole,) = speculator.head.unroll(states[:, :-1], weights.embedding[torch.from_numpy(text[1:])][None].float(), 1)
    assert int(tree.tokens[0]) == int(speculator.head.logits(whole[0, -1], weights.lm_head).argmax())


def test_questions_are_none_of_those_that_prove_a_speculator() -> None:
    learned, held_out = chat_questions(held_out=False), chat_questions(held_out=True)
    assert not {*learned, *held_out} & set(QUESTIONS)
    assert not set(learned) & set(held_out)
    assert len(held_out) >= 16
    assert len(learned) > 1000


def test_texts_that_end_soon_are_padded() -> None:
    samples = padded([[1] * 20, [2] * 50, [3] * 4], WINDOW)
    assert samples.lengths.tolist() == [20, WINDOW]
    tokens, real = samples.batch(np.array([0]))
    assert tokens.tolist() == [[1] * 20]
    assert bool(real.all())


def test_own_texts_are_read_from_files(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 40, "utf-8")
    (tmp_path / "skipped.bin").write_bytes(b"\0" * 100)
    texts = read_input_texts(encoder(), [tmp_path])
    assert len(texts.train) > 200
    assert len(texts.held_out) >= 16
    with pytest.raises(BadRequest, match="too short to train on"):
        read_input_texts(encoder(), [tmp_path / "none"])
