"""Tokenizers in every form in which they are published become `tokenizer.json`, once."""

import base64
import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import BadRequest, ModelError
from treeswarm.model_files import load_tokenizer, tokenizer_digest
from treeswarm.model_sources import conversion_process, tokenizer_files
from treeswarm_client.prompt_encoder import load_prompt_encoder

TEXT = "The swarm answers: in 42 trees, the theme is 'there'.\n  Zwölf 世界"
TEKKEN_NAMES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
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


def write_sentencepiece(folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_tiktoken(folder: Path) -> None:
    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("\n".join(lines))


def write_vocab_and_merges(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    trained.save_model(str(folder))


def write_wordpieces(folder: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789:.,'"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join([*pieces, "the", "theme", "##ers"]))


def write_tekken(folder: Path) -> None:
    ranks = byte_ranks()
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) + len(TEKKEN_NAMES),
            "default_num_special_tokens": len(TEKKEN_NAMES),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(ranks)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(TEKKEN_NAMES)
        ],
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(content))


def test_sentencepiece_model_gives_its_own_ids(tmp_path: Path, conversions: list[Path]) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = model_folder(tmp_path, "llama", tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=False)
    write_sentencepiece(folder)
    model = (folder / "tokenizer.model").read_bytes()
    expected = SentencePieceProcessor(model_proto=model).encode("the theme answers 世界")
    assert load_tokenizer(folder).encode("the theme answers 世界", add_special_tokens=False).ids == expected
    assert len(tokenizer_digest(folder)) == 64
    assert conversions == [folder]  # the second time it is in the cache


def test_tiktoken_model_gives_its_own_ids(tmp_path: Path) -> None:
    from tiktoken import Encoding
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {token: rank for rank, token in enumerate(byte_ranks())}
    folder = model_folder(tmp_path, "deepseek_v3", tokenizer_class="PreTrainedTokenizerFast")
    write_tiktoken(folder)
    pattern = TikTokenConverter(str(folder / "tiktoken.model")).pattern
    expected = Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode(TEXT)
    assert load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids == expected


def test_vocab_and_merges_give_the_ids_of_transformers(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    folder = model_folder(tmp_path, "gpt2", tokenizer_class="GPT2Tokenizer")
    write_vocab_and_merges(folder)
    stored = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids == stored.encode(TEXT).ids


def test_mistral_tekken_file_keeps_its_special_tokens_first(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "mistral")
    write_tekken(folder)
    encoded = load_tokenizer(folder).encode("[INST] the", add_special_tokens=False).ids
    assert encoded == [3, len(TEKKEN_NAMES) + byte_ranks().index(b" the")]


# Each form: how it is written, the type and tokenizer class of a model that has it, and the packages it needs.
FORMS: dict[str, tuple[Callable[[Path], None], str, str, list[str]]] = {
    "tokenizer.model": (write_sentencepiece, "llama", "LlamaTokenizer", ["transformers", "sentencepiece"]),
    "tiktoken.model": (write_tiktoken, "deepseek_v3", "PreTrainedTokenizerFast", ["transformers", "tiktoken"]),
    "vocab.json": (write_vocab_and_merges, "gpt2", "GPT2Tokenizer", ["transformers"]),
    "vocab.txt": (write_wordpieces, "bert", "BertTokenizer", ["transformers"]),
    "tekken.json": (write_tekken, "mistral", "", ["transformers"]),
}


@pytest.mark.parametrize("file", FORMS)
def test_client_reads_and_writes_texts_with_every_form(file: str, tmp_path: Path) -> None:
    write, model_type, tokenizer_class, _ = FORMS[file]
    folder = model_folder(tmp_path, model_type, **({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))
    write(folder)
    encoder = load_prompt_encoder("model", folder)
    text = "the theme answers"
    ids = encoder.encode(text)
    assert text in encoder.decode(ids)
    assert len(set(ids)) >= 3


@pytest.mark.parametrize("file", FORMS)
def test_missing_packages_are_named_with_their_command(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, model_type, _, needed = FORMS[file]
    find = importlib.util.find_spec
    folder = model_folder(tmp_path, model_type)
    write(folder)
    for absent in needed:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, absent=absent: find(name) if name != absent else None
        )
        with pytest.raises(BadRequest, match=rf"{re.escape(file)}, which is converted once with {absent}") as refusal:
            load_prompt_encoder("model", folder)
        assert "pip install" in str(refusal.value)
        assert "[tokenizers]" in str(refusal.value)


def test_no_tokenizer_in_any_form_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer in another form"):
        load_tokenizer(model_folder(tmp_path, "llama"))
