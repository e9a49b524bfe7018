"""A node loads a speculator that fits its model and its span, and says why another one does not."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.node.conftest import SpanChain, tiny_model
from transformers import PreTrainedModel

from treeswarm.errors import ModelError
from treeswarm.protocol.messages import NumericsClass
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator, head_shape
from treeswarm_node.speculator.files import WEIGHTS, SpeculatorConfig, save_speculator
from treeswarm_node.speculator.head import SpeculatorHead
from treeswarm_node.speculator.loading import BESIDE, load_speculator, speculator_bytes
from treeswarm_node.speculator.seam import Speculator

FITTING = SpeculatorConfig("autoregressive", "c", "w", 64, 199, (3,), 4, 2, 16, 96, window=32)


def save(folder: Path, **changes: Any) -> Path:
    config = replace(FITTING, **changes)
    save_speculator(folder, config, SpeculatorHead(head_shape(config)).state_dict())
    return folder


@pytest.fixture
def models(cut_in_three: Callable[[PreTrainedModel], SpanChain]) -> list[SpanModel]:
    """Return spans 0:1, 1:3 and 3:4 of a tiny model with a tied head; none of these tests runs a block."""
    return cut_in_three(tiny_model("llama", tie_word_embeddings=True)).models


def load(models: list[SpanModel], choice: str, folder: Path = Path("none"), place: int = 2) -> Speculator | None:
    model = models[place]
    served = ServedSpan(
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
    return load_speculator(choice, model, folder, served)


def test_a_tail_loads_the_speculator_that_is_named(models: list[SpanModel], tmp_path: Path) -> None:
    speculator = load(models, str(save(tmp_path)))
    assert isinstance(speculator, AutoregressiveSpeculator)
    assert speculator.taps == (3,)
    assert torch.equal(speculator.weights.lm_head, models[2].lm_head()[0])
    assert speculator_bytes(str(tmp_path)) == 4 * (tmp_path / WEIGHTS).stat().st_size


def test_auto_takes_the_one_beside_the_model(models: list[SpanModel], tmp_path: Path) -> None:
    assert load(models, "auto", tmp_path) is None
    save(tmp_path / BESIDE)
    assert load(models, "auto", tmp_path) is not None
    assert load(models, "none", tmp_path) is None


def test_only_a_tail_loads_one(models: list[SpanModel], tmp_path: Path) -> None:
    assert load(models, str(save(tmp_path)), place=1) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"taps": (2, 3)}, "reads the results of blocks 2, 3, and this node hosts 3:4: host from block 2 on"),
        ({"config_digest": "d"}, "is for another model"),
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


def test_one_of_other_weights_is_loaded_with_a_warning(
    models: list[SpanModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(models, str(save(tmp_path, weights_digest="v"))) is not None
    assert "was trained on other weights" in caplog.text
