"""Every kind of speculator learns, is saved, and proposes in a node what its training computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.bench.speculators.test_training import PLAN, make

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.speculators.command import KINDS
from treeswarm_bench.speculators.kinds.block_heads import LatticeSpeculator
from treeswarm_bench.speculators.kinds.block_learning import BlockModule
from treeswarm_bench.speculators.kinds.table import TRAINED_KINDS, unrefined
from treeswarm_bench.speculators.kinds.token_mlp import MlpSpeculator
from treeswarm_bench.speculators.reads import KeptReadings
from treeswarm_node.speculator.parallel.speculator import ParallelSpeculator
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

NEW_KINDS = tuple(kind for kind in KINDS if kind != "autoregressive")
COUNT = 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a training, which has ended, of each new kind."""
    found = {}
    for kind in NEW_KINDS:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = make(folder, plan=replace(PLAN, steps=8, kind=kind))
        found[kind].run()
    return found


def load(training: Any) -> Speculator:
    """Load what a training wrote; its scores are those of the weights in bfloat16."""
    target = training.target
    return TRAINED_KINDS[training.plan.kind].load(training.out, target.lm_head, is_tied=False, dtype=torch.float32)


def text(training: Any) -> tuple[np.ndarray, torch.Tensor]:
    """Return tokens of a text, and its states up to the last but one."""
    tokens = np.random.default_rng(3).integers(0, 199, COUNT + 1)
    return tokens, training.target.read(torch.from_numpy(tokens)[None])[0][0, :-1]


def propose(
    speculator: Speculator, memory: Any, tokens: np.ndarray, states: torch.Tensor, start: int, end: int, **settings: Any
) -> SpeculatedTree:
    asked = SpeculationRequest(
        memory, start, states[start:end], tokens[start + 1 : end + 1], SamplingSettings(**settings), 24
    )
    *_, tree = speculator.propose(asked)
    return tree


def test_the_command_knows_the_kinds_of_the_table() -> None:
    assert set(KINDS) == set(TRAINED_KINDS)


@pytest.mark.parametrize("kind", NEW_KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_read_in_parts_gives_the_same_tree(trained: dict[str, Any], kind: str, temperature: float) -> None:
    """A kind reads no more rows than its window says, and its trees are connected, best first and repeatable."""
    speculator, (tokens, states) = load(trained[kind]), text(trained[kind])
    whole = propose(speculator, speculator.new_memory(), tokens, states, 0, COUNT, temperature=temperature)
    memory, read = speculator.new_memory(), 0
    for end in (7, 8, 12, COUNT):
        start = max(read, end - speculator.window)
        parts = propose(speculator, memory, tokens, states, start, end, temperature=temperature)
        read = end
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.parents.tolist() == whole.parents.tolist()
    assert (whole.parents < np.arange(len(whole))).all()
    assert (np.diff(whole.scores, prepend=0) <= 0).all()
    assert len(set(zip(whole.parents.tolist(), whole.tokens.tolist(), strict=True))) == len(whole) == 24
    assert whole.parents.max() >= 0


def second_level(tree: SpeculatedTree) -> tuple[int, list[int]]:
    """Return the best node that has a parent, and the tokens of its path."""
    node = int(np.flatnonzero(tree.parents >= 0)[0])
    return node, [int(tree.tokens[tree.parents[node]]), int(tree.tokens[node])]


def test_a_path_of_the_mlp_scores_as_its_unrolled_steps(trained: dict[str, Any]) -> None:
    training = trained["mlp"]
    speculator, (tokens, states) = cast(MlpSpeculator, load(training)), text(training)
    tree = propose(speculator, None, tokens, states, 0, COUNT)
    node, path = second_level(tree)
    embedded = speculator.weights.embed(np.array([*tokens[1:], path[0]]))
    steps = speculator.head.unroll(torch.cat([states, states[-1:]])[None], embedded, 2)
    logits = [speculator.head.logits(steps[i][0, COUNT - 1 + i], speculator.weights.lm_head) for i in range(2)]
    assert float(tree.scores[node]) == pytest.approx(score(logits, path, speculator.config.greedy_tau), abs=1e-4)


@pytest.mark.parametrize("kind", ["lattice", "parallel"])
def test_an_unrefined_path_scores_as_the_block(trained: dict[str, Any], kind: str) -> None:
    training = trained[kind]
    loaded, (tokens, states) = load(training), text(training)
    speculator = cast(LatticeSpeculator | ParallelSpeculator, unrefined(loaded))
    tree = propose(speculator, speculator.new_memory(), tokens, states, 0, COUNT)
    node, path = second_level(tree)
    head = cast(BlockModule, speculator.head)
    block = head.block(states[None], speculator.weights.embed(tokens[1:]))[0, -1]
    logits = list(head.logits(block, speculator.weights.lm_head)[:2])
    assert float(tree.scores[node]) == pytest.approx(score(logits, path, speculator.config.greedy_tau), abs=1e-3)


def score(logits: list[torch.Tensor], path: list[int], tau: float) -> float:
    """Return the log-score of a path by the logits of its levels."""
    return sum(float(torch.log_softmax(row / tau, -1)[token]) for row, token in zip(logits, path, strict=True))


def test_the_light_step_of_the_parallel_kind_corrects_as_in_training(trained: dict[str, Any]) -> None:
    """Two children of one node differ by what the followed result gives them."""
    training = trained["parallel"]
    speculator, (tokens, states) = cast(ParallelSpeculator, load(training)), text(training)
    # The step is made strong enough to matter: eight steps of training hardly move it.
    torch.manual_seed(0)
    speculator.head.step_out.weight.data.normal_(0, 0.3)
    tree = propose(speculator, speculator.new_memory(), tokens, states, 0, COUNT)
    parents = [p for p in set(tree.parents.tolist()) if p >= 0 and tree.parents.tolist().count(p) > 1]
    first, second = np.flatnonzero(tree.parents == parents[0])[:2].tolist()
    depth, above = 0, int(tree.parents[first])
    while above >= 0:
        depth, above = depth + 1, int(tree.parents[above])
    result = speculator.head.block(states[None], speculator.weights.embed(tokens[1:]))[0, -1, depth]
    followed = speculator.head.followed(result, speculator.weights.embed(tree.tokens[[parents[0]]])[0, 0])
    logits = speculator.head.logits(followed, speculator.weights.lm_head) / speculator.config.greedy_tau
    difference = float(logits[tree.tokens[first]] - logits[tree.tokens[second]])
    assert float(tree.scores[first] - tree.scores[second]) == pytest.approx(difference, abs=1e-3)
    plain = propose(unrefined(speculator), speculator.new_memory(), tokens, states, 0, COUNT)  # type: ignore[arg-type]
    assert plain.tokens.tolist() != tree.tokens.tolist()


@pytest.mark.parametrize("kind", ["lattice", "parallel"])
def test_blocks_learn_a_few_texts_by_heart(tmp_path: Path, kind: str) -> None:
    training = make(tmp_path, plan=replace(PLAN, kind=kind))
    _, own = training._own_texts()
    learner = training._learner(own)
    few = KeptReadings(training.target, learner.vocabulary, own).of(np.arange(4))
    before, agreement = float(learner.loss(few).detach()), learner.agreement([few])
    for step in range(40):
        learner.learn(few, step / 40)
    assert float(learner.loss(few).detach()) < 0.75 * before
    assert len(agreement) == learner.levels == 8
    assert np.mean(learner.agreement([few])) > np.mean(agreement) + 0.2
