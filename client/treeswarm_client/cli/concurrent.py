"""Generates several prompts, and several samples of each, side by side."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS
from treeswarm_client.generation.run import Run


@dataclass(frozen=True, eq=False)
class PromptResult:
    """The samples of one prompt, or the error that ended them."""

    index: int
    """Number of the prompt, counted from 0."""
    prompt: str
    runs: Sequence[Run]
    """The samples in order; after an error, those parts that were generated, or none."""
    error: SwarmError | None = None

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return one object per sample, for JSON lines; after an error there is at least one."""
        prompt = {"index": self.index, "prompt": self.prompt}
        samples = [prompt | {"sample": sample} | _as_dict(run) for sample, run in enumerate(self.runs)]
        if self.error is None:
            return samples
        failure = {"error": {"type": type(self.error).__name__, "message": str(self.error)}}
        return [sample | failure for sample in samples or [prompt]]


async def generate_concurrently(
    client: SwarmClient, prompts: Sequence[str], *, n: int, options: Mapping[str, Any]
) -> AsyncGenerator[PromptResult, None]:
    """Yield `n` samples of every prompt, in the order of the prompts.  A prompt that fails delays no other."""
    # With more at once, generations would only wait for drafters.
    turns = asyncio.Semaphore(max(1, MOST_GENERATIONS // n))

    async def take_turn(index: int, prompt: str) -> PromptResult:
        async with turns:
            return await _generate(client, index, prompt, n, options)

    tasks = [asyncio.create_task(take_turn(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate(client: SwarmClient, index: int, prompt: str, n: int, options: Mapping[str, Any]) -> PromptResult:
    runs: list[Run] = []
    try:
        if n > 1:
            return PromptResult(index, prompt, await client.generate_many(prompt, n=n, **options))
        runs.append(client.stream(prompt, **options))
        async for _ in runs[0]:
            pass
    except SwarmError as error:
        return PromptResult(index, prompt, runs, error)
    return PromptResult(index, prompt, runs)


def _as_dict(run: Run) -> dict[str, Any]:
    return {
        "text": run.text,
        "token_ids": run.token_ids,
        "finish_reason": run.finish_reason,
        "prefix_tokens": run.prefix_tokens,
        "stats": run.stats.as_dict() if run.stats else None,
    }
