"""The texts that a speculator is trained on: windows of input text, and what the target writes itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import BadRequest
from treeswarm_bench.benchmarks.texts import is_held_out, library_texts
from treeswarm_bench.speculators.prompts import chat_questions
from treeswarm_client.prompt_encoder import PromptEncoder

# Number of tokens of a prompt from input text: the target writes the rest of the window.
PROMPT_TOKENS = 64
# Texts that end sooner teach little.
SHORTEST = 16


@dataclass(frozen=True, eq=False)
class Samples:
    """Texts of at most one window, padded behind their ends."""

    tokens: NDArray[np.int32]
    """Token ids, int32 [texts, window]."""
    lengths: NDArray[np.int32]
    """Number of tokens of each text, int32 [texts]."""

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.tokens)

    def batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return some texts, int64 [batch, longest], and which of their tokens are real, bool [batch, longest]."""
        lengths = self.lengths[indices]
        longest = int(lengths.max())
        real = np.arange(longest) < lengths[:, None]
        return torch.from_numpy(self.tokens[indices, :longest].astype(np.int64)), torch.from_numpy(real)

    def joined(self, other: "Samples") -> "Samples":
        """Return these texts and, after them, the others."""
        return Samples(np.concatenate([self.tokens, other.tokens]), np.concatenate([self.lengths, other.lengths]))


def padded(texts: Sequence[Sequence[int]], window: int) -> Samples:
    """Return texts as samples; those that are too short are left out."""
    kept = [text[:window] for text in texts if len(text) >= SHORTEST]
    tokens = np.zeros((len(kept), window), np.int32)
    for row, text in zip(tokens, kept, strict=True):
        row[: len(text)] = text
    return Samples(tokens, np.array([len(text) for text in kept], np.int32))


@dataclass(frozen=True, eq=False)
class InputTexts:
    """Texts as one long row of tokens each for training and for what is held out."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]

    def windows(self, count: int, window: int, seed: int, *, held_out: bool = False) -> Samples:
        """Return random windows, the same ones for the same seed."""
        tokens = self.held_out if held_out else self.train
        starts = np.random.default_rng(seed).integers(0, max(1, len(tokens) - window), count)
        return padded([tokens[start : start + window].tolist() for start in starts], window)


def read_input_texts(encoder: PromptEncoder, paths: Sequence[Path]) -> InputTexts:
    """Read the texts at `paths` (files, or folders of .txt, .md and .py files), or else the standard library's source.

    A file is held out by the hash of its name.  Raises BadRequest.
    """
    texts = _texts_at(paths) if paths else library_texts()
    split: dict[bool, list[int]] = {False: [], True: []}
    for name, text in texts.items():
        split[is_held_out(name)] += encoder.encode(text)
    # One file or a few may all be on one side.
    if not split[True] or not split[False]:
        together = split[True] or split[False]
        cut = len(together) * 19 // 20
        split = {False: together[:cut], True: together[cut:]}
    if len(split[True]) < SHORTEST:
        raise BadRequest("the texts are too short to train on: give some thousand words with --texts")
    return InputTexts(np.array(split[False], np.int64), np.array(split[True], np.int64))


def _texts_at(paths: Sequence[Path]) -> dict[str, str]:
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if path.is_file() or file.suffix in {".txt", ".md", ".py"}
    ]
    try:
        return {file.name: file.read_text("utf-8", errors="ignore") for file in files}
    except OSError as error:
        raise BadRequest(f"a text cannot be read: {error}") from None


@dataclass(frozen=True, eq=False)
class PromptSource:
    """Prompts for the target's own texts."""

    encoder: PromptEncoder
    texts: InputTexts
    chats: bool
    """Whether the prompts are questions to a chat model, not beginnings of texts."""

    def prompts(self, first: int, count: int, *, held_out: bool = False) -> list[list[int]]:
        """Return prompts number `first` and the next ones, the same ones every time."""
        if self.chats:
            questions = chat_questions(held_out=held_out)
            chosen = [questions[i % len(questions)] for i in range(first, first + count)]
            return [self.of_question(question) for question in chosen]
        samples = [
            self.texts.windows(1, PROMPT_TOKENS, 7_000_003 + i, held_out=held_out) for i in range(first, first + count)
        ]
        return [sample.tokens[0, : sample.lengths[0]].tolist() for sample in samples]

    def of_question(self, question: str) -> list[int]:
        """Return a conversation that begins with a question."""
        return self.encoder.encode_chat([{"role": "user", "content": question}])
