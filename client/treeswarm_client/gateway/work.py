"""One request's generations: they run side by side, and what they say is merged as it comes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from treeswarm.errors import SwarmError
from treeswarm_client.generation import FinishReason
from treeswarm_client.run import Run, Token

# Tokens that wait for a slow reader; then its generations wait as well.
AHEAD = 64


@dataclass(frozen=True)
class Said:
    """A choice said one token more."""

    choice: int
    token: Token


@dataclass(frozen=True)
class Ended:
    """A choice is whole."""

    choice: int
    finish: FinishReason


Event = Said | Ended


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; prompts count once, however often they are continued."""

    prompt: int
    completion: int
    cached: int
    """Of the prompts, those that nodes had already."""


def usage_of(runs: Sequence[Run], n: int) -> Usage:
    """Choices stand prompt by prompt, `n` of each."""
    firsts = runs[::n]
    return Usage(
        sum(len(run.prompt_ids) for run in firsts),
        sum(len(run.token_ids) for run in runs),
        sum(run.prefix_tokens for run in firsts),
    )


async def follow(runs: Sequence[Run], n: int) -> AsyncGenerator[Event, None]:
    """All runs to their ends.  Closing it ends them and frees their sessions; an error of one ends all and is raised.

    Of each prompt the first of its `n` runs begins alone: once the prompt has passed the nodes, the others share it.
    """
    heard: asyncio.Queue[Event | SwarmError] = asyncio.Queue(AHEAD)
    passed = [asyncio.Event() for _ in runs[::n]]
    tasks = [
        asyncio.create_task(_follow(i, run, passed[i // n], heard, first=i % n == 0)) for i, run in enumerate(runs)
    ]
    left = len(runs)
    try:
        while left:
            event = await heard.get()
            if isinstance(event, SwarmError):
                raise event
            left -= isinstance(event, Ended)
            yield event
    finally:
        for task in tasks:
            task.cancel()
        # Not gathered: a caller cancelled again and again, as a web server does, would cancel their goodbyes too.
        await asyncio.wait(tasks)


async def _follow(
    choice: int, run: Run, passed: asyncio.Event, heard: "asyncio.Queue[Event | SwarmError]", *, first: bool
) -> None:
    if not first:
        await passed.wait()
    try:
        async with aclosing(run.tokens):
            async for token in run:
                passed.set()
                await heard.put(Said(choice, token))
        await heard.put(Ended(choice, run.finish_reason or "length"))
    except SwarmError as error:
        await heard.put(error)
    finally:
        passed.set()


async def drain(events: AsyncGenerator[Event, None]) -> None:
    """To the end, for whoever wants it whole."""
    async with contextlib.aclosing(events):
        async for _ in events:
            pass
