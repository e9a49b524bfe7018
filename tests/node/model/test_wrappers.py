"""Of a multimodal model only the text part is fetched, loaded and counted.  tests/families tests what it computes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families.checkpoint import write_checkpoint
from tests.families.configs import LAYERS
from tests.families.table import WRAPPER_SWEEP, read_table
from tests.families.wrapper_configs import tiny_wrapper_config
from tests.support.quantized_checkpoints import random_git
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from treeswarm.errors import UnsupportedModel
from treeswarm.identity import weights_digest
from treeswarm.model_files import INDEX, SINGLE, needed_files, read_config, read_shape
from treeswarm.model_sources.text_configs import DEFAULTS, FIELDS, TEXT_TYPES, text_settings
from treeswarm.programs.devices import Machine
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.dry_run.appraisal import appraise
from treeswarm_node.dry_run.report import as_text
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.text_part import find_block_of, tensors_to_load
from treeswarm_node.model.families.blocks import DecoderBlocks, find_blocks
from treeswarm_node.model.footprint import read_footprint

CPU = torch.device("cpu")
TABLE = read_table(WRAPPER_SWEEP)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny wrapper whose images' part is in a file of its own, and is not here."""
    folder = tmp_path_factory.mktemp("gemma3")
    write_checkpoint("gemma3", folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: "text.safetensors" if "language_model" in name else "images.safetensors" for name in tensors}
    for name in tensors:
        if ".layers.3." in name and "language_model" in name:
            files[name] = "third.safetensors"
    for file in {*files.values()} - {"images.safetensors"}:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_files_of_other_parts_are_not_needed(gemma3: Path) -> None:
    is_loaded = tensors_to_load(gemma3)
    assert is_loaded is not None
    assert needed_files(gemma3, None, is_loaded) == ["text.safetensors", "third.safetensors"]
    assert needed_files(gemma3, Span(0, 3), is_loaded) == ["text.safetensors"]
    assert "images.safetensors" in needed_files(gemma3, Span(0, 3))


def test_names_of_published_checkpoints_are_told_apart(tmp_path: Path) -> None:
    tiny_wrapper_config("llava").save_pretrained(tmp_path)
    is_loaded = tensors_to_load(tmp_path)
    assert is_loaded is not None
    for name in ("language_model.model.layers.1.mlp.up_proj.weight", "language_model.lm_head.weight"):
        assert is_loaded(name)
    packed = "language_model.model.layers.1.mlp.up_proj.qweight"
    assert is_loaded(packed)
    for name in ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "multi_modal_projector.linear_1.bias"):
        assert not is_loaded(name)


def test_other_parts_are_neither_loaded_nor_counted(gemma3: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load_span(gemma3, Span(1, 2), torch.float32, CPU)
    assert "'gemma3' is a multimodal model: its text part alone is hosted" in caplog.text
    real = [name for name, parameter in loaded.skeleton.named_parameters() if not parameter.is_meta]
    assert real
    assert all(name.startswith("model.language_model.layers.1.") for name in real)
    tensors = load_file(gemma3 / "text.safetensors")
    block = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.1." in name)
    assert read_footprint(loaded.skeleton, torch.float32, "none", "cpu").block == block


def test_digest_of_weights_does_not_cover_other_files(gemma3: Path) -> None:
    digest = weights_digest(gemma3, read_config(gemma3), is_loaded=tensors_to_load(gemma3))
    (gemma3 / "images.safetensors").write_bytes(b"anything")
    assert weights_digest(gemma3, read_config(gemma3), is_loaded=tensors_to_load(gemma3)) == digest
    (gemma3 / "images.safetensors").unlink()


def test_dry_run_counts_the_text_part(gemma3: Path) -> None:
    config = NodeConfig(ModelConfig(str(gemma3), dtype="float32"), DeviceConfig("cpu", kv_tokens=1024))
    appraisal = appraise(config, Machine())
    assert appraisal.refusal is None
    assert appraisal.sizes is not None
    assert appraisal.sizes.published is not None
    files = [load_file(gemma3 / name) for name in ("text.safetensors", "third.safetensors")]
    assert appraisal.sizes.published.total == sum(tensor.nbytes for file in files for tensor in file.values())
    assert "the text part of a multimodal model" in " ".join(as_text(appraisal).split())


def test_decoder_is_found_though_another_part_is_larger(tmp_path: Path) -> None:
    config = tiny_wrapper_config("llava")
    config.vision_config.intermediate_size = 4096
    config.save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path, torch.float32)
    sizes = [sum(p.numel() for p in part.parameters()) for part in skeleton.model.children()]
    assert max(sizes) > sum(p.numel() for p in skeleton.model.language_model.parameters())
    assert find_blocks(skeleton).path == "model.language_model.layers"
    assert len(find_blocks(skeleton).layers) == LAYERS


