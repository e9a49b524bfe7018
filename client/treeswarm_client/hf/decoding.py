"""Rows and samples side by side, each a session of its own."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch
from transformers import StopStringCriteria

from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run

StopCheck = Callable[[Sequence[int]], bool]
"""Whether a text, prompt included, ends here."""


def never_stop(text: Sequence[int]) -> bool:
    """Where only end tokens and lengths count."""
    return False


def stop_at_strings(stops: Sequence[str], tokenizer: Any) -> StopCheck:
    """transformers' own criterion, so that texts end where its do."""
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=list(stops))

    def ended(text: Sequence[int]) -> bool:
        tail = torch.tensor([text[-criterion.maximum_token_len :]])
        return bool(criterion(tail, None).any())

    return ended


async def stream_traversals(run: Run, prompt: Sequence[int], ended: StopCheck) -> AsyncGenerator[list[int], None]:
    """What each round trip brings, until the run or the text ends.  `prompt` is what the caller sees before it."""
    text = list(prompt)
    burst: list[int] = []
    async with aclosing(run):
        async for token in run:
            text.append(token.id)
            burst.append(token.id)
            if over := ended(text):
                run.finish_reason = "stop"
            if over or not token.following:
                yield burst
                burst = []
            if over:
                return


async def generate_rows(
    client: SwarmClient,
    prompts: Sequence[tuple[Sequence[int], list[int]]],
    samples: int,
    ended: StopCheck,
    **options: Any,
) -> list[Run]:
    """`samples` of every (padded, bare) prompt, row by row; the first failure ends all, and is raised."""
    runs = [
        [client.stream(bare, sample=row * samples + i, **options) for i in range(samples)]
        for row, (_, bare) in enumerate(prompts)
    ]
    ends = [asyncio.create_task(_row(of_row, padded, ended)) for of_row, (padded, _) in zip(runs, prompts, strict=True)]
    await _all(ends)
    return [run for of_row in runs for run in of_row]


async def _row(runs: Sequence[Run], prompt: Sequence[int], ended: StopCheck) -> None:
    """The first sample's prompt passes all nodes; the others begin on it."""
    passed = asyncio.Event()
    first = asyncio.create_task(_drain(runs[0], prompt, ended, passed))
    others = [asyncio.create_task(_drain_after(passed, run, prompt, ended)) for run in runs[1:]]
    await _all([first, *others])


async def _drain(run: Run, prompt: Sequence[int], ended: StopCheck, passed: asyncio.Event) -> None:
    async for _ in stream_traversals(run, prompt, ended):
        passed.set()


async def _drain_after(passed: asyncio.Event, run: Run, prompt: Sequence[int], ended: StopCheck) -> None:
    await passed.wait()
    await _drain(run, prompt, ended, passed)


async def _all(tasks: Sequence["asyncio.Task[None]"]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
