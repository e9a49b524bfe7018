"""Texts of a stock transformers model, computed in a process that never imports this project's attention."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError
from treeswarm_client import reference_process

# Two tokens this close in the stock model's own logits may swap when the batch's shape changes the order of sums.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class StockTexts:
    """The stock model's tokens for several prompts."""

    token_ids: list[list[int]]
    """Token ids, one list per prompt."""
    gaps: list[list[float]]
    """Difference between the two best logits at each of these tokens."""
    versions: dict[str, str]
    """Versions of torch and transformers."""


async def stock_greedy(model: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, dtype: str) -> StockTexts:
    """Return greedy continuations of exactly `max_new_tokens` tokens.  Raises ModelError."""
    return await _ask({"model": str(model), "prompts": prompts, "max_new_tokens": max_new_tokens, "dtype": dtype})


async def stock_forced(
    model: Path, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], dtype: str
) -> StockTexts:
    """Return the stock model's choice at every position of the given texts.  Raises ModelError."""
    return await _ask({"model": str(model), "prompts": prompts, "forced": texts, "dtype": dtype})


async def _ask(request: dict[str, Any]) -> StockTexts:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        reference_process.__file__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate(json.dumps(request).encode())
    finally:
        if process.returncode is None:  # the caller was cancelled
            process.kill()
            await process.wait()
    if process.returncode:
        raise ModelError(f"the stock model could not run: {errors.decode(errors='replace').strip().splitlines()[-1]}")
    return StockTexts(**json.loads(output))
