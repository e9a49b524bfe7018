"""The four kinds of text that `swarm bench wan` continues."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from treeswarm_bench.benchmarks.texts import PROMPT_TOKENS, held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.reference import stock_greedy

# A copying text: so many tokens of a held-out file and so many more as the target goes on, both twice; the second time
# it stops a little into what the target wrote itself.
PASSAGE, CONTINUED, STARTED = 96, 64, 8
# A prompt counts as copying when the target repeats so many tokens of its first continuation.
COPIED = 24
# Held-out beginnings looked at for each that copies: with the bundled target every second one does.
TRIED = 4


@dataclass(frozen=True)
class Corpus:
    """Prompts of one kind."""

    name: str
    says: str
    prompts: list[list[int]]
    misled: bool = False
    """Drafters draft something else than they would."""
    tokens_share: float = 1.0
    """Of the tokens asked for: more where trees pay, since their rate shows over some rounds; fewer where each token
    costs a traversal."""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"says": self.says, "prompts": len(self.prompts), "tokens_share": self.tokens_share, **self.facts}


@dataclass(frozen=True)
class Source:
    """What corpora are made of."""

    client: SwarmClient
    model: Path
    dtype: str
    count: int


async def _code(source: Source) -> Corpus:
    prompts = held_out_prompts(source.client, source.count)
    return Corpus("code", "Python that neither model saw in training", prompts, tokens_share=2.0)


async def _prose(source: Source) -> Corpus:
    passages = [source.client.encode(passage) for passage in prose_passages()]
    windows = [passage[start : start + PROMPT_TOKENS] for start in (0, PROMPT_TOKENS) for passage in passages]
    prompts = [window for window in windows if window][: source.count]
    says = "English, which the bundled models hardly know: what the target makes of it turns into code again soon"
    return Corpus("prose", says, prompts)


async def _copying(source: Source) -> Corpus:
    # Others than those of `code`: drafters remember.
    held_out = held_out_prompts(source.client, (1 + TRIED) * source.count)[source.count :]
    beginnings = [prompt[:PASSAGE] for prompt in held_out]
    written = (await stock_greedy(source.model, beginnings, CONTINUED, source.dtype)).token_ids
    prompts = [twice(start, more) for start, more in zip(beginnings, written, strict=True)]
    again = (await stock_greedy(source.model, prompts, CONTINUED - STARTED, source.dtype)).token_ids
    copied = [common(text, more[STARTED:]) for text, more in zip(again, written, strict=True)]
    # The first that copy; if there are too few, those that copy most.
    order = sorted(range(len(prompts)), key=lambda i: (-min(copied[i], COPIED), i))[: source.count]
    says = (
        f"{PASSAGE} tokens of held-out Python and {CONTINUED} more in the target's own words, twice, the second time "
        f"cut {STARTED} tokens into those: under greedy the target repeats itself"
    )
    facts = {
        "tokens_copied_under_greedy": [copied[i] for i in order],
        "of": CONTINUED - STARTED,
        "beginnings_tried": len(prompts),
    }
    return Corpus("copying", says, [prompts[i] for i in order], facts=facts)


async def _zero(source: Source) -> Corpus:
    says = (
        "the prompts of `code`; drafters ship the trees they would, with other tokens in them (half the vocabulary on)"
    )
    prompts = held_out_prompts(source.client, source.count)
    return Corpus("zero", says, prompts, misled=True)


MAKERS: dict[str, Callable[[Source], Awaitable[Corpus]]] = {
    "code": _code,
    "prose": _prose,
    "copying": _copying,
    "zero": _zero,
}


async def corpora(source: Source, names: Sequence[str]) -> list[Corpus]:
    """Those asked for.  Raises ModelError where the target cannot be asked what it copies."""
    return [await MAKERS[name](source) for name in names]


def spare_prompt(source: Source) -> list[int]:
    """Held out, and in no corpus."""
    return held_out_prompts(source.client, (1 + TRIED) * source.count + 1)[-1]


def prose_passages() -> list[str]:
    """Each in one line."""
    text = files("treeswarm_bench.benchmarks").joinpath("prose.txt").read_text("utf-8")
    return [passage.replace("\n", " ").strip() for passage in text.split("\n\n")]


def twice(start: Sequence[int], more: Sequence[int]) -> list[int]:
    """A passage and how it went on, then again up to the beginning of how it went on."""
    return [*start, *more, *start, *more[:STARTED]]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
