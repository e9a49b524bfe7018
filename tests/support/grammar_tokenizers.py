"""Small tokenizers of the usual kinds, trained on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from treeswarm.grammar.compiler import GrammarCompiler

TEXT = [
    '{"name": "Bob", "age": 12, "tags": ["red", "blue"], "kind": "alpha"}',
    '{"city": "Zürich", "code": "A-17", "ok": true, "none": null, "list": [1, 2.5, -3]}',
    "alpha beta gamma the cat sat on the mat, don't you know?",
] * 3
END = "</s>"


def byte_level() -> Tokenizer:
    """Return byte-level BPE, as GPT-2's, Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Return BPE with spaces as a character and bytes for what is unknown, as Llama 2's, Mistral's and Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    # Bytes are plain tokens; training can only add them as special ones.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece}


def compiler_for(tokenizer: Tokenizer, padding: int = 0) -> GrammarCompiler:
    """Return a compiler for a model whose vocabulary has `padding` tokens more than the tokenizer."""
    return GrammarCompiler.of(tokenizer, tokenizer.get_vocab_size() + padding, "test")
