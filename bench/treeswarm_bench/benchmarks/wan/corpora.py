"""The kinds of text that `swarm bench wan` continues."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from treeswarm_bench.benchmarks.texts import PROMPT_TOKENS, chat_prompts, held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.reference import stock_greedy

# A copying text is PASSAGE tokens of a held-out file and CONTINUED more as the target continues them, both twice; the
# second time it stops STARTED tokens into what the target wrote itself.
PASSAGE, CONTINUED, STARTED = 96, 64, 8
# Least number of tokens of its first continuation that the target repeats on a prompt that counts as copying.
COPIED = 24
# Number of held-out beginnings tried for each prompt that copies: with the bundled target every second one does.
TRIED = 4


@dataclass(frozen=True)
class Corpus:
    """Prompts of one kind."""

    name: str
    description: str
    prompts: list[list[int]]
    misled: bool = False
    """Whether drafters draft other tokens than they would."""
    tokens_share: float = 1.0
    """Factor on the requested number of tokens.

    It is higher where trees pay, since their rate shows over some rounds, and lower where each token costs a traversal.
    """
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the description and the figures, for JSON."""
        return {
            "says": self.description,
            "prompts": len(self.prompts),
            "tokens_share": self.tokens_share,
            **self.facts,
        }


@dataclass(frozen=True)
class TextSource:
    """What corpora are made with: a tokenizer, the target, and the number of prompts."""

    client: SwarmClient
    model: Path
    dtype: str
    count: int


async def _code(source: TextSource) -> Corpus:
    prompts = held_out_prompts(source.client, source.count)
    return Corpus("code", "Python that neither model saw in training", prompts, tokens_share=2.0)


async def _prose(source: TextSource) -> Corpus:
    passages = [source.client.encode(passage) for passage in prose_passages()]
    windows = [passage[start : start + PROMPT_TOKENS] for start in (0, PROMPT_TOKENS) for passage in passages]
    prompts = [window for window in windows if window][: source.count]
    description = "English, which the bundled models hardly know: the target soon turns it into code again"
    return Corpus("prose", description, prompts)


async def _copying(source: TextSource) -> Corpus:
    # Other prompts than those of `code`, because drafters remember texts.
    held_out = held_out_prompts(source.client, (1 + TRIED) * source.count)[source.count :]
    beginnings = [prompt[:PASSAGE] for prompt in held_out]
    written = (await stock_greedy(source.model, beginnings, CONTINUED, source.dtype)).token_ids
    prompts = [write_twice(start, more) for start, more in zip(beginnings, written, strict=True)]
    again = (await stock_greedy(source.model, prompts, CONTINUED - STARTED, source.dtype)).token_ids
    copied = [shared_tokens(text, more[STARTED:]) for text, more in zip(again, written, strict=True)]
    # The first prompts that copy; if there are too few, those that copy most.
    order = sorted(range(len(prompts)), key=lambda i: (-min(copied[i], COPIED), i))[: source.count]
    description = (
        f"{PASSAGE} tokens of held-out Python and {CONTINUED} more in the target's own words, twice, the second time "
        f"cut {STARTED} tokens into those: under greedy the target repeats itself"
    )
    facts = {
        "tokens_copied_under_greedy": [copied[i] for i in order],
        "of": CONTINUED - STARTED,
        "beginnings_tried": len(prompts),
    }
    return Corpus("copying", description, [prompts[i] for i in order], facts=facts)


async def _zero(source: TextSource) -> Corpus:
    description = (
        "the prompts of `code`; drafters ship the trees they would, with other tokens in them (half the vocabulary on)"
    )
    prompts = held_out_prompts(source.client, source.count)
    return Corpus("zero", description, prompts, misled=True)


async def _chat(source: TextSource) -> Corpus:
    prompts = chat_prompts(source.client, source.count)
    return Corpus("chat", "questions in English, as the model's chat template writes them", prompts)


MAKERS: dict[str, Callable[[TextSource], Awaitable[Corpus]]] = {
    "code": _code,
    "prose": _prose,
    "copying": _copying,
    "zero": _zero,
    "chat": _chat,
}
# The bundled target has no chat template.
DEFAULT_TEXTS = ("code", "prose", "copying", "zero")


async def make_corpora(source: TextSource, names: Sequence[str]) -> list[Corpus]:
    """Make the corpora of these names.

    Raises ModelError if the target cannot be run to find what it copies, BadRequest if it has no chat template.
    """
    return [await MAKERS[name](source) for name in names]


def spare_prompt(source: TextSource) -> list[int]:
    """Return a held-out prompt that is in no corpus."""
    return held_out_prompts(source.client, (1 + TRIED) * source.count + 1)[-1]


def prose_passages() -> list[str]:
    """Return the passages of English, each in one line."""
    text = files("treeswarm_bench.benchmarks.wan").joinpath("prose.txt").read_text("utf-8")
    return [passage.replace("\n", " ").strip() for passage in text.split("\n\n")]


def write_twice(start: Sequence[int], more: Sequence[int]) -> list[int]:
    """Return a passage and its continuation, then the passage and STARTED tokens of its continuation again."""
    return [*start, *more, *start, *more[:STARTED]]


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first tokens two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
