"""One conformance suite for all drafters; trees agree with brute force, and τ with what generated the labels."""

import itertools
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from treeswarm.errors import BadRequest, Mismatch, ModelError
from treeswarm.model_files import HubOptions, resolve_model
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import walk
from treeswarm_client.drafters import choose_drafter, load_drafter
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.model_tree import ModelTree, ModelTreeOptions
from treeswarm_client.drafters.none import NoneDrafter
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, Drafter, DraftTree, Verification
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_client.drafters.tail.tail_drafter import TailDrafter
from treeswarm_client.drafters.tau import GRID, TauEstimate
from treeswarm_client.drafters.token_recycling import TokenRecyclingDrafter
from treeswarm_client.drafters.union import UnionDrafter
from treeswarm_client.generation.drafter_pool import CopyableDrafter

VOCAB, CONTEXT = 61, 96
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SETTINGS = [SamplingSettings(), SamplingSettings(temperature=1.0, seed=5), SamplingSettings(temperature=0.7, seed=6)]


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


class FedTailDrafter(TailDrafter):
    """A drafter that gets a tree of the tail below every root: the same one for the same text."""

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        super().begin(prompt, settings)
        self._text = list(prompt)
        self.receive(random_tree(self._text))

    def observe(self, verification: Verification) -> None:
        super().observe(verification)
        tokens = verification.tree.tokens
        self._text += [*(int(tokens[node]) for node in verification.accepted), verification.bonus]
        self.receive(random_tree(self._text))

    def copy_for_new_generation(self) -> "FedTailDrafter":
        return FedTailDrafter()


def random_tree(text: Sequence[int]) -> DraftTree:
    """Return a tree of up to 50 nodes that depends on the text alone."""
    random = np.random.default_rng(list(text))
    places: dict[tuple[int, int], int] = {}
    for _ in range(50):
        node = int(random.integers(-1, len(places))), int(random.integers(VOCAB))
        places.setdefault(node, len(places))
    parents, tokens = (np.array(column, np.int64) for column in zip(*places, strict=True))
    return DraftTree(parents, tokens, np.sort(-random.random(len(places)).astype(np.float32))[::-1].copy())


Make = Callable[[], Drafter]


OPTIONS = {
    "model": DraftOptions(),
    "chain": DraftOptions(chain=True),
    "raw": DraftOptions(ranking="raw", shared_noise=False),
}


def maker(kind: str, draft_folder: Path) -> Make:
    """Return a function that makes a drafter of this kind."""

    def model() -> Drafter:
        return ModelDrafter.load(draft_folder, options=OPTIONS.get(kind, DraftOptions()))

    makers: dict[str, Make] = {
        "none": NoneDrafter,
        "suffix": SuffixDrafter,
        "recycling": TokenRecyclingDrafter,
        "ngram": lambda: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter()]),
        "tail": FedTailDrafter,
        "tail+ngram": lambda: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter(), FedTailDrafter()]),
        "all": lambda: UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter(), model()]),
    }
    return makers.get(kind, model)


@pytest.fixture(params=["none", *OPTIONS, "suffix", "recycling", "ngram", "tail", "tail+ngram", "all"])
def make(request: pytest.FixtureRequest, draft_folder: Path) -> Make:
    return maker(request.param, draft_folder)


@pytest.fixture(params=list(OPTIONS))
def make_model(request: pytest.FixtureRequest, draft_folder: Path) -> Make:
    return maker(request.param, draft_folder)


def check_tree(tree: DraftTree, size: int, depth: int) -> None:
    assert len(tree) <= size
    assert len({*zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)}) == len(tree)
    depths: list[int] = []
    for i, parent in enumerate(tree.parents.tolist()):
        assert -1 <= parent < i
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
        if parent >= 0:
            assert tree.scores[i] <= tree.scores[parent]
    assert max(depths, default=0) <= depth
    assert (np.diff(tree.scores) <= 0).all()


