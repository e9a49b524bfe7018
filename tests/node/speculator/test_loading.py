"""A node loads a speculator that fits its model and its span, and says why another one does not."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import SpanChain, tiny_model
from tests.support.eagle3_heads import FLAT, NESTED, HeadFiles
from tests.support.local_hub import Repository, local_hub
from transformers import PreTrainedModel

from treeswarm.errors import ModelError
from treeswarm.model_files import DEFAULT_HUB
from treeswarm.protocol.messages import NumericsClass
from treeswarm_node.engine.tap_slice import TapSlice
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator import finding
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator, head_shape
from treeswarm_node.speculator.eagle3 import known_heads
from treeswarm_node.speculator.eagle3.known_heads import KnownHead
from treeswarm_node.speculator.files import WEIGHTS, SpeculatorConfig, read_speculator_weights, save_speculator
from treeswarm_node.speculator.finding import BESIDE, find_speculator
from treeswarm_node.speculator.head import SpeculatorHead
from treeswarm_node.speculator.loading import load_speculator, load_tap_slice
from treeswarm_node.speculator.parallel.speculator import ParallelHead, ParallelSpeculator
from treeswarm_node.speculator.seam import Speculator
from treeswarm_node.speculator.self_check import CheckedSpeculator

FITTING = SpeculatorConfig("autoregressive", "c", "w", 64, 199, (3,), 4, 2, 16, 96, window=32)


def save(folder: Path, **changes: Any) -> Path:
    config = replace(FITTING, **changes)
    save_speculator(folder, config, SpeculatorHead(head_shape(config)).state_dict())
    return folder


def write_target(folder: Path, **changes: Any) -> Path:
    """Write the config of a target, by which published heads are looked for."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "max_position_embeddings": 512, "vocab_size": 199}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **changes}), "utf-8")
    return folder


@pytest.fixture
def models(cut_in_three: Callable[[PreTrainedModel], SpanChain]) -> list[SpanModel]:
    """Return spans 0:1, 1:3 and 3:4 of a tiny model with a tied head; none of these tests runs a block."""
    return cut_in_three(tiny_model("llama", tie_word_embeddings=True)).models


def load(
    models: list[SpanModel], choice: str, folder: Path = Path("none"), place: int = 2, name: str = ""
) -> Speculator | None:
    return load_speculator(choice, models[place], folder, served_by(models[place]), name)


def load_part(
    models: list[SpanModel], choice: str, place: int, tail: Speculator | None, folder: Path = Path("none")
) -> TapSlice | None:
    return load_tap_slice(choice, models[place], folder, served_by(models[place]), tail)


def served_by(model: SpanModel) -> ServedSpan:
    return ServedSpan(
        span=model.loaded.span,
        blocks=4,
        vocab_size=199,
        hidden_size=64,
        max_positions=512,
        config="c",
        numerics=NumericsClass("w", "float32"),
        attention="",
        activation_bytes=256,
    )


def test_a_tail_loads_the_speculator_that_is_named(models: list[SpanModel], tmp_path: Path) -> None:
    speculator = load(models, str(save(tmp_path)))
    assert isinstance(speculator, AutoregressiveSpeculator)
    assert speculator.taps == (3,)
    assert torch.equal(speculator.weights.lm_head, models[2].lm_head()[0])
    found = find_speculator(str(tmp_path), Path("none"), DEFAULT_HUB)
    assert found is not None
    assert found.memory_bytes(4, 4) == 4 * (tmp_path / WEIGHTS).stat().st_size


def test_a_tail_loads_the_kind_that_the_config_names(models: list[SpanModel], tmp_path: Path) -> None:
    """Weights of another kind are refused."""
    config = replace(FITTING, kind="parallel")
    save_speculator(tmp_path, config, ParallelHead.of(config).state_dict())
    speculator = load(models, str(tmp_path))
    assert isinstance(speculator, ParallelSpeculator)
    assert speculator.name == "parallel"
    save_speculator(tmp_path, replace(config, taps=(2, 3)), ParallelHead.of(replace(config, taps=(2, 3))).state_dict())
    with pytest.raises(ModelError, match="host from block 2 on"):
        load(models, str(tmp_path))
    save_speculator(tmp_path, FITTING, ParallelHead.of(config).state_dict())
    with pytest.raises(ModelError, match="are not those of its config"):
        load(models, str(tmp_path))


