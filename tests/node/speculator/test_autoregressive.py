"""The head computes in steps what it computes over a whole text, and its files are checked before they are used."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from treeswarm.errors import ModelError
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import gumbel_row
from treeswarm_node.model.quantization.quantized_linear import QuantizedLinear
from treeswarm_node.model.quantization.weight_kinds import has_integer_products
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator, head_shape, known_runs
from treeswarm_node.speculator.files import CONFIG, WEIGHTS, SpeculatorConfig, read_speculator_config, save_speculator
from treeswarm_node.speculator.guesses import HeadWeights
from treeswarm_node.speculator.head import SpeculatorHead
from treeswarm_node.speculator.packing import packed, unpacked
from treeswarm_node.speculator.seam import RowSums, SpeculatedTree, SpeculationRequest

VOCAB, HIDDEN = 50, 16
CONFIG_OF_TEST = SpeculatorConfig("autoregressive", "c", "w", HIDDEN, VOCAB, (1, 2), 4, 2, 4, 32, window=9)
TOLERANCE = 1e-5


def make(config: SpeculatorConfig = CONFIG_OF_TEST) -> AutoregressiveSpeculator:
    torch.manual_seed(0)
    head = SpeculatorHead(head_shape(config))
    for parameter in head.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    embedding = torch.randn(VOCAB, HIDDEN)
    return AutoregressiveSpeculator(config, head, HeadWeights(torch.arange(VOCAB), embedding, embedding))


def text(count: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Return tokens and states of a text; the states are those of any target."""
    torch.manual_seed(seed)
    return np.random.default_rng(seed).integers(0, VOCAB, count + 1), torch.randn(count, 2 * HIDDEN)


def request(
    memory: Any,
    tokens: np.ndarray,
    states: torch.Tensor,
    start: int,
    end: int,
    settings: SamplingSettings | None = None,
    size: int = 40,
) -> SpeculationRequest:
    """Return a request that reads rows start up to, not including, end."""
    return SpeculationRequest(
        memory, start, states[start:end], tokens[start + 1 : end + 1], settings or SamplingSettings(), size
    )


def propose(speculator: AutoregressiveSpeculator, asked: SpeculationRequest) -> SpeculatedTree:
    *_, tree = speculator.propose(asked)
    return tree


def first_children(tree: SpeculatedTree) -> dict[int, float]:
    return {int(t): float(s) for p, t, s in zip(tree.parents, tree.tokens, tree.scores, strict=True) if p < 0}


@pytest.mark.parametrize("cuts", [(24,), (1, 2, 3, 24), (7, 20, 24), tuple(range(1, 25))])
def test_rows_read_in_parts_give_what_the_whole_text_gives(cuts: tuple[int, ...]) -> None:
    """The texts are longer than the window."""
    speculator, (tokens, states) = make(), text(24)
    embedded = speculator.weights.embedding[torch.from_numpy(tokens[1:])]
    (whole,) = speculator.head.unroll(states[None], embedded[None], 1)
    memory = speculator.new_memory()
    for start, end in zip((0, *cuts), cuts, strict=False):
        asked = request(memory, tokens, states, start, end)
        memory.cut(start)
        part = speculator._read(memory, asked)
        assert torch.allclose(part, whole[0, start:end], atol=TOLERANCE)
    assert memory.end == 24
    assert memory.keys.shape[1] == 9


def test_a_path_of_the_tree_scores_as_the_unrolled_steps() -> None:
    """Every path of three nodes has the scores that three steps of training-time test give it."""
    speculator, (tokens, states) = make(), text(6)
    tree = propose(speculator, request(speculator.new_memory(), tokens, states, 0, 6))
    node = next(i for i in range(len(tree)) if tree.parents[i] >= 0 and tree.parents[tree.parents[i]] >= 0)
    path = [int(tree.parents[tree.parents[node]]), int(tree.parents[node]), node]
    followed = [*tokens, *(int(tree.tokens[i]) for i in path)]
    embedded = speculator.weights.embedding[torch.tensor(followed[1:])]
    padded = torch.cat([states, torch.zeros(len(followed) - 1 - len(states), 2 * HIDDEN)])
    steps = speculator.head.unroll(padded[None], embedded[None], 3)
    expected = 0.0
    for level, place in enumerate(path):
        logits = speculator.head.logits(steps[level][0, 5 + level], speculator.weights.lm_head)
        expected += float(torch.log_softmax(logits / speculator.config.greedy_tau, -1)[tree.tokens[place]])
        assert float(tree.scores[place]) == pytest.approx(expected, abs=1e-4)


