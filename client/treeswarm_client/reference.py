"""Asks a stock transformers model, in a process that never imports our attention, what it would have said."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError
from treeswarm_client import reference_process as stock

# Two tokens this close in the stock model's own logits may swap when the batch's shape changes the order of sums.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class StockTexts:
    """Per prompt: token ids, and for each the gap between the model's two best logits."""

    token_ids: list[list[int]]
    gaps: list[list[float]]
    versions: dict[str, str]


async def stock_greedy(model: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, dtype: str) -> StockTexts:
    """Greedy continuations of exactly `max_new_tokens` tokens."""
    return await _ask({"model": str(model), "prompts": prompts, "max_new_tokens": max_new_tokens, "dtype": dtype})


async def stock_forced(
    model: Path, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], dtype: str
) -> StockTexts:
    """The stock model's choice at every position of the given texts."""
    return await _ask({"model": str(model), "prompts": prompts, "forced": texts, "dtype": dtype})


async def _ask(request: dict[str, Any]) -> StockTexts:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        stock.__file__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate(json.dumps(request).encode())
    finally:
        if process.returncode is None:  # nobody waits for it any more
            process.kill()
            await process.wait()
    if process.returncode:
        raise ModelError(f"the stock model could not run: {errors.decode(errors='replace').strip().splitlines()[-1]}")
    return StockTexts(**json.loads(output))
