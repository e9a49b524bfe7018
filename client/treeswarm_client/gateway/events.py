"""The generations of one request: they run side by side, and their tokens are merged into one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from treeswarm.errors import SwarmError
from treeswarm_client.generation.loop import FinishReason
from treeswarm_client.generation.run import Run, Token

# Number of events that wait for a caller who reads slowly; when they are that many, the generations wait as well.
MAX_QUEUED_EVENTS = 64
# Seconds without reading after which a request ends: an idle caller must not hold room on the nodes.
READER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class TokenEvent:
    """A choice has one more token."""

    choice: int
    token: Token


@dataclass(frozen=True)
class FinishEvent:
    """A choice is complete."""

    choice: int
    finish: FinishReason


GenerationEvent = TokenEvent | FinishEvent
EventQueue = asyncio.Queue[GenerationEvent | Exception]


@dataclass(frozen=True)
class Usage:
    """Number of tokens of a request; a prompt counts once, however often it is continued."""

    prompt: int
    """Number of tokens of all prompts."""
    completion: int
    """Number of tokens of all choices."""
    cached: int
    """Number of prompt tokens that nodes had in their caches."""


def count_usage(runs: Sequence[Run], n: int) -> Usage:
    """Count the tokens of runs that are ordered prompt by prompt, `n` of each."""
    first_runs = runs[::n]
    return Usage(
        sum(len(run.prompt_ids) for run in first_runs),
        sum(len(run.token_ids) for run in runs),
        sum(run.prefix_tokens for run in first_runs),
    )


class AnswerAborted(SwarmError):
    """An answer that ends early: its caller has stopped reading, or the gateway is being stopped."""


async def merge_runs(
    runs: Sequence[Run],
    n: int,
    *,
    on_all_ended: Callable[[], None] = lambda: None,
    shutdown: "asyncio.Future[None] | None" = None,
    reader_timeout_s: float = READER_TIMEOUT_S,
) -> AsyncGenerator[GenerationEvent, None]:
    """Yield the events of all runs as they come, until all runs have ended.

    Closing the generator ends the runs and frees their sessions.  An error of one run ends all and is raised.  Of each
    prompt, the first of its `n` runs begins alone: once the prompt has passed through the nodes, the others share it.

    `on_all_ended` is called when all runs have ended, even if the caller reads no further.  When `shutdown` is done,
    all runs end with AnswerAborted.
    """
    queue: EventQueue = asyncio.Queue(MAX_QUEUED_EVENTS)
    prompts_passed = [asyncio.Event() for _ in runs[::n]]
    tasks = [
        asyncio.create_task(
            _forward(i, run, prompts_passed[i // n], queue, first=i % n == 0, reader_timeout_s=reader_timeout_s)
        )
        for i, run in enumerate(runs)
    ]
    running = set(tasks)

    def note_end(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if not running:
            on_all_ended()

    for task in tasks:
        task.add_done_callback(note_end)

    def abort(_: object) -> None:
        _put_error(queue, AnswerAborted("the gateway is being stopped: try again later"))

    if shutdown is not None:
        shutdown.add_done_callback(abort)
    unfinished = len(runs)
    try:
        while unfinished:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            unfinished -= isinstance(event, FinishEvent)
            yield event
    finally:
        if shutdown is not None:
            shutdown.remove_done_callback(abort)
        for task in tasks:
            task.cancel()
        # Not gathered: a web server cancels its handler several times, and `gather` would pass that on to the tasks,
        # which are closing their sessions.
        await asyncio.wait(tasks)


async def _forward(
    choice: int, run: Run, prompt_passed: asyncio.Event, queue: EventQueue, *, first: bool, reader_timeout_s: float
) -> None:
    try:
        if not first:
            await prompt_passed.wait()
        async with aclosing(run.tokens):
            async for token in run:
                prompt_passed.set()
                await _put(queue, TokenEvent(choice, token), reader_timeout_s)
        await _put(queue, FinishEvent(choice, run.finish_reason or "length"), reader_timeout_s)
    except Exception as error:  # of any kind: the reader of this choice must receive it
        _put_error(queue, error)
    finally:
        prompt_passed.set()


def _put_error(queue: EventQueue, error: Exception) -> None:
    """Queue an error, in place of the oldest events if the queue is full."""
    while queue.full():
        queue.get_nowait()
    queue.put_nowait(error)


async def _put(queue: EventQueue, event: GenerationEvent, reader_timeout_s: float) -> None:
    try:
        async with asyncio.timeout(reader_timeout_s):
            await queue.put(event)
    except TimeoutError:
        raise AnswerAborted(f"nothing of the answer was read for {reader_timeout_s:.0f} s: send it again") from None


async def drain(events: AsyncGenerator[GenerationEvent, None]) -> None:
    """Read all events and discard them, for an answer that is sent whole."""
    async with aclosing(events):
        async for _ in events:
            pass
