"""The speculators in the package can be served: their files are whole, and found by the shape of their model."""

import json
from pathlib import Path

import pytest
import torch

from treeswarm.model_files import DEFAULT_HUB
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator
from treeswarm_node.speculator.files import read_speculator_config
from treeswarm_node.speculator.finding import BUNDLED, find_speculator

FOLDERS = sorted(BUNDLED.iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_bundled_speculator_is_found_and_loads(folder: Path, tmp_path: Path) -> None:
    config = read_speculator_config(folder)
    sizes = {"num_hidden_layers": config.taps[-1] + 1, "hidden_size": config.hidden_size}
    content = {"model_type": "llama", **sizes, "vocab_size": config.vocab_size, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    found = find_speculator("auto", tmp_path, DEFAULT_HUB)
    assert found is not None
    assert found.folder == folder
    lm_head = torch.zeros(config.vocab_size, config.hidden_size)
    speculator = AutoregressiveSpeculator.load(folder, lm_head, is_tied=True, dtype=torch.float32)
    assert all(bool(weight.isfinite().all()) for weight in speculator.head.parameters())
    assert speculator.agreement > 0.4


def test_the_chat_model_that_is_fetched_by_name_has_one() -> None:
    assert [folder.name for folder in FOLDERS] == ["smollm2"]
