"""Rows and samples generated side by side, each in a session of its own."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch
from transformers import StopStringCriteria

from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run

StopCheck = Callable[[Sequence[int]], bool]
"""A function that tells whether a text, given as token ids with its prompt, ends here."""


def never_stop(text: Sequence[int]) -> bool:
    """Return False: only end tokens and lengths end the text."""
    return False


def stop_at_strings(stops: Sequence[str], tokenizer: Any) -> StopCheck:
    """Return transformers' own criterion, so that texts end exactly where transformers would end them."""
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=list(stops))

    def stops_here(text: Sequence[int]) -> bool:
        tail = torch.tensor([text[-criterion.maximum_token_len :]])
        return bool(criterion(tail, None).any())

    return stops_here


def stop_by_criteria(criteria: Sequence[Callable[..., Any]]) -> StopCheck:
    """Return transformers' stopping criteria as a check; they see one row, and None for its scores."""

    def stops_here(text: Sequence[int]) -> bool:
        row = torch.tensor([text])
        return any(bool(torch.as_tensor(criterion(row, None)).all()) for criterion in criteria)

    return stops_here


def stop_after(seconds: float) -> StopCheck:
    """Return a check that ends texts so long after now."""
    end = time.monotonic() + seconds
    return lambda _: time.monotonic() >= end


def any_of(checks: Sequence[StopCheck]) -> StopCheck:
    """Return a check that ends a text where one of these does."""
    return lambda text: any(check(text) for check in checks)


async def stream_traversals(run: Run, prompt: Sequence[int], stops_here: StopCheck) -> AsyncGenerator[list[int], None]:
    """Yield the token ids of each traversal until the run ends or `stops_here` says so.

    `prompt` are the token ids before the new text, as the caller sees them.
    """
    text = list(prompt)
    burst: list[int] = []
    async with aclosing(run):
        async for token in run:
            text.append(token.id)
            burst.append(token.id)
            if stop := stops_here(text):
                run.finish_reason = "stop"
            if stop or not token.following:
                yield burst
                burst = []
            if stop:
                return


async def generate_rows(
    client: SwarmClient,
    prompts: Sequence[tuple[Sequence[int], list[int]]],
    samples: int,
    stops_here: StopCheck,
    **options: Any,
) -> list[Run]:
    """Generate `samples` texts for every prompt and return their runs, row by row.

    Each prompt is a pair of token ids, with and without its padding.  The first failure ends all and is raised.
    """
    rows = [
        [client.stream(bare, sample=row * samples + i, **options) for i in range(samples)]
        for row, (_, bare) in enumerate(prompts)
    ]
    tasks = [
        asyncio.create_task(_generate_row(runs, padded, stops_here))
        for runs, (padded, _) in zip(rows, prompts, strict=True)
    ]
    await _wait_for_all(tasks)
    return [run for runs in rows for run in runs]


async def _generate_row(runs: Sequence[Run], prompt: Sequence[int], stops_here: StopCheck) -> None:
    """Generate the samples of one row.

    The first sample's prompt passes through all nodes before the others begin, so that they share its prefix.
    """
    prompt_passed = asyncio.Event()
    first = asyncio.create_task(_drain(runs[0], prompt, stops_here, prompt_passed))
    others = [asyncio.create_task(_drain_after(prompt_passed, run, prompt, stops_here)) for run in runs[1:]]
    await _wait_for_all([first, *others])


async def _drain(run: Run, prompt: Sequence[int], stops_here: StopCheck, prompt_passed: asyncio.Event) -> None:
    async for _ in stream_traversals(run, prompt, stops_here):
        prompt_passed.set()


async def _drain_after(prompt_passed: asyncio.Event, run: Run, prompt: Sequence[int], stops_here: StopCheck) -> None:
    await prompt_passed.wait()
    await _drain(run, prompt, stops_here, prompt_passed)


async def _wait_for_all(tasks: Sequence["asyncio.Task[None]"]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
