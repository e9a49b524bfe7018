"""One request's generations: they run side by side, and what they say is merged as it comes."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from treeswarm.errors import SwarmError
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Run, Token

# Tokens that wait for a slow reader; then its generations wait as well, and end when he has read nothing for so long:
# whoever sleeps shall not keep nodes' room.
AHEAD = 64
READER_S = 60.0


@dataclass(frozen=True)
class TokenEvent:
    """A choice said one token more."""

    choice: int
    token: Token


@dataclass(frozen=True)
class FinishEvent:
    """A choice is whole."""

    choice: int
    finish: FinishReason


GenerationEvent = TokenEvent | FinishEvent


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; prompts count once, however often they are continued."""

    prompt: int
    completion: int
    cached: int
    """Of the prompts, those that nodes had already."""


def count_usage(runs: Sequence[Run], n: int) -> Usage:
    """Choices stand prompt by prompt, `n` of each."""
    firsts = runs[::n]
    return Usage(
        sum(len(run.prompt_ids) for run in firsts),
        sum(len(run.token_ids) for run in runs),
        sum(run.prefix_tokens for run in firsts),
    )


class AnswerAborted(SwarmError):
    """Nobody reads what is said, or nothing more will be."""


async def follow(
    runs: Sequence[Run],
    n: int,
    *,
    idle: Callable[[], None] = lambda: None,
    over: "asyncio.Future[None] | None" = None,
    reader_s: float = READER_S,
) -> AsyncGenerator[GenerationEvent, None]:
    """All runs to their ends.  Closing it ends them and frees their sessions; an error of one ends all and is raised.

    Of each prompt the first of its `n` runs begins alone: once the prompt has passed the nodes, the others share it.
    `idle` is called when all have ended, also where nobody reads on.  When `over` is done, all end with an error.
    """
    heard: asyncio.Queue[GenerationEvent | Exception] = asyncio.Queue(AHEAD)
    passed = [asyncio.Event() for _ in runs[::n]]
    tasks = [
        asyncio.create_task(_follow(i, run, passed[i // n], heard, first=i % n == 0, reader_s=reader_s))
        for i, run in enumerate(runs)
    ]
    running = set(tasks)

    def one_less(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if not running:
            idle()

    for task in tasks:
        task.add_done_callback(one_less)

    def end(_: object) -> None:
        _force(heard, AnswerAborted("the gateway is being stopped: ask again in a while"))

    if over is not None:
        over.add_done_callback(end)
    left = len(runs)
    try:
        while left:
            event = await heard.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, FinishEvent)
            yield event
    finally:
        if over is not None:
            over.remove_done_callback(end)
        for task in tasks:
            task.cancel()
        # Not gathered: a caller cancelled again and again, as a web server does, would cancel their goodbyes too.
        await asyncio.wait(tasks)


async def _follow(
    choice: int,
    run: Run,
    passed: asyncio.Event,
    heard: "asyncio.Queue[GenerationEvent | Exception]",
    *,
    first: bool,
    reader_s: float,
) -> None:
    try:
        if not first:
            await passed.wait()
        async with aclosing(run.tokens):
            async for token in run:
                passed.set()
                await _put(heard, TokenEvent(choice, token), reader_s)
        await _put(heard, FinishEvent(choice, run.finish_reason or "length"), reader_s)
    except Exception as error:  # whatever it is: who waits for this choice must hear of it
        _force(heard, error)
    finally:
        passed.set()


def _force(heard: "asyncio.Queue[GenerationEvent | Exception]", error: Exception) -> None:
    while heard.full():
        heard.get_nowait()
    heard.put_nowait(error)


async def _put(heard: "asyncio.Queue[GenerationEvent | Exception]", event: GenerationEvent, reader_s: float) -> None:
    try:
        async with asyncio.timeout(reader_s):
            await heard.put(event)
    except TimeoutError:
        raise AnswerAborted(f"nothing of the answer was read for {reader_s:.0f} s: ask again") from None


async def drain(events: AsyncGenerator[GenerationEvent, None]) -> None:
    """To the end, for whoever wants it whole."""
    async with aclosing(events):
        async for _ in events:
            pass