def test_auto_takes_the_one_beside_the_model(models: list[SpanModel], tmp_path: Path) -> None:
    write_target(tmp_path)
    assert load(models, "auto", tmp_path) is None
    save(tmp_path / BESIDE)
    assert load(models, "auto", tmp_path) is not None
    assert load(models, "none", tmp_path) is None


def test_only_a_tail_loads_one(models: list[SpanModel], tmp_path: Path) -> None:
    assert load(models, str(save(tmp_path)), place=1) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"taps": (2, 3), "config_digest": "d"},
            "reads the results of blocks 2, 3, and this node hosts 3:4: host from block 2 on",
        ),
        ({"vocab_size": 300}, "is for an LM head of 300 tokens and 64 values, this model's has 199 and 64"),
    ],
)
def test_one_that_does_not_fit_is_refused(
    models: list[SpanModel], tmp_path: Path, changes: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match=problem):
        load(models, str(save(tmp_path / BESIDE, **changes)))
    with caplog.at_level(logging.WARNING):
        assert load(models, "auto", tmp_path) is None
    assert problem in caplog.text


def test_one_of_another_config_is_checked(
    models: list[SpanModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(load(models, str(save(tmp_path, config_digest="d"))), CheckedSpeculator)
    assert "was trained on a model with another config: its guesses are checked" in caplog.text


def test_auto_takes_a_bundled_one_for_models_of_its_shape(
    models: list[SpanModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "BUNDLED", tmp_path / "bundled")
    model = write_target(tmp_path / "model")
    assert load(models, "auto", model) is None
    save(tmp_path / "bundled" / "a", hidden_size=32)
    save(tmp_path / "bundled" / "b", taps=(2,))
    assert load(models, "auto", model) is None
    save(tmp_path / "bundled" / "c", config_digest="of the same model as GGUF")
    assert isinstance(load(models, "auto", model), CheckedSpeculator)


def test_each_node_loads_the_columns_of_its_own_taps(models: list[SpanModel], tmp_path: Path) -> None:
    """A tail whose head taps blocks of other nodes says which, and all of them know the head by the same digest."""
    choice = str(save(tmp_path, taps=(0, 1, 2, 3)))
    tail = load(models, choice)
    parts = [load_part(models, choice, place, tail) for place in range(3)]
    assert [sorted(part.columns) for part in parts if part] == [[0], [1, 2], [3]]
    assert len({part.head for part in parts if part}) == 1
    matrix = read_speculator_weights(tmp_path)["fuse.weight"]
    for part in parts:
        assert part is not None
        assert (part.size, part.window, part.taps) == (64, 32, (0, 1, 2, 3))
        for tap, columns in part.columns.items():
            assert torch.equal(columns, matrix[:, 64 * tap : 64 * (tap + 1)])
    assert isinstance(tail, AutoregressiveSpeculator)
    assert tail.head.fuse.weight.shape == (64, 64)
    found = find_speculator(choice, tmp_path, DEFAULT_HUB)
    assert found is not None
    assert found.tap_bytes(4) == 4 * 64 * 64 * 4


def test_a_node_without_a_fitting_head_adds_no_taps(models: list[SpanModel], tmp_path: Path) -> None:
    assert load_part(models, "auto", 1, None, tmp_path) is None
    save(tmp_path / BESIDE, config_digest="d")
    assert load_part(models, "auto", 1, None, tmp_path) is None
    assert load_part(models, str(tmp_path / BESIDE), 1, None) is None
    save(tmp_path / BESIDE)
    assert load_part(models, "none", 1, None, tmp_path) is None
    part = load_part(models, "auto", 1, None, tmp_path)
    assert part is not None
    assert not part.columns, "block 3 is not hosted here"
    weights = load_file(tmp_path / BESIDE / WEIGHTS)
    save_file({"fuse.weight": weights["fuse.weight"][:, :9].contiguous()}, tmp_path / BESIDE / WEIGHTS)
    with pytest.raises(ModelError, match="are not those of its config"):
        load_part(models, str(tmp_path / BESIDE), 1, None)
    (tmp_path / BESIDE / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load_part(models, str(tmp_path / BESIDE), 1, None)


def test_one_of_other_weights_is_loaded_with_a_warning(
    models: list[SpanModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(models, str(save(tmp_path, weights_digest="v"))) is not None
    assert "was trained on other weights" in caplog.text


# ---------------------------------------------------------------- published heads


TAIL_HEAD = HeadFiles(tap_ids=(4,), taps=1)
"""A head that taps the last block alone."""


def published(speculator: Speculator | None) -> AutoregressiveSpeculator:
    """Return the head that is checked behind the seam."""
    assert isinstance(speculator, CheckedSpeculator)
    assert isinstance(speculator.inner, AutoregressiveSpeculator)
    return speculator.inner


@pytest.mark.parametrize("form", [FLAT, NESTED])
def test_a_published_head_is_loaded_from_its_folder(form: str, models: list[SpanModel], tmp_path: Path) -> None:
    speculator = published(load(models, str(TAIL_HEAD.write(tmp_path, form))))
    assert (speculator.name, speculator.taps) == ("eagle3", (3,))
    assert speculator.weights.embedding is models[2].lm_head()[0], "the target's matrices are tied"


def test_a_tail_that_lacks_a_tapped_block_says_so(models: list[SpanModel], tmp_path: Path) -> None:
    folder = HeadFiles(tap_ids=(2, 3, 4)).write(tmp_path, NESTED)
    with pytest.raises(ModelError, match=r"reads the results of blocks 1, 2, 3, and this node hosts 3:4: host from"):
        load(models, str(folder))


def test_a_target_without_a_tied_head_reads_its_embedding_from_the_files(
    cut_in_three: Callable[[PreTrainedModel], SpanChain], tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "target")
    tail = cut_in_three(model).models
    for part in tail:
        skeleton: Any = part.loaded.skeleton
        skeleton.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(199, 64, device="meta"), False)
    speculator = published(load(tail, str(TAIL_HEAD.write(tmp_path / "head", FLAT)), tmp_path / "target"))
    assert torch.equal(speculator.weights.embedding, model.get_input_embeddings().weight)  # type: ignore[union-attr]


def test_auto_takes_a_known_head_that_is_here_and_names_one_that_is_not(
    models: list[SpanModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(known_heads, "KNOWN_HEADS", (KnownHead("org/tiny-eagle3", 0.1, "llama", 4, 64),))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    target = write_target(tmp_path / "target")
    with caplog.at_level(logging.INFO):
        assert load(models, "auto", target) is None
        assert "--speculator org/tiny-eagle3 fetches it (0.1 GB)" in caplog.text
        TAIL_HEAD.write(tmp_path / "tiny-eagle3", NESTED)
        assert load(models, "auto", target) is not None
        assert "the head org/tiny-eagle3 is on this machine: it is taken" in caplog.text
    assert load(models, "auto", write_target(tmp_path / "wider", hidden_size=128)) is None
    TAIL_HEAD.write(target / BESIDE, FLAT)
    found = find_speculator("auto", target, DEFAULT_HUB)
    assert found is not None
    assert found.folder == target / BESIDE


def test_a_head_is_planned_by_its_config_and_then_fetched(
    models: list[SpanModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_hub() as hub:
        hub.add_folder("org/head", TAIL_HEAD.write(tmp_path / "published", NESTED))
        hub.use_here(tmp_path, monkeypatch)
        found = find_speculator("org/head", Path("none"), DEFAULT_HUB)
        assert found is not None
        assert found.memory_bytes(4, 2) > 0
        assert hub.sent == {"config.json"}
        speculator = load(models, "org/head")
        assert speculator is not None
        assert speculator.name == "eagle3"
        assert hub.sent == {"config.json", "model.safetensors"}
        content = (tmp_path / "published" / "config.json").read_bytes()
        hub.repositories["org/pickled"] = Repository({"config.json": content, "pytorch_model.bin": b"x"})
        with pytest.raises(ModelError, match=r"'org/pickled' has no complete weights as safetensors"):
            load(models, "org/pickled")


def test_a_name_of_nothing_is_refused(models: list[SpanModel], tmp_path: Path) -> None:
    for choice in (str(tmp_path), "nothing", "/no/such/folder"):
        with pytest.raises(ModelError, match=f"there is no speculator in '{choice}': give a folder"):
            load(models, choice)


# ---------------------------------------------------------------- memory


def test_a_heads_memory_is_counted_before_it_is_here(tmp_path: Path) -> None:
    folder = HeadFiles(own_embedding=True).write(tmp_path, FLAT)
    found = find_speculator(str(folder), Path("none"), DEFAULT_HUB)
    assert found is not None
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    matrices = sum(t.numel() for name, t in tensors.items() if t.ndim > 1 and "embed" not in name)
    assert found.memory_bytes(4, 2) == 4 * matrices + 2 * 199 * 64
