"""Loading a span reads its tensors and no others; errors say what is wrong with a model's directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families.checkpoint import write_checkpoint
from tests.node.conftest import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from treeswarm.errors import BadRequest, ModelError, UnsupportedModel
from treeswarm.identity import config_digest, weights_digest
from treeswarm.model_files import (
    load_tokenizer,
    read_config,
    read_shape,
    resolve_model,
    tokenizer_digest,
    usual_block_of,
)
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.loader import hosted_parts, load_span
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
SPANS = [Span(0, 1), Span(1, 3), Span(3, 4), Span(0, 4)]
Edit = Callable[[Path], None]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mixtral", {}),
        ("qwen3-moe", {}),
        ("gemma3", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama tied", "qwen3", "mixtral", "qwen3-moe", "gemma3 tied"],
)
def test_loaded_span_has_only_its_own_tensors(family: str, changes: dict[str, Any], span: Span, tmp_path: Path) -> None:
    whole = tiny_model(family, **changes)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = load_span(tmp_path, span, torch.float32, CPU)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    hosted = {id(p) for module in hosted_parts(loaded.skeleton, span) for p in module.parameters(recurse=False)}
    seen = 0
    for name, parameter in loaded.skeleton.named_parameters(remove_duplicate=False):
        if id(parameter) in hosted:
            assert torch.equal(parameter, expected[name]), name
            seen += 1
        else:
            assert parameter.device.type == "meta", name
    assert seen >= 8 * len(span)


def test_files_without_the_spans_tensors_are_not_read(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if ".layers.1." in name or ".layers.2." in name}
    others = set(index.values()) - needed
    assert others
    for file in others:
        (tmp_path / file).unlink()
    load_span(tmp_path, Span(1, 3), torch.bfloat16, CPU)
    with pytest.raises(ModelError, match="partial"):
        load_span(tmp_path, Span(0, 4), torch.float32, CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _edit_config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "not complete"),
        (_truncate, "corrupt"),
        (_scramble, "corrupt"),
        (_drop_tensor, "up_proj.weight is missing"),
        (_reshape_tensor, "up_proj.weight.*does not have the shape"),
        (_only_bin, "convert them to safetensors"),
        (_edit_config(auto_map={"AutoModel": "x.Y"}, model_type="no-such"), "'no-such'.*never run here"),
        (_edit_config(model_type="no-such-model"), "no-such-model"),
    ],
    ids=range(10),
)
def test_error_says_what_is_wrong_with_a_directory(folder: Path, damage: Edit, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_span(folder, Span(0, 4), torch.float32, CPU)


def test_blocks_beyond_the_model_are_refused(folder: Path) -> None:
    with pytest.raises(BadRequest, match=r"which has 4.*0:4"):
        load_span(folder, Span(2, 5), torch.float32, CPU)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_unsupported_model_type_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, hidden_size=64, num_hidden_layers=2, vocab_size=99, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"'{model_type}'.*keep a recurrent state"):
        check_family(SpanModel(load_span(tmp_path, Span(0, 2), torch.float32, CPU), 256))


def test_bundled_target_is_found_and_read() -> None:
    shape = read_shape(resolve_model("demo"))
    assert (shape.model_type, shape.vocab_size) == ("llama", 4096)
    assert shape.blocks in {8, 9}


@pytest.mark.parametrize("name", ["no-such-dir", "./nowhere", "a/b/c", ""])
def test_name_that_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="give a directory"):
        resolve_model(name)


def test_weights_digest_depends_on_content_not_on_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    before = weights_digest(folder, read_config(folder))
    assert before == weights_digest(folder, read_config(folder))
    _edit_config(_name_or_path="elsewhere", transformers_version="9", dtype="bfloat16")(folder)
    assert weights_digest(folder, read_config(folder)) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert weights_digest(folder, read_config(folder)) != before
    _edit_config(rms_norm_eps=1e-3)(folder)
    assert config_digest(read_config(folder)) != config_digest(tiny_model("llama").config.to_dict())


def test_tokenizer_digest_and_missing_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
    demo = json.loads((resolve_model("demo") / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(demo))
    assert tokenizer_digest(folder) == tokenizer_digest(resolve_model("demo"))
    demo["model"]["vocab"] = {token: 4095 - i for token, i in demo["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(demo))
    assert tokenizer_digest(folder) != tokenizer_digest(resolve_model("demo"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)


def test_buffer_of_the_whole_model_does_not_load_every_block(tmp_path: Path) -> None:
    write_checkpoint("ctrl", tmp_path)  # its table of positions is a buffer of the module that has the blocks
    loaded = load_span(tmp_path, Span(0, 2), torch.float32, torch.device("cpu"))
    blocks = [usual_block_of(name) for name, parameter in loaded.skeleton.named_parameters() if not parameter.is_meta]
    assert {block for block in blocks if block is not None} == {0, 1}
