"""A node holds published weights in their bits if the owner says so, or if its blocks do not fit otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import tiny_model
from tests.support.quantized_checkpoints import FORMATS, write_checkpoint

from treeswarm.errors import BadRequest
from treeswarm.model_files import INDEX, SINGLE, usual_block_of
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.model.block_fit import Holding, choose_holding, when_to_expand
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.memory_fit import USABLE_SHARE, NodeRoom, peak_bytes

WHOLE, PART, PLENTY = Span(0, 4), Span(1, 2), 1 << 40


def holding(folder: Path, memory: int, span: Span | None = WHOLE, expand: str = "auto", kind: str = "none") -> Holding:
    config = NodeConfig(
        ModelConfig(str(folder), dtype="bfloat16", quantization=kind), DeviceConfig("cpu", expand=expand)
    )
    room = NodeRoom(memory, store=None, kv_tokens=16, forward_rows=1)
    return choose_holding(config, room, folder, build_skeleton(folder, torch.bfloat16), span)


def needed(found: Holding) -> int:
    """Return the memory in which the whole model fits."""
    room = NodeRoom(0, store=None, kv_tokens=16, forward_rows=1)
    return int(peak_bytes(4, room, found.footprint, found.footprint.ends.whole) / USABLE_SHARE) + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("qwen3", intermediate_size=512)
    write_checkpoint(model, FORMATS["compressed int4"], tmp_path / "model")
    return tmp_path / "model"


def test_memory_decides_unless_the_owner_does(folder: Path) -> None:
    expanded, held = (holding(folder, PLENTY, expand=expand) for expand in ("load", "use"))
    assert (expanded.holds_codes, held.holds_codes) == (False, True)
    assert held.footprint.block < 0.5 * expanded.footprint.block
    assert needed(held) < needed(expanded)
    assert holding(folder, needed(expanded)) == expanded
    assert holding(folder, needed(expanded) - 2) == held
    assert holding(folder, needed(expanded) - 2, PART) == expanded, "one block fits"
    assert holding(folder, needed(expanded) - 2, None) == expanded, "some blocks fit"
    assert holding(folder, 1 << 10, None) == held, "no block fits"
    assert holding(folder, 1 << 10, expand="load") == expanded


def test_a_node_with_the_files_of_its_own_blocks_alone_holds_codes(folder: Path) -> None:
    whole = holding(folder, PLENTY, expand="use")
    tensors = load_file(folder / SINGLE)
    own = {name: tensor for name, tensor in tensors.items() if usual_block_of(name) == PART.start}
    save_file(own, folder / "own.safetensors", {"format": "pt"})
    files = {name: "own.safetensors" if name in own else "others.safetensors" for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / SINGLE).unlink()
    assert holding(folder, PLENTY, PART, expand="use") == whole


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_that_are_quantized_again_are_expanded_for_it(kind: str, folder: Path) -> None:
    assert not holding(folder, 1 << 10, expand="use", kind=kind).holds_codes


def test_weights_for_kernels_always_keep_their_bits(folder: Path) -> None:
    assert holding(folder, PLENTY, expand="load", kind="published").holds_codes


def test_codes_are_never_held_on_mps(folder: Path) -> None:
    config = NodeConfig(ModelConfig(str(folder)), DeviceConfig("mps"))
    assert when_to_expand(config, folder) == "load"
    with pytest.raises(BadRequest, match=r"--expand use does not work on mps.*--expand load"):
        when_to_expand(replace(config, device=DeviceConfig("mps", expand="use")), folder)


def test_plain_weights_are_never_held_otherwise(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert not holding(tmp_path, 1 << 10, expand="use").holds_codes
