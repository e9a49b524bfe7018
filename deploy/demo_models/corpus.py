"""The corpus: this Python's own standard library and its `pydoc` topics.

Nothing is downloaded, so anyone with a Python can repeat the training.  Files are held out
whole: a held-out prompt comes from a file of which the models saw no line.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydoc_data.topics import topics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.05
# Tables of characters and fixtures teach a small model nothing but themselves.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "idlelib"}
LARGEST_FILE = 200_000


@dataclass(frozen=True)
class Corpus:
    """Texts by name, split by whole files."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus() -> Corpus:
    """All texts of the running Python, the held-out ones chosen by a hash of their names."""
    texts = {**_library_files(), **{f"topic:{name}": text for name, text in topics.items()}}
    held_out = {name for name in texts if _fraction(name) < HELD_OUT_SHARE}
    return Corpus(
        train={name: text for name, text in texts.items() if name not in held_out},
        held_out={name: texts[name] for name in sorted(held_out)},
    )


def _library_files() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    kept = (path for path in files if not SKIPPED_FOLDERS & set(path.parts))
    texts = {path.as_posix(): (root / path).read_text("utf-8", errors="ignore") for path in kept}
    return {name: text for name, text in texts.items() if 0 < len(text) <= LARGEST_FILE}


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens, learned from the training files alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> np.ndarray:
    """All texts as one line of token ids, int64, each text ended by the end-of-text token."""
    encoded = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded])