def answer(tree: DraftTree, random: np.random.Generator) -> tuple[NDArray[np.int64], list[int], int]:
    """Return answers, accepted path and bonus of a random target that often agrees with the tree."""
    answers = random.integers(0, VOCAB, len(tree) + 1)
    for i, parent in enumerate(tree.parents.tolist()):
        if random.random() < 0.5:
            answers[parent + 1] = tree.tokens[i]
    walked = walk(tree.parents, tree.tokens, answers)
    return answers, list(walked.accepted), walked.bonus


def finish(drafter: Drafter, text: list[int], shipped: DraftTree, random: np.random.Generator) -> list[int]:
    """Let the target answer a tree, half the time only where the walk needs it.  Returns the text afterwards."""
    answers, accepted, bonus = answer(shipped, random)
    best = np.empty((0, 0), np.int64)
    if drafter.alternatives:
        best = np.stack([random.permutation(VOCAB)[: drafter.alternatives] for _ in answers])
    if random.random() < 0.5:
        needless = np.ones(len(answers), np.bool_)
        needless[[0, *(node + 1 for node in accepted)]] = False
        answers[needless] = UNANSWERED
        best[needless[: len(best)]] = UNANSWERED
    drafter.observe(Verification(shipped, answers, accepted, bonus, best))
    return [*text, *(int(shipped.tokens[i]) for i in accepted), bonus]


def some_of(tree: DraftTree, random: np.random.Generator) -> DraftTree:
    """Return some nodes of a tree with all their ancestors, and one node that the tree does not have."""
    place: dict[int, int] = {-1: -1}
    kept: list[int] = []
    for i, parent in enumerate(tree.parents.tolist()):
        if parent in place and random.random() < 0.7:
            place[i] = len(kept)
            kept.append(i)
    parents = [place[int(tree.parents[i])] for i in kept]
    strange = next(token for token in range(VOCAB) if token not in tree.tokens[tree.parents == -1])
    return DraftTree(
        np.array([*parents, -1], np.int64),
        np.array([*tree.tokens[kept].tolist(), strange], np.int64),
        np.array([*tree.scores[kept].tolist(), -20.0], np.float32),
    )


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


def after_rounds(drafter: Drafter, rounds: int = 8, seed: int = 0) -> list[int]:
    """Let the drafter learn from a generation.  Returns its text."""
    random, text = np.random.default_rng(seed), [*PROMPT, *PROMPT[:4]]
    drafter.begin(text, SamplingSettings())
    text = finish(drafter, text, NO_TREE, random)
    for _ in range(rounds):
        text = finish(drafter, text, drafter.propose(12, 6), random)
    return text


def test_a_larger_tree_of_the_same_root_contains_the_smaller(make: Make) -> None:
    drafter = make()
    text, random = after_rounds(drafter), np.random.default_rng(5)
    for _ in range(4):
        small, middle, large = (drafter.propose(size, 6) for size in (4, 9, 30))
        for tree, size in ((small, 4), (middle, 9), (large, 30)):
            check_tree(tree, size, depth=6)
        assert paths(small) <= paths(middle) <= paths(large)
        assert len(drafter.propose(4, 6)) == len(small)
        text = finish(drafter, text, large, random)


def test_a_drafter_stops_soon_once_told_to(make: Make) -> None:
    """It returns what it has, and continues when it is asked again."""
    drafter = make()
    after_rounds(drafter)
    asked = 0

    def should_stop(_tokens_per_second: float) -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    hasty = drafter.propose(40, 6, should_stop)
    check_tree(hasty, 40, 6)
    patient = drafter.propose(40, 6)
    check_tree(patient, 40, 6)
    assert len(hasty) <= len(patient)
    assert asked <= 8
    if not isinstance(drafter, ModelDrafter | UnionDrafter):
        assert paths(hasty) <= paths(patient)


@pytest.mark.parametrize("seed", range(6))
def test_a_part_of_a_tree_may_be_shipped_with_other_nodes(make: Make, seed: int) -> None:
    drafter, random = make(), np.random.default_rng(seed)
    text = after_rounds(drafter, 3, seed)
    for _ in range(5):
        tree = drafter.propose(20, 8)
        check_tree(tree, 20, 8)
        text = finish(drafter, text, some_of(tree, random), random)


