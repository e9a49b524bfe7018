"""`--draft auto` takes the small model of the target's family where that is on this machine, and says what it took."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from treeswarm.model_files import DEFAULT_HUB, resolve_model
from treeswarm_client.drafters import choose_drafter
from treeswarm_client.drafters.selection import find_draft as module
from treeswarm_client.drafters.selection.find_draft import FoundDraft, MissingDraft, find_draft

DRAFT = "HuggingFaceTB/SmolLM2-135M-Instruct"
VOCAB = 49152
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, *, texts: str = "abc") -> None:
    added = [{"id": number, "content": token} for number, token in enumerate(SPECIAL)]
    added.append({"id": 15, "content": "<jupyter_script>"})
    vocab = {letter: 20 + number for number, letter in enumerate(texts)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config and tokenizer of a model like SmolLM2-1.7B; the hub's cache is empty."""

    def nothing_cached(*_: object, **options: object) -> str:
        assert options["local_files_only"] is True, "nothing may be downloaded"
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)
    folder = tmp_path / "SmolLM2-1.7B"
    folder.mkdir()
    sizes = {"num_hidden_layers": 24, "hidden_size": 2048, "vocab_size": VOCAB, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    write_tokenizer(folder)
    return folder


def write_draft(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


def cached_at(folder: Path) -> Callable[..., str]:
    """Return a stand-in for the hub's client, whose cache holds the draft."""

    def download(name: str, **options: object) -> str:
        assert (name, options["local_files_only"]) == (DRAFT, True)
        return str(folder)

    return download


def test_a_missing_draft_is_named_and_not_downloaded(target: Path) -> None:
    choice = choose_drafter("auto", target, "org/large")[1]
    assert (choice.name, choice.fallback) == ("ngram", True)
    assert choice.why == (
        f"because {DRAFT}, which has the tokenizer of org/large, is not on this machine: --draft {DRAFT}+ngram "
        "downloads it once (0.3 GB)"
    )


def test_a_draft_in_the_cache_is_used_offline(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_draft(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_at(tmp_path / "cache"))
    drafter, choice = choose_drafter("auto", target, "org/large")
    assert (drafter.name, choice.name, choice.automatic) == ("auto", f"{DRAFT}+ngram", True)
    assert choice.why == f"because {DRAFT} has the tokenizer of org/large"
    (tmp_path / "cache" / "model.safetensors").unlink()
    assert choose_drafter("auto", target, "org/large")[1].name == "ngram", "the download was not complete"


def test_a_draft_beside_the_target_is_used(target: Path) -> None:
    beside = target.parent / DRAFT.rpartition("/")[2]
    write_draft(beside)
    assert find_draft(target, "org/large", DEFAULT_HUB) == FoundDraft(DRAFT, beside)
    write_tokenizer(beside, texts="cab")
    missing = find_draft(target, "org/large", DEFAULT_HUB)
    assert isinstance(missing, MissingDraft)
    assert missing.why.startswith(f"the tokenizer of {DRAFT} differs from that of org/large")
    assert missing.family is None, "a download would not help"


def test_a_draft_that_cannot_be_loaded_leaves_n_grams(target: Path) -> None:
    beside = target.parent / DRAFT.rpartition("/")[2]
    write_draft(beside)
    (beside / "model.safetensors").write_bytes(b"damaged")
    choice = choose_drafter("auto", target, "org/large")[1]
    assert (choice.name, choice.fallback) == ("ngram", True)
    assert "cannot be loaded" in choice.why


def test_without_torch_the_install_command_is_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "missing_modules", lambda _: ["torch"])
    why = choose_drafter("auto", target, "org/large")[1].why
    assert why.startswith(f"because {DRAFT}, which has the tokenizer of org/large, needs torch: pip install ")


def test_a_padded_vocabulary_is_named_as_the_reason(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 128}))
    choice = choose_drafter("auto", target, "org/tuned")[1]
    assert (choice.name, choice.fallback) == ("ngram", True)
    assert choice.why == (
        "because the vocabulary of org/tuned has 49280 rows, other models with its tokenizer (SmolLM2) 49152: "
        f"name {DRAFT} with --draft if the rest is padding"
    )


def test_a_padded_bundled_model_has_its_draft(tmp_path: Path) -> None:
    shutil.copytree(resolve_model("demo"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    found = find_draft(tmp_path, "padded", DEFAULT_HUB)
    assert isinstance(found, FoundDraft)
    assert found.name == "demo-draft"


def test_a_small_target_and_gpt_oss_have_no_draft(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"hidden_size": 576}))
    small = find_draft(target, "smollm2", DEFAULT_HUB)
    assert small == MissingDraft("no model much smaller than smollm2 has its tokenizer")
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 201088}))
    added = [{"id": 200005, "content": "<|channel|>"}, {"id": 200006, "content": "<|start|>"}]
    (target / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    assert find_draft(target, "gpt", DEFAULT_HUB) == MissingDraft(
        "no small model with the tokenizer of gpt (gpt-oss) is published"
    )