def test_trees_are_best_first_and_connected() -> None:
    speculator, (tokens, states) = make(), text(6)
    for tree in speculator.propose(request(speculator.new_memory(), tokens, states, 0, 6)):
        assert (tree.parents < np.arange(len(tree))).all()
        assert (np.diff(tree.scores, prepend=0) <= 0).all()
        assert len(set(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))) == len(tree) <= 40


def test_an_abandoned_tree_leaves_no_trace() -> None:
    speculator, (tokens, states) = make(), text(12)
    memory, other = speculator.new_memory(), speculator.new_memory()
    next(iter(speculator.propose(request(memory, tokens, states, 0, 8))))
    abandoned = propose(speculator, request(memory, tokens, states, 8, 12))
    undisturbed = propose(speculator, request(other, tokens, states, 0, 12))
    assert first_children(abandoned) == pytest.approx(first_children(undisturbed), abs=1e-4)


def test_rows_that_were_cut_off_do_not_count() -> None:
    """After a repair, rows from before are read again with other tokens after them."""
    speculator, (tokens, states) = make(), text(12)
    memory = speculator.new_memory()
    wrong_tokens, wrong_states = text(12, seed=1)
    propose(speculator, request(memory, tokens, states, 0, 6))
    propose(speculator, request(memory, wrong_tokens, wrong_states, 6, 12))
    again = propose(speculator, request(memory, tokens, states, 6, 12))
    fresh = propose(speculator, request(speculator.new_memory(), tokens, states, 0, 12))
    assert first_children(again) == pytest.approx(first_children(fresh), abs=1e-4)


def test_a_gap_begins_a_new_memory() -> None:
    speculator, (tokens, states) = make(), text(12)
    memory = speculator.new_memory()
    propose(speculator, request(memory, tokens, states, 0, 4))
    after_gap = propose(speculator, request(memory, tokens, states, 6, 12))
    fresh = propose(speculator, request(speculator.new_memory(), tokens, states, 6, 12))
    assert first_children(after_gap) == pytest.approx(first_children(fresh), abs=1e-4)


def test_a_sampled_tree_is_ranked_with_the_targets_noise() -> None:
    speculator, (tokens, states) = make(replace(CONFIG_OF_TEST, sampled_tau=1.0)), text(6)
    settings = SamplingSettings(temperature=0.7, seed=11, sample=2)
    asked = request(speculator.new_memory(), tokens, states, 0, 6, settings)
    tree = propose(speculator, asked)
    memory = speculator.new_memory()
    result = speculator._read(memory, request(memory, tokens, states, 0, 6))
    logits = speculator.head.logits(result[-1], speculator.weights.lm_head)
    # The tokens below the root are those of position 7: the root itself is the token after row 5.
    noised = logits / 0.7 + torch.from_numpy(gumbel_row(11, 2, 7, VOCAB))
    assert int(tree.tokens[0]) == int(noised.argmax())
    assert float(tree.scores[0]) == pytest.approx(float(torch.log_softmax(noised, -1).max()), abs=1e-4)


def test_a_small_vocabulary_guesses_only_its_tokens() -> None:
    speculator, (tokens, states) = make(), text(6)
    ids = torch.tensor([3, 7, 20, 41])
    weights = speculator.weights
    small = AutoregressiveSpeculator(
        CONFIG_OF_TEST, speculator.head, HeadWeights(ids, weights.lm_head[ids], weights.embedding)
    )
    for settings in (SamplingSettings(), SamplingSettings(temperature=1.0, seed=3)):
        tree = propose(small, request(small.new_memory(), tokens, states, 0, 6, settings))
        assert set(tree.tokens.tolist()) <= {3, 7, 20, 41}


def with_sums(
    speculator: AutoregressiveSpeculator, asked: SpeculationRequest, known: Sequence[bool]
) -> SpeculationRequest:
    """Return the request as a tail gets it that has the last tap alone; rows may lack what the other one adds."""
    part, mask = speculator.tap_slice, np.array(known)
    values = part.contribution(asked.states[:, :HIDDEN], part.taps[:1])
    values[torch.from_numpy(~mask)] = 0
    return replace(asked, states=asked.states[:, HIDDEN:], sums=RowSums(values, mask, part.taps[1:]))


def test_taps_of_other_nodes_count_as_its_own() -> None:
    speculator, (tokens, states) = make(), text(12)
    asked = request(speculator.new_memory(), tokens, states, 0, 12)
    alone = propose(speculator, asked)
    together = propose(speculator, with_sums(speculator, replace(asked, memory=speculator.new_memory()), [True] * 12))
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.scores == pytest.approx(alone.scores, abs=1e-4)