def test_a_drafter_follows_the_text_if_nothing_was_shipped(make: Make) -> None:
    drafter, random = make(), np.random.default_rng(0)
    text = after_rounds(drafter)
    for _ in range(5):
        text = finish(drafter, text, NO_TREE, random)
    check_tree(drafter.propose(9, 4), 9, 4)


def test_a_copy_has_what_was_learned_and_a_context_of_its_own(make: Make) -> None:
    """From then on neither changes what the other proposes."""
    drafter = make()
    text = after_rounds(drafter)
    assert isinstance(drafter, CopyableDrafter)
    before = drafter.propose(12, 6)
    other = drafter.copy_for_new_generation()
    random = np.random.default_rng(9)
    other.begin([1, 2, 3], SamplingSettings())
    other_text = [1, 2, 3]
    for _ in range(3):
        other_text = finish(other, other_text, other.propose(9, 5), random)
    assert drafter.propose(12, 6).tokens.tolist() == before.tokens.tolist()
    first, second = drafter.copy_for_new_generation(), drafter.copy_for_new_generation()
    for copied in (first, second):
        copied.begin(text, SamplingSettings())
    assert first.propose(12, 6).tokens.tolist() == second.propose(12, 6).tokens.tolist()


def test_a_new_generation_forgets_the_prompt_before(make: Make) -> None:
    used, fresh = make(), make()
    used.begin([7, 8, 9, 10, 11, 12, 7, 8, 9, 10], SamplingSettings())
    used.propose(5, 5)
    for drafter in (used, fresh):
        drafter.begin([50, 51, 8, 9], SamplingSettings())
    assert used.propose(5, 5).tokens.tolist() == fresh.propose(5, 5).tokens.tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_a_tree_after_rounds_equals_that_of_a_new_drafter(make: Make, settings: SamplingSettings, size: int) -> None:
    """What a model keeps between rounds changes nothing: the same context gives the same tree."""
    random, drafter = np.random.default_rng(size), make()
    text = list(PROMPT)
    drafter.begin(text, settings)
    for _ in range(6):
        tree = drafter.propose(size, depth=9)
        check_tree(tree, size, depth=9)
        if not isinstance(drafter, ModelDrafter | NoneDrafter):
            text = finish(drafter, text, tree, random)
            continue  # Such a drafter has learned meanwhile.
        fresh = make()
        if isinstance(fresh, ModelDrafter) and isinstance(drafter, ModelDrafter):
            fresh._tau_estimates = dict(drafter._tau_estimates)
        fresh.begin(text, settings)
        again = fresh.propose(size, depth=9)
        assert again.tokens.tolist() == tree.tokens.tolist()
        assert again.parents.tolist() == tree.parents.tolist()
        np.testing.assert_allclose(again.scores, tree.scores, atol=1e-4)
        text = finish(drafter, text, tree, random)


def test_a_new_prompt_that_shares_a_prefix_gives_the_same_trees(make: Make) -> None:
    used, fresh = make(), make()
    used.begin([*PROMPT, 7, 7, 7], SamplingSettings())
    used.propose(5, 5)
    for prompt in ([*PROMPT, 8, 8], PROMPT[:3], [9]):
        used.begin(prompt, SamplingSettings())
        fresh.begin(prompt, SamplingSettings())
        assert used.propose(5, 5).tokens.tolist() == fresh.propose(5, 5).tokens.tolist()


def test_trees_grow_below_texts_longer_than_the_context(make_model: Make) -> None:
    drafter = make_model()
    drafter.begin(list(range(VOCAB)) + [1] * (CONTEXT - VOCAB - 3), SamplingSettings())
    for _ in range(2 * CONTEXT):
        tree = drafter.propose(4, depth=50)
        check_tree(tree, 4, depth=50)
        assert len(tree) == 4
        drafter.observe(Verification(tree, np.zeros(len(tree) + 1, np.int64), [], 0))
    drafter.begin([1] * 500, SamplingSettings())
    drafter.observe(Verification(NO_TREE, np.zeros(1, np.int64), (), 0))
    assert len(drafter.propose(4, depth=50)) == 4


