"""Read the corpus: the standard library of the running Python and its `pydoc` topics.

Nothing is downloaded, so that anyone with a Python can repeat the training.  Whole files are held out: a held-out
prompt comes from a file of which the models saw no line.
"""

from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from treeswarm_bench.benchmarks.texts import is_held_out, library_texts

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Texts by name, split into training and held-out files."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus() -> Corpus:
    """Return all texts of the running Python; a hash of their names chooses those held out."""
    texts = {**library_texts(), **{f"topic:{name}": text for name, text in topics.items()}}
    held_out = {name for name in texts if is_held_out(name)}
    return Corpus(
        train={name: text for name, text in texts.items() if name not in held_out},
        held_out={name: texts[name] for name in sorted(held_out)},
    )


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCAB_SIZE` tokens on the training files only."""
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
    """Return all texts as one int64 array of token ids, each text followed by the end-of-text token."""
    encoded = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded])