def test_a_row_without_a_sum_goes_on_from_the_row_before() -> None:
    """It is computed as the head computes its own guesses: as the second step of training-time test."""
    speculator, (tokens, states) = make(), text(6)
    embedded = speculator.weights.embedding[torch.from_numpy(tokens[1:])]
    steps = speculator.head.unroll(states[None], embedded[None], 3)
    for unknown in (1, 2):
        known = [True] * (6 - unknown) + [False] * unknown
        asked = with_sums(speculator, request(speculator.new_memory(), tokens, states, 0, 6), known)
        result = speculator._read(asked.memory, asked)
        assert torch.allclose(result[-1], steps[unknown][0, -1], atol=TOLERANCE)
        assert asked.memory.end == 6


@pytest.mark.parametrize(
    ("known", "runs"),
    [("1", [(0, 1)]), ("111", [(0, 3)]), ("1100", [(0, 2), (2, 3), (3, 4)]), ("1011", [(0, 1), (1, 2), (2, 4)])],
)
def test_known_rows_are_read_in_one_forward(known: str, runs: list[tuple[int, int]]) -> None:
    assert known_runs(np.array([row == "1" for row in known])) == runs


# ---------------------------------------------------------------- files


def saved(folder: Path, **changes: Any) -> Path:
    speculator = make()
    save_speculator(folder, replace(CONFIG_OF_TEST, **changes), speculator.head.state_dict())
    return folder


def load(folder: Path, lm_head: torch.Tensor | None = None, *, is_tied: bool = True) -> AutoregressiveSpeculator:
    head = make().weights.lm_head if lm_head is None else lm_head
    return AutoregressiveSpeculator.load(folder, head, is_tied=is_tied, dtype=torch.float32)


def test_a_saved_speculator_proposes_the_same_tree(tmp_path: Path) -> None:
    speculator, (tokens, states) = make(), text(6)
    speculator.head.load_state_dict(unpacked(packed(speculator.head.state_dict())))
    loaded = load(saved(tmp_path))
    before, after = (propose(s, request(s.new_memory(), tokens, states, 0, 6)) for s in (speculator, loaded))
    assert before.tokens.tolist() == after.tokens.tolist()
    assert before.scores.tolist() == after.scores.tolist()
    assert read_speculator_config(tmp_path) == CONFIG_OF_TEST


def test_eight_bits_compute_with_the_rounded_weights() -> None:
    tokens, states = text(12)
    plain, rounded = make(), make()
    fuse = rounded.head.fuse.weight
    weights = {name: value for name, value in plain.head.state_dict().items() if name != "fuse.weight"}
    plain.head.load_state_dict(unpacked(packed(weights)), strict=False)
    plain.weights = replace(plain.weights, lm_head=unpacked(packed({"": plain.weights.lm_head}))[""])
    rounded.compute_in_eight_bits()
    before, after = (propose(one, request(one.new_memory(), tokens, states, 0, 12)) for one in (plain, rounded))
    kinds = {type(module) for module in rounded.head.modules()}
    assert (QuantizedLinear in kinds) == (rounded.weights.integers is not None) == has_integer_products()
    assert rounded.head.fuse.weight is fuse
    assert before.tokens[:8].tolist() == after.tokens[:8].tolist()
    # Where there are no integer products, the weights are not rounded at all.
    np.testing.assert_allclose(before.scores[:8], after.scores[:8], atol=1e-3 if has_integer_products() else 0.2)


def test_processors_without_integer_products_keep_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeswarm_node.speculator.guesses.has_integer_products", lambda: False)
    tokens, states = text(12)
    plain, same = make(), make()
    same.compute_in_eight_bits()
    trees = [propose(one, request(one.new_memory(), tokens, states, 0, 12)) for one in (plain, same)]
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].scores.tolist() == trees[1].scores.tolist()


@pytest.mark.parametrize(
    "changes",
    [{"taps": ()}, {"taps": (2, 1)}, {"heads": 3}, {"head_dim": 3}, {"hidden_size": 1 << 30}, {"kind": "medusa"}],
)
def test_a_config_that_cannot_be_built_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"describes no speculator|are not known here"):
        load(saved(tmp_path, **changes))


def test_weights_of_another_shape_or_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ModelError, match="this model's has 51 and 16"):
        load(tmp_path, torch.zeros(51, HIDDEN))
    with pytest.raises(ModelError, match="lacks the target's embedding"):
        load(tmp_path, is_tied=False)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "vocabulary": torch.tensor([1, VOCAB])}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="outside the vocabulary"):
        load(tmp_path)
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="are not those of its config"):
        load(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no speculator in"):
        load(tmp_path)
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps(content | {"version": 2}), "utf-8")
    with pytest.raises(ModelError, match="has version 2, this release reads version 1"):
        load(tmp_path)