def test_no_size_or_no_depth_gives_an_empty_tree(make: Make) -> None:
    drafter = make()
    drafter.begin(PROMPT, SamplingSettings())
    assert len(drafter.propose(0, 5)) == len(drafter.propose(5, 0)) == 0


def test_a_draft_equal_to_the_target_is_always_right(draft_folder: Path) -> None:
    """With shared noise the tree's best path is the text that the target will choose, at any temperature."""
    from treeswarm.session.noise import gumbel_row

    target = LlamaForCausalLM.from_pretrained(draft_folder, dtype=torch.float32).eval()
    for chosen in SETTINGS:
        drafter = ModelDrafter.load(draft_folder, options=DraftOptions(chain=True))
        drafter.begin(PROMPT, chosen)
        tree, text = drafter.propose(8, 8), list(PROMPT)
        with torch.inference_mode():
            for token in tree.tokens.tolist():
                logits = target(torch.tensor([text])).logits[0, -1]
                scores = torch.log_softmax(logits / (chosen.temperature or 1.0), -1).numpy()
                if not chosen.greedy:
                    scores = scores + gumbel_row(chosen.seed, 0, len(text), VOCAB)
                assert int(scores.argmax()) == token
                text.append(token)


# ---------------------------------------------------------------- trees

TOY_VOCAB = 4