def test_settings_that_configs_leave_out_are_those_of_transformers() -> None:
    wrappers = [name for name in TABLE.types if "text_config" in CONFIG_MAPPING[name].sub_configs]
    text = {name: CONFIG_MAPPING[name]().get_text_config(decoder=True) for name in {*wrappers, *TEXT_TYPES}}
    assert {name: config.model_type for name, config in text.items()} == TEXT_TYPES
    defaults = {config.model_type: type(config)() for config in text.values()}
    assert {name: tuple(getattr(config, field) for field in FIELDS) for name, config in defaults.items()} == DEFAULTS


def test_config_that_leaves_out_defaults_is_read(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "eos_token_id": 1, "text_config": text}))
    shape = read_shape(tmp_path)
    assert (shape.blocks, shape.hidden_size, shape.vocab_size) == (34, 2560, 262208)
    assert (shape.max_positions, shape.eos_ids) == (131072, {1})
    assert text_settings({"model_type": "llava", "text_config": {"vocab_size": 32064}})["hidden_size"] == 4096
    assert text_settings({"hidden_size": 5}) == {"hidden_size": 5}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("siglip", "no class of it writes text"),
        ("blip-2", "they compute no text without pixel_values"),
    ],
)
def test_refusal_names_its_reason_in_one_line(tmp_path: Path, model_type: str, reason: str) -> None:
    config = CONFIG_MAPPING[model_type]() if model_type == "siglip" else tiny_wrapper_config(model_type)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason) as info:
        build_skeleton(tmp_path, torch.float32)
    assert len(str(info.value).splitlines()) == 1


def test_layers_of_other_parts_are_no_decoder_blocks() -> None:
    """GIT's decoder has `layer`, its image part has `layers`; Phi-4 has its image part at the embedding."""
    blocks = DecoderBlocks("git.encoder.layer", torch.nn.ModuleList())
    assert blocks.block_of("git.encoder.layer.13.attention.self.query.weight") == 13
    assert blocks.block_of("git.encoder.layer_norm.weight") is None
    assert blocks.block_of("git.image_encoder.vision_model.encoder.layers.1.mlp.fc1.weight") is None


def test_an_image_part_with_more_layers_is_not_the_decoder() -> None:
    """As in GIT's published models: 12 layers that read images, and 6 decoder blocks."""
    blocks = find_blocks(random_git())
    assert (blocks.path, len(blocks.layers)) == ("git.encoder.layer", 3)


def test_files_of_blocks_are_told_by_the_decoder_and_not_by_their_usual_names(tmp_path: Path) -> None:
    """The head loads GIT's image part, whose layers have the usual names of blocks, and its decoder's have not."""
    git = random_git()
    files = {name: ".".join(name.split(".")[1:5]) for name in git.state_dict()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    needed = {*needed_files(tmp_path, Span(1, 2), None, find_block_of(git))}
    assert needed == {file for file in files.values() if not file.startswith(("encoder.layer.0", "encoder.layer.2"))}
