"""Tokenizers in every form in which they are published become `tokenizer.json`, once."""

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import BadRequest, ModelError
from treeswarm.model_files import load_tokenizer, tokenizer_digest
from treeswarm.model_sources import conversion_process, tokenizer_files

TEXT = "The swarm answers: in 42 trees, the theme is 'there'.\n  Zwölf 世界"
SENTENCES = ["the swarm answers in trees", "there are 42 trees in the theme", "a node answers the client"] * 20


@pytest.fixture(autouse=True)
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Convert in this process, and return the folders that were converted."""
    done: list[Path] = []

    def convert(kind: str, source: Path, target: Path) -> None:
        assert kind == "tokenizer"
        done.append(source)
        conversion_process.convert_tokenizer(source, target)

    monkeypatch.setattr(tokenizer_files, "convert", convert)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


def model_folder(tmp_path: Path, model_type: str, **tokenizer_config: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def byte_ranks() -> list[bytes]:
    """Return a byte-level vocabulary in order of its merges."""
    return [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the", b"in", b"re", b"there", b"ree"]


def test_sentencepiece_model_gives_its_own_ids(tmp_path: Path, conversions: list[Path]) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder = model_folder(tmp_path, "llama", tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=False)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    expected = SentencePieceProcessor(model_proto=model.getvalue()).encode("the theme answers 世界")
    assert load_tokenizer(folder).encode("the theme answers 世界", add_special_tokens=False).ids == expected
    assert len(tokenizer_digest(folder)) == 64
    assert conversions == [folder]  # the second time it is in the cache


def test_tiktoken_model_gives_its_own_ids(tmp_path: Path) -> None:
    from tiktoken import Encoding
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    folder = model_folder(tmp_path, "deepseek_v3", tokenizer_class="PreTrainedTokenizerFast")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines))
    pattern = TikTokenConverter(str(folder / "tiktoken.model")).pattern
    expected = Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode(TEXT)
    assert load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids == expected


def test_vocab_and_merges_give_the_ids_of_transformers(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    folder = model_folder(tmp_path, "gpt2", tokenizer_class="GPT2Tokenizer")
    trained.save_model(str(folder))
    assert load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids == trained.encode(TEXT).ids


def test_mistral_tekken_file_keeps_its_special_tokens_first(tmp_path: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    ranks = byte_ranks()
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) + len(names),
            "default_num_special_tokens": len(names),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(ranks)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ],
    }  # fmt: skip
    folder = model_folder(tmp_path, "mistral")
    (folder / "tekken.json").write_text(json.dumps(content))
    encoded = load_tokenizer(folder).encode("[INST] the", add_special_tokens=False).ids
    assert encoded == [3, len(names) + ranks.index(b" the")]


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    folder = model_folder(tmp_path, "llama")
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadRequest, match=r"tokenizer\.model, which is converted once with sentencepiece") as refusal:
        load_tokenizer(folder)
    assert "pip install" in str(refusal.value)
    assert "[tokenizers]" in str(refusal.value)


def test_no_tokenizer_in_any_form_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer in another form"):
        load_tokenizer(model_folder(tmp_path, "llama"))