def toy_scores(path: Sequence[int], seed: int) -> NDArray[np.float32]:
    """Return the conditional log-scores after a path, unsorted."""
    random = np.random.default_rng([seed, len(path), *path])
    return np.log(random.dirichlet(np.full(TOY_VOCAB, 0.5)) + 1e-9).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 40), depth=st.integers(1, 4), beam=st.sampled_from([1, 3, 1000])
)
def test_a_model_tree_is_the_best_of_all_nodes(seed: int, size: int, depth: int, beam: int) -> None:
    paths: dict[int, tuple[int, ...]] = {}

    def best(path: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        scores = toy_scores(path, seed)
        order = np.argsort(-scores, kind="stable")
        return order, scores[order]

    def expand(nodes: Any, parents: Any, tokens: Any, levels: Any) -> Any:
        for node, parent, token in zip(nodes.tolist(), parents.tolist(), tokens.tolist(), strict=True):
            paths[node] = (*paths.get(parent, ()), token)
        children = [best(paths[node]) for node in nodes.tolist()]
        return np.stack([c[0] for c in children]), np.stack([c[1] for c in children])

    model_tree = ModelTree(size, ModelTreeOptions(beam=beam, width=TOY_VOCAB, depth=depth), *best(()))
    tree = model_tree.grow(expand)
    everything = []
    for length in range(1, depth + 1):
        for path in itertools.product(range(TOY_VOCAB), repeat=length):
            everything.append(sum(float(toy_scores(path[:i], seed)[path[i]]) for i in range(length)))
    expected = sorted(everything, reverse=True)[:size]
    np.testing.assert_allclose(tree.scores, expected, atol=1e-4)
    check_tree(tree, size, depth)


# ---------------------------------------------------------------- τ


@pytest.mark.parametrize("true", [0.3, 0.6, 1.2])
def test_tau_finds_the_temperature_of_the_labels(true: float) -> None:
    random = np.random.default_rng(0)
    fitted = TauEstimate.fresh(prior=0.5)
    for _ in range(40):
        scores = np.sort(random.normal(-3, 1.5, (64, 20)))[:, ::-1].astype(np.float32)
        noise = random.gumbel(size=scores.shape)
        fitted = fitted.with_labels(scores, (scores / true + noise).argmax(1))
    assert fitted.value == pytest.approx(true, rel=0.1)


def test_tau_starts_at_its_prior_and_stays_on_the_grid() -> None:
    fresh = TauEstimate.fresh(prior=0.5)
    assert fresh.value == pytest.approx(0.5, rel=0.05)
    assert fresh.with_labels(np.empty((0, 4), np.float32), np.empty(0, np.int64)) is fresh
    sure = fresh.with_labels(np.tile(np.array([[0.0, -1.0]], np.float32), (5000, 1)), np.zeros(5000, np.int64))
    assert GRID[0] * 0.8 <= sure.value <= GRID[-1]


# ---------------------------------------------------------------- by name


def test_drafters_are_loaded_by_name(draft_folder: Path) -> None:
    demo = resolve_model("demo")
    for name in ("none", "ngram", "auto", "demo-draft", "demo-draft+ngram"):
        assert load_drafter(name, demo).name == name
    with pytest.raises(ModelError, match="no model"):
        load_drafter("no-such-draft", demo)
    (draft_folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    for name in (str(draft_folder), f"{draft_folder}+ngram"):
        with pytest.raises(Mismatch, match="differs from the target's"):
            load_drafter(name, demo)
    _, choice = choose_drafter("auto", draft_folder, "org/model")
    assert choice.name == "ngram", "no bundled draft model has that tokenizer"


def test_the_automatic_choice_says_its_reason(draft_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "treeswarm_client.drafters"):
        chosen = choose_drafter("auto", resolve_model("demo"), "demo")[1]
        (draft_folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        fallback = choose_drafter("auto", draft_folder, "org/model")[1]
    assert str(chosen) == ("draft: demo-draft and n-grams from the text, because demo-draft has the tokenizer of demo")
    assert str(fallback) == (
        "draft: n-grams from the text, because no draft model is known for org/model: name one of the same family "
        "with --draft"
    )
    assert (chosen.name, fallback.name) == ("demo-draft+ngram", "ngram")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", str(chosen)),
        ("WARNING", str(fallback)),
    ]
    named = choose_drafter("ngram", draft_folder, "org/model")[1]
    assert named.as_dict() == {"name": "ngram", "why": "as named"}
    assert [choice.automatic for choice in (chosen, fallback, named)] == [True, True, False]


def test_weights_of_a_hub_draft_come_if_tokenizers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub records the options of each download."""
    requests: list[dict[str, object]] = []

    def download(name: str, allow_patterns: list[str], **options: object) -> str:
        requests.append(options)
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in resolve_model("demo-draft").glob(pattern):
                shutil.copy(file, tmp_path / name / file.name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = HubOptions(revision="v2", cache_dir="cache", token="secret", local_files_only=True)
    other = tmp_path / "other"
    shutil.copytree(resolve_model("demo"), other)
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(Mismatch, match="differs from the target's"):
        load_drafter("org/draft", other, hub=hub.for_another_model())
    assert not list((tmp_path / "org/draft").glob("*.safetensors"))
    assert load_drafter("org/draft", resolve_model("demo"), hub=hub.for_another_model()).name == "draft"
    assert requests[0] == {"cache_dir": "cache", "token": "secret", "local_files_only": True}
    resolve_model("org/draft", hub=hub)
    assert requests[-1]["revision"] == "v2"
    resolve_model("org/draft")
    assert requests[-1] == {}
    assert "secret" not in repr(hub)


def test_without_torch_auto_drafts_without_a_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "treeswarm_client.drafters.model", None)
    demo = resolve_model("demo")
    with pytest.raises(BadRequest, match="needs torch"):
        load_drafter("demo-draft", demo)
    with caplog.at_level(logging.INFO, "treeswarm_client.drafters"):
        assert choose_drafter("auto", demo, "demo")[1].name == "ngram"
    assert "draft: n-grams from the text, because a draft model needs torch, but" in caplog.text


def test_a_copied_union_has_a_context_of_its_own() -> None:
    first = UnionDrafter([SuffixDrafter(), TokenRecyclingDrafter()])
    first.begin([1, 2, 3, 1, 2], SamplingSettings())
    second = first.copy_for_new_generation()
    second.begin([7, 8, 9, 7, 8], SamplingSettings())
    assert first.propose(1, 3).tokens.tolist() == [3]
    assert second.propose(1, 3).tokens.tolist() == [9]
