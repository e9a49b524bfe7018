"""Texts for benches and for training: this Python's own standard library, split by whole files.

A file is held out by the hash of its name.  So every machine holds out the same files, and what the bundled models saw
in training is never a prompt.
"""

import hashlib
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

HELD_OUT_SHARE = 0.05
# Tables of characters and test fixtures teach a small model nothing about other texts.
SKIPPED_FOLDERS = {
    "__pycache__",
    "encodings",
    "idle_test",
    "idlelib",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
}
LARGEST_FILE = 200_000
# A prompt of this length shows what kind of text it is, and leaves the rest of a file unseen.
PROMPT_TOKENS = 128
PROMPT_CHARACTERS = 1500


QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "Write a short email that moves a meeting from Monday to Wednesday.",
    "Explain what a prime number is to a child of ten.",
    "List five things to pack for a week in the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that returns the factorial of a number.",
    "Give me three ideas for a quick vegetarian dinner.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "How do I boil an egg?",
    "Translate into French: the house is on the hill.",
    "Summarize in one sentence why bees are important.",
    "What does the word ubiquitous mean? Use it in a sentence.",
    "Name the planets of the solar system in order.",
    "How can I sleep better at night?",
    "Write a haiku about autumn.",
    "What causes the seasons on Earth?",
    "If a train travels 60 km in 45 minutes, how fast is it?",
    "Give two arguments for and two against working from home.",
    "What is photosynthesis?",
    "How does a refrigerator keep food cold?",
    "Write a thank-you note to a neighbour who watered my plants.",
    "What is the largest ocean, and how deep is it?",
    "Explain the difference between weather and climate.",
    "Give me a simple recipe for pancakes.",
    "Write a SQL query that counts the orders of each customer.",
    "What should I consider before I adopt a cat?",
    "Why do leaves change colour in autumn?",
    "Write a limerick about a programmer.",
    "What is inflation, in plain words?",
    "Describe how a bill becomes a law in the United States.",
    "How many minutes are there in a week? Show the steps.",
    "What are the symptoms of dehydration?",
    "Suggest names for a small bakery by the sea.",
    "Who was Marie Curie, and why is she remembered?",
    "Correct the grammar: me and him goes to school yesterday.",
    "How do I change the oil of a car?",
    "What is the difference between RAM and a hard disk?",
    "Tell a very short story about a lighthouse keeper.",
    "Write a bash command that finds all files larger than 100 MB.",
)
"""Questions to a chat model.  Heads and drafts that are measured on them never train on them."""


class Encoder(Protocol):
    """A client, or another object that has the model's tokenizer."""

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a text."""
        ...


class ChatEncoder(Protocol):
    """A model's tokenizer and chat template."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation."""
        ...


def library_texts() -> dict[str, str]:
    """Return the source of the running Python's modules, by path relative to the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    kept = (path for path in names if not SKIPPED_FOLDERS & set(path.parts))
    texts = {path.as_posix(): (root / path).read_text("utf-8", errors="ignore") for path in kept}
    return {name: text for name, text in texts.items() if 0 < len(text) <= LARGEST_FILE}


def is_held_out(name: str) -> bool:
    """Return whether a text of this name is kept out of training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < HELD_OUT_SHARE


def held_out_prompts(client: Encoder, count: int) -> list[list[int]]:
    """Return `count` prompts of PROMPT_TOKENS tokens, from each held-out file in turn."""
    texts = [text for name, text in library_texts().items() if is_held_out(name) and len(text) > PROMPT_CHARACTERS]
    prompts: list[list[int]] = []
    for start in range(0, LARGEST_FILE, PROMPT_CHARACTERS):
        for text in texts:
            window = text[start : start + PROMPT_CHARACTERS]
            tokens = client.encode(window)[:PROMPT_TOKENS] if len(window) == PROMPT_CHARACTERS else []
            if tokens:
                prompts.append(tokens)
            if len(prompts) == count:
                return prompts
    return prompts


def chat_prompts(encoder: ChatEncoder, count: int) -> list[list[int]]:
    """Return the first `count` questions as the model's chat template writes them.  Raises BadRequest."""
    return [encoder.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS[:count]]


def repeated_4grams(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that already occurred in the text: 0 for a novel text, near 1 for a loop."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1.0 - len(set(grams)) / max(1, len(grams))
