"""What every program does with its background tasks."""

import asyncio
from typing import Any


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel it, and wait until it has left; how it ended is nobody's news any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
